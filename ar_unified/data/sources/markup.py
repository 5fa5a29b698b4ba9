"""Turns Markdown and HTML pages into parts in reading order: {"type": "text", "text"} and {"type": "image", "image"}.

From Markdown, the text is kept as written, without images and front matter. If the front matter has a title, and the
text does not begin with it, the title becomes the heading. From HTML, the text of the body is kept, with a blank line
between blocks and a line end between lines. Alternative texts are left out, because the image shows what they say.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from ar_unified.manifests import Json

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r"""^title:[ \t]*["']?(.*?)["']?[ \t]*\r?$""", re.MULTILINE)
_CODE = r"(?P<code>^(?P<fence>`{3,}|~{3,})[^\n]*\n.*?(?:^(?P=fence)[^\n]*$|\Z)|(?P<tick>`+)(?!`)[^\n]*?(?P=tick))"
_TARGET = r"""\(\s*(?:<(?P<angle>[^<>\n]*)>|(?P<plain>(?:[^\s()]|\([^\s()]*\))+))(?:\s+["'(][^\n]*?["')])?\s*\)"""
_IMAGE = rf"(?P<link>\[\s*)?!\[(?P<alt>(?:[^\[\]]|\[[^\[\]]*\])*)\](?:{_TARGET}|\[(?P<name>[^\]\n]*)\])"
_TAG = r"(?P<tag><img\b[^<>]*>)"
_PARTS = re.compile(f"{_CODE}|{_IMAGE}|{_TAG}", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_LINK_END = re.compile(r"\s*\](?:\([^()\s]*(?:\s[^()]*)?\)|\[[^\]\n]*\])")
_DEFINED = re.compile(r"^[ ]{0,3}\[([^\]\n]+)\]:[ \t]*<?([^\s<>]+)>?.*$", re.MULTILINE)
_SOURCE = re.compile(r"""\bsrc\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.IGNORECASE)

_BLOCKS = {
    "address", "article", "aside", "blockquote", "caption", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav",
    "ol", "p", "pre", "section", "summary", "table", "tr", "ul",
}  # fmt: skip
_UNREAD = {"head", "script", "style", "template", "noscript", "svg", "iframe"}


def from_markdown(text: str) -> list[dict[str, Any]]:
    """The parts of a page of Markdown."""
    front = _FRONT.match(text)
    title = _TITLE.search(front[1]) if front else None
    text = text[front.end() :] if front else text
    defined = {name.lower(): target for name, target in _DEFINED.findall(text)}
    parts: list[dict[str, Json]] = []
    if title and title[1] and not text.lstrip().startswith(f"# {title[1]}"):
        parts.append({"type": "text", "text": f"# {title[1]}"})
    at, words = 0, ""
    while found := _PARTS.search(text, at):
        words, at = words + text[at : found.start()], found.end()
        target = _target(found, defined)
        if target is None:
            words += found[0]
            continue
        if found["link"]:  # if an image is a link, the link's target is not text
            after = _LINK_END.match(text, at)
            words, at = (words, after.end()) if after else (words + found["link"], at)
        parts += [*_text(words), {"type": "image", "image": target}]
        words = ""
    return parts + _text(words + text[at:])


def _target(found: re.Match[str], defined: dict[str, str]) -> str | None:
    """The name of an image's file; None if the match is code, or not an image."""
    if found["tag"]:
        source = _SOURCE.search(found["tag"])
        return next(filter(None, source.groups()), None) if source else None
    if found["name"] is not None:
        return defined.get((found["name"] or found["alt"]).lower())
    return found["angle"] or found["plain"]


def _text(words: str) -> list[dict[str, Json]]:
    words = words.strip("\r\n")
    return [{"type": "text", "text": words.rstrip()}] if words.strip() else []


def from_html(text: str) -> list[dict[str, Any]]:
    """The parts of a page of HTML, even of broken HTML."""
    page = _Page()
    page.feed(text)
    page.close()
    page.end()
    return page.parts


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[dict[str, Json]] = []
        self._blocks: list[str] = []  # since the last image
        self._words = ""
        self._unread, self._kept = 0, 0  # how many open tags are ignored, and how many keep spaces

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in _UNREAD:
            self._unread += 1
        elif tag == "body":  # ignored tags that were opened before the body are forgotten
            self._unread = 0
        elif tag == "img" and not self._unread:
            self._block()
            source = dict(attributes).get("src")
            if source:
                self.end()
                self.parts.append({"type": "image", "image": source})
        elif tag == "br":
            self._words += "\n"
        elif tag in ("td", "th"):
            self._words += " "
        elif tag in _BLOCKS:
            self._block()
            self._kept += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNREAD:
            self._unread = max(self._unread - 1, 0)
        elif tag in _BLOCKS:
            self._block()
            self._kept = max(self._kept - (tag == "pre"), 0)

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self._words += data if self._kept else re.sub(r"\s+", " ", data)

    def _block(self) -> None:
        lines = (line if self._kept else re.sub(r"[ \t]+", " ", line).strip() for line in self._words.split("\n"))
        if words := "\n".join(lines).strip():
            self._blocks.append(words)
        self._words = ""

    def end(self) -> None:
        """Ends the current part of text."""
        self._block()
        if self._blocks:
            self.parts.append({"type": "text", "text": "\n\n".join(self._blocks)})
        self._blocks = []
