"""parse(encode(d)) == d; errors name the position; rearranging tokens is the same as rearranging documents."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.language.automaton import DONE, PARTS, Opened
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart, Turn
from ar_unified.language.grammar import Grammar
from ar_unified.language.layouts import LAYOUTS, Text, TurnFrames, TurnTemplate
from ar_unified.language.reading import GrammarError
from ar_unified.language.syntax import TEXT_ALONE, ImageLayout, fixed_grid, sized_rows
from ar_unified.language.turns import joined_texts
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.manifests import ManifestMismatch
from tests.language.small import (
    CODEBOOK,
    LATIN,
    LETTER,
    LETTERS,
    Latin,
    Pieces,
    Utf8,
    counted,
    documents,
    every,
    grammar_of,
    image,
    marked,
)

GRID = Grammar(Vocabulary(256, CODEBOOK), fixed_grid(2, 3), Utf8())
ROWS = Grammar(Vocabulary(256, CODEBOOK, size_tokens=4), sized_rows(3, 4), Utf8())
BOI, EOI, EOT, EOL = map(GRID.vocabulary.control, ("boi", "eoi", "eot", "eol"))


def spoken(document, turns):
    """The turns of a conversation, with the system turn that the layout adds."""
    brings = document.asks and document.turns[0].speaker != "system" and turns.system
    return [*([Turn("system", (TextPart(turns.system),))] if brings else []), *document.turns]


def told(document, turns):
    """The content of a conversation if its turns cannot be parsed: everything, with neighbouring texts joined."""
    parts = []

    def say(*more):
        for part in more:
            if isinstance(part, TextPart) and parts and isinstance(parts[-1], TextPart):
                part = TextPart(parts.pop().text + part.text)
            parts.extend([part] if part != TextPart("") else [])

    framed = isinstance(turns, TurnFrames) and document.asks
    for i, turn in enumerate(spoken(document, turns)):
        around = ["", ""]
        if framed and turn.speaker != "assistant":
            around[0] = (turns.between if i else "") + turns.name.format(turn.speaker)
        if turn.speaker == "user":
            spelled = turns.between + turns.name.format("assistant") if framed else turns.user
            around = [around[0], spelled] if framed else spelled.split("{}")
        say(TextPart(around[0]), *turn.parts, TextPart(around[1]))
    return Document((Turn("document", tuple(parts)),))


@pytest.mark.parametrize("depth", [1, 2])
@every
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_parse_is_the_inverse_of_encode(kind, depth, data):
    grammar = grammar_of(kind, depth=depth, codec=Utf8(), text_size=256)
    v, layout = grammar.vocabulary, grammar.layout
    document = data.draw(documents(grammar))
    found = grammar.encode(document)
    assert (found.tokens.dtype, found.marks.dtype) == (np.int32, np.uint8)
    said = document if marked(kind) else told(document, layout.record.turns)
    assert grammar.parse(found.tokens) == said
    # Where questions and answers have the same end, an answer may still follow.
    framed = isinstance(layout.record.turns, TurnFrames) and document.asks
    ended = Opened(PARTS if counted(kind) or framed else DONE)
    assert grammar.breaks_off(found.tokens) == (len(found), ended)
    assert grammar.breaks_off(found.tokens[: len(found) - len(grammar.tail)]).opened == ended
    for cut in data.draw(st.lists(st.integers(1, len(found)), max_size=5)):
        before = grammar.breaks_off(found.tokens[:cut])  # every prefix is a prompt
        assert (
            before.begin == cut
            if before.opened.phase in (PARTS, DONE) and not before.opened.written
            else before.begin < cut
        )
        assert (
            before.begin == cut or before.begin in found.images or found.tokens[before.begin] == grammar.syntax.open[0]
        )

    # Roles, speakers and what is learned, of each turn and each image.
    shapes = [part.codes.shape for part in document.parts if isinstance(part, CodesPart)]
    texts = [part.text for part in said.parts if isinstance(part, TextPart)]
    roles = np.bincount(found.roles, minlength=len(Role))
    assert roles[Role.PAD] == 0
    assert roles[Role.TEXT] == sum(len(text.encode()) for text in texts)
    assert roles[Role.IMAGE] == sum(h * w for h, w in shapes)
    assert roles[Role.SIZE] == sum(layout.header(*shape) for shape in shapes)
    speakers = [turn.speaker for turn in document.turns]
    asks = speakers.count("system") + speakers.count("user")
    begin = 1
    if isinstance(layout.record.turns, TurnTemplate):
        asks = speakers.count("user") * len(layout.record.turns.answer)
    elif not marked(kind):  # an id before each turn, and the end after it
        framed = [turn.speaker for turn in spoken(document, layout.record.turns)] if document.asks else []
        asks, begin = 2 * len(framed) - speakers.count("assistant"), 1 - document.asks
    ends = speakers.count("document") + speakers.count("assistant") + len(grammar.tail)
    images = sum(grammar.image_tokens(*shape) for shape in shapes)
    assert len(found) == begin + asks + ends + roles[Role.TEXT] + images
    assert found.tokens[found.images].tolist() == [grammar.syntax.open[0]] * len(shapes)
    np.testing.assert_array_equal((v.role(found.tokens) == Role.IMAGE), found.roles == Role.IMAGE)
    if marked(kind):
        starts = [*found.turns.tolist(), len(found)]
        assert len(starts) == len(document.turns) + 1 and starts[0] == 0
        for turn, begin, end in zip(document.turns, starts, starts[1:], strict=False):
            who = ("document", "system", "user", "assistant").index(turn.speaker)
            assert set(found.speakers[begin:end]) == {who} and set(found.trained[begin:end]) == {turn.learned}


@every
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_parses_is_what_encode_writes(kind, data):
    """With one token replaced, removed or doubled, the ids are refused with a position, or they encode another
    document."""
    exact = grammar_of(kind, codec=Latin(), text_size=256)
    v = exact.vocabulary
    document = data.draw(documents(exact, LATIN, exchanges=3 if marked(kind) else 0))
    tokens = exact.encode(document).tokens
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(250, v.rest_offset + 1) | st.sampled_from([-1, 42, *b"0123456789", 10**6]))
    # Text after a spelled mark may change the mark's tokens, which are then text.
    early = len(exact.syntax.open) if exact.syntax.spelled else 0
    for changed in (
        np.concatenate([tokens[:at], [other], tokens[at + 1 :]]),
        np.delete(tokens, at),
        np.insert(tokens, at, tokens[at]),
        tokens[:at],
    ):
        try:
            found = exact.parse(changed)
        except GrammarError as error:
            assert at - early <= error.position <= len(changed)  # the error is not before the change
        else:
            if told_apart(exact, changed):
                np.testing.assert_array_equal(exact.encode(found).tokens, changed)


def told_apart(grammar, tokens):
    """Whether these ids tell the turns apart. If not, several turns are parsed as a document without turns."""
    marks = grammar.layout.record.turns
    if marked(grammar.layout.kind):
        return True
    names = [marks.open] if isinstance(marks, TurnFrames) else marks.answer
    begun = np.isin(tokens, [grammar.vocabulary.control(name) for name in names])
    return (tokens == grammar.syntax.end).sum() == 1 and not begun.any()


@every
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_ids_of_any_kind_are_read_or_refused(kind, data):
    """Random ids, valid and invalid ones, give a document with exactly these ids, or an error at one of them."""
    exact = grammar_of(kind, codec=Latin(), text_size=256)
    v, syntax = exact.vocabulary, exact.syntax
    likely = [*syntax.open, *syntax.start, *syntax.close, *syntax.digits, syntax.row_end, syntax.separator]
    ids = st.sampled_from([*likely, v.pad, syntax.end, -1, 97, v.size, *range(v.control_offset, v.rest_offset)])
    blue = np.array([v.bos, *data.draw(st.lists(ids, max_size=12))])
    for tokens in (blue, np.concatenate([blue[:1], syntax.open, blue[1:]])):
        try:
            before = exact.breaks_off(tokens)
        except GrammarError as error:
            assert 0 < error.position < len(tokens)
            with pytest.raises(GrammarError) as caught:
                exact.parse(tokens)
            assert caught.value.position == error.position
            continue
        assert 0 < before.begin <= len(tokens)
        ended = tokens[-1] in (syntax.end, *exact.tail)
        assert (before.opened.phase == DONE) == (ended and not counted(kind))
        if ended:
            if tokens[-1] == syntax.end:
                tokens = np.concatenate([tokens, exact.tail])
            found = exact.parse(tokens)
            if told_apart(exact, tokens):
                np.testing.assert_array_equal(exact.encode(found).tokens, tokens)


def test_how_documents_look_on_the_wire():
    v = ROWS.vocabulary
    side = v.size_offset - 1
    tokens = ROWS.encode(Document.of((TextPart("a"), image(1, 2, 4)), 1)).tokens
    code = v.image_offset
    expected = [v.bos, 97, EOT, BOI, side + 1, side + 2, code + 4, code + 5, EOL, EOI, v.eos]
    assert tokens.tolist() == expected
    v = GRID.vocabulary
    tokens = GRID.encode(Document.of((image(2, 3),))).tokens
    assert tokens.tolist() == [v.bos, BOI, *range(v.image_offset, v.image_offset + 6), EOI, v.eos]
    assert GRID.prompt([Turn("user", (TextPart("a"),))]).tolist() == [v.bos, 97, EOT]
    assert GRID.prompt([Turn("document", (TextPart("a"),))]).tolist() == [v.bos, 97]
    assert GRID.prompt([Turn("user")]).tolist() == GRID.unconditional.tokens.tolist()
    assert GRID.parts([TextPart("a"), image(2, 3)]).tolist() == [97, *tokens[1:-1]]
    asked = [Turn("system", (TextPart("a"),)), Turn("user", (TextPart("b"),))]
    assert GRID.prompt(asked).tolist() == [v.bos, 97, EOT, 98, EOT]
    over = [*asked, Turn("assistant", (TextPart("c"),))]
    assert GRID.history(over).tolist() == [v.bos, 97, EOT, 98, EOT, 99, v.eos]
    again = [*over, Turn("user", (TextPart("d"),))]
    assert GRID.prompt(again).tolist() == [*GRID.history(over), 100, EOT]


class Lossy(Utf8):
    def decode(self, ids):
        return super().decode(ids).replace("\t", " ")


SMALL = Grammar(Vocabulary(100, CODEBOOK), fixed_grid(2, 3), Utf8())
LOSSY = Grammar(GRID.vocabulary, GRID.layout, Lossy())


@pytest.mark.parametrize(
    "grammar, parts, says",
    [
        (GRID, (TextPart("a"), image(3, 2)), r"part 1: expected .* exactly 2 x 3 codes .*, found 3 x 2"),
        (ROWS, (image(4, 4),), r"part 0: expected .* at most 3 x 4 codes .*, found 4 x 4"),
        (GRID, (CodesPart(image(2, 3).codes + 1),), r"codes 0\.\.5 .*, found 1\.\.6"),
        (GRID, (CodesPart(image(2, 3).codes - 1),), r"codes 0\.\.5 .*, found -1\.\.4"),
        (GRID, (image(2, 3), TextPart("")), r"part 1: .*found an invalid one: the text is empty"),
        (GRID, (TextPart("a"), TextPart("b")), r"part 1: .*found an invalid one: text right after text"),
        (GRID, (ImagePart(np.zeros((4, 4, 3), np.uint8)),), r"expected codes .*, found pixels"),
        (SMALL, (TextPart("aé"),), r"ids 0\.\.99 from the text"),
        (LOSSY, (TextPart("a\tc"),), r"'\\tc' at character 1, found ' c'"),
    ],
)
def test_what_cannot_be_written_is_refused(grammar, parts, says):
    with pytest.raises(GrammarError, match=says):
        grammar.encode(Document.of(parts))


V, S, C = ROWS.vocabulary, ROWS.vocabulary.size_offset - 1, ROWS.vocabulary.image_offset


@pytest.mark.parametrize(
    "tokens, position, expected, found",
    [
        ([], 0, "<bos>", "the end of the sequence"),
        ([97], 0, "<bos>", "text piece 97"),
        ([V.bos, 97], 2, "<eos>", "the end of the sequence"),
        ([V.bos, V.eos, V.pad], 2, "the end of the sequence", "<pad>"),
        ([V.bos, EOT, EOT, EOT, V.eos], 3, "text, <boi> or <eos>", "<eot>"),
        ([V.bos, EOT, V.eos, V.eos], 3, "text, <boi>, <eot>", "<eos>"),
        ([V.bos, EOT, V.eos, EOT, EOT], 4, "text, <boi> or <eos>", "<eot>"),
        ([V.bos, C, V.eos], 1, "text, <boi>, <eot> or <eos>", "image code 0"),
        ([V.bos, BOI, C], 2, "a size token for the height, 1..3", "image code 0"),
        ([V.bos, BOI, S + 4], 2, "a size token for the height, 1..3", "size 4"),
        ([V.bos, BOI, S + 1], 3, "the rest of an image", "the end of the sequence"),
        ([V.bos, BOI, S + 1, S + 5], 3, "a size token for the width, 1..4", "image code 0"),
        ([V.bos, BOI, S + 1, S + 2, C, EOL], 5, "an image code (row 0, column 1 of 1 x 2)", "<eol>"),
        ([V.bos, BOI, S + 2, S + 1, C, C], 5, "<eol> (row 0, column 1 of 2 x 1)", "image code 0"),
        ([V.bos, BOI, S + 1, S + 1, C, EOL, V.eos], 6, "<eoi>", "<eos>"),
    ],
)
def test_parse_says_where_and_what(tokens, position, expected, found):
    with pytest.raises(GrammarError) as caught:
        ROWS.parse(tokens)
    error = caught.value
    assert (error.position, error.expected, error.found) == (position, expected, found)


@every
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_tokens_are_rearranged_as_documents_are(kind, data):
    grammar = grammar_of(kind)
    document = data.draw(documents(grammar, LETTER))
    found = grammar.encode(document)
    context = grammar.unconditional
    if not document.asks:
        for turn in (grammar.drop_prompt, grammar.swap_turn):
            with pytest.raises(GrammarError, match="a document with turns"):
                turn(found)
    else:
        *head, question, answer = document.turns
        dropped = grammar.drop_prompt(found)
        assert_same(dropped[: len(context)], context)
        expected = grammar.encode(Document((Turn("user"), answer)))
        left = len(dropped) - len(context)
        assert left and expected.turns[-1] == len(expected) - left
        assert_same(dropped[len(context) :], expected[-left:])
        if only := promptless(kind, answer):
            assert grammar.parse(dropped.tokens) == only
        else:
            with pytest.raises(GrammarError):
                grammar.parse(dropped.tokens)
        if not marked(kind):
            with pytest.raises(GrammarError, match="separated by ids"):
                grammar.swap_turn(found)
        else:
            turns = replace(question, parts=answer.parts), replace(answer, parts=question.parts)
            assert_same(grammar.swap_turn(found), grammar.encode(Document((*head, *turns))))
            assert_same(grammar.swap_turn(grammar.swap_turn(found)), found)
    drop_context(grammar, document, found)


def promptless(kind, answer):
    """What an answer to the empty prompt parses as. None if it is no document: Lumina-mGPT's empty prompt has no ids,
    and Liquid's is a control that occurs nowhere else."""
    marks = LAYOUTS[kind].unconditional
    if not marks or "unconditional" in marks:
        return None
    if "eot" in marks:
        return Document((Turn("user"), answer))
    said = [TextPart(mark.text) for mark in marks if isinstance(mark, Text)]
    return Document((Turn("document", joined_texts((*said, *answer.parts))),))


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.marks, expected.marks)


def drop_context(grammar, document, found):
    """For each learned image of an answer: the rest of its turn from there, and all later turns."""
    said = []
    for i, turn in enumerate(document.turns):
        if turn.speaker in ("document", "assistant") and turn.learned:
            said += [(i, j) for j, part in enumerate(turn.parts) if isinstance(part, CodesPart)]
    context = grammar.unconditional
    for index, (i, j) in enumerate(said):
        dropped = grammar.drop_context(found, index)
        assert_same(dropped[: len(context)], context)
        left = Turn("assistant", document.turns[i].parts[j:], document.turns[i].trained)
        if marked(grammar.layout.kind):
            expected = grammar.encode(Document((Turn("user"), left, *document.turns[i + 1 :])))
            assert_same(dropped[len(context) :], expected[2:])
            if len(context) == 2:
                assert_same(dropped, expected)
    with pytest.raises(GrammarError, match=f"found {len(said)} images"):
        grammar.drop_context(found, len(said))


@every
def test_manifest_there_and_back(kind):
    grammar = grammar_of(kind, depth=2, codec=Utf8(), text_size=256)
    manifest = json.loads(json.dumps(grammar.manifest()))
    again = Grammar.from_manifest(manifest, Utf8())
    assert (again.vocabulary, again.layout) == (grammar.vocabulary, grammar.layout)
    assert again.manifest() == manifest
    for field, value, says in (("depth", 5, "no layout"), ("kind", "spiral", "no layout"), ("more", 1, "layout.more")):
        other = manifest | {"layout": manifest["layout"] | {field: value}}
        with pytest.raises(ManifestMismatch, match=says):
            Grammar.from_manifest(other, Utf8())
    manifest["layout"]["record"]["close"] = ["eos"]  # as if the layout had changed since
    with pytest.raises(ManifestMismatch, match="layout.record.close"):
        Grammar.from_manifest(manifest, Utf8())
    with pytest.raises(ManifestMismatch, match="no layout"):
        Grammar.from_manifest(grammar.vocabulary.manifest(), Utf8())


def test_a_grammar_refuses_another_text_tokenizer_and_sides_it_cannot_say():
    codec: Any = Utf8()
    codec.hash, codec.size = "mine", 256
    Grammar(Vocabulary(256, 4, text_hash="mine"), fixed_grid(1, 1), codec)
    with pytest.raises(ManifestMismatch, match="hash 'theirs'.*hash 'mine'"):
        Grammar(Vocabulary(256, 4, text_hash="theirs"), fixed_grid(1, 1), codec)
    with pytest.raises(ManifestMismatch, match="size 300"):
        Grammar(Vocabulary(300, 4, text_hash="mine"), fixed_grid(1, 1), codec)
    with pytest.raises(ValueError, match="size_tokens: expected at least 4"):
        Grammar(Vocabulary(256, 4, size_tokens=3), sized_rows(3, 4), Utf8())
    with pytest.raises(ValueError, match="one of grid, rows, .*'spiral'"):
        ImageLayout("spiral", 1, 1)
    for kind, height, width, depth in (("grid", 1, 3, 2), ("lumina_mgpt", 1, 4, 1), ("lumina_mgpt_2", 4, 4, 2)):
        with pytest.raises(ValueError, match="expected sides of at least"):
            ImageLayout(kind, height, width, depth)
    with pytest.raises(ValueError, match="no control token 'img'"):
        Grammar(Vocabulary(len(LETTERS.pieces), 4), ImageLayout("emu3", 4, 4), LETTERS)
    for pieces in ("12", "0123456789"):  # two digits in one piece; no separate piece for the separator
        codec = Pieces(*LETTERS.pieces, "12") if pieces == "12" else Pieces(*LETTERS.pieces, "**")
        if pieces != "12":
            codec.pieces.remove("*")
            with pytest.raises(ValueError, match="no piece for"):
                grammar_of("emu3", codec=codec)
        else:
            grammar_of("emu3", codec=codec)  # each digit has its piece, and sizes are written with them


def test_a_vocabulary_of_text_alone_refuses_images():
    alone = Grammar(Vocabulary(256, 0), TEXT_ALONE, Utf8())
    document = Document.of((TextPart("a"), TextPart("b")), prompt=1)
    assert alone.parse(alone.encode(document).tokens) == document
    with pytest.raises(
        GrammarError, match="part 1: expected a text .this vocabulary has no image codes., found an image"
    ):
        alone.encode(Document.of((TextPart("a"), image(1, 1))))
    v = alone.vocabulary
    with pytest.raises(GrammarError):
        alone.parse([v.bos, BOI, v.image_offset, EOI, v.eos])
    assert Grammar.from_manifest(alone.manifest(), Utf8()).manifest() == alone.manifest()
