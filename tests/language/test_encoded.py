"""The marks of each position of a conversation, written by hand, for each kind of layout."""

import numpy as np
import pytest

from ar_unified.language import encoded
from ar_unified.language.document import SPEAKERS, Document, TextPart, Turn
from ar_unified.language.encoded import Encoded
from ar_unified.language.reading import GrammarError
from ar_unified.language.vocabulary import Role
from tests.language.small import Pieces, grammar_of, image

LETTER = {"t": Role.TEXT, "c": Role.CONTROL, "s": Role.SIZE, "i": Role.IMAGE}


def expect(found, grammar, tokens, roles, speakers, trained, turns, images):
    """tokens: words, which are <name> for a control, #n for a code, =n for a size token, or a piece of text. Other
    arguments have a letter per token."""
    v = grammar.vocabulary

    def id_of(word):
        if word[0] in "#=" and word[1:]:
            return int(word[1:]) + (v.image_offset if word[0] == "#" else v.size_offset - 1)
        if word[0] == "<" and word[1:-1] in v.controls:
            return v.control(word[1:-1])
        (id,) = grammar.text_codec.encode(word.replace("_", " "))
        return id

    assert found.tokens.tolist() == [id_of(word) for word in tokens.split()]
    assert found.roles.tolist() == [LETTER[letter] for letter in roles]
    assert "".join(SPEAKERS[who][0] for who in found.speakers) == speakers
    assert "".join("01"[int(learned)] for learned in found.trained) == trained
    assert (found.turns.tolist(), found.images.tolist()) == (turns, images)


ASK = Turn("user", (TextPart("1"), image(2, 2)))
DRAW = Turn("assistant", (image(2, 2, 2), TextPart("b")))


def test_turns_told_apart_by_ids():
    grammar = grammar_of("rows", 2, 2)
    conversation = Document(
        (Turn("system", (TextPart("a"),)), ASK, DRAW, Turn("user", (), True), Turn("assistant", (), False))
    )
    image = "<boi> =2 =2 #{} #{} <eol> #{} #{} <eol> <eoi>"
    expect(
        grammar.encode(conversation),
        grammar,
        f"<bos> a <eot> 1 {image.format(0, 1, 2, 3)} <eot> {image.format(2, 3, 4, 5)} b <eos> <eot> <eos>",
        "ctc" + "t" + "cssiiciicc" + "c" + "cssiiciicc" + "tc" + "c" + "c",
        "sss" + "u" * 12 + "a" * 12 + "u" + "a",
        "000" + "0" * 12 + "1" * 12 + "1" + "0",
        [0, 3, 15, 27, 28],
        [4, 15],
    )
    found = grammar.encode(conversation)
    assert found.own_images.tolist() == [15]
    assert grammar.encode(Document((ASK, Turn("assistant", DRAW.parts, False)))).own_images.tolist() == []


def test_a_document_of_nobody_s_is_learned_from_its_begin_on():
    grammar = grammar_of("grid", 2, 2)
    found = grammar.encode(Document.of((TextPart("a"), image(2, 2))))
    expect(found, grammar, "<bos> a <boi> #0 #1 #2 #3 <eoi> <eos>",
           "ctciiiicc", "d" * 9, "1" * 9, [0], [2])  # fmt: skip


def test_turns_told_apart_by_text_and_decimal_sizes():
    codec = Pieces(*"0123456789*ab", "You are a helpful assistant.", " USER: ", ". ASSISTANT:")
    grammar = grammar_of("emu3", 2, 12, codec=codec)
    expect(
        grammar.encode(Document((Turn("user", (TextPart("1*2"), image(1, 12))), DRAW))),
        grammar,
        "<bos> You_are_a_helpful_assistant. _USER:_ 1 * 2 <boi> 1 * 1 2 <img> "
        "#0 #1 #2 #3 #4 #5 #0 #1 #2 #3 #4 #5 <eol> <eof> <eoi> ._ASSISTANT: "
        "<boi> 2 * 2 <img> #2 #3 <eol> #4 #5 <eol> <eof> <eoi> b <eos>",
        "ct" + "tttt" + "cssssciiiiiiiiiiiiccc" + "t" + "csssciiciiccctc",
        "s" * 2 + "u" * 26 + "a" * 15,
        "0" * 28 + "1" * 15,
        [0, 2, 28],
        [6, 28],
    )


def test_an_answer_that_a_control_begins_and_an_end_with_more_behind_it():
    codec = Pieces(*"0123456789*ab", "You are a helpful assistant for t2i task.", " USER: ", " ASSISTANT: ")
    grammar = grammar_of("emu3_5", 2, 2, codec=codec)
    ask = Turn("user", (TextPart("a"),))
    expect(
        grammar.encode(Document((Turn("system", (TextPart("b"),)), ask, DRAW, ask, DRAW))),
        grammar,
        "<bos> b _USER:_ a _ASSISTANT:_ <bss> <boi> 2 * 2 <img> #2 #3 <eol> #4 #5 <eoi> b <ess> "
        "_USER:_ a _ASSISTANT:_ <bss> <boi> 2 * 2 <img> #2 #3 <eol> #4 #5 <eoi> b <ess> <eos>",
        "ct" + ("tttc" + "csssciiciic" + "tc") * 2 + "c",
        "ss" + ("uuuu" + "a" * 13) * 2 + "a",
        "00" + ("0000" + "1" * 13) * 2 + "1",
        [0, 2, 6, 19, 23],
        [6, 23],
    )


SPELLED = grammar_of("lwm", 1, 2, codec=Pieces("a", "<vi", "sion>", "</vision>"))


def test_images_that_begin_and_end_with_text():
    expect(
        SPELLED.encode(
            Document((Turn("user", (TextPart("a<vi"), image(1, 2))), Turn("assistant", (TextPart("sion>"),))))
        ),
        SPELLED,
        "<bos> a <vi <vi sion> #0 #1 <eov> </vision> sion> <eos>",
        "ctt" + "cciicc" + "tc",
        "u" * 9 + "aa",
        "0" * 9 + "11",
        [0, 9],
        [3],
    )


def test_no_text_says_the_beginning_of_an_image():
    one = grammar_of("lwm", 1, 2, codec=Pieces("a", "<vision>", "</vision>"))
    for grammar in (SPELLED, one, grammar_of("lwm")):
        with pytest.raises(GrammarError, match="part 0: expected a text without '<vision>'"):
            grammar.encode(Document.of((TextPart("a<vision>a"),)))
    for grammar in (SPELLED, grammar_of("lwm")):
        turns = Turn("user", (TextPart("a<vi"),)), Turn("assistant", (TextPart("sion>"),))
        with pytest.raises(GrammarError, match="turns whose joined texts do not contain '<vision>'"):
            grammar.encode(Document(turns))
        with pytest.raises(GrammarError, match="joined texts do not contain"):
            grammar.history(turns)
    for text in ("a</vision>", "a<vi"):
        document = Document.of((TextPart(text), image(1, 2), TextPart(text)))
        assert SPELLED.parse(SPELLED.encode(document).tokens) == document


def test_a_question_and_its_answer_exchanged():
    grammar = grammar_of("grid", 1, 2)
    turns = Turn("system", (TextPart("a"),)), Turn("user", (TextPart("1"),)), Turn("assistant", (image(1, 2),))
    found = encoded.swapped(grammar.encode(Document(turns)))
    expect(found, grammar, "<bos> a <eot> <boi> #0 #1 <eoi> <eot> 1 <eos>",
           "ctc" + "ciicc" + "tc", "sss" + "uuuuu" + "aa", "000" + "00000" + "11", [0, 3, 8], [3])  # fmt: skip


def test_pieces_side_by_side():
    found = grammar_of("grid", 2, 2).encode(Document((ASK, DRAW)))
    again = encoded.joined([found[:5], found[5:5], found[5:]])
    np.testing.assert_array_equal(again.tokens, found.tokens)
    np.testing.assert_array_equal(again.marks, found.marks)
    assert isinstance(again, Encoded) and len(again) == len(found) and again.marks.dtype == np.uint8
    for who in SPEAKERS:
        for role in Role:
            for learned in (False, True):
                one = Encoded(np.zeros(1, np.int32), np.array([encoded.mark(role, who, learned)], np.uint8))
                assert (one.roles[0], SPEAKERS[one.speakers[0]], one.trained[0]) == (role, who, learned)
                assert not len(one.turns) and not len(one.images)
