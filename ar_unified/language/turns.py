"""Sequences of turns: the ids that a layout writes around them, and how parts that were read are assigned to turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ar_unified.language.document import Part, TextPart, Turn
from ar_unified.language.layouts import TurnFrames, TurnMarks, TurnTemplate


class Around(NamedTuple):
    """The ids around parts: before the first turn, before a framed turn, after a question, after an answer, after
    everything."""

    begin: list[int]
    open: list[int]
    asks: list[int]
    end: list[int]
    tail: list[int]


Pieces = Iterable[list[int] | Part]


def arranged(
    turns: Sequence[Turn], told: TurnMarks | TurnTemplate | TurnFrames, around: Around
) -> Iterator[tuple[Turn, Pieces]]:
    """Yields each turn with its parts in order, together with the texts and ids that the layout writes around them."""
    if turns[0].speaker == "document" or isinstance(told, TurnMarks):
        asks_all = isinstance(told, TurnMarks)
        yield from ((turn, _marked(turn, not i, asks_all, around)) for i, turn in enumerate(turns))
        return
    if turns[0].speaker != "system" and told.system:
        turns = [Turn("system", (TextPart(told.system),)), *turns]
    for i, turn in enumerate(turns):
        if isinstance(told, TurnFrames):
            yield turn, _framed(turn, not i, told, around)
        else:
            yield turn, _marked(_spelled(turn, told), not i, False, around)


def _marked(turn: Turn, first: bool, asks_all: bool, around: Around) -> Iterator[list[int] | Part]:
    """The ids and parts of a turn. asks_all: whether the system's turn also ends like a question."""
    if first:
        yield around.begin
    yield from turn.parts
    if turn.speaker in ("document", "assistant"):
        yield around.end
    elif turn.speaker == "user" or asks_all:
        yield around.asks


def _framed(turn: Turn, first: bool, frames: TurnFrames, around: Around) -> Iterator[list[int] | Part]:
    """The ids and parts of a turn in a frame. The ids before an answer belong to the turn of the question."""
    parts = turn.parts
    if turn.speaker != "assistant":
        if not first:
            yield TextPart(frames.between)
        yield around.open
        parts = joined_texts([TextPart(frames.name.format(turn.speaker)), *parts])
    yield from parts
    yield around.end
    if turn.speaker == "user":
        yield TextPart(frames.between)
        yield around.open
        yield TextPart(frames.name.format("assistant"))


def _spelled(turn: Turn, template: TurnTemplate) -> Turn:
    """A turn with the text of a template around its parts."""
    before, _, behind = template.user.partition("{}") if turn.speaker == "user" else ("", "", "")
    parts = [*([TextPart(before)] if before else []), *turn.parts, *([TextPart(behind)] if behind else [])]
    return Turn(turn.speaker, joined_texts(parts), turn.trained)


def answered(asked: Sequence[tuple[Part, ...]], answer: tuple[Part, ...]) -> list[Turn]:
    """A question and its answer, or only an answer. If two turns come before the answer, the first is the system's."""
    if not asked:
        return [Turn("document", answer)]
    system = [Turn("system", asked[0])] if len(asked) > 1 else []
    return [*system, Turn("user", asked[-1]), Turn("assistant", answer)]


def counted(said: Sequence[tuple[Part, ...]]) -> list[Turn]:
    """The turns of a document in which all turns end with the same id. A single turn has no speaker. If there are more
    turns and their number is odd, the first is the system's."""
    if len(said) == 1:
        return [Turn("document", said[0])]
    odd = len(said) % 2
    system = [Turn("system", said[0])] if odd else []
    pairs = zip(said[odd::2], said[odd + 1 :: 2], strict=True)
    return system + [turn for asked, answer in pairs for turn in (Turn("user", asked), Turn("assistant", answer))]


def joined_texts(parts: Sequence[Part], between: str = "") -> tuple[Part, ...]:
    """The parts; adjacent texts are joined into one text and separated by `between`."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, TextPart) and out and isinstance(out[-1], TextPart):
            out[-1] = TextPart(f"{out[-1].text}{between}{part.text}")
        else:
            out.append(part)
    return tuple(out)
