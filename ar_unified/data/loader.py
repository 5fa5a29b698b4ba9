"""Makes packed batches for the transformer from shards, and image batches for the image tokenizer from sources.

batch(step) is a pure function of (data, seed, step). The global batch is the same in any order of steps and with any
number of processes or threads; each process asks for its slice.

Axes: `B` rows of the global batch, `T` tokens of a row, `n` documents of a batch, `H` `W` pixels.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ar_unified.data import images, shards
from ar_unified.data.batch import PackedBatch
from ar_unified.data.counter_rng import hash64, key, permute, uniform
from ar_unified.data.items import LeftOut, has_images
from ar_unified.data.packing import Mixture, Packing, Picks, summary
from ar_unified.data.phases import Phase, mixtures, require_order
from ar_unified.data.prepare import folder_name, load_manifest
from ar_unified.data.sizes import Enlarged
from ar_unified.data.sources import BadItem, Source
from ar_unified.errors import UserError
from ar_unified.language.document import TASKS, ImagePart
from ar_unified.language.encoded import TRAINED, Encoded, joined
from ar_unified.language.grammar import Grammar
from ar_unified.language.vocabulary import Role
from ar_unified.manifests import Json, require_same

_TEXT_TO_IMAGE, _IMAGE_TO_TEXT = TASKS.index("text_to_image"), TASKS.index("image_to_text")
_INTERLEAVED = TASKS.index("interleaved")
_MARKS = Encoded(np.zeros(256, np.int32), np.arange(256, dtype=np.uint8))  # all marks, for the tables below
_ROLES = np.where(_MARKS.unlearned, Role.PAD, _MARKS.roles).astype(np.uint8).tobytes()
_PROMPT = (~_MARKS.trained).tobytes()
_LOOKED_AT = 1000  # documents of a source that are searched for an image


class NothingReadable(UserError):
    """A source has no image that an image tokenizer could learn from."""


class Chosen(NamedTuple):
    """The items (documents or preference pairs) for the rows `at` of a batch, all from one epoch of a source."""

    source: int
    epoch: int
    at: np.ndarray
    items: list[np.ndarray]


def _require_kind(name: str, counts: Mapping[str, Json], answers: int) -> None:
    """Raises UserError for a source of preference pairs where documents are expected, or the reverse."""
    found = 2 if counts.get("preferences") else 1
    if counts["documents"] and found != answers:
        kinds = {1: ("documents", "likelihood"), 2: ("preference pairs", "preference")}
        raise UserError(
            f"source {name!r}: expected {kinds[answers][0]}, found {kinds[found][0]}: "
            f"set config.training.objective = {kinds[found][1]!r} to train on {kinds[found][0]}"
        )


class PackedBatches:
    """Rows of whole documents from the shards that `prepare` wrote to `folder`.

    Every epoch of a source has each of its documents once. Each epoch chooses again, at random, which documents are
    flipped and which lose their condition (`Phase`). In a new phase, a source continues where the previous phase
    stopped. If the length of rows changes, it continues with its next window (`Packing.after`). A small source has only
    one window, so it continues with its next epoch.

    Args:
        folder: the folder that one `prepare` wrote.
        grammar: the grammar with which the data was prepared.
        batch_size, sequence_length: B and T for phases that do not set their own. The longest rows of any phase must
            have room for the longest document.
        phases: in order; the first begins at step 0.
        seed: for the order and for all random choices.

    Attributes:
        phases: each with its batch_size and sequence_length.
        sequence_length: the length of the longest rows.
        names, shards, packings: for every source that is used, its folder's name, its documents, and its packing into
            the longest rows.
        rows_per_epoch: for every source that is used, the number of rows in one epoch, with rows of the longest length.
        shares: for every phase, the share of rows that each source gets.
        order: {"order": 2}, or {} if the order of rows is the same as in early versions.

    Raises:
        ManifestMismatch: if the data was prepared with another vocabulary or grammar.
        UserError: if a source is unknown, weights are out of range, phases are out of order, a document is longer than
            any row, no document of a source fits into a row of a phase, or a source has preference pairs
            (`preferences`).
    """

    answers = 1  # number of documents in an item; they always share a row

    def __init__(
        self,
        folder: str | Path,
        grammar: Grammar,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        phases: Sequence[Phase] = (Phase(),),
    ):
        manifest = load_manifest(folder)
        require_same(grammar.manifest(), manifest["vocabulary"], expected_from="this run", found_from=str(folder))
        counts = manifest["report"]
        weights = [
            {folder_name(name): w for name, w in (phase.weights or dict.fromkeys(counts, 1.0)).items() if w}
            for phase in phases
        ]
        wanted = list(dict.fromkeys(name for phase in weights for name in phase))
        unknown = sorted(set(wanted) - counts.keys())
        if unknown:
            raise UserError(f"weights: expected sources {sorted(counts)}, found {unknown[0]!r}")
        require_order(phases)
        for name in wanted:
            _require_kind(name, counts[name], self.answers)
        self.grammar, self.batch_size, self.seed = grammar, batch_size, seed
        self.phases = tuple(
            dataclasses.replace(
                phase,
                batch_size=phase.batch_size or batch_size,
                sequence_length=phase.sequence_length or sequence_length,
            )
            for phase in phases
        )
        of_phases = [phase.sequence_length or sequence_length for phase in self.phases]
        self.sequence_length = max(of_phases)
        self.names = [name for name in wanted if counts[name]["documents"]]
        folders = [Path(folder) / name for name in self.names]
        self.shards = [
            shards.Shards(place, counts[name]["shards"]) for name, place in zip(self.names, folders, strict=True)
        ]
        self._packings = {
            length: [
                Packing(
                    source.lengths(self.answers),
                    length,
                    seed=seed,
                    name=place.name,
                    folder=place,
                    leave_out=length < self.sequence_length,
                )
                for source, place in zip(self.shards, folders, strict=True)
            ]
            for length in dict.fromkeys([self.sequence_length, *of_phases])
        }
        self.packings = self._packings[self.sequence_length]
        self.order = {"order": 2} if any(p.order > 1 for each in self._packings.values() for p in each) else {}
        self.rows_per_epoch = {name: p.rows for name, p in zip(self.names, self.packings, strict=True)}
        shares = [[of.get(name, 0.0) for name in self.names] for of in weights]
        self._mixtures = mixtures(self.phases, self.names, self._packings, shares)
        self.shares = [dict(zip(self.names, mixture.shares, strict=True)) for mixture in self._mixtures]

    def describe(self) -> dict[str, dict[str, Any]]:
        """For every source: its rows per epoch, the share of their positions that have a token (`fill`), and its share
        of the rows in each phase.

        If phases have rows of several lengths, `by_length` has for each length the rows, the fill and the number of
        left-out documents.
        """
        packed = summary(dict(zip(self.names, self.packings, strict=True)))
        found = {name: packed[name] | {"shares": [shares[name] for shares in self.shares]} for name in self.names}
        if len(self._packings) > 1:
            for at, name in enumerate(self.names):
                each = {length: packings[at] for length, packings in self._packings.items()}
                found[name]["by_length"] = {
                    length: {"rows": p.rows, "fill": p.fill, "left_out": p.left_out} for length, p in each.items()
                }
        return found

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> PackedBatch[np.ndarray]:
        """The rows of one of `process_count` processes in the global batch of `step`, [B / process_count, T]."""
        return self.laid(*self.picked(step, process_index, process_count))

    def picked(self, step: int, process_index: int, process_count: int) -> tuple[Phase, int, list[Chosen]]:
        """The phase of a step, how many rows this process needs, and the items in them."""
        now = bisect.bisect_right([phase.from_step for phase in self.phases], step) - 1
        phase = self.phases[now]
        rows, length = phase.batch_size or self.batch_size, phase.sequence_length or self.sequence_length
        picks = _slice(self._mixtures[now], step - phase.from_step, rows, process_index, process_count)
        chosen = []
        for at in _groups(picks):
            source, epoch = int(picks.source[at[0]]), int(picks.epoch[at[0]])
            chosen.append(Chosen(source, epoch, at, self._packings[length][source].documents(epoch, picks.item[at])))
        return phase, len(picks.item), chosen

    def laid(self, phase: Phase, count: int, chosen: Sequence[Chosen]) -> PackedBatch[np.ndarray]:
        """The batch of the chosen items, in `count` rows."""
        documents: list[Encoded] = []
        tasks: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        for source, epoch, at, items in chosen:
            those = (np.concatenate(items)[:, None] * self.answers + np.arange(self.answers)).reshape(-1)
            found, found_tasks = self._read(phase, source, epoch, those)
            documents += found
            tasks.append(found_tasks)
            rows.append(np.repeat(at, [len(row) * self.answers for row in items]))
        where = np.concatenate(rows)
        order = np.argsort(where, kind="stable")
        return pack(
            [documents[i] for i in order.tolist()],
            np.concatenate(tasks)[order],
            where[order],
            shape=(count, phase.sequence_length or self.sequence_length),
            pad=self.grammar.vocabulary.pad,
        )

    def _read(self, phase: Phase, source: int, epoch: int, chosen: np.ndarray) -> tuple[list[Encoded], np.ndarray]:
        """Ids and tasks of documents, after the random changes of this epoch (flips, dropped prompts)."""
        index = self.shards[source].facts(chosen)
        documents, tasks = self.shards[source].read(chosen, index["length"]), index["task"].copy()
        streams = (self.seed, self.names[source], epoch)
        flipped = index["pair"] & (uniform(key(*streams, "flip"), chosen) < phase.flip_pairs)
        tasks[flipped] = np.where(index["task"][flipped] == _TEXT_TO_IMAGE, _IMAGE_TO_TEXT, _TEXT_TO_IMAGE)
        dropped = uniform(key(*streams, "dropout"), chosen) < phase.condition_dropout
        image = hash64(key(*streams, "picture"), chosen)
        for i in np.flatnonzero(flipped):
            documents[i] = self.grammar.swap_turn(documents[i])
        for i in np.flatnonzero(dropped & (tasks == _TEXT_TO_IMAGE)):
            documents[i] = self.grammar.drop_prompt(documents[i])
        for i in np.flatnonzero(dropped & (tasks == _INTERLEAVED)):
            document = documents[i]
            if count := len(document.own_images):
                rest = self.grammar.drop_context(document, int(image[i] % np.uint64(count)))
                # If the document begins with the image, the empty prompt would make it longer, and its row may be full.
                documents[i] = rest if len(rest) <= len(document) else document
        return documents, tasks


def pack(
    documents: Sequence[Encoded],
    tasks: np.ndarray,
    rows: np.ndarray,
    *,
    shape: tuple[int, int],
    pad: int,
) -> PackedBatch[np.ndarray]:
    """Writes documents into their rows, one after another.

    Args:
        documents: n documents.
        tasks: int8 [n].
        rows: int [n], ascending; the row of each document.
        shape: (B, T).
    """
    B, T = shape
    lengths = np.array([len(document) for document in documents])
    room = T - np.bincount(rows, lengths, B).astype(np.int64)
    nothing = Encoded(np.full(T, pad, np.int32), np.full(T, TRAINED, np.uint8))
    order = np.argsort(np.append(rows, np.arange(B)), kind="stable")  # each row's documents, then its padding

    def of_each(values: np.ndarray, padding: int) -> np.ndarray:
        """Repeats one value of each document at all positions of that document."""
        return np.repeat(np.append(values, np.full(B, padding, values.dtype))[order], counts)

    def next_one(values: np.ndarray, padding: int) -> np.ndarray:
        """For each position, the value at the next position of the same document."""
        out = np.empty_like(values)
        out[:-1] = values[1:]
        out[ends - 1] = padding
        return out

    pieces = [*documents, *(nothing[:count] for count in room.tolist())]
    together = joined([pieces[i] for i in order.tolist()])
    counts = np.append(lengths, room)[order]
    ends = np.cumsum(counts)[counts > 0]
    start = np.cumsum(lengths) - lengths  # where each document begins in its row
    start = (start - start[np.searchsorted(rows, rows)]).astype(np.int32)
    numbers = (np.arange(len(documents)) - np.searchsorted(rows, rows) + 1).astype(np.int32)
    doc_start = of_each(start, T)
    positions = np.arange(T, dtype=np.int32) - doc_start.reshape(B, T)
    after = Encoded(next_one(together.tokens, pad), next_one(together.marks, TRAINED))
    values = {
        "tokens": together.tokens,
        "targets": after.tokens,
        "roles": np.frombuffer(bytearray(after.marks).translate(_ROLES), np.int8),
        "positions": np.maximum(positions, 0, out=positions),
        "doc_start": doc_start,
        "segment_ids": of_each(numbers, 0),
        "tasks": of_each(tasks, 0),
        "prompt": np.frombuffer(bytearray(after.marks).translate(_PROMPT), np.bool_),
    }
    return PackedBatch(**{name: each.reshape(B, T) for name, each in values.items()})


class ImageBatches:
    """Images of the sources' documents at one size, for training an image tokenizer.

    Every epoch of a source visits each document once, and takes one random image from it. If a document has no readable
    image, another document replaces it.

    Args:
        sources: at least one with images; sources of text alone are left out. Items are read when they are needed, and
            up to `memory` bytes of them are kept in memory.
        size: (H, W) in pixels.
        weights: shares of the sources; None means in proportion to their numbers of documents.
        mirror: whether half of the images are mirrored left to right. Leave it off for images of text, or if left and
            right matter.
        short_side: images are scaled so that their short side has this many pixels, and a window of `size` is cropped
            at a random place. None crops the largest centred window with the aspect of `size` and scales it.
        recolour: share of images with randomly changed colours (`images.recoloured`).
        left_out: called once with each bad item, when it is read for the first time.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        size: tuple[int, int],
        batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        mirror: bool = False,
        short_side: int | None = None,
        recolour: float = 0.0,
        memory: int = 2**29,
        left_out: Callable[[BadItem], object] = lambda bad: None,
    ):
        used = [i for i, source in enumerate(sources) if has_images(source)]
        if not used:
            names = ", ".join(source.name for source in sources) or "none"
            raise UserError(f"expected a source with images; found sources of text alone: {names}")
        self.sources, self.size, self.batch_size, self.seed = [sources[i] for i in used], size, batch_size, seed
        if short_side is not None and short_side < max(size):
            raise UserError(f"short_side: expected at least {max(size)}, the longer side of `size`; found {short_side}")
        if not 0 <= recolour <= 1:
            raise UserError(f"recolour: expected a share from 0 to 1, found {recolour}")
        self.mirror, self.short_side, self.recolour = mirror, short_side, recolour
        self._mixture = Mixture([len(source) for source in self.sources], weights and [weights[i] for i in used])
        self.enlarged = Enlarged()
        self._room, self._left_out = memory, left_out
        self._bad: set[tuple[int, int]] = set()
        self._kept: dict[tuple[int, int], list[np.ndarray]] = {}

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> dict[str, np.ndarray]:
        """{"pixels": uint8 [B / process_count, H, W, 3]}."""
        picks = _slice(self._mixture, step, self.batch_size, process_index, process_count)
        pixels = np.empty((len(picks.item), *self.size, 3), np.uint8)
        for at in _groups(picks):
            source, epoch = int(picks.source[at[0]]), int(picks.epoch[at[0]])
            streams = (self.seed, self.sources[source].name, epoch)
            chosen = permute(picks.item[at], len(self.sources[source]), key(*streams, "documents"))
            draws = hash64(key(*streams, "picture"), picks.item[at, None] * 4 + np.arange(4))
            colours = uniform(key(*streams, "colours"), picks.item[at, None] * 5 + np.arange(5))
            for i, document, draw, colour in zip(at, chosen.tolist(), draws.tolist(), colours, strict=True):
                image = self._image(source, document, draw)
                pixels[i] = images.recoloured(image, colour[1:]) if colour[0] < self.recolour else image
        return {"pixels": pixels}

    def check(self) -> None:
        """Raises NothingReadable for the first source without a readable image in its first 1000 documents."""
        for source, items in enumerate(self.sources):
            if not any(self._images(source, document) for document in range(min(len(items), _LOOKED_AT))):
                raise self._nothing_readable(source)

    def _nothing_readable(self, source: int) -> NothingReadable:
        items, left_out = self.sources[source], LeftOut()
        count = min(len(items), _LOOKED_AT)
        for document in range(count):
            try:
                items[document]
            except BadItem as bad:
                left_out(bad)
            else:
                left_out(BadItem("no_image", items.origin(document), "the document has no image"))
        looked = "its" if count == len(items) else f"the first {count} of its"
        return NothingReadable(
            f"source {items.name!r}: no readable image in {looked} {len(items)} documents: {left_out}. Repair the "
            "documents, take the source out of the config, or give it kind='text' if it has no images"
        )

    def _image(self, source: int, document: int, draw: Sequence[int]) -> np.ndarray:
        """One image. draw: four random integers. They choose an image of the document, the top and the left of the
        window, and whether the image is mirrored.
        """
        count = len(self.sources[source])
        for attempt in range(_LOOKED_AT):
            if found := self._images(source, document):
                break
            document = int(hash64(key("instead"), draw[0] ^ attempt) % np.uint64(count))
        else:
            raise self._nothing_readable(source)
        image, (H, W) = found[draw[0] % len(found)], self.size
        top, left = draw[1] % (image.shape[0] - H + 1), draw[2] % (image.shape[1] - W + 1)
        image = image[top : top + H, left : left + W]
        return image[:, ::-1] if self.mirror and draw[3] & 1 else image

    def _images(self, source: int, document: int) -> list[np.ndarray]:
        """All images of a document, scaled; [] if there are none or the item is bad."""
        which = (source, document)
        if which in self._kept:
            return self._kept[which]
        try:
            parts = self.sources[source][document].parts
        except BadItem as bad:
            parts = ()
            if which not in self._bad:
                self._bad.add(which)
                self._left_out(bad)
        whole = [part.pixels for part in parts if isinstance(part, ImagePart)]
        for pixels in whole:
            self.enlarged.add(images.sides_of(pixels), self._scaled(pixels))
        found = [images.resize(pixels, *self._scaled(pixels)) for pixels in whole]
        self._room -= sum(image.nbytes for image in found)
        if self._room > 0:
            self._kept[which] = found
        return found

    def _scaled(self, pixels: np.ndarray) -> tuple[int, int]:
        if self.short_side is None:
            return self.size
        height, width = pixels.shape[:2]
        scale = self.short_side / min(height, width)
        return round(height * scale), round(width * scale)


def _slice(mixture: Mixture, step: int, batch_size: int, index: int, count: int) -> Picks:
    if batch_size % count or not 0 <= index < count:
        raise UserError(
            f"process {index} of {count}: expected a number of processes that divides the batch size {batch_size}"
        )
    rows = batch_size // count
    start = step * batch_size + index * rows
    return mixture.picks(start, start + rows)


def _groups(picks: Picks) -> list[np.ndarray]:
    """The indices of rows, grouped by source and epoch."""
    both = np.stack([picks.source, picks.epoch])
    _, group = np.unique(both, axis=1, return_inverse=True)
    group = group.reshape(-1)
    return [np.flatnonzero(group == i) for i in range(group.max() + 1)]
