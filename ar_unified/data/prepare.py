"""Sources -> token shards: images through the image tokenizer in full batches, documents through the grammar.

A shard is a fixed range of a source's items, so what is in it depends on nothing else: an interrupted run continues
with the first shard that is not there, and ends with the same bytes. Memory is bounded by a shard's tokens and a few
batches of images.

Axes: `B` images of a batch, `H` `W` their size in pixels, `h` `w` in codes, `n` tokens of a document.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified import progress, workdir
from ar_unified.data import blocks, shards
from ar_unified.data.cutting import can_be_split, split
from ar_unified.data.images import ImageCodec, Resize
from ar_unified.data.items import LeftOut
from ar_unified.data.sizes import default_resize
from ar_unified.data.sources import BadItem, Source, read
from ar_unified.errors import UserError
from ar_unified.language.document import TASKS, CodesPart, Document, ImagePart, TextPart
from ar_unified.language.grammar import Grammar, TextLost
from ar_unified.manifests import ManifestMismatch, differences, require_same

VERSION = 3


@dataclass
class SourceReport:
    """What became of a source."""

    items: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    images: int = 0
    longest: int = 0
    split_items: int = 0  # items longer than max_tokens that became several documents
    shards: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # kind -> items (too_long_part: pieces of items)
    first: dict[str, str] = field(default_factory=dict)  # kind -> the first of these items, and what is wrong

    @property
    def lost(self) -> str:
        """How many items were left out, by kind, and the first of each; "" for none."""
        return "; ".join(
            f"{n} {kind}" + (f", first {self.first[kind]}" if self.first else "") for kind, n in self.skipped.items()
        )


class NothingLeft(UserError):
    """A source of which no document is left: training would go on without it."""


@dataclass
class Report:
    """Counts by source; `print` it."""

    sources: dict[str, SourceReport]

    def __str__(self) -> str:
        lines = []
        for name, s in self.sources.items():
            tasks = ", ".join(f"{count} {task}" for task, count in s.tasks.items())
            lines.append(
                f"{name}: {s.items} items -> {s.documents} documents ({tasks}), {s.tokens} tokens "
                f"(longest {s.longest}), {s.images} images, {s.text_bytes} bytes of text"
            )
            if s.split_items:
                lines.append(f"  {s.split_items} items were too long and are split into several documents")
            if s.skipped:
                lines.append(f"  left out: {s.lost}")
            if 2 * s.documents < s.items:
                lines.append(f"  WARNING: most of {name} is left out")
        return "\n".join(lines)


def prepare(
    sources: Sequence[Source],
    grammar: Grammar,
    image_tokenizer: ImageCodec,
    folder: str | Path,
    *,
    max_tokens: int,
    resize: Resize | None = None,
    batch_size: int = 64,
    shard_items: int = 8192,
    workers: int = 2,
    may_be_lost: bool = False,
    show_progress: bool = True,
) -> Report:
    """Writes every source's documents as tokens under `folder` (see `shards`), or continues, or finds it done.

    Bad items are left out, counted by kind, and listed with origin and reason in <folder>/skipped.jsonl. A document of
    more than max_tokens is left out too ("too_long") if it is one question, since half an answer is none; others are
    split (see `cutting.split`), and only an image, a character or a question that is too long by itself is left out
    ("too_long_part"). What a lossy text tokenizer does not give back is left out ("text_lost").

    Args:
        sources: with different names.
        grammar: of the vocabulary the two tokenizers made.
        image_tokenizer: called with uint8 [batch_size, H, W, 3], always full, one (H, W) a call; each compiles once.
        max_tokens: of a document, BOS and EOS included: the sequence length of the training to come.
        resize: what is done to images first; None: `default_resize`.
        shard_items: items of a source in a shard, the unit of restarting.
        workers: threads that read and decode.
        may_be_lost: whether a source may end without a document.

    Raises:
        NothingLeft: no document is left of a source; what was written is removed.
        ManifestMismatch, StageMismatch: the tokenizer is not the vocabulary's, or `folder` was begun with another
            vocabulary, other sources or settings.
    """
    folder = Path(folder)
    resize = resize or default_resize(grammar.layout, image_tokenizer)
    _check_tokenizer(grammar, image_tokenizer)
    if len(names := [folder_name(source.name) for source in sources]) > len(set(names)):
        raise UserError(f"sources need different names (labels), found {names}")
    settings = dict(max_tokens=max_tokens, resize=asdict(resize), batch_size=batch_size, shard_items=shard_items)
    fingerprints = [dict(source.fingerprint) | {"reversible": source.reversible} for source in sources]
    plan = {
        "version": VERSION,
        "vocabulary": grammar.manifest(),
        "settings": settings,
        "sources": dict(zip(names, fingerprints, strict=True)),
    }
    _same_plan(folder, plan)
    if (folder / "manifest.json").exists():
        return load_report(folder)
    workdir.clean(folder)
    workdir.write_json(folder / "plan.json", plan)

    ranges = [
        (name, source, [range(i, min(i + shard_items, len(source))) for i in range(0, len(source), shard_items)])
        for name, source in zip(names, sources, strict=True)
    ]
    missing = [
        (source, items, folder / name, number)
        for name, source, parts in ranges
        for number, items in enumerate(parts)
        if not shards.shard_path(folder / name, number).exists()
    ]
    total, left = sum(map(len, sources)), sum(len(items) for _, items, _, _ in missing)
    with progress.bar(total, "items", "prepare", done=total - left, shown=show_progress) as bar:
        for source, items, place, number in missing:
            with shards.ShardWriter(place, number) as shard:
                encoder = _Encoder(grammar, image_tokenizer, resize, batch_size)
                for ready in encoder.run(read(source, items, workers), bar.update):
                    _write(shard, ready, grammar, max_tokens, source.reversible)
    report = Report({name: _count(folder / name, len(parts), len(source)) for name, source, parts in ranges})
    if lost := [name for name, source in report.sources.items() if not source.documents and not may_be_lost]:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "plan.json").unlink()
        raise NothingLeft(". ".join(_nothing_left(name, report.sources[name]) for name in lost))
    _finish(folder, plan, report)
    return report


def _nothing_left(name: str, source: SourceReport) -> str:
    if not source.items:
        return f"source {name!r} has no items: fill it, or take it out of the config"
    cure = (
        "raise config.data.max_tokens (and training.sequence_length)" if "too_long" in source.skipped else "mend them"
    )
    return (
        f"no documents are left of source {name!r}: {source.lost}. "
        f"{cure[0].upper()}{cure[1:]}, or take the source out of the config"
    )


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """What `prepare` wrote last: "vocabulary", "settings", "sources", "report".

    Raises:
        FileNotFoundError: nothing was prepared here, or not to the end.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; run `prepare` to its end first")
    return workdir.read_json(path)


def load_report(folder: str | Path) -> Report:
    """The report of a finished `prepare`. Raises like `load_manifest`."""
    counts = load_manifest(folder)["report"]
    return Report({name: SourceReport(**count) for name, count in counts.items()})


def plan_rows(folder: str | Path, report: Report, sequence_length: int) -> None:
    """Plans beside every source's shards which documents share a row of this length (`blocks`), unless that is done.

    A loader of such rows begins at once then; 10^6 documents take a second or two.

    Raises:
        UserError: a document is longer. OSError: nothing can be written there.
    """
    for name, source in report.sources.items():
        place = Path(folder) / name
        blocks.store(shards.join_indexes(place, source.shards)["length"], sequence_length, place, name=name)


def folder_name(source: str) -> str:
    """The folder of a source's shards."""
    return re.sub(r"[^\w.-]+", "-", source).strip(".-") or "source"


def _check_tokenizer(grammar: Grammar, tokenizer: ImageCodec) -> None:
    vocabulary = grammar.vocabulary
    for name, ours in (("hash", vocabulary.image_hash), ("codebook_size", vocabulary.codebook_size)):
        theirs = getattr(tokenizer, name)
        if ours and theirs != ours:
            raise ManifestMismatch(
                f"image_{name}" if name == "hash" else name,
                f"the vocabulary was made for an image tokenizer with {name} {ours!r}, the one given has {theirs!r}: "
                "use the tokenizer of the same run",
            )


def _same_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Refuses a folder that was begun with another plan."""
    if not (folder / "plan.json").exists():
        return
    found = workdir.read_json(folder / "plan.json")
    require_same(plan["vocabulary"], found["vocabulary"], expected_from="this run", found_from=str(folder))
    for name, (theirs, ours) in differences(found, plan).items():
        raise workdir.StageMismatch(
            name,
            f"{folder} was prepared with {name} = {theirs!r}, this run has {ours!r}. "
            "Use another folder, or delete this one to prepare it again.",
            theirs,
        )


def _count(folder: Path, count: int, items: int) -> SourceReport:
    paths = [shards.shard_path(folder, number) for number in range(count)]
    index = np.concatenate([np.zeros(0, shards.INDEX), *map(shards.read_index, paths)])
    left_out = LeftOut()
    for row in (row for path in paths for row in shards.read_skipped(path)):
        left_out(BadItem(row["kind"], row["origin"], row["reason"]))
    kinds = dict(sorted(left_out.kinds.items()))
    tasks = {task: int((index["task"] == i).sum()) for i, task in enumerate(TASKS)}
    return SourceReport(
        items=items,
        documents=len(index),
        tokens=int(index["length"].sum()),
        text_bytes=int(index["text_bytes"].sum()),
        images=int(index["images"].sum()),
        longest=int(index["length"].max(initial=0)),
        split_items=int((index["part"] == 1).sum()),
        shards=count,
        tasks={task: number for task, number in tasks.items() if number},
        skipped={kind: found["count"] for kind, found in kinds.items()},
        first={kind: found["first"] for kind, found in kinds.items()},
    )


def _finish(folder: Path, plan: Mapping[str, Any], report: Report) -> None:
    plan_rows(folder, report, plan["settings"]["max_tokens"])
    rows = []
    for name, source in report.sources.items():
        for number in range(source.shards):
            path = shards.skipped_path(shards.shard_path(folder / name, number))
            rows.append(path.read_text(encoding="utf-8"))
    workdir.write_text(folder / "skipped.jsonl", "".join(rows))
    workdir.write_json(folder / "manifest.json", dict(plan) | {"report": asdict(report)["sources"]})


# ---- one shard ---------------------------------------------------------------------------------------------------


@dataclass
class _Item:
    """An item on its way: a document whose images are on theirs, or why there is none."""

    number: int
    document: Document | None
    bad: BadItem | None = None
    images: list[bytes] = field(default_factory=list)  # digests, in order


class _Encoder:
    """Documents with pixels in, documents with codes out, in the same order, a batch of images at a time.

    Equal images of a shard are encoded once: an image often comes with many questions.
    """

    def __init__(self, grammar: Grammar, tokenizer: ImageCodec, resize: Resize, batch_size: int):
        self._grammar, self._tokenizer, self._resize, self._batch_size = grammar, tokenizer, resize, batch_size
        self._codes: dict[bytes, CodesPart] = {}
        self._waiting: dict[tuple[int, ...], dict[bytes, np.ndarray]] = {}  # by size
        self._items: deque[_Item] = deque()

    def run(self, items: Iterable[tuple[int, Document | BadItem]], taken: Callable[[], Any]) -> Iterator[_Item]:
        """All items as they become ready; `taken` is called after each that was read."""
        for number, item in items:
            yield from self._add(number, item)
            taken()
        while self._waiting:
            self._encode(next(iter(self._waiting)))
        yield from self._ready()

    def _add(self, number: int, item: Document | BadItem) -> Iterator[_Item]:
        """Takes an item; yields those that are ready."""
        if isinstance(item, BadItem):
            self._items.append(_Item(number, None, item))
        else:
            digests = [self._take(part.pixels) for part in item.parts if isinstance(part, ImagePart)]
            # Only where the image was is kept: pixels live until their batch is encoded.
            without = item.changed(lambda part: _IMAGE if isinstance(part, ImagePart) else part)
            self._items.append(_Item(number, without, None, digests))
        if sum(map(len, self._waiting.values())) > 8 * self._batch_size:  # many sizes: the first in line goes
            self._encode(next(iter(self._waiting)))
        yield from self._ready()

    def _take(self, pixels: np.ndarray) -> bytes:
        pixels = self._resize(pixels)
        digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
        if digest not in self._codes:
            same_size = self._waiting.setdefault(pixels.shape, {})
            same_size[digest] = pixels
            if len(same_size) == self._batch_size:
                self._encode(pixels.shape)
        return digest

    def _encode(self, shape: tuple[int, ...]) -> None:
        images = self._waiting.pop(shape)
        batch = np.zeros((self._batch_size, *shape), np.uint8)
        batch[: len(images)] = np.stack(list(images.values()))
        codes = np.asarray(self._tokenizer.encode(batch), np.int32)
        self._codes.update({digest: CodesPart(codes[i]) for i, digest in enumerate(images)})

    def _ready(self) -> Iterator[_Item]:
        while self._items and all(digest in self._codes for digest in self._items[0].images):
            item = self._items.popleft()
            if item.document is not None and item.images:
                codes = iter([self._codes[digest] for digest in item.images])
                item.document = item.document.changed(lambda part: next(codes) if part is _IMAGE else part)  # noqa: B023
            yield item


_IMAGE = ImagePart(np.zeros((1, 1, 3), np.uint8))  # stands where an image was


def _write(shard: shards.ShardWriter, item: _Item, grammar: Grammar, max_tokens: int, reversible: bool) -> None:
    """One item, as documents that fit or as a reason why not."""
    if item.document is None:
        assert item.bad is not None
        shard.skip(item.bad.origin, item.bad.kind, item.bad.reason)
        return
    whole = item.document
    try:
        found = grammar.encode(whole)
        if len(found) > max_tokens and not can_be_split(whole):
            shard.skip(
                whole.origin,
                "too_long",
                f"expected at most {max_tokens} tokens (config.data.max_tokens), found {len(found)}",
            )
            return
        pieces = split(whole, grammar, max_tokens) if len(found) > max_tokens else [(whole, found)]
    except TextLost as error:
        shard.skip(whole.origin, "text_lost", str(error))
        return
    for _, found in pieces:
        if len(found) > max_tokens:
            reason = f"expected at most {max_tokens} tokens, found {len(found)} in one {_unit(whole)}"
            shard.skip(whole.origin, "too_long_part", reason)
    pieces = [(piece, found) for piece, found in pieces if len(found) <= max_tokens]
    for part, (document, found) in enumerate(pieces):
        texts = [p.text for p in document.parts if isinstance(p, TextPart)]
        shard.write(
            found,
            item=item.number,
            part=part,
            text_bytes=sum(len(text.encode()) for text in texts),
            task=TASKS.index(document.task),
            images=len(document.parts) - len(texts),
            pair=reversible and document.is_pair and grammar.can_swap,
        )


def _unit(document: Document) -> str:
    return "question with its answer" if document.asks else "image or character"
