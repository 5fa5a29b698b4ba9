"""Turns sources into token shards: images with the image tokenizer, in full batches, and documents with the grammar.

A shard is a fixed range of a source's items, and its content depends on nothing else. So an interrupted run continues
with the missing shards, any number of processes can share the work (`claims`), and the bytes are always the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ar_tokenizers.files import whole

from ar_unified import storage, workdir
from ar_unified.data import shards
from ar_unified.data.images import ImageCodec, Resize
from ar_unified.data.items import LeftOut
from ar_unified.data.packing import blocks
from ar_unified.data.prepare.claims import Claims, Team
from ar_unified.data.prepare.encoder import Tokenizers
from ar_unified.data.prepare.making import Piece, Progress, ShardMaker
from ar_unified.data.sizes import default_resize
from ar_unified.data.skipped import SKIPPED
from ar_unified.data.sources import BadItem, Source, decoders
from ar_unified.errors import UserError
from ar_unified.language.document import TASKS
from ar_unified.language.grammar import Grammar
from ar_unified.manifests import Json, ManifestMismatch, differences, require_same

VERSION = 3
CLAIMS = ".claims"  # a folder inside the prepared folder; it exists while many processes work there


@dataclass
class SourceReport:
    """Counts of what was made from a source, and of what was left out."""

    items: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    images: int = 0
    longest: int = 0
    split_items: int = 0  # items longer than max_tokens that became several documents
    preferences: int = 0  # items that are preference pairs, of two documents each
    shards: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # left-out items of each kind (pieces, for too_long_part)
    first: dict[str, str] = field(default_factory=dict)  # the first left-out item of each kind, and the reason

    @property
    def lost(self) -> str:
        """How many items were left out, by kind, and the first of each kind; "" if there are none."""
        return "; ".join(
            f"{n} {kind}" + (f", first {self.first[kind]}" if self.first else "") for kind, n in self.skipped.items()
        )


class NothingLeft(UserError):
    """No document of a source is left. Training would go on without the source, so this is an error."""


@dataclass
class Report:
    """The reports of all sources. `str` formats them for a terminal."""

    sources: dict[str, SourceReport]

    def __str__(self) -> str:
        lines = []
        for name, s in self.sources.items():
            tasks = ", ".join(f"{count} {task}" for task, count in s.tasks.items())
            lines.append(
                f"{name}: {s.items} items -> {s.documents} documents ({tasks}), {s.tokens} tokens "
                f"(longest {s.longest}), {s.images} images, {s.text_bytes} bytes of text"
            )
            if s.preferences:
                lines.append(f"  {s.preferences} of the items are preference pairs, of two documents each")
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
    workers: int | None = None,
    may_be_lost: bool = False,
    show_progress: bool = True,
    tokenizers: Tokenizers | None = None,
    team: Team | None = None,
    elsewhere: Callable[[Sequence[str]], object] | None = None,
) -> Report:
    """Writes every source's documents as tokens under `folder` (see `shards`), or continues an interrupted run.

    Many processes may call it with the same arguments and a `team`. They divide the shards among themselves, and each
    call returns when all shards exist. The bytes of a shard do not depend on the process that made it.

    Bad items are left out, counted by kind, and listed with origin and reason in <folder>/skipped.jsonl. A document of
    more than max_tokens is left out too ("too_long") if it is a single question, because half an answer is useless.
    Other documents are split (see `cutting.split`), and only an image, a character or a question that is too long by
    itself is left out ("too_long_part"). A preference pair is left out as a whole if one answer is too long, or if both
    answers have the same tokens ("same_answers"). A text that a lossy text tokenizer changes is left out ("text_lost").

    Args:
        sources: the sources. Their names must differ.
        grammar: the grammar. Its vocabulary is made from the two tokenizers.
        image_tokenizer: called with full batches, uint8 [batch_size, H, W, 3]; each (H, W) compiles once. The codes of
            an image may not depend on the other images of the batch.
        max_tokens: the most tokens of a document, with BOS and EOS. This is the sequence length of the later training.
        resize: how images are resized before they are encoded. None means `default_resize`.
        shard_items: the number of a source's items in a shard. A restart repeats unfinished shards from their start.
        workers: the number of threads that read and decode. None means `decoders`.
        may_be_lost: whether a source may be left without documents.
        tokenizers: a replica of the image tokenizer for each device, and the codes that are known already. None means
            only `image_tokenizer`.
        team: the processes that share the work. None means this process alone.
        elsewhere: called with the names of the shards that are not there yet, so that other processes make them with
            `shard_maker`. Shards that are still missing afterwards are made here.

    Raises:
        NothingLeft: if no document of a source is left. What was written is removed.
        ManifestMismatch, StageMismatch: if the tokenizer or `folder` belongs to another vocabulary, or if `folder` was
            begun with other sources or settings.
    """
    folder, team = Path(folder), team or Team()
    resize = resize or default_resize(grammar.layout, image_tokenizer)
    _check_tokenizer(grammar, image_tokenizer)
    plan = _plan(sources, grammar, _settings(max_tokens, resize, batch_size, shard_items))
    _same_plan(folder, plan)
    if storage.exists(folder / "manifest.json"):
        return load_report(folder)
    if team.processes == 1 and elsewhere is None:
        workdir.clean(folder)
    workdir.write_json(folder / "plan.json", plan)

    pieces = _pieces(sources, plan["sources"], folder, shard_items)
    claims = Claims(folder / CLAIMS, team)
    tokenizers = tokenizers or Tokenizers([image_tokenizer])
    maker = ShardMaker(grammar, tokenizers, resize, batch_size, max_tokens, workers or decoders())
    if elsewhere and (missing := [name for name, piece in pieces.items() if not storage.exists(piece.path)]):
        elsewhere(missing)
        workdir.clean(folder)
    with Progress(pieces.values(), tokenizers, show_progress) as shown:
        claims.work(
            list(pieces),
            done=lambda name: storage.exists(pieces[name].path),
            do=lambda name: maker.make(pieces[name], claims, shown),
        )
    claims.work(
        ["manifest"],
        done=lambda _: _ended(folder),
        do=lambda _: _end(folder, plan, pieces.values(), may_be_lost),
    )
    claims.clear()
    return load_report(folder)


def shard_maker(
    sources: Sequence[Source],
    grammar: Grammar,
    folder: str | Path,
    tokenizers: Tokenizers,
    *,
    max_tokens: int,
    resize: Resize,
) -> Callable[[str], None]:
    """Returns a function that makes the shard with a given name, for `elsewhere` of `prepare`. It does nothing if the
    shard exists.

    The arguments are those of `prepare`. `shard_items` and `batch_size` are read from what `prepare` has written in the
    folder. Raises ManifestMismatch or StageMismatch if `prepare` has begun the folder with other sources or settings.
    """
    folder = Path(folder)
    begun = workdir.read_json(storage.fetch(folder / "plan.json"))["settings"]
    batch_size, shard_items = begun["batch_size"], begun["shard_items"]
    plan = _plan(sources, grammar, _settings(max_tokens, resize, batch_size, shard_items))
    _same_plan(folder, plan)
    pieces = _pieces(sources, plan["sources"], folder, shard_items)
    maker = ShardMaker(grammar, tokenizers, resize, batch_size, max_tokens, decoders())
    claims = Claims(folder, Team())

    def make(name: str) -> None:
        if not storage.exists(pieces[name].path):
            with Progress([pieces[name]], tokenizers, False) as unseen:
                maker.make(pieces[name], claims, unseen)

    return make


def _settings(max_tokens: int, resize: Resize, batch_size: int, shard_items: int) -> dict[str, Json]:
    return dict(max_tokens=max_tokens, resize=resize.record(), batch_size=batch_size, shard_items=shard_items)


def _nothing_left(name: str, source: SourceReport) -> str:
    if not source.items:
        return f"source {name!r} has no items: fill it, or take it out of the config"
    cure = (
        "raise config.data.max_tokens (and training.sequence_length)" if "too_long" in source.skipped else "repair them"
    )
    return (
        f"no document is left of source {name!r}: {source.lost}. "
        f"{cure[0].upper()}{cure[1:]}, or take the source out of the config"
    )


def _mixed(name: str, source: SourceReport) -> str:
    others = source.documents - 2 * source.preferences
    return (
        f"source {name!r}: expected only preference pairs or none, found {source.preferences} pairs and {others} "
        "other documents: put the pairs into a separate source"
    )


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest, which `prepare` writes last: "vocabulary", "settings", "sources", "report".

    Raises:
        FileNotFoundError: if `prepare` was not run here, or did not reach its end.
    """
    path = storage.fetch(Path(folder) / "manifest.json")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; run `prepare` until it finishes")
    return workdir.read_json(path)


def load_report(folder: str | Path) -> Report:
    """The report of a finished `prepare`. Raises like `load_manifest`."""
    counts = load_manifest(folder)["report"]
    return Report({name: SourceReport(**count) for name, count in counts.items()})


def plan_rows(folder: str | Path, report: Report, sequence_length: int, *, leave_out: bool = False) -> None:
    """Plans which documents share a row of this length (`blocks`), unless such a plan exists. The plan of a source is
    stored next to its shards.

    With the plan, a loader of such rows starts at once. Planning takes a second or two for 10^6 documents. Both answers
    of a preference pair are in one row. leave_out: whether documents that are longer than a row are left out.

    Raises:
        UserError: if a document is longer than a row and `leave_out` is False.
        OSError: if the plan cannot be written.
    """
    for name, source in report.sources.items():
        place = Path(folder) / name
        lengths = shards.Lengths(shards.join_indexes(place, source.shards), 2 if source.preferences else 1)
        blocks.store(lengths, sequence_length, place, name=name, leave_out=leave_out)


def folder_name(source: str) -> str:
    """The folder of a source's shards."""
    return re.sub(r"[^\w.-]+", "-", source).strip(".-") or "source"


def same_names(sets: Mapping[str, Mapping[int, Source]]) -> list[str]:
    """A message about each source whose folder is also the folder of an earlier source in its set; [] if all folders
    differ.

    sets: for each set of a config ("train", "validation", a test's name), its sources by their numbers in the set.
    """
    found = []
    for part, sources in sets.items():
        where = f"config.data.{part}" if part in ("train", "validation") else f"config.data.tests.{part}"
        seen: dict[str, int] = {}
        for i, source in sources.items():
            if (first := seen.setdefault(folder_name(source.name), i)) != i:
                name = f"its name {source.name!r} means the same folder as the name of {where}[{first}]"
                found.append(f"{where}[{i}]: {name}: give one of the two sources a `label`")
    return found


def _check_tokenizer(grammar: Grammar, tokenizer: ImageCodec) -> None:
    vocabulary = grammar.vocabulary
    for name, ours in (("hash", vocabulary.image_hash), ("codebook_size", vocabulary.codebook_size)):
        theirs = getattr(tokenizer, name)
        if ours and theirs != ours:
            raise ManifestMismatch(
                f"image_{name}" if name == "hash" else name,
                f"the vocabulary was made for an image tokenizer with {name} {ours!r}, but this tokenizer "
                f"has {theirs!r}: use the tokenizer of the same run",
            )


def _plan(sources: Sequence[Source], grammar: Grammar, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that determines the shards, as JSON values. The sources are listed by the names of their folders.
    Raises UserError if two names are the same.
    """
    if len(names := [folder_name(source.name) for source in sources]) > len(set(names)):
        raise UserError(f"sources need different names (labels), found {names}")
    fingerprints = [dict(source.fingerprint) | {"reversible": source.reversible} for source in sources]
    return {
        "version": VERSION,
        "vocabulary": grammar.manifest(),
        "settings": settings,
        "sources": dict(zip(names, fingerprints, strict=True)),
    }


def _pieces(sources: Sequence[Source], names: Collection[str], folder: Path, shard_items: int) -> dict[str, Piece]:
    """The shards of all sources, by name."""
    return {
        f"{name}/{number:05d}": Piece(
            source, folder / name, number, range(begin, min(begin + shard_items, len(source)))
        )
        for name, source in zip(names, sources, strict=True)
        for number, begin in enumerate(range(0, len(source), shard_items))
    }


def _same_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Refuses a folder that was begun with another plan."""
    if not storage.fetch(folder / "plan.json").exists():
        return
    found = workdir.read_json(folder / "plan.json")
    require_same(plan["vocabulary"], found["vocabulary"], expected_from="this run", found_from=str(folder))
    for name, (theirs, ours) in differences(found, plan).items():
        raise workdir.StageMismatch(
            name,
            f"{folder} was prepared with {name} = {theirs!r}, this run has {ours!r}. "
            "Use another folder, or delete this folder to prepare the data again.",
            theirs,
        )


def _ended(folder: Path) -> bool:
    """Whether the manifest is there. Raises NothingLeft if another process has found a source without any document."""
    if storage.exists(folder / "manifest.json"):
        return True
    storage.refresh(folder / "plan.json")
    if not (folder / "plan.json").exists():
        raise NothingLeft(f"{folder}: a source has no document left; the message of another process names this source")
    return False


def _end(folder: Path, plan: Mapping[str, Any], pieces: Collection[Piece], may_be_lost: bool) -> None:
    """Counts the shards, plans the rows and writes the manifest.

    If a source has no document and `may_be_lost` is False, removes all shards and raises NothingLeft. If a source mixes
    preference pairs with other documents, removes all shards and raises UserError.
    """
    places = {name: [piece for piece in pieces if piece.folder == folder / name] for name in plan["sources"]}
    report = Report({name: _count(mine) for name, mine in places.items()})
    lost = [name for name, source in report.sources.items() if not source.documents and not may_be_lost]
    mixed = [name for name, source in report.sources.items() if source.documents > 2 * source.preferences > 0]
    if lost or mixed:
        for name in [*places, CLAIMS]:
            storage.remove_tree(folder / name)
        storage.remove(folder / "plan.json")
        if lost:
            raise NothingLeft(". ".join(_nothing_left(name, report.sources[name]) for name in lost))
        raise UserError(". ".join(_mixed(name, report.sources[name]) for name in mixed))
    for name, source in report.sources.items():
        answers = 2 if source.preferences else 1
        plan_rows(folder, Report({name: source}), answers * plan["settings"]["max_tokens"])
    with whole(folder / SKIPPED) as rows:
        for piece in pieces:
            rows.write(storage.fetch(shards.skipped_path(piece.path)).read_bytes())
    workdir.write_json(folder / "manifest.json", dict(plan) | {"report": asdict(report)["sources"]})


def _count(pieces: Collection[Piece]) -> SourceReport:
    """The report of one source, counted shard by shard."""
    found, left_out, tasks = SourceReport(shards=len(pieces)), LeftOut(), np.zeros(len(TASKS), np.int64)
    for piece in pieces:
        index = shards.read_index(piece.path)
        found.items += len(piece.items)
        found.documents += len(index)
        found.tokens += int(index["length"].sum())
        found.text_bytes += int(index["text_bytes"].sum())
        found.images += int(index["images"].sum())
        found.longest = max(found.longest, int(index["length"].max(initial=0)))
        found.split_items += int((index["part"] == 1).sum())
        found.preferences += int((index["part"] == shards.REJECTED).sum())
        tasks += np.bincount(index["task"], minlength=len(TASKS))
        for row in shards.read_skipped(piece.path):
            left_out(BadItem(row["kind"], row["origin"], row["reason"]))
    kinds = dict(sorted(left_out.kinds.items()))
    found.tasks = {task: int(number) for task, number in zip(TASKS, tasks, strict=True) if number}
    found.skipped = {kind: told["count"] for kind, told in kinds.items()}
    found.first = {kind: told["first"] for kind, told in kinds.items()}
    return found
