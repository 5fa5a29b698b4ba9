"""Writes a self-contained page about what `validate` found: it needs no other file, font or script. Data is escaped.

The page can be read on phones and on large screens, in light and dark mode. Large images are scaled down.
"""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from ar_unified.data.checks.comparison import Alike, Pair
from ar_unified.data.checks.validate import NAMES, Found, Validation, counted, percentiles
from ar_unified.data.checks.view import MOST, Shown, Token
from ar_unified.data.images import to_png, to_thumbnail
from ar_unified.data.items import BadItem
from ar_unified.workdir import write_text

_SIDE = 224  # maximum number of pixels of an image's longer side on the page
_SMALL = 96  # an image is shown pixel by pixel if its longer side has at most so many pixels
_EXAMPLES = 12  # maximum number of bad items of one kind that are shown
_CHARACTERS = 2000  # maximum number of characters of a text that are shown
_BARS = 40  # maximum number of bars of a histogram


def write(path: str | Path, validation: Validation, title: str) -> None:
    """Writes the page. The file appears complete or not at all."""
    sections = [(_name(found), _source(found, validation.sequence_length)) for found in validation.sources]
    if validation.alike is not None:
        sections.append(("Copies", _alike(validation.alike)))
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = f'<h1>{escape(title)}</h1>\n<p class="soft">{_summary(validation)}</p>\n<nav>{links}</nav>\n'
    if len(validation.sources) > 1:
        body += _overview(validation)
    if validation.note:
        body += f'<p class="card">{escape(validation.note)}</p>\n'
    body += "\n".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>\n{html}</section>' for i, (name, html) in enumerate(sections)
    )
    here = files("ar_unified.data.checks")
    page, style = (here.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css"))
    filled = {"TITLE": escape(title), "STYLE": style, "BODY": body}  # one pass, because data may contain "@BODY@"
    text = re.sub(r"@(TITLE|STYLE|BODY)@", lambda name: filled[name[1]], page)
    write_text(path, text.encode(errors="backslashreplace").decode())  # file names need not be UTF-8


def _name(found: Found) -> str:
    return f"{found.part}: {found.name}" if found.part else found.name


def _summary(validation: Validation) -> str:
    documents = sum(sum(found.tasks.values()) for found in validation.sources)
    tokens = sum(sum(found.tokens) for found in validation.sources)
    images = sum(sum(found.images) for found in validation.sources)
    told = [f"{documents:,} documents", f"{images:,} images"] + ([f"{tokens:,} tokens"] if tokens else [])
    return ", ".join([*told, counted(validation.bad)])


def _overview(validation: Validation) -> str:
    rows = [
        f"<tr><td>{escape(_name(found))}</td><td>{found.items:,}</td><td>{sum(found.tasks.values()):,}</td>"
        f"<td>{sum(found.images):,}</td><td>{sum(found.tokens):,}</td><td>{len(found.bad):,}</td></tr>"
        for found in validation.sources
    ]
    head = "".join(f"<th>{name}</th>" for name in ("source", "items", "documents", "images", "tokens", "left out"))
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
    )


# ---- one source --------------------------------------------------------------------------------------------------


def _source(found: Found, sequence_length: int | None) -> str:
    looked = "" if found.looked == found.items else f"The first {found.looked:,} were looked at. "
    tasks = ", ".join(f"{count:,} {task.replace('_', ' ')}" for task, count in found.tasks.items()) or "no documents"
    bad = f'<span class="bad">{counted(found.bad)}</span>' if found.bad else "none bad"
    html = f"<p>{found.items:,} items. {looked}{escape(tasks)}, {bad}.</p>\n"
    if found.numbers:
        html += _percentiles(found.numbers)
    if small := str(found.enlarged):
        html += f'<p class="card">{escape(small)}</p>\n'
    cards = []
    if found.roles:
        cards.append(_balance("Tokens by role", found.roles))
    if found.languages:
        cards.append(_list("Languages", [f"{name}: {count:,}" for name, count in found.languages.most_common(30)]))
    if lengths := found.tokens or found.text_bytes:
        cards.append(_histogram("Lengths in tokens" if found.tokens else "Lengths in bytes of text", lengths))
    if sequence_length and (fill := found.fill(sequence_length)) is not None:
        cards.append(
            f'<div class="card"><h3>Packing</h3><p>Rows of {sequence_length:,} tokens: {100 * fill:.1f} % of the '
            f'positions hold a token.</p><div class="bar"><b style="width:{100 * fill:.1f}%"></b></div></div>'
        )
    html += f'<div class="grid">{"".join(cards)}</div>\n' if cards else ""
    html += "".join(_left_out(why, items) for why, items in found.left_out.items())
    if found.shown:
        html += "<h3>Documents</h3>\n" + "".join(map(_document, found.shown))
    return html


def _percentiles(numbers: Mapping[str, Sequence[int]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in NAMES)
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{value:,}</td>' for value in percentiles(values))}</tr>"
        for name, values in numbers.items()
    )
    return (
        f'<div class="card scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'
    )


def _balance(title: str, counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    bars = "".join(f'<b class="{name}" style="width:{100 * n / total:.2f}%"></b>' for name, n in counts.items())
    keys = "".join(
        f'<p><i class="key {name}"></i>{name}: {n:,} ({100 * n / total:.1f} %)</p>' for name, n in counts.items()
    )
    return f'<div class="card"><h3>{title}</h3><div class="bar">{bars}</div>{keys}</div>'


def _histogram(title: str, values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    counts, _ = np.histogram(values, min(_BARS, high - low + 1), (low, high + 1))
    bars = "".join(f'<b style="height:{100 * n / counts.max():.1f}%" title="{n:,}"></b>' for n in counts.tolist())
    ends = f'<div class="ends"><span>{low:,}</span><span>{high:,}</span></div>'
    return f'<div class="card"><h3>{title}</h3><div class="histogram">{bars}</div>{ends}</div>'


def _list(title: str, lines: Sequence[str]) -> str:
    return f'<div class="card"><h3>{title}</h3>{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>'


def _left_out(why: str, bad: Sequence[BadItem]) -> str:
    kinds = defaultdict(list)
    for item in bad:
        kinds[item.kind].append(item)
    html = f"<h3>{escape(why[0].upper() + why[1:])}</h3>\n"
    for kind, items in kinds.items():
        lines = "".join(f"<li>{escape(item.origin)}: {escape(_cut(item.reason))}</li>" for item in items[:_EXAMPLES])
        more = f'<p class="soft">and {len(items) - _EXAMPLES:,} more</p>' if len(items) > _EXAMPLES else ""
        html += (
            f'<details class="card"><summary>{len(items):,} {escape(kind)}</summary><ul>{lines}</ul>{more}</details>\n'
        )
    return html


# ---- documents ---------------------------------------------------------------------------------------------------


def _document(shown: Shown) -> str:
    html = f'<div class="card"><small>{escape(shown.origin)} · {escape(shown.task.replace("_", " "))}</small>'
    for speaker, parts in shown.turns:
        says = "" if speaker == "document" else f"<h3>{escape(speaker)}</h3>"
        html += f'{says}<div class="said">{"".join(map(_content, parts))}</div>'
    if shown.tokens:
        html += f'<h3>{shown.count:,} tokens</h3><div class="tokens">{"".join(map(_token, shown.tokens))}</div>'
        if len(shown.tokens) == MOST:
            html += '<p class="soft">... and so on</p>'
    return html + "</div>\n"


def _content(part: str | np.ndarray) -> str:
    return f"<p>{escape(_cut(part))}</p>" if isinstance(part, str) else _image(part)


def _token(token: Token) -> str:
    role = token.role.name.lower()
    faint = "" if token.learned else " read"
    title = f"{role}, learned" if token.learned else f"{role}, only read"
    span = f'<span class="{role}{faint}" title="{title}">{escape(token.text)}</span>'
    images = [image for image in (token.original, token.image) if image is not None]
    if not images:
        return span
    says = "as it was encoded, and decoded from its codes" if len(images) > 1 else "decoded from its codes"
    if token.image is None:
        says = "as it was encoded"
    return f"<figure><div>{''.join(map(_image, images))}</div>{span} {says}</figure>"


def _image(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if longer <= _SMALL:  # whole factors keep the pixels of a small image square
        scale, kind, data = max(1, _SMALL // longer), "png", to_png(pixels)
    else:
        scale, kind, data = min(1, _SIDE / longer), "jpeg", to_thumbnail(pixels, _SIDE)
    small = ' class="small"' if longer <= _SMALL else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    h, w = round(height * scale), round(width * scale)
    return f'<img{small} alt="" title="{height} x {width} pixels" width="{w}" height="{h}" src="{source}">'


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} ... ({len(text):,} characters)"


# ---- copies ------------------------------------------------------------------------------------------------------


def _alike(alike: Alike) -> str:
    kinds = [kind for kind in alike.kinds if kind.count]
    if not kinds:
        return "<p>No copies were found, and no training document is also held out.</p>\n"
    html = ""
    for kind in kinds:
        html += f"<h3>{kind.count:,} of {kind.of:,} {escape(kind.says)}</h3>\n"
        html += f'<div class="grid">{"".join(map(_pair, kind.pairs))}</div>\n'
    return html


def _pair(pair: Pair) -> str:
    sides = (
        f"<div>{_content(content)}<small>{escape(origin)}</small></div>"
        for origin, content in zip(pair.origins, pair.contents, strict=True)
    )
    return f'<div class="card pair">{"".join(sides)}</div>'
