"""A published id space and ours: each id is there once on both sides, and tables convert both ways."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.language.border import Border, Ids, MappedCodec
from ar_unified.language.syntax import ImageLayout
from ar_unified.language.vocabulary import Role, Vocabulary

# Theirs:  0 bos  1 pad  2 eos  3..5 codes  6..8 text  9 rest        Ours: 3 of text, controls, codes, rest
THEIRS = [6, 7, 8, 1, 0, 2, 3, 4, 5, 9]
BORDER = Border.from_ids(THEIRS)


def test_runs_are_as_long_as_they_can_be_and_sorted_by_theirs():
    assert BORDER.runs == ((0, 4, 1), (1, 3, 1), (2, 5, 4), (6, 0, 3), (9, 9, 1))
    assert BORDER.size == 10
    assert BORDER.theirs.tolist() == THEIRS and BORDER.theirs.dtype == np.int32
    assert BORDER.ours.tolist() == [4, 3, 5, 6, 7, 8, 0, 1, 2, 9] and BORDER.ours.dtype == np.int32
    assert Border.from_ids(range(70_000)).runs == ((0, 0, 70_000),)
    assert Border.from_ids([1, 0]).runs == ((0, 1, 1), (1, 0, 1))


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(12)))
def test_any_order_there_and_back(theirs):
    border = Border.from_ids(theirs)
    assert border.theirs.tolist() == list(theirs)
    np.testing.assert_array_equal(border.ours[border.theirs], np.arange(12))
    assert Border.from_manifest(json.loads(json.dumps(border.manifest()))) == border
    table = np.random.default_rng(0).normal(size=(12, 3))
    np.testing.assert_array_equal(border.gather(table), table[list(theirs)])
    np.testing.assert_array_equal(border.scatter(border.gather(table)), table)


@pytest.mark.parametrize(
    "ids, says",
    [
        ([0, 1, 3], "published ids 0, 1, 2, ... each once; id 2 is"),  # one is missing
        ([0, 1, 1], "published ids 0, 1, 2, ... each once; id 1 is"),  # one is there twice
        ([1, 2], "published ids 0, 1, 2, ... each once; id 0 is"),
        ([-1, 0], "published ids 0, 1, 2, ... each once; id -1 is"),
        ([], "expected published ids"),
        ([[0, 1]], r"found int64 \[1, 2\]"),
    ],
)
def test_ids_that_are_no_bijection_are_refused(ids, says):
    with pytest.raises(ValueError, match=says):
        Border.from_ids(ids)


@pytest.mark.parametrize(
    "runs, says",
    [
        ([], "at least one run"),
        ([[0, 0, 2], [2, 3, 1]], "our ids 0, 1, 2, ... each once; id 2 is"),
        ([[0, 0, 2], [1, 2, 1]], "published ids 0, 1, 2, ... each once; id 1 is"),
        ([[0, 0, 1], [1, 1, 0]], "published ids 0, 1, 2, ... each once"),
    ],
)
def test_runs_that_are_no_bijection_are_refused(runs, says):
    with pytest.raises(ValueError, match=says):
        Border.from_manifest(runs)


def test_tables_of_another_length_are_refused_and_padded_ones_are_cut():
    table = jnp.arange(20.0).reshape(10, 2)
    ours = BORDER.gather(table)
    assert ours[:, 0].tolist() == [2.0 * id for id in THEIRS]
    padded = jnp.pad(ours, ((0, 6), (0, 0)), constant_values=-1)
    np.testing.assert_array_equal(BORDER.scatter(padded), table)
    for wrong in (table[:9], jnp.pad(table, ((0, 1), (0, 0)))):
        with pytest.raises(ValueError, match="expected a table of 10 rows, found"):
            BORDER.gather(wrong)
    with pytest.raises(ValueError, match="found 9"):
        BORDER.scatter(ours[:9])


class Theirs:
    """Letters a..c are ids 6..8; "<" is the bos, ">" an id beyond the table."""

    size, hash, file, data, losses, symbols = 12, "theirs", "text.model", b"", (), []
    piece_bytes = np.array([0] * 6 + [1, 2, 3] + [0] * 3, np.int32)

    def encode(self, text):
        ids = {"a": 6, "b": 7, "c": 8, "<": 0, ">": 11}
        return [ids[letter] for letter in text]

    def is_byte(self, id):
        return id == 7

    def decode(self, ids):
        return "".join("<" if id == 0 else "abc"[id - 6] for id in ids)


def test_a_text_tokenizer_speaks_our_ids():
    codec = MappedCodec(Theirs(), BORDER, 3)
    assert codec.encode("cab") == [2, 0, 1] and codec.decode([2, 0, 1]) == "cab"
    assert all(type(id) is int for id in codec.encode("cab"))
    assert codec.encode("") == [] and codec.decode([]) == ""
    for text in ("a<b", "a>b"):
        with pytest.raises(ValueError, match=f"'{text}' is encoded with an id that is not a text piece"):
            codec.encode(text)
    for ids in ([3], [0, -1]):
        with pytest.raises(ValueError, match=r"text ids must be in \[0, 3\)"):
            codec.decode(ids)
    assert codec.piece_bytes.tolist() == [1, 2, 3] and [codec.is_byte(id) for id in range(3)] == [False, True, False]
    vocabulary = Vocabulary(3, 3, text_hash="hash", controls=("pad", "bos", "eos"), rest=1)
    assert (vocabulary.pad, vocabulary.image_offset, vocabulary.rest_offset, vocabulary.used) == (3, 6, 9, BORDER.size)


def test_the_pieces_of_a_border_are_those_of_its_tokenizer():
    hashes = {MappedCodec(Theirs(), border, size).hash for border, size in ((BORDER, 3), (BORDER, 2))}
    assert len(hashes) == 2 and "theirs" not in hashes
    for theirs, size, says in (
        ([6, 7, 8, 1, 0, 2, 3, 4, 5, 9], 11, "expected 1 to 10 text pieces, found 11"),
        ([6, 7, 8, 1, 0, 2, 3, 4, 5, 9], 0, "expected 1 to 10 text pieces, found 0"),
        ([7, 6, 8, 1, 0, 2, 3, 4, 5, 9], 3, "in the order of the published ids"),
        ([6, 7, 12, *range(6), 8, 9, 10, 11], 3, "ids of text pieces below 12, the size of text.model; found 12"),
    ):
        with pytest.raises(ValueError, match=says):
            MappedCodec(Theirs(), Border.from_ids(theirs), size)


def test_ids_go_across_for_those_who_compare():
    ids = Ids(BORDER, 10)
    tokens = np.array([[0, 6, 9], [3, 2, 8]])
    assert ids.ours(tokens).tolist() == [[4, 0, 9], [6, 5, 2]] and ids.ours(tokens).dtype == np.int32
    np.testing.assert_array_equal(ids.theirs(ids.ours(tokens)), tokens)
    assert ids.ours(range(10)).tolist() == BORDER.ours.tolist() and ids.ours([]).tolist() == []
    same = Ids(None, 10)
    np.testing.assert_array_equal(same.ours(tokens), same.theirs(tokens))
    np.testing.assert_array_equal(same.ours(tokens), tokens)
    for each in (ids, same):
        for across in (each.ours, each.theirs):
            for wrong, says in (
                ([0, 10], r"expected 0\.\.9, found 0\.\.10"),
                ([-1], r"found -1\.\.-1"),
                ([0.5], "whole numbers"),
            ):
                with pytest.raises(ValueError, match=says):
                    across(wrong)


@pytest.mark.parametrize("runs", [[[0, 0]], [[0, 0, 1.0]], {"a": 1}, [[0, 0, 1 << 40]], [[0, 0, True]], None, [1]])
def test_runs_that_somebody_sent_are_refused(runs):
    with pytest.raises(ValueError, match="border: expected"):
        Border.from_manifest(runs)


# ---- real tables, of full size: ids of the published tokenizers -----------------------------------


def published(kind, side, text, controls, size_one, codes, V):
    """The vocabulary of a layout for a published table of V ids, and the border between them: text, controls, sizes
    from `size_one` on, codes, and then all other ids."""
    layout = ImageLayout(kind, side, side)
    names = layout.record.controls
    sizes = np.arange(layout.size_tokens) + size_one
    known = np.concatenate([text, [controls[name] for name in names], sizes, codes]).astype(np.int64)
    others = np.setdiff1d(np.arange(V), known)
    vocabulary = Vocabulary(len(text), len(codes), len(sizes), controls=names, rest=len(others))
    return vocabulary, Border.from_ids(np.concatenate([known, others]))


def check(vocabulary, border, named):
    assert vocabulary.used == border.size
    assert Border.from_manifest(json.loads(json.dumps(border.manifest()))) == border
    for ours, theirs in named.items():
        assert border.theirs[ours] == theirs and border.ours[theirs] == ours
    roles = vocabulary.role(border.ours)  # the role of each published id
    codes = np.flatnonzero(roles == Role.IMAGE)
    assert len(codes) == vocabulary.codebook_size and np.all(np.diff(codes) == 1)


@pytest.mark.parametrize("kind", ["chameleon", "lumina_mgpt"])
def test_chameleon_s_ids(kind):
    controls = {"bos": 0, "pad": 1, "eos": 2, "eot": 8710, "boi": 8197, "eoi": 8196, "eol": 8803}
    v, border = published(kind, 96, np.arange(9000, 65536), controls, 8805, np.arange(4, 8196), 65536)
    assert (v.used, v.size) == (65536, 65536) and len(border.runs) < 20
    named = {v.control(name): controls[name] for name in v.controls}
    named |= {v.image_offset: 4, v.rest_offset - 1: 8195, v.rest_offset: 3, 0: 9000}
    if kind == "lumina_mgpt":  # 48 sizes of 32 pixels
        named |= {v.size_offset: 8805, v.size_offset + 47: 8852, v.rest_offset - 8193: 8852}
    check(v, border, named)


@pytest.mark.parametrize("kind, codes", [("emu3", 32768), ("emu3_5", 131072)])
def test_emu3_s_ids(kind, codes):
    controls = {
        "pad": 151643, "bos": 151849, "eos": 151850, "img": 151851, "boi": 151852, "eoi": 151853, "eol": 151846,
        "eof": 151847, "frame": 151848, "bss": 151746, "ess": 151747, "boc": 151696, "eoc": 151697, "bog": 151706,
        "eog": 151707,
    }  # fmt: skip
    V = 151854 + codes
    v, border = published(kind, 128, np.arange(151643), controls, 0, np.arange(151854, V), V)
    assert v.used == V == {"emu3": 184622, "emu3_5": 282926}[kind] and v.size - v.used == 82
    assert len(border.runs) < 25 and border.runs[0] == (0, 0, 151644)
    named = {v.control(name): controls[name] for name in v.controls}
    named |= {v.image_offset: 151854, v.rest_offset - 1: V - 1}
    named |= {id: id for id in (9, *range(15, 25))}  # "*" and the digits of sizes are text
    check(v, border, named)
