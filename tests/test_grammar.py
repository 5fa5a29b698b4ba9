"""parse(encode(d)) == d; what does not parse says where; tokens are rearranged as documents would be."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.document import TASKS, CodesPart, Document, ImagePart, TextPart
from ar_unified.grammar import TEXT_ALONE, Grammar, GrammarError, ImageLayout, fixed_grid, sized_rows
from ar_unified.manifests import ManifestMismatch
from ar_unified.vocabulary import Role, Vocabulary


class Utf8:
    """Text as its bytes."""

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Latin:
    """One id a character: every run of ids is a text, and no two are the same."""

    def encode(self, text):
        return list(text.encode("latin-1"))

    def decode(self, ids):
        return bytes(ids).decode("latin-1")


CODEBOOK = 6
GRID = Grammar(Vocabulary(256, CODEBOOK), fixed_grid(2, 3), Utf8())
ROWS = Grammar(Vocabulary(256, CODEBOOK, max_side=4), sized_rows(3, 4), Utf8())
both = pytest.mark.parametrize("grammar", [GRID, ROWS], ids=["grid", "rows"])


def picture(h, w, first=0):
    return CodesPart(((np.arange(h * w) + first) % CODEBOOK).astype(np.int32).reshape(h, w))


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
LATIN = st.text(st.characters(max_codepoint=255), min_size=1, max_size=4)


@st.composite
def documents(draw, grammar, text=UNICODE):
    """Texts and pictures (of many sizes, if the layout has them), with and without a turn."""
    layout = grammar.layout
    sides = [st.integers(1 if layout.sized else n, n) for n in (layout.height, layout.width)]
    kinds = draw(st.lists(st.sampled_from("ti"), max_size=7))
    prompt = draw(st.none() | st.integers(0, len(kinds)))
    parts, border = [], None
    for i, kind in enumerate(kinds):
        border = len(parts) if i == prompt else border
        if kind == "i":
            parts.append(picture(*(draw(side) for side in sides), draw(st.integers(0, CODEBOOK - 1))))
        elif not parts or len(parts) == border or not isinstance(parts[-1], TextPart):
            parts.append(TextPart(draw(text)))
    return Document(tuple(parts), len(parts) if prompt == len(kinds) else border)


@both
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_parse_is_the_inverse_of_encode(grammar, data):
    document = data.draw(documents(grammar))
    tokens = grammar.encode(document)
    assert tokens.dtype == np.int32
    assert grammar.parse(tokens) == document
    assert TASKS[grammar.task(tokens)] == document.task

    pictures = [part.codes.shape for part in document.parts if isinstance(part, CodesPart)]
    texts = [part.text for part in document.parts if isinstance(part, TextPart)]
    roles = np.bincount(grammar.vocabulary.role(tokens), minlength=len(Role))
    assert roles[Role.PAD] == 0
    assert roles[Role.TEXT] == sum(len(text.encode()) for text in texts)
    assert roles[Role.IMAGE] == sum(h * w for h, w in pictures)
    assert roles[Role.SIZE] == 2 * len(pictures) * grammar.layout.sized
    expected = 2 + (document.prompt is not None) + roles[Role.TEXT]
    assert len(tokens) == expected + sum(grammar.image_tokens(*shape) for shape in pictures)


@both
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_parses_is_what_encode_writes(grammar, data):
    """One token replaced, removed or doubled: refused with its place, or the encoding of another document."""
    exact = Grammar(grammar.vocabulary, grammar.layout, Latin())
    document = data.draw(documents(exact, LATIN))
    tokens = exact.encode(document)
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(250, exact.vocabulary.image_offset + CODEBOOK + 1) | st.just(-1))
    for changed in (
        np.concatenate([tokens[:at], [other], tokens[at + 1 :]]),
        np.delete(tokens, at),
        np.insert(tokens, at, tokens[at]),
        tokens[:at],
    ):
        try:
            found = exact.parse(changed)
        except GrammarError as error:
            assert at <= error.position <= len(changed)  # nothing before the change is blamed
        else:
            np.testing.assert_array_equal(exact.encode(found), changed)


def test_how_documents_look_on_the_wire():
    v = ROWS.vocabulary
    side = v.size_offset - 1
    tokens = ROWS.encode(Document((TextPart("a"), picture(1, 2, 4)), 1))
    code = v.image_offset
    expected = [v.bos, 97, v.eot, v.boi, side + 1, side + 2, code + 4, code + 5, v.eol, v.eoi, v.eos]
    assert tokens.tolist() == expected
    v = GRID.vocabulary
    tokens = GRID.encode(Document((picture(2, 3),)))
    assert tokens.tolist() == [v.bos, v.boi, *range(v.image_offset, v.image_offset + 6), v.eoi, v.eos]
    assert GRID.prompt_tokens([TextPart("a")], turn=True).tolist() == [v.bos, 97, v.eot]
    assert GRID.prompt_tokens([TextPart("a")], turn=False).tolist() == [v.bos, 97]
    assert GRID.prompt_tokens([], turn=True).tolist() == GRID.unconditional.tolist()


class Lossy(Utf8):
    def decode(self, ids):
        return super().decode(ids).replace("\t", " ")


SMALL = Grammar(Vocabulary(100, CODEBOOK), fixed_grid(2, 3), Utf8())
LOSSY = Grammar(GRID.vocabulary, GRID.layout, Lossy())


@pytest.mark.parametrize(
    "grammar, parts, says",
    [
        (GRID, (TextPart("a"), picture(3, 2)), r"part 1: expected .* exactly 2 x 3 codes .*, found 3 x 2"),
        (ROWS, (picture(4, 4),), r"part 0: expected .* at most 3 x 4 codes .*, found 4 x 4"),
        (GRID, (CodesPart(picture(2, 3).codes + 1),), r"codes 0\.\.5 .*, found 1\.\.6"),
        (GRID, (CodesPart(picture(2, 3).codes - 1),), r"codes 0\.\.5 .*, found -1\.\.4"),
        (GRID, (picture(2, 3), TextPart("")), r"part 1: .*found the text is empty"),
        (GRID, (TextPart("a"), TextPart("b")), r"part 1: .*found text right after text"),
        (GRID, (ImagePart(np.zeros((4, 4, 3), np.uint8)),), r"expected codes .*, found pixels"),
        (SMALL, (TextPart("aé"),), r"ids 0\.\.99 from the text"),
        (LOSSY, (TextPart("a\tc"),), r"'\\tc' at character 1, found ' c'"),
    ],
)
def test_what_cannot_be_written_is_refused(grammar, parts, says):
    with pytest.raises(GrammarError, match=says):
        grammar.encode(Document(parts))


V, S, C = ROWS.vocabulary, ROWS.vocabulary.size_offset - 1, ROWS.vocabulary.image_offset


@pytest.mark.parametrize(
    "tokens, position, expected, found",
    [
        ([], 0, "<bos>", "the end of the sequence"),
        ([97], 0, "<bos>", "text piece 97"),
        ([V.bos, 97], 2, "<eos>", "the end of the sequence"),
        ([V.bos, V.eos, V.pad], 2, "the end of the sequence", "<pad>"),
        ([V.bos, V.eot, V.eot, V.eos], 2, "text, <boi> or <eos>", "<eot>"),
        ([V.bos, C, V.eos], 1, "text, <boi>, <eot> or <eos>", "image code 0"),
        ([V.bos, V.boi, C], 2, "a side token for the height, 1..3", "image code 0"),
        ([V.bos, V.boi, S + 4], 2, "a side token for the height, 1..3", "side 4"),
        ([V.bos, V.boi, S + 1], 3, "a side token for the width, 1..4", "the end of the sequence"),
        ([V.bos, V.boi, S + 1, S + 2, C, V.eol], 5, "an image code (row 0, column 1 of 1 x 2)", "<eol>"),
        ([V.bos, V.boi, S + 2, S + 1, C, C], 5, "<eol> (row 0, column 1 of 2 x 1)", "image code 0"),
        ([V.bos, V.boi, S + 1, S + 1, C, V.eol, V.eos], 6, "<eoi>", "<eos>"),
    ],
)
def test_parse_says_where_and_what(tokens, position, expected, found):
    with pytest.raises(GrammarError) as caught:
        ROWS.parse(tokens)
    error = caught.value
    assert (error.position, error.expected, error.found) == (position, expected, found)


@both
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tokens_are_rearranged_as_documents_are(grammar, data):
    document = data.draw(documents(grammar))
    tokens, border = grammar.encode(document), document.prompt
    if border is None:
        for turn in (grammar.drop_prompt, grammar.swap_turn):
            with pytest.raises(GrammarError, match="a turn"):
                turn(tokens)
    else:
        prompt, answer = document.parts[:border], document.parts[border:]
        dropped = grammar.drop_prompt(tokens)
        assert grammar.parse(dropped) == Document(answer, 0)
        np.testing.assert_array_equal(dropped[: len(grammar.unconditional)], grammar.unconditional)
        assert grammar.parse(grammar.swap_turn(tokens)) == Document(answer + prompt, len(answer))
        np.testing.assert_array_equal(grammar.swap_turn(grammar.swap_turn(tokens)), tokens)

    pictures = [i for i, part in enumerate(document.parts) if isinstance(part, CodesPart)]
    for index, i in enumerate(pictures):
        if border is not None and i < border:
            with pytest.raises(GrammarError, match="outside the prompt"):
                grammar.drop_context(tokens, index)
        else:
            assert grammar.parse(grammar.drop_context(tokens, index)) == Document(document.parts[i:], 0)
    with pytest.raises(GrammarError, match=f"found {len(pictures)} pictures"):
        grammar.drop_context(tokens, len(pictures))


@both
def test_manifest_there_and_back(grammar):
    manifest = json.loads(json.dumps(grammar.manifest()))
    again = Grammar.from_manifest(manifest, Utf8())
    assert (again.vocabulary, again.layout) == (grammar.vocabulary, grammar.layout)
    assert again.manifest() == manifest
    manifest["grammar"]["depth"] = 4
    with pytest.raises(ManifestMismatch, match="grammar.depth"):
        Grammar.from_manifest(manifest, Utf8())
    with pytest.raises(ManifestMismatch, match="no grammar"):
        Grammar.from_manifest(grammar.vocabulary.manifest(), Utf8())


def test_a_grammar_refuses_another_text_tokenizer_and_sides_it_cannot_say():
    codec = Utf8()
    codec.hash, codec.size = "mine", 256
    Grammar(Vocabulary(256, 4, text_hash="mine"), fixed_grid(1, 1), codec)
    with pytest.raises(ManifestMismatch, match="hash 'theirs'.*hash 'mine'"):
        Grammar(Vocabulary(256, 4, text_hash="theirs"), fixed_grid(1, 1), codec)
    with pytest.raises(ManifestMismatch, match="size 300"):
        Grammar(Vocabulary(300, 4, text_hash="mine"), fixed_grid(1, 1), codec)
    with pytest.raises(ValueError, match="max_side: expected at least 4"):
        Grammar(Vocabulary(256, 4, max_side=3), sized_rows(3, 4), Utf8())
    with pytest.raises(ValueError, match='"grid" or "rows"'):
        ImageLayout("spiral", 1, 1)


def test_a_vocabulary_of_text_alone_refuses_pictures():
    alone = Grammar(Vocabulary(256, 0), TEXT_ALONE, Utf8())
    document = Document((TextPart("a"), TextPart("b")), prompt=1)
    assert alone.parse(alone.encode(document)) == document
    with pytest.raises(
        GrammarError, match="part 1: expected a text .this vocabulary is of text alone., found a picture"
    ):
        alone.encode(Document((TextPart("a"), picture(1, 1))))
    v = alone.vocabulary
    with pytest.raises(GrammarError):
        alone.parse([v.bos, v.boi, v.image_offset, v.eoi, v.eos])
    assert Grammar.from_manifest(alone.manifest(), Utf8()).manifest() == alone.manifest()
