"""Looks at every item of a data set, as `prepare` would, and says what it found. Changes nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified import progress
from ar_unified.data.cutting import can_be_split
from ar_unified.data.files import Folder
from ar_unified.data.images import SUFFIXES, ImageCodec, Resize
from ar_unified.data.items import Source, has_images
from ar_unified.data.sizes import default_resize
from ar_unified.data.sources import FOLDER_FILES, BadItem, kind_of, open_source, read, row_files
from ar_unified.data.text_files import FILES as TEXT_FILES
from ar_unified.data.text_files import find
from ar_unified.errors import UserError
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart
from ar_unified.language.grammar import Grammar, TextLost

_PERCENTILES = (0, 50, 90, 99, 100)


@dataclass
class Found:
    """What one source holds.

    Attributes:
        tasks: task -> good documents. bad: what is wrong with which item, in order.
        text_bytes, images, sides, tokens: one number a document, but `sides` one (height, width) in pixels an image;
            `tokens` only where a grammar is given.
        first: the first good documents as the model will see them.
    """

    name: str
    items: int
    tasks: Counter[str] = field(default_factory=Counter)
    bad: list[BadItem] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    sides: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    first: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> Counter[str]:
        """Bad items by kind."""
        return Counter(bad.kind for bad in self.bad)

    def add(self, document: Document, tokens: int | None) -> None:
        sides = [part.pixels.shape[:2] for part in document.parts if isinstance(part, ImagePart)]
        texts = [part.text for part in document.parts if isinstance(part, TextPart)]
        self.tasks[document.task] += 1
        self.text_bytes.append(sum(len(text.encode()) for text in texts))
        self.images.append(len(sides))
        self.sides += [(int(h), int(w)) for h, w in sides]
        self.tokens += [] if tokens is None else [tokens]

    def lines(self, most_bad: int) -> list[str]:
        good = sum(self.tasks.values())
        tasks = ", ".join(f"{count} {task}" for task, count in self.tasks.items()) or "none"
        lines = [f"{self.name}: {self.items} items, {good} good ({tasks}), {len(self.bad)} bad"]
        heights, widths = ([side[i] for side in self.sides] for i in (0, 1))
        rows = {
            "text bytes": self.text_bytes,
            "images": self.images,
            "height": heights,
            "width": widths,
            "tokens": self.tokens,
        }
        lines += [f"  {name:<12}{_percentiles(values)}" for name, values in rows.items() if values]
        if self.bad:
            lines.append("  bad items: " + ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()))
            lines += [f"    {bad}" for bad in self.bad[:most_bad]]
            if len(self.bad) > most_bad:
                lines.append(f"    ... and {len(self.bad) - most_bad} more")
        for number, text in enumerate(self.first):
            lines.append(f"  document {number}:")
            lines += [f"    | {line}" for line in text.splitlines()]
        return lines


@dataclass
class Validation:
    """What all sources hold; `print` it."""

    sources: list[Found]
    note: str = ""

    @property
    def bad(self) -> list[BadItem]:
        return [bad for found in self.sources for bad in found.bad]

    def __str__(self, most_bad: int = 100) -> str:
        lines = [line for found in self.sources for line in found.lines(most_bad)]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def validate(
    data: str | Path | Sequence[Mapping[str, Any]],
    grammar: Grammar | None = None,
    image_tokenizer: ImageCodec | None = None,
    *,
    resize: Resize | None = None,
    max_tokens: int | None = None,
    links: bool = False,
    show: int = 3,
    workers: int = 2,
    show_progress: bool = True,
) -> Validation:
    """Reads every item, images included.

    Args:
        data: a folder (`captions.jsonl`, `docs.jsonl`, `vqa.jsonl`, each reported by itself; without them, its Parquet,
            Arrow or tar files, else its text files), one such file or name with braces, or a list of source specs
            (`open_source`).
        grammar: with it, and with the tokenizer or `resize`, lengths in tokens are reported.
        image_tokenizer: with it and a grammar the first documents are shown as their real tokens.
        resize: as for `prepare`.
        max_tokens: with a grammar, longer documents are reported as bad ("too_long").
        links: of a folder or file: whether links that lead out of it are followed.
        show: documents of each source to show.

    Raises:
        UserError: nothing to read at `data`.
    """
    model = _Model(grammar, image_tokenizer, resize)
    sources = [open_source(spec) for spec in (_specs(data, links) if isinstance(data, str | Path) else data)]
    validation = Validation([Found(source.name, len(source)) for source in sources], _unnamed(data, sources, links))
    total = sum(map(len, sources))
    with progress.bar(total, "items", "validate", shown=show_progress) as bar:
        for source, found in zip(sources, validation.sources, strict=True):
            for i, item in read(source, range(len(source)), workers):
                bar.update()
                if isinstance(item, BadItem):
                    found.bad.append(item)
                    continue
                try:
                    length = model.length(item)
                except TextLost as error:
                    found.bad.append(BadItem("text_lost", source.origin(i), str(error)))
                    continue
                if max_tokens and length and length > max_tokens and not can_be_split(item):
                    reason = f"expected at most {max_tokens} tokens (config.data.max_tokens), found {length}"
                    found.bad.append(BadItem("too_long", source.origin(i), reason))
                    continue
                found.add(item, length)
                if len(found.first) < show:
                    found.first.append(model.show(item))
    return validation


def _unnamed(data: str | Path | Sequence[Mapping[str, Any]], sources: Sequence[Source], links: bool) -> str:
    """A word on the images of a folder that was read as text alone, as no rows name them; "" for none."""
    if not isinstance(data, str | Path) or not Path(data).is_dir() or any(map(has_images, sources)):
        return ""
    count = len(Folder(data, links).search(lambda name: name.lower().endswith(SUFFIXES)))
    return (
        count
        and (
            f"{data}: these are the texts alone. It has {count} images that nothing names: a model learns them from "
            'captions.jsonl, one line {"image": "name.png", "text": "what it shows"} each'
        )
        or ""
    )


def _specs(path: str | Path, links: bool) -> list[dict[str, Any]]:
    kind = kind_of(path, links)
    if kind == "folder":
        label = Path(path).name
        names = row_files(path)
        return [dict(kind=kind, path=path, files=(name,), links=links, label=f"{label}/{name}") for name in names]
    if kind == "text" and os.path.isdir(path):
        try:
            find(Path(path), TEXT_FILES, links)
        except UserError as error:
            expected = ", ".join(f"{name}.jsonl" for name in FOLDER_FILES)
            raise UserError(
                f"{path}: expected at least one of {expected} in it, Parquet, Arrow, tar or text files; found none"
            ) from error
    elif kind in ("text", "jsonl") and not os.path.isfile(path):
        raise UserError(f"{path}: no such folder or file")
    return [dict(kind=kind, path=path, links=links)]


class _Model:
    """Documents as a model would see them, as far as its parts are there."""

    def __init__(self, grammar: Grammar | None, tokenizer: ImageCodec | None, resize: Resize | None):
        if resize is None and grammar is not None and tokenizer is not None:
            resize = default_resize(grammar.layout, tokenizer)
        self.grammar, self.tokenizer, self.resize = grammar, tokenizer, resize

    def length(self, document: Document) -> int | None:
        """Tokens, for which the sizes of the images are enough; None without a grammar or a size."""
        resize = self.resize
        if self.grammar is None or (resize is None and any(isinstance(part, ImagePart) for part in document.parts)):
            return None

        def blank(pixels: np.ndarray) -> np.ndarray:
            assert resize is not None
            h, w = resize.target(*pixels.shape[:2])
            factor, depth = (
                (self.tokenizer.factor, self.tokenizer.codes_per_position) if self.tokenizer else (resize.factor, 1)
            )
            return np.zeros((h // factor, w // factor * depth), np.int32)

        return len(self.grammar.encode(_coded(document, blank)))

    def show(self, document: Document) -> str:
        """In words, with <image H x W>; then as tokens, piece by piece, if there are a grammar and a tokenizer."""
        lines = [f"({document.origin}, {document.task})"]
        for turn in document.turns:
            if document.asks:
                lines.append(f"<{turn.speaker}>")
            for part in turn.parts:
                if isinstance(part, TextPart):
                    rest = f" ... ({len(part.text)} characters)" if len(part.text) > 400 else ""
                    lines.append(part.text[:400] + rest)
                elif isinstance(part, ImagePart):
                    lines.append("<image {} x {}>".format(*part.pixels.shape))
        grammar, tokenizer, resize = self.grammar, self.tokenizer, self.resize
        if grammar is not None and tokenizer is not None and resize is not None:
            real = _coded(document, lambda pixels: np.asarray(tokenizer.encode(resize(pixels)[None]), np.int32)[0])
            words = [_word(int(token), grammar) for token in grammar.encode(real).tokens]
            short = words if len(words) <= 96 else [*words[:64], f"... ({len(words) - 80} tokens) ...", *words[-16:]]
            lines.append(f"{len(words)} tokens: " + "|".join(short))
        return "\n".join(lines)


def _coded(document: Document, codes: Callable[[np.ndarray], np.ndarray]) -> Document:
    return document.changed(lambda part: CodesPart(codes(part.pixels)) if isinstance(part, ImagePart) else part)


def _word(token: int, grammar: Grammar) -> str:
    if token < grammar.vocabulary.text_size:
        return repr(grammar.text_codec.decode([token]))[1:-1]
    return f"<{grammar.vocabulary.name(token).strip('<>')}>"


def _percentiles(values: Sequence[int]) -> str:
    numbers = np.percentile(values, _PERCENTILES, method="nearest").astype(int).tolist()
    names = ["least" if p == 0 else "most" if p == 100 else f"{p}%" for p in _PERCENTILES]
    return "  ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
