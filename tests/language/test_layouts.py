"""Hand-written documents: our ids, converted by a border, equal those of the transcribed published formatters.

Both use one text tokenizer, which stands in for the published one. If ours differs, or the original is unknown, a test
says so.

Axes: `h` `w` height and width of an image in codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from ar_unified.language.border import Border, MappedCodec
from ar_unified.language.document import CodesPart, Document, TextPart, Turn
from ar_unified.language.grammar import Grammar
from ar_unified.language.layouts import WITH_IMAGES
from ar_unified.language.syntax import ImageLayout
from ar_unified.language.vocabulary import Vocabulary
from tests.language import transcriptions as published

TEXT_SIZE = 256
PIECES = {chr(33 + i): i for i in range(94)} | {"\n": 198, " ": 220, " a": 100, "at": 101, "is": 102, " i": 103}
SPELLING = {id: piece for piece, id in PIECES.items()}


@dataclass(frozen=True)
class StandIn:
    """A text tokenizer with ids from `first` on: one for each letter, then for pairs of letters as far as ids last."""

    first: int
    file = "stand-in"

    @property
    def size(self) -> int:
        return self.first + TEXT_SIZE

    @property
    def hash(self) -> str:
        return f"stand-in from {self.first}"

    def encode(self, text: str, /) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            piece = text[at : at + 2] if text[at : at + 2] in PIECES else text[at]
            ids.append(self.first + PIECES[piece])
            at += len(piece)
        return ids

    def decode(self, ids: Sequence[int], /) -> str:
        return "".join(SPELLING.get(id - self.first, "?") for id in ids)


@dataclass(frozen=True)
class System:
    """A published id space: the ids of controls by name, of code 0 as "code", of size n as "size" + n, and where text
    begins.

    Images have height x width codes, or at most these if they state their size.
    """

    ids: Mapping[str, int]
    text: StandIn
    height: int
    width: int
    codebook: int


LWM = published.LWM
QWEN = {"bos": 151643, "eot": 150001, "size": 151671}  # ids of Lumina-mGPT 2.0, with an arbitrary `eot`
SYSTEMS = {
    "chameleon": System(published.CHAMELEON, StandIn(16384), 4, 4, 8192),
    "lumina_mgpt": System(published.LUMINA, StandIn(16384), 8, 8, 8192),
    "lumina_mgpt_2": System(published.LUMINA_2 | QWEN, StandIn(0), 8, 8, 16384),
    "emu3": System(published.EMU3_5, StandIn(0), 12, 130, 32768),
    "emu3_gen": System(published.EMU3_5, StandIn(0), 12, 130, 32768),
    "emu3_5": System(published.EMU3_5, StandIn(0), 12, 130, 131072),
    "lwm": System(LWM | {"code": LWM["vision"]} | {name: LWM["vision"] + LWM[name] for name in ("eof", "eov")},
                  StandIn(16384), 4, 4, 8192),
    "liquid": System(published.LIQUID, StandIn(1000), 4, 4, 8192),
    "simplear": System(published.SIMPLEAR, StandIn(0), 4, 4, 64000),
    "tar": System(published.TAR, StandIn(0), 4, 4, 65536),
}  # fmt: skip


@cache
def opened(kind: str) -> tuple[Grammar, Border]:
    """Our grammar with the stand-in for the published tokenizer, and the border of the whole id space."""
    system, layout = SYSTEMS[kind], ImageLayout(kind, SYSTEMS[kind].height, SYSTEMS[kind].width)
    controls = layout.record.controls
    sizes = [system.ids["size"] + n for n in range(1, layout.size_tokens + 1)]
    codes = range(system.ids["code"], system.ids["code"] + system.codebook)
    text = range(system.text.first, system.text.first + TEXT_SIZE)
    said = {*text, *system.ids.values(), *sizes, *codes}
    unsaid = [id for id in range(max(said) + 1) if id not in said]
    # A control that a system lacks, or does not have as a single id, gets an id that nothing uses.
    named = [system.ids[name] if name in system.ids else unsaid.pop() for name in controls]
    theirs = [*text, *named, *sizes, *codes]
    rest = sorted(set(range(max(said) + 1)) - set(theirs))
    border = Border.from_ids([*theirs, *rest])
    codec = MappedCodec(system.text, border, TEXT_SIZE)
    vocabulary = Vocabulary(TEXT_SIZE, system.codebook, layout.size_tokens, codec.hash, "", controls, len(rest))
    assert vocabulary.used == border.size
    return Grammar(vocabulary, layout, codec), border


def turn(speaker: str, parts: published.Turn) -> Turn:
    said = (TextPart(part) if isinstance(part, str) else CodesPart(part) for part in parts)
    return Turn(speaker, tuple(said))


def document(parts: published.Turn) -> Document:
    return Document((turn("document", parts),))


def conversation(*turns: published.Turn, system: str = "") -> Document:
    """The user's turn, the assistant's, the user's, ..."""
    said = [turn("system", [system])] if system else []
    return Document((*said, *(turn(("user", "assistant")[i % 2], parts) for i, parts in enumerate(turns))))


def ours(kind: str, said: Document) -> list[int]:
    """Published ids of a document as our grammar writes it."""
    grammar, border = opened(kind)
    return border.theirs[grammar.encode(said).tokens].tolist()


def unconditional(kind: str) -> list[int]:
    grammar, border = opened(kind)
    return border.theirs[grammar.unconditional.tokens].tolist()


def codes(h: int, w: int, first: int = 0) -> np.ndarray:
    return (np.arange(h * w, dtype=np.int32) + first).reshape(h, w)


WORDS, ASKED = "A cat is at 12*3.", "What is that?"
SQUARE, OTHER = codes(4, 4), codes(4, 4, 7)
WIDE = codes(4, 8)
PLAIN: list[published.Turn] = [[WORDS], [SQUARE], [WORDS, SQUARE, " and", OTHER, OTHER, "end"]]
PAIRS: list[list[published.Turn]] = [[[WORDS], [SQUARE]], [[SQUARE, ASKED], [WORDS]]]
TALK = [["a", SQUARE, ASKED], ["that"], ["Draw it"], ["This:", OTHER], [], ["end"]]
BOTH = [*(document(parts) for parts in PLAIN), *(conversation(*turns) for turns in PAIRS)]


def parts_of(said: Document) -> list[published.Turn]:
    return [[p.text if isinstance(p, TextPart) else p.codes for p in turn.parts] for turn in said.turns]


@pytest.mark.parametrize("said", BOTH)
def test_chameleon(said: Document) -> None:
    text = SYSTEMS["chameleon"].text.encode
    assert ours("chameleon", said) == published.chameleon(text, parts_of(said), chat=said.asks)


def test_chameleon_without_a_prompt_and_in_several_turns() -> None:
    text, c = SYSTEMS["chameleon"].text.encode, published.CHAMELEON
    _, nothing = published.chameleon_contexts(published.chameleon(text, [["a"]]))
    assert [*unconditional("chameleon"), c["boi"]] == nothing
    # We found no source for what follows an answer that is not the last. Ours ends every answer with </s>.
    theirs, found = np.array(published.chameleon(text, TALK)), np.array(ours("chameleon", conversation(*TALK)))
    (differ,) = np.nonzero(theirs != found)
    assert len(differ) == 2 and set(theirs[differ]) == {c["eot"]} and set(found[differ]) == {c["eos"]}


@pytest.mark.parametrize("said", [*BOTH, conversation(*TALK), conversation([WORDS], [WIDE]),
                                  conversation(published.implicit([WIDE, SQUARE], ASKED), [WORDS])])  # fmt: skip
def test_lumina_mgpt(said: Document) -> None:
    text = SYSTEMS["lumina_mgpt"].text.encode
    assert ours("lumina_mgpt", said) == published.lumina_mgpt(text, parts_of(said))
    ids, text = SYSTEMS["lumina_mgpt_2"].ids, SYSTEMS["lumina_mgpt_2"].text.encode
    theirs = published.lumina_mgpt_2(text, parts_of(said), bos=ids["bos"], eot=ids["eot"], size=ids["size"])
    assert ours("lumina_mgpt_2", said) == theirs
    assert unconditional("lumina_mgpt") == unconditional("lumina_mgpt_2") == []


@pytest.mark.parametrize("parts", [*PLAIN, [WORDS, codes(12, 3)], [codes(1, 120), WORDS]])
def test_emu3_without_turns(parts: published.Turn) -> None:
    """Its training samples have no end; sampling forces one."""
    text, found = SYSTEMS["emu3"].text.encode, ours("emu3", document(parts))
    assert found == published.emu3(text, [parts])
    assert found[:-1] == published.emu3(text, [parts], eos=False)


def test_emu3_asked_to_draw_is_a_document_that_breaks_off() -> None:
    asked = published.emu3_prompt(SYSTEMS["emu3"].text.encode, WORDS, 12, 3)
    assert ours("emu3", document([WORDS, codes(12, 3)]))[: len(asked)] == asked
    nothing = published.emu3_prompt(SYSTEMS["emu3"].text.encode, "", 12, 3)
    assert nothing[:2] == [*unconditional("emu3"), published.EMU3["boi"]]


def test_a_turn_of_emu3_gen_is_the_bare_prompt() -> None:
    text, said = SYSTEMS["emu3_gen"].text.encode, conversation([WORDS], [codes(12, 3)])
    found, asked = ours("emu3_gen", said), published.emu3_prompt(text, WORDS, 12, 3)
    assert found[: len(asked)] == asked and found == published.emu3(text, [[WORDS, codes(12, 3)]])
    grammar, border = opened("emu3_gen")
    dropped = border.theirs[grammar.drop_prompt(grammar.encode(said)).tokens].tolist()
    assert dropped == published.emu3(text, [["", codes(12, 3)]])


@pytest.mark.parametrize("turns", [*PAIRS, [[ASKED], [WORDS]]])
def test_emu3_chat(turns: list[published.Turn]) -> None:
    """Compares only one question, because no published code for several was found."""
    grammar, border = opened("emu3")
    said, text = conversation(*turns), SYSTEMS["emu3"].text.encode
    assert ours("emu3", said) == published.emu3_chat(text, turns)
    assert border.theirs[grammar.prompt(said.asked)].tolist() == published.emu3_chat(text, turns[:1])


@pytest.mark.parametrize("turns", [*PAIRS, [[ASKED], [WORDS]], [["Draw"], ["a", codes(12, 11), "is", SQUARE]]])
@pytest.mark.parametrize("task", ["t2i", "x2i", "story"])
def test_emu3_5(turns: list[published.Turn], task: str) -> None:
    """Compares only one question, because no published code for several, or for documents without turns, was found."""
    grammar, border = opened("emu3_5")
    text = SYSTEMS["emu3_5"].text.encode
    system = "" if task == "t2i" else f"You are a helpful assistant for {task} task."
    said = conversation(*turns, system=system)
    assert ours("emu3_5", said) == published.emu3_5(text, turns, task=task)
    assert border.theirs[grammar.prompt(said.asked)].tolist() == published.emu3_5(text, turns[:1], task=task)
    assert unconditional("emu3_5") == published.emu3_5(text, [[]], task=None)


@pytest.mark.parametrize("said", BOTH)
def test_lwm(said: Document) -> None:
    """Turns are words in its data; each text is tokenized separately."""
    text, bos = SYSTEMS["lwm"].text.encode, LWM["bos"]
    parts = [part for turn in parts_of(said) for part in turn]
    found = ours("lwm", said)
    assert found == published.lwm(text, [parts], adds_bos=False)
    # A tokenizer that adds a BOS, as theirs may, puts one in front of every text and mark. Ours never does.
    fields = sum(1 if isinstance(part, str) else 2 for part in parts)
    added = published.lwm(text, [parts], adds_bos=True)
    assert len(added) == len(found) + fields and [bos, *(id for id in added if id != bos)] == found


def test_lwm_asked_about_an_image_and_to_draw_one() -> None:
    grammar, border = opened("lwm")
    text = SYSTEMS["lwm"].text.encode
    asked = turn("user", [f"You are a helpful assistant. USER: {ASKED}\n", SQUARE, " ASSISTANT:"])
    prompt = border.theirs[grammar.prompt([asked])].tolist()
    assert prompt == published.lwm_chat(text, [SQUARE], ASKED, adds_bos=False)
    draw = f"You are a helpful assistant. USER: Generate an image of {WORDS} ASSISTANT: "
    drawn, nothing = published.lwm_prompt(text, WORDS, adds_bos=False)
    assert ours("lwm", conversation([draw], [SQUARE]))[: len(drawn)] == drawn
    assert [*unconditional("lwm"), *text("<vision>")] == nothing


def test_liquid_asked_to_draw() -> None:
    grammar, border = opened("liquid")
    text, said = SYSTEMS["liquid"].text.encode, conversation([WORDS], [SQUARE])
    assert ours("liquid", said) == published.liquid(text, WORDS, SQUARE)
    dropped = border.theirs[grammar.drop_prompt(grammar.encode(said)).tokens].tolist()
    assert dropped == published.liquid(text, "", SQUARE)
    assert dropped[: len(unconditional("liquid"))] == unconditional("liquid")


def test_liquid_describes_in_a_document_and_does_not_talk() -> None:
    """The document contains its instruction. The record lacks the marks and the speakers' names of its chat."""
    text = SYSTEMS["liquid"].text.encode
    said = document([SQUARE, f"The caption of this image is:{WORDS}"])
    assert ours("liquid", said) == published.liquid_caption(text, SQUARE, WORDS)
    marks = {published.LIQUID[name] for name in ("start", "end")}
    assert marks <= set(published.liquid_chat(text, [[ASKED], [WORDS]]))
    grammar, border = opened("liquid")
    assert not marks & set(border.theirs[: grammar.vocabulary.rest_offset].tolist())


def test_simplear_draws_and_says_no_end() -> None:
    """Ours ends a document; theirs only has a fixed number of codes."""
    text, end = SYSTEMS["simplear"].text.encode, published.SIMPLEAR["eos"]
    assert ours("simplear", conversation([WORDS], [SQUARE])) == [*published.simplear(text, WORDS, SQUARE), end]
    dropped = published.simplear(text, "", SQUARE)
    assert [*unconditional("simplear"), *dropped[1:]] == dropped


def test_an_image_of_tars_without_turns() -> None:
    found, ids = ours("tar", document([WORDS, SQUARE])), published.TAR
    assert found == [ids["bos"], *SYSTEMS["tar"].text.encode(WORDS), *published.tar(SQUARE), ids["eos"]]


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("turns", [*PAIRS, TALK, [[ASKED], [WORDS]], [["\n  a"], ["b"], [], [SQUARE, WORDS]]])
def test_tars_turns(turns: list[published.Turn], system: str) -> None:
    """Their conversations end with a line end, which ours do not have."""
    grammar, border = opened("tar")
    said, text = conversation(*turns, system=system), SYSTEMS["tar"].text.encode
    more = {"system": system} if system else {}
    theirs = published.tar_chat(text, turns, **more)
    line = text("\n")
    assert [*ours("tar", said), *line] == theirs
    assert border.theirs[grammar.prompt(said.asked)].tolist() == published.tar_chat(text, turns[:-1], **more)
    over = grammar.history(said.turns)
    following = grammar.prompt([*said.turns, turn("user", [WORDS])])
    assert following[: len(over)].tolist() == over.tolist()


def test_every_published_layout_is_compared() -> None:
    assert set(SYSTEMS) == set(WITH_IMAGES) - {"grid", "rows"}
