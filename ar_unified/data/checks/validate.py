"""Looks at every item of a data set, as `prepare` would, and reports what it found. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified import progress, storage
from ar_unified.data.checks.comparison import Alike, Comparison
from ar_unified.data.checks.view import Shown, View
from ar_unified.data.filters import Filters, filtered
from ar_unified.data.images import ImageCodec, Resize, sides_of
from ar_unified.data.items import Source, has_images, language
from ar_unified.data.packing import Packing
from ar_unified.data.prepare import same_names
from ar_unified.data.prepare.cutting import can_be_split
from ar_unified.data.sizes import Enlarged
from ar_unified.data.sources import BadItem, EmptySplit, kind_of, open_source, read, row_files
from ar_unified.data.sources.augmentation import Augmented
from ar_unified.data.sources.unread import about_unnamed
from ar_unified.errors import UserError, several
from ar_unified.language.document import Document, ImagePart, TextPart
from ar_unified.language.encoded import Encoded
from ar_unified.language.grammar import Grammar, TextLost
from ar_unified.language.vocabulary import Role
from ar_unified.manifests import Json
from ar_unified.storage import AnyPath, Remote

NAMES = {"least": 0, "50%": 50, "90%": 90, "99%": 99, "most": 100}  # name -> percentile


@dataclass
class Found:
    """What one source contains.

    Attributes:
        part: the set of an experiment that the source belongs to: "train", "validation" or the name of a test; "" if
            none.
        items: how many items the source has.
        looked: how many items were looked at.
        tasks: number of good documents of each task.
        bad: the bad items, in order, and those that `config.data.filters` leave out (`BadItem.filtered`).
        text_bytes, images: bytes of text and number of images of each document.
        sides: (height, width) of each image, in pixels.
        enlarged: how many of them become much larger.
        tokens: the length of each document that `prepare` would make of the items; [] without a grammar.
        roles: number of tokens of each Role.
        languages: number of documents in each language, if the texts declare a language.
        first: the first good documents as text for a terminal.
        shown: the same documents for a page.
    """

    name: str
    items: int
    part: str = ""
    looked: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    bad: list[BadItem] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    sides: list[tuple[int, int]] = field(default_factory=list)
    enlarged: Enlarged = field(default_factory=Enlarged)
    tokens: list[int] = field(default_factory=list)
    roles: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    @property
    def left_out(self) -> dict[str, list[BadItem]]:
        """The items that are left out, by why, in words: because they are bad, or because a filter asks for it."""
        named = {"bad items": False, "left out by config.data.filters": True}
        found = {why: [bad for bad in self.bad if bad.filtered is filtered] for why, filtered in named.items()}
        return {why: items for why, items in found.items() if items}

    @property
    def kinds(self) -> Counter[str]:
        """The number of bad items of each kind."""
        return Counter(bad.kind for bad in self.bad)

    @property
    def numbers(self) -> dict[str, Sequence[int]]:
        """The quantities that are reported by percentiles."""
        heights, widths = ([side[i] for side in self.sides] for i in (0, 1))
        named = {"text bytes": self.text_bytes, "images": self.images, "height": heights, "width": widths}
        return {name: values for name, values in {**named, "tokens": self.tokens}.items() if values}

    def add(
        self, document: Document, found: Encoded | None, lengths: Sequence[int], resize: Resize | None = None
    ) -> None:
        """Counts a good document. found: the document's ids, if there are tokenizers. lengths: the number of tokens in
        each piece of the document, after it is cut. resize: how its images are resized, if that is known.
        """
        sides = [sides_of(part.pixels) for part in document.parts if isinstance(part, ImagePart)]
        for each in sides:
            self.enlarged.add(each, resize.target(*each) if resize else None)
        texts = [part.text for part in document.parts if isinstance(part, TextPart)]
        self.tasks[document.task] += 1
        self.text_bytes.append(sum(len(text.encode()) for text in texts))
        self.images.append(len(sides))
        self.sides += [(int(h), int(w)) for h, w in sides]
        self.tokens += lengths
        if found is not None:
            self.count(found.roles)

    def count(self, roles: np.ndarray) -> None:
        """Counts the roles of n tokens, uint8 [n]."""
        for role, count in enumerate(np.bincount(roles).tolist()):
            if count:
                self.roles[Role(role).name.lower()] += count

    def fill(self, sequence_length: int) -> float | None:
        """The share of positions in packed rows that hold a token; None if lengths are not known, or if a document is
        longer than a row.
        """
        if not self.tokens or max(self.tokens) > sequence_length:
            return None
        return Packing(np.array(self.tokens), sequence_length, seed=0, name=self.name).fill

    def lines(self, most_bad: int, sequence_length: int | None) -> list[str]:
        """What to print about the source: counts, lengths, at most `most_bad` bad items, and the share of positions in
        packed rows that would hold a token.
        """
        good = sum(self.tasks.values())
        tasks = ", ".join(f"{count} {task}" for task, count in self.tasks.items()) or "none"
        whole = f"{self.part}: {self.name}" if self.part else self.name
        items = f"{self.items} items" if self.looked == self.items else f"the first {self.looked} of {self.items} items"
        lines = [f"{whole}: {items}, {good} good ({tasks}), {counted(self.bad)}"]
        for kind, values in self.numbers.items():
            told = zip(NAMES, percentiles(values), strict=True)
            lines.append(f"  {kind:<12}" + "  ".join(f"{name} {number}" for name, number in told))
        if small := str(self.enlarged):
            lines.append(f"  {small}")
        if self.roles:
            lines.append("  tokens by role: " + ", ".join(f"{count} {role}" for role, count in self.roles.items()))
        if sequence_length and (fill := self.fill(sequence_length)) is not None:
            lines.append(f"  packed into rows of {sequence_length}: {100 * fill:.1f} % of the positions hold a token")
        for why, those in self.left_out.items():
            kinds = Counter(bad.kind for bad in those)
            lines.append(f"  {why}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
            lines += [f"    {bad}" for bad in those[:most_bad]]
            if len(those) > most_bad:
                lines.append(f"    ... and {len(those) - most_bad} more")
        for number, text in enumerate(self.first):
            lines.append(f"  document {number}:")
            lines += [f"    | {line}" for line in text.splitlines()]
        return lines


@dataclass
class Validation:
    """What all sources contain. `print` shows it.

    Attributes:
        note: remarks for the user.
        alike: which documents are alike; None if nothing was compared.
        sequence_length: length of the rows that documents will be packed into, in tokens; None if it is not known.
    """

    sources: list[Found]
    note: str = ""
    alike: Alike | None = None
    sequence_length: int | None = None

    @property
    def bad(self) -> list[BadItem]:
        """The bad items of all sources, in their order."""
        return [bad for found in self.sources for bad in found.bad]

    def __str__(self, most_bad: int = 100) -> str:
        lines = [line for found in self.sources for line in found.lines(most_bad, self.sequence_length)]
        lines += self.alike.lines() if self.alike else []
        return "\n".join([*lines, *([self.note] if self.note else [])])


def validate(
    data: str | AnyPath | Sequence[Mapping[str, Json]] | Mapping[str, Sequence[Mapping[str, Json]]],
    grammar: Grammar | None = None,
    image_tokenizer: ImageCodec | None = None,
    *,
    resize: Resize | None = None,
    filters: Filters | None = None,
    max_tokens: int | None = None,
    sequence_length: int | None = None,
    links: bool = False,
    show: int = 3,
    first: int | None = None,
    compare: bool = True,
    workers: int = 2,
    show_progress: bool = True,
) -> Validation:
    """Reads every item with its images, and reports what it found.

    Args:
        data: a folder, a file, a name with braces for several files, a list of source specs (`open_source`), or a dict
            of such lists by the name of their set: "train", and other names for held-out sets. In a folder,
            `captions.jsonl`, `docs.jsonl` and `vqa.jsonl` are read, each as a source. If it has none of these, its
            Parquet, Arrow or tar files are read, and if it has none of those either, its text files (`kind_of`).
        grammar: together with the tokenizer or `resize`, it gives lengths in tokens.
        image_tokenizer: together with a grammar, it shows the first documents as their real tokens.
        resize: as for `prepare`.
        filters: what `prepare` leaves out of the sources of "train". With `first`, filters that compare items are not
            applied, because their verdicts depend on all items.
        max_tokens: longer documents that cannot be split are reported as bad ("too_long"). Used only with a grammar.
        sequence_length: length of the rows that documents will be packed into.
        links: whether links that lead out of the folder of the data are followed.
        show: how many documents of each source to show.
        first: how many items of each source to look at; None means all.
        compare: whether to look for copies (`duplicates`).

    Raises:
        UserError: if there is nothing to read at `data`, or two sources of a set have the same name.
    """
    view = View(grammar, image_tokenizer, resize)
    by_part = (
        {"": _specs(data, links)}
        if isinstance(data, str | Path | Remote)
        else data
        if isinstance(data, Mapping)
        else {"": data}
    )
    by_number, notes = _opened(by_part)
    if filters is not None and filters.used:
        if first and filters.compares:
            filters = filters.alone
            notes.append(
                "config.data.filters: duplicates, max_repeats and held_out are not applied, because they compare all "
                "items: leave out --first to see what they leave out"
            )
        train = by_number.get("train", {})
        held_out = [source for part, those in by_number.items() if _held_out(part) for source in those.values()]
        left = filtered([*train.values()], held_out, filters, None, workers=workers, show_progress=show_progress)
        by_number["train"] = dict(zip(train, left, strict=True))
    if isinstance(data, Mapping) and (problems := same_names(by_number)):
        raise UserError(several(problems))
    opened = [(part, source) for part, numbered in by_number.items() for source in numbered.values()]
    sources = [source for _, source in opened]
    validation = Validation([Found(source.name, len(source), part) for part, source in opened])
    validation.note = "\n".join(filter(None, [*notes, _unnamed(data, sources, links)]))
    validation.sequence_length = sequence_length
    comparison = Comparison() if compare else None
    counts = [min(len(source), first) if first else len(source) for source in sources]
    with progress.bar(sum(counts), "items", "validate", shown=show_progress) as bar:
        for source, found, count in zip(sources, validation.sources, counts, strict=True):
            for i, item in read(source, range(count), workers):
                bar.update()
                if (good := _looked_at(found, source, i, item, view, max_tokens)) is None:
                    continue
                if comparison is not None and not (isinstance(source, Augmented) and i % source.count):
                    comparison.add(good, source, i, held_out=_held_out(found.part))
                if len(found.first) < show:
                    found.first.append(view.words(good))
                    found.shown.append(view.shown(good))
    validation.alike = comparison.found() if comparison is not None else None
    return validation


def _opened(
    by_part: Mapping[str, Sequence[Mapping[str, Json]]],
) -> tuple[dict[str, dict[int, Source]], list[str]]:
    """Opens the sources of each set. Returns them by their numbers in the set, and a remark about each held-out source
    that is empty.
    """
    opened: dict[str, dict[int, Source]] = {part: {} for part in by_part}
    notes = []
    for part, specs in by_part.items():
        for i, spec in enumerate(specs):
            try:
                opened[part][i] = open_source(spec)
            except EmptySplit as error:
                if not _held_out(part):
                    raise
                notes.append(f"{part}: {error}")
    return opened, notes


def _held_out(part: str) -> bool:
    return part not in ("", "train")


def _looked_at(
    found: Found, source: Source, i: int, item: Document | BadItem, view: View, max_tokens: int | None
) -> Document | None:
    """Records an item; returns the document if it is good."""
    found.looked += 1
    if isinstance(item, BadItem):
        found.bad.append(item)
        return None
    try:
        if item.rejected is not None and item.rejected.parts == item.answer:
            raise BadItem(
                "same_answers", source.origin(i), "expected two different answers, found the same answer twice"
            )
        encoded, *more = [view.encoded(answered) for answered in item.answered]  # two documents of a preference pair
        length = max(0 if each is None else len(each) for each in (encoded, *more))
        if max_tokens and length > max_tokens and (more or not can_be_split(item)):
            reason = f"expected at most {max_tokens} tokens (config.data.max_tokens), found {length}"
            raise BadItem("too_long", source.origin(i), reason)
        lengths = [] if encoded is None else view.lengths(item.answered[0], encoded, max_tokens)
        lengths += [len(each) for each in more if each is not None]
    except TextLost as error:
        found.bad.append(BadItem("text_lost", source.origin(i), str(error)))
        return None
    except BadItem as bad:
        found.bad.append(bad)
        return None
    found.add(item, encoded, lengths, view.resize)
    if not has_images(source) and (known := language(source, i)):
        found.languages[known] += 1
    return item


def _unnamed(data: Any, sources: Sequence[Source], links: bool) -> str:
    """A remark if a folder has images but only its text was read, because no row names an image; otherwise ""."""
    if not isinstance(data, str | Path | Remote) or not storage.path(data).is_dir() or any(map(has_images, sources)):
        return ""
    return about_unnamed(data, links)


def _specs(path: str | AnyPath, links: bool) -> list[dict[str, Any]]:
    kind = kind_of(path, links)
    if kind == "folder":
        label = storage.path(path).name
        names = row_files(path)
        return [dict(kind=kind, path=path, files=(name,), links=links, label=f"{label}/{name}") for name in names]
    place = storage.path(path)
    if kind in ("text", "jsonl") and not (place.is_dir() or place.is_file()):
        raise UserError(f"{path}: no such folder or file")
    return [dict(kind=kind, path=path, links=links)]


def counted(left_out: Sequence[BadItem]) -> str:
    """How many items are bad, and how many are left out by filters, in words."""
    chosen = sum(bad.filtered for bad in left_out)
    return f"{len(left_out) - chosen} bad" + (f", {chosen} filtered" if chosen else "")


def percentiles(values: Sequence[int]) -> list[int]:
    """The percentiles that NAMES lists."""
    return np.percentile(values, list(NAMES.values()), method="nearest").astype(int).tolist()
