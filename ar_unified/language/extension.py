"""Adds images to a language model's id space. Its text ids keep their numbers, and their rows in the tables.

    [ text | its controls | rest ]   becomes   [ text | controls of the layout | sizes | image codes | rest ]

A control of the model and a control of the layout that have the same name become one. The rest contains the model's
controls that the layout does not need, and the ids that the model's tokenizer never wrote. All these ids keep their
rows, and the softmax still includes them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ar_unified.language.border import Border, MappedCodec
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import ImageLayout, vocabulary_for
from ar_unified.language.vocabulary import Vocabulary


def extended(grammar: Grammar, layout: ImageLayout, codebook_size: int, image_hash: str = "") -> Grammar:
    """The grammar of a language model with the ids that images of `layout` need.

    If the model has published ids, the border grows: these ids keep their order, and the new ids follow them.

    Raises ValueError if the model already has image codes, or if its text tokenizer cannot write the layout's texts.
    """
    old, codec = grammar.vocabulary, grammar.text_codec
    if old.codebook_size:
        raise ValueError(f"expected a vocabulary of text alone, found one with {old.codebook_size} image codes")
    new = vocabulary_for(layout, old.text_size, codebook_size, old.text_hash, image_hash)
    new = replace(new, rest=len(_left(old, new)) + old.used - old.rest_offset)
    if isinstance(codec, MappedCodec):
        rows = rows_of(old, new)[: new.used]
        ids = np.where(rows >= 0, codec.border.theirs[np.maximum(rows, 0)], -1)
        ids[rows < 0] = codec.border.size + np.arange(np.sum(rows < 0))
        codec = replace(codec, border=Border.from_ids(ids))
        new = replace(new, text_hash=codec.hash)
    return Grammar(new, layout, codec)


def rows_of(old: Vocabulary, new: Vocabulary) -> np.ndarray:
    """int32 [new.size]: for each row of a table [new.size, ...], its row in a table [old.size, ...]; -1 for a new row.

    new: the result of `extended` for `old`.
    """
    rows = np.full(new.size, -1, np.int32)
    rows[: old.text_size] = np.arange(old.text_size)
    for name in set(old.controls) & set(new.controls):
        rows[new.control(name)] = old.control(name)
    rest = [*_left(old, new), *range(old.rest_offset, old.used)]
    rows[new.rest_offset : new.rest_offset + len(rest)] = rest
    return rows


def new_ids(old: Vocabulary, new: Vocabulary) -> tuple[int, ...]:
    """Ids of `new` that are used and have no row in `old`, ascending."""
    return tuple(np.flatnonzero(rows_of(old, new)[: new.used] < 0).tolist())


def _left(old: Vocabulary, new: Vocabulary) -> list[int]:
    """Old ids of the controls that the new vocabulary does not have."""
    return [old.control(name) for name in old.controls if name not in new.controls]
