"""Docstrings as Markdown: an extension of griffe, which reads them for the API's pages (mkdocs.yml).

A docstring is prose for a terminal. What is indented in it is laid out by hand and stays as it is, in a block.
Brackets and `<` are what they are, not links and tags.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_COLUMNS = re.compile(r"[^\s.:;] {2,}\S")  # words that stand one below the other


class AsMarkdown(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The Markdown that shows a docstring as it was meant."""
    lines, block = list[str](), list[str]()
    for line in [*text.split("\n"), "end"]:
        if line.startswith("  ") or _COLUMNS.search(line) or (block and not line):
            block.append(line)
            continue
        if block:
            while block and not block[-1]:
                block.pop()
            least = min(len(each) - len(each.lstrip()) for each in block if each)
            lines += ["", "```text", *(each[least:] for each in block), "```", ""]
            block = []
        lines.append("".join(_escaped(part) for part in re.split(r"(`[^`]*`)", line)))
    return "\n".join(lines[:-1])


def _escaped(part: str) -> str:
    """Prose whose signs mean nothing in Markdown; what stands between backticks is left as it is."""
    if part.startswith("`"):
        return part
    return re.sub(r"([\[\]*_#|~])", r"\\\1", part).replace("<", "&lt;")
