"""Images and samples as HTML: each kind of example becomes a card of the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ar_unified.evaluation.examples import Example
from ar_unified.evaluation.right_answers import text_of
from ar_unified.language.document import ImagePart, TextPart

NO_IMAGE = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="


def sample_sections(galleries: Mapping[str, Sequence[Example]]) -> list[tuple[str, str]]:
    """(heading, HTML) for each kind of sample: images, stories, conversations and answers. `galleries` has the examples
    of each held-out set."""
    shown: tuple[tuple[str, tuple[str, ...], Callable[[Example], str], str, str], ...] = (
        ("Images from text", ("text_to_image",), _drawn, "gallery", "Left: the model's image. Right: a real one."),
        ("Stories", ("story",), _story, "stories", "The model is told a change, and draws what follows (framed)."),
        (
            "Next images",
            ("next_image",),
            _story,
            "stories",
            "What was given, then the model's part (framed) and the real one.",
        ),
        (
            "Conversations",
            ("turn",),
            _turn,
            "gallery asks",
            "What a person asks and the model answers, up to its first wrong turn, or to the end.",
        ),
        ("Next texts", ("next_text",), _answered, "gallery asks", ""),
        ("Answers about images", ("image_to_text", "caption"), _answered, "gallery asks", ""),
    )
    sections = []
    for heading, kinds, draw, layout, lead in shown:
        blocks = []
        for name, group in galleries.items():
            cards = "".join(draw(example) for example in group if example.kind in kinds)
            if cards:
                title = f"<h3>{escape(name.replace('_', ' '))}</h3>" if len(galleries) > 1 else ""
                blocks.append(f'{title}<div class="{layout}">{cards}</div>')
        if blocks:
            lead = f"{lead} The first examples, without selection; after them, some of the later failures."
            sections.append((heading, f'<p class="lead">{lead.strip()}</p>{"".join(blocks)}'))
    return sections


def _drawn(example: Example) -> str:
    return (
        f'<div class="card sample"><div class="pair">{figure(example.got, "model", example.correct)}'
        f"{figure(example.expected, 'real')}</div>"
        f'<div class="text">{escape(text_of(example.document, answer=False))}</div></div>'
    )


def _answered(example: Example) -> str:
    image = next((part.pixels for part in example.prompt if isinstance(part, ImagePart)), None)
    question = " ".join(part.text for part in example.prompt if isinstance(part, TextPart)) or "(a caption)"
    got = example.got if isinstance(example.got, str) else "(did not parse)"
    expected = "" if example.correct else f'<div class="soft">expected: {escape(str(example.expected))}</div>'
    return (
        f'<div class="card sample ask">{figure(image)}<div><div class="q">{escape(question)}</div>'
        f"<div>{_mark(example.correct)} {escape(got)}</div>{expected}</div></div>"
    )


def _story(example: Example) -> str:
    """Images from left to right with their texts above; the last two images are the model's and the real one."""
    panels, says = [], ""
    for part in example.prompt:
        if isinstance(part, TextPart):
            says = part.text
        elif isinstance(part, ImagePart):
            panels.append(_panel(says, figure(part.pixels, "given")))
            says = ""
    panels.append(_panel(says, figure(example.got, "model", example.correct), "model"))
    panels.append(_panel("", figure(example.expected, "real")))
    return f'<div class="card story">{"".join(panels)}</div>'


def _turn(example: Example) -> str:
    """What was said before, in order, and the model's answer. If it is wrong, the right answer is shown, too."""
    before = "".join(
        f'<div class="q">{escape(part.text)}</div>' if isinstance(part, TextPart) else figure(part.pixels)
        for part in example.prompt
        if isinstance(part, TextPart | ImagePart)
    )
    if isinstance(example.expected, np.ndarray):
        real = "" if example.correct else figure(example.expected, "real")
        drawn = figure(example.got, "model", example.correct)
        return f'<div class="card sample ask"><div>{before}{drawn}{real}</div></div>'
    got = example.got if isinstance(example.got, str) else "(did not parse)"
    expected = "" if example.correct else f'<div class="soft">expected: {escape(str(example.expected))}</div>'
    answer = f"<div>{_mark(example.correct)} {escape(got)}</div>{expected}"
    return f'<div class="card sample ask"><div>{before}{answer}</div></div>'


def _panel(says: str, image: str, style: str = "") -> str:
    return f'<div class="{style}"><div class="says">{escape(says)}</div>{image}</div>'


def _mark(correct: bool | None) -> str:
    if correct is None:
        return ""
    return '<span class="mark good">✓</span>' if correct else '<span class="mark bad">✗</span>'


def figure(pixels: Any, label: str = "", correct: bool | None = None) -> str:
    """An image with a caption and the checker's verdict below it."""
    below = f'<span class="label">{label}{_mark(correct)}</span>' if label else ""
    return f'<div><div class="image">{_image(pixels)}</div>{below}</div>'


def _image(pixels: Any) -> str:
    """An image uint8 [H, W, 3] as inline HTML; a small image is enlarged without smoothing. None becomes an empty
    frame."""
    if not isinstance(pixels, np.ndarray):
        return f'<img alt="no image" src="{NO_IMAGE}" style="aspect-ratio:1">'
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    sharp = ' class="pixelated"' if max(pixels.shape[:2]) <= 128 else ""
    height, width = pixels.shape[:2]
    return f'<img{sharp} alt="" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
