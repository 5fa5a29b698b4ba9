"""Makes one shard: a range of a source's items goes through the image tokenizer and the grammar and becomes tokens on
disk.

Every process that makes a shard writes the same bytes, because nothing else is read and nothing is random. Memory is
bounded by a shard's tokens and a few batches of images.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from ar_unified import progress, storage
from ar_unified.data import shards
from ar_unified.data.images import Resize
from ar_unified.data.items import resized
from ar_unified.data.prepare.claims import Claims
from ar_unified.data.prepare.cutting import can_be_split, split
from ar_unified.data.prepare.encoder import Encoder, Item, Tokenizers
from ar_unified.data.sources import Source, read
from ar_unified.language.document import TASKS, Document, TextPart
from ar_unified.language.grammar import Grammar, TextLost


@dataclass(frozen=True)
class Piece:
    """A shard to be made. It contains `items` of `source`, and has the number `number` in `folder`."""

    source: Source
    folder: Path
    number: int
    items: range

    @property
    def path(self) -> Path:
        """The path of the shard, which may not exist yet."""
        return shards.shard_path(self.folder, self.number)


class Progress:
    """A progress bar over the items of all processes. It shows the speed of this process's tokenizers."""

    def __init__(self, pieces: Collection[Piece], tokenizers: Tokenizers, shown: bool):
        self._pieces, self._tokenizers = list(pieces), tokenizers
        total = sum(len(piece.items) for piece in self._pieces)
        self._bar = progress.bar(total, "items", "prepare", done=self._finished(), shown=shown)
        self.taken = self._bar.update  # to be called after each item

    def look(self, begun: int = 0) -> None:
        """Shows what others have finished. begun: how many items of its current piece this process has done."""
        self._bar.set_postfix_str(str(self._tokenizers), refresh=False)
        self._bar.update(max(self._finished() + begun - self._bar.n, 0))

    def _finished(self) -> int:
        there = {folder: _names(folder) for folder in {piece.folder for piece in self._pieces}}
        return sum(len(piece.items) for piece in self._pieces if piece.path.name in there[piece.folder])

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


class _Made(Exception):
    """Another process has finished the shard meanwhile."""


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of items; the fields are arguments of `prepare.prepare`."""

    grammar: Grammar
    tokenizers: Tokenizers
    resize: Resize
    batch_size: int
    max_tokens: int
    workers: int

    def make(self, piece: Piece, claims: Claims, shown: Progress) -> None:
        """Writes a shard, or gives up if another process was faster."""
        begun = 0

        def taken() -> None:
            nonlocal begun
            begun += 1
            shown.taken()
            if claims.renew():
                if storage.exists(piece.path):
                    raise _Made
                shown.look(begun)

        try:
            with shards.ShardWriter(piece.folder, piece.number) as shard:
                encoder = Encoder(self.tokenizers, self.batch_size)
                documents = read(resized(piece.source, self.resize), piece.items, self.workers)
                for item in encoder.run(documents, taken):
                    _write(shard, item, self.grammar, self.max_tokens, piece.source.reversible)
        except _Made:
            pass
        shown.look()


def _write(shard: shards.ShardWriter, item: Item, grammar: Grammar, max_tokens: int, reversible: bool) -> None:
    """Writes the documents of an item that fit. For each of the others, writes the reason why it is left out."""
    if item.document is None:
        assert item.bad is not None
        shard.skip(item.bad.origin, item.bad.kind, item.bad.reason)
        return
    whole = item.document
    if whole.rejected is not None:
        return _write_preference(shard, item, grammar, max_tokens)
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
        pair = reversible and document.is_pair and grammar.can_swap
        shard.write(found, item=item.number, part=part, pair=pair, **_counted(document))


def _write_preference(shard: shards.ShardWriter, item: Item, grammar: Grammar, max_tokens: int) -> None:
    """Writes a preference pair as two documents with the same prompt, the chosen answer first. If the pair is left out,
    writes the reason."""
    assert item.document is not None
    whole, both = item.document, item.document.answered
    try:
        found = [grammar.encode(document) for document in both]
    except TextLost as error:
        shard.skip(whole.origin, "text_lost", str(error))
        return
    if (longest := max(map(len, found))) > max_tokens:
        reason = f"expected answers of at most {max_tokens} tokens with their prompt (config.data.max_tokens), found "
        shard.skip(whole.origin, "too_long", f"{reason}{longest}")
    elif np.array_equal(found[0].tokens, found[1].tokens):
        shard.skip(whole.origin, "same_answers", "expected two answers, found the same tokens twice")
    else:
        for document, each, part in zip(both, found, (shards.CHOSEN, shards.REJECTED), strict=True):
            shard.write(each, item=item.number, part=part, pair=False, **_counted(document))


def _counted(document: Document) -> dict[str, int]:
    """What the index says about a document, besides its number of tokens."""
    texts = [part.text for part in document.parts if isinstance(part, TextPart)]
    return {
        "text_bytes": sum(len(text.encode()) for text in texts),
        "task": TASKS.index(document.task),
        "images": len(document.parts) - len(texts),
    }


def _unit(document: Document) -> str:
    return "question with its answer" if document.asks else "image or character"
