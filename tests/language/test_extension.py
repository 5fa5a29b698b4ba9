"""A language model's ids with images added: text keeps its ids, old ids keep their rows, and published ids keep their
numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ar_unified.language.border import Border, MappedCodec
from ar_unified.language.document import CodesPart, Document, TextPart
from ar_unified.language.extension import extended, new_ids, rows_of
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import TEXT_ALONE, ImageLayout, fixed_grid, sized_rows
from ar_unified.language.vocabulary import Role, Vocabulary
from tests.sampling.tiny import Letters


@dataclass(frozen=True)
class Published:
    """A tokenizer of 20 ids, of which 3..18 are letters."""

    size: int = 20
    hash: str = "published"

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) - ord("a") for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + id - 3) for id in ids)


# Theirs: 0 bos  1 eos  2 pad  3..18 letters  19 <|reserved|>
BORDER = Border.from_ids([*range(3, 19), 2, 0, 1, 19])
PLAIN = ImageLayout("plain", 1, 1)


def published() -> Grammar:
    codec = MappedCodec(Published(), BORDER, 16)
    return Grammar(Vocabulary(16, 0, text_hash=codec.hash, controls=("pad", "bos", "eos"), rest=1), PLAIN, codec)


@pytest.mark.parametrize("layout, sizes", [(fixed_grid(2, 2), 0), (sized_rows(3, 4), 4)])
def test_what_was_there_keeps_its_row_and_the_rest_is_new(layout, sizes):
    before = published()
    after = extended(before, layout, 8, "image")
    old, new = before.vocabulary, after.vocabulary
    assert (new.text_size, new.size_tokens, new.codebook_size, new.image_hash) == (16, sizes, 8, "image")
    rows = rows_of(old, new)
    assert rows[:16].tolist() == list(range(16))
    assert [rows[new.control(name)] for name in ("pad", "bos", "eos")] == [16, 17, 18]
    assert rows[new.rest_offset] == old.rest_offset and new.used == new.rest_offset + 1
    assert new_ids(old, new) == tuple(np.flatnonzero(rows[: new.used] < 0))
    assert len(new_ids(old, new)) == 4 + sizes + 8  # eot, boi, eoi, eol
    assert set(new.ids(Role.IMAGE)) < set(new_ids(old, new))


def test_the_published_table_grows_at_its_end_and_text_is_spelled_as_before():
    before, layout = published(), sized_rows(3, 4)
    after = extended(before, layout, 8)
    codec: Any = after.text_codec
    border = codec.border
    assert border.size == after.vocabulary.used == 20 + 4 + 4 + 8
    theirs = {name: border.theirs[after.vocabulary.control(name)] for name in ("pad", "bos", "eos", "eot")}
    assert theirs == {"pad": 2, "bos": 0, "eos": 1, "eot": 20}
    assert border.theirs[after.vocabulary.ids(Role.IMAGE)].tolist() == list(range(28, 36))
    assert border.theirs[after.vocabulary.rest_offset] == 19
    assert after.text_codec.encode("abc") == before.text_codec.encode("abc")
    document = Document.of([TextPart("abc"), CodesPart(np.array([[1, 7], [3, 0]], np.int32))], 1)
    assert after.parse(after.encode(document).tokens) == document
    assert Grammar.from_manifest(after.manifest(), after.text_codec).manifest() == after.manifest()


def test_our_own_model_of_text_is_extended_too():
    before = Grammar(Vocabulary(16, 0), TEXT_ALONE, Letters())
    after = extended(before, fixed_grid(2, 2), 8)
    rows = rows_of(before.vocabulary, after.vocabulary)
    assert rows[: 16 + 7].tolist() == list(range(16 + 7)), "all controls are there already"
    assert new_ids(before.vocabulary, after.vocabulary) == tuple(range(23, 31))
    assert rows[31 : after.vocabulary.used].tolist() == list(range(23, 128)), "the rest keeps its rows"


def test_controls_that_a_layout_does_not_need_are_kept_in_the_rest():
    before = Grammar(Vocabulary(16, 0, rest=0), TEXT_ALONE, Letters())
    after = extended(before, ImageLayout("simplear", 2, 2), 8)
    rows = rows_of(before.vocabulary, after.vocabulary)[: after.vocabulary.used]
    assert sorted(rows[rows >= 0]) == list(range(23)) and after.vocabulary.rest == 3  # the rest has eot, eoi, eol


def test_a_model_with_images_is_refused():
    with pytest.raises(ValueError, match="expected a vocabulary of text alone, found one with 8 image codes"):
        extended(Grammar(Vocabulary(16, 8), fixed_grid(2, 2), Letters()), fixed_grid(2, 2), 8)
