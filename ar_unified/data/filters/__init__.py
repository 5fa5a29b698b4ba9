"""Filters decide what `prepare` leaves out of the training sources. By default nothing is left out.

Filters that look at one item (sizes, length, language) are applied when the item is read. Filters that compare all
items (copies, images that repeat too often, items that are also held out) are applied beforehand, in one pass over all
items. Their verdicts are kept in a file. So what is left out depends only on the sources and the settings, not on the
order of reading.

Each item that is left out becomes a BadItem, which is counted and listed with the others. Its kind is "filtered_size",
"filtered_aspect", "filtered_length", "filtered_language", "filtered_duplicate", "filtered_repeated" or
"filtered_held_out".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ar_unified import progress, workdir
from ar_unified.data.filters.duplicates import Duplicates, Search
from ar_unified.data.items import TOGETHER, BadItem, Source, fetched, language, texts_of
from ar_unified.data.sources import read
from ar_unified.data.sources.augmentation import Augmented
from ar_unified.errors import UserError
from ar_unified.language.document import Document, ImagePart, TextPart
from ar_unified.manifests import Json

DUPLICATES = ("keep", "documents", "images")


@dataclass(frozen=True)
class Filters:
    """Which items are left out. 0, () or "keep" turns a filter off.

    Attributes:
        min_side: minimum of an image's shorter side, in pixels.
        max_side: maximum of an image's longer side, in pixels.
        max_aspect: largest ratio of an image's longer side to its shorter side.
        min_characters, max_characters: limits for all text of an item (config.data.max_tokens limits tokens).
        languages: the languages to keep; items without a language are kept, too.
        duplicates: "keep" keeps all; "documents" keeps the first of several items with the same images and words;
            "images" leaves out an item if all its images are in earlier items, even with other words. An image that was
            scaled, recompressed, or cropped a little is treated as the same image (`duplicates`).
        max_repeats: maximum number of items that an image may be in. An image in more items is probably a watermark or
            a placeholder.
        held_out: whether to leave out an item that shares an image with the validation set or a test. An item without
            images is then left out if it has the same or nearly the same words as an item of these sets.
    """

    min_side: int = 0
    max_side: int = 0
    max_aspect: float = 0.0
    min_characters: int = 0
    max_characters: int = 0
    languages: tuple[str, ...] = ()
    duplicates: str = "keep"
    max_repeats: int = 0
    held_out: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "languages", tuple(self.languages))
        for name in ("min_side", "max_side", "min_characters", "max_characters", "max_repeats"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected 0 (no limit) or more, found {getattr(self, name)}")
        if self.max_aspect != 0 and not self.max_aspect >= 1:
            raise UserError(f"max_aspect: expected 0 (no limit) or at least 1, found {self.max_aspect}")
        for low, high in (("min_side", "max_side"), ("min_characters", "max_characters")):
            if 0 < getattr(self, high) < getattr(self, low):
                least, found = getattr(self, low), getattr(self, high)
                raise UserError(f"{high}: expected at least {low}, which is {least}; found {found}")
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates: expected one of {', '.join(DUPLICATES)}; found {self.duplicates!r}")

    @property
    def used(self) -> bool:
        """Whether anything is filtered at all."""
        return self != Filters()

    @property
    def compares(self) -> bool:
        """Whether items are compared with each other, which takes a pass over all of them."""
        return self.duplicates != "keep" or self.max_repeats > 0 or self.held_out

    @property
    def alone(self) -> Filters:
        """The filters that look at single items."""
        return replace(self, duplicates="keep", max_repeats=0, held_out=False)

    def check(self, document: Document, of: str) -> None:
        """Raises BadItem if a filter of single items leaves the document out. of: its language, or "" if unknown."""
        for part in document.parts:
            if isinstance(part, ImagePart):
                height, width = part.pixels.shape[:2]
                self._check_image(height, width, document.origin)
        length = sum(len(part.text) for part in document.parts if isinstance(part, TextPart))
        if length < self.min_characters or 0 < self.max_characters < length:
            most = f" to {self.max_characters}" if self.max_characters else " or more"
            reason = f"expected {self.min_characters}{most} characters of text, found {length}"
            raise BadItem("filtered_length", document.origin, reason)
        if self.languages and of and of not in self.languages:
            reason = f"expected one of the languages {', '.join(self.languages)}, found {of!r}"
            raise BadItem("filtered_language", document.origin, reason)

    def _check_image(self, height: int, width: int, origin: str) -> None:
        short, long = sorted((height, width))
        found = f"found an image of {height} x {width} pixels (height x width)"
        if short < self.min_side or 0 < self.max_side < long:
            most = f" to {self.max_side}" if self.max_side else " pixels or more"
            raise BadItem("filtered_size", origin, f"expected sides of {self.min_side}{most}, {found}")
        if self.max_aspect and long > self.max_aspect * short:
            raise BadItem(
                "filtered_aspect",
                origin,
                f"expected a longer side of at most {self.max_aspect:g} times the shorter, {found}",
            )


class Filtered:
    """A source without the items that the filters leave out. The other items keep their indices.

    verdicts: maps each item that is left out because of other items to (kind, reason).
    """

    def __init__(self, source: Source, filters: Filters, verdicts: Mapping[int, tuple[str, str]], decided_by: Any):
        self.source, self.filters, self._verdicts, self._decided_by = source, filters, verdicts, decided_by
        self.name, self.reversible = source.name, source.reversible

    @property
    def has_images(self) -> bool:
        """False if the source is known to contain text alone."""
        return getattr(self.source, "has_images", True)

    @property
    def fingerprint(self) -> Mapping[str, Json]:
        """The source's fingerprint, the settings of the filters, and the fingerprints of the sources that were
        compared.
        """
        decided = {"decided_by": self._decided_by} if self._decided_by else {}
        return dict(self.source.fingerprint) | {"filters": asdict(self.filters)} | decided

    def __len__(self) -> int:
        return len(self.source)

    @property
    def together(self) -> int:
        """The best number of items of the source to read at once."""
        return getattr(self.source, "together", TOGETHER)

    def __getitem__(self, i: int) -> Document:
        return self._checked(i, functools.partial(self.source.__getitem__, i))

    def fetch(self, indices: Sequence[int]) -> list[Callable[[], Document]]:
        """See `items.fetched`."""
        return [functools.partial(self._checked, i, decode) for i, decode in fetched(self.source, indices)]

    def _checked(self, i: int, decode: Callable[[], Document]) -> Document:
        if i in self._verdicts:
            kind, reason = self._verdicts[i]
            raise BadItem(kind, self.source.origin(i), reason)
        document = decode()
        self.filters.check(document, language(self.source, i) if self.filters.languages else "")
        return document

    def texts(self, i: int) -> list[str]:
        """The texts of item i, even if it is left out: a text tokenizer is trained on all text."""
        return self.source.texts(i)

    def fetch_texts(self, indices: Sequence[int]) -> list[list[str] | BadItem]:
        """See `items.texts_of`."""
        return [texts for _, texts in texts_of(self.source, indices)]

    def origin(self, i: int) -> str:
        """Where item i of the source comes from."""
        return self.source.origin(i)

    def language(self, i: int) -> str:
        """The language that item i of the source declares."""
        return language(self.source, i)


def filtered(
    sources: Sequence[Source],
    held_out: Sequence[Source],
    filters: Filters,
    file: str | Path | None,
    *,
    workers: int = 2,
    show_progress: bool = True,
) -> list[Source]:
    """The sources without the items that the filters leave out.

    Args:
        sources: the training sources.
        held_out: the sources of the validation set and all tests.
        file: where the verdicts of the pass over all items are written, whole or not at all. An existing file is used
            if its sources and filters are the same. None keeps no verdicts.
    """
    if not filters.used:
        return list(sources)
    plain = [source.source if isinstance(source, Augmented) else source for source in sources]
    those = list(held_out) if filters.held_out else []
    decided_by: dict[str, Json] = {}
    verdicts: list[dict[int, tuple[str, str]]] = [{} for _ in plain]
    if filters.compares:
        decided_by = {
            "sources": {source.name: dict(source.fingerprint) for source in plain},
            "held_out": [dict(source.fingerprint) for source in those],
        }
        plan = {"filters": asdict(filters), **decided_by}
        verdicts = _read(Path(file), plan, plain) if file else []
        if not verdicts:
            verdicts = _decide(plain, those, filters, workers, show_progress)
            if file:
                kept = {source.name: verdict for source, verdict in zip(plain, verdicts, strict=True)}
                workdir.write_json(file, {"plan": plan, "filtered": kept})
    left: list[Source] = []
    for source, inner, verdict in zip(sources, plain, verdicts, strict=True):
        without = Filtered(inner, filters, verdict, decided_by)
        left.append(
            Augmented(without, count=source.count, shift=source.shift, mirror=source.mirror, whole=source.whole)
            if isinstance(source, Augmented)
            else without
        )
    return left


def _read(file: Path, plan: Mapping[str, Json], sources: Sequence[Source]) -> list[dict[int, tuple[str, str]]]:
    """The verdicts of each source, if the file has verdicts for the same sources and settings (`plan`); else []."""
    if not file.exists() or (found := workdir.read_json(file))["plan"] != json.loads(json.dumps(plan)):
        return []
    return [
        {int(item): (kind, reason) for item, (kind, reason) in found["filtered"][source.name].items()}
        for source in sources
    ]


def _decide(
    sources: Sequence[Source], held_out: Sequence[Source], filters: Filters, workers: int, show_progress: bool
) -> list[dict[int, tuple[str, str]]]:
    """Compares all items. An item that a filter of single items leaves out is not compared with others."""
    search, where = Search(), list[tuple[Source, int]]()
    total = sum(map(len, (*sources, *held_out)))
    with progress.bar(total, "items", "compare", shown=show_progress) as bar:
        for source, out in [*((each, True) for each in held_out), *((each, False) for each in sources)]:
            seen = source if out else Filtered(source, filters.alone, {}, None)
            for i, item in read(seen, range(len(source)), workers):
                bar.update()
                if not isinstance(item, BadItem):
                    search.add(item, held_out=out)
                    where.append((source, i))
    found, verdicts = search.found(), {id(source): dict[int, tuple[str, str]]() for source in sources}
    for at, kind, reason in _reasons(found, filters, lambda other: where[other][0].origin(where[other][1])):
        source, i = where[at]
        if id(source) in verdicts:
            verdicts[id(source)].setdefault(i, (kind, reason))
    return [verdicts[id(source)] for source in sources]


def _reasons(found: Duplicates, filters: Filters, origin: Callable[[int], str]) -> Iterator[tuple[int, str, str]]:
    """Yields the documents to leave out, with kind and reason. A document may be yielded several times;
    then its first reason counts."""
    for at, (overlap, same, shown, repeats) in enumerate(
        zip(*(column.tolist() for column in (found.overlap, found.same, found.shown, found.repeats)), strict=True)
    ):
        first = same if filters.duplicates == "documents" else max(same, shown)
        if filters.held_out and overlap >= 0:
            reason = f"expected no content of a held-out set, found content of {origin(overlap)}"
            yield at, "filtered_held_out", reason
        if filters.duplicates != "keep" and first >= 0:
            what = "a copy of" if first == same else "copies of the images in"
            reason = f"expected no copies of earlier items, found {what} {origin(first)}"
            yield at, "filtered_duplicate", reason
        if filters.max_repeats and repeats > filters.max_repeats:
            reason = f"expected images that are in at most {filters.max_repeats} documents, found one in {repeats}"
            yield at, "filtered_repeated", reason
