"""Has conversations with a model, and counts how many of its turns and how many whole conversations are right.

The user's turns come from a held-out document and the assistant's from the model, so the next turn is about what the
model said or drew. An early mistake can make later answers wrong, as for a person who uses the model. All conversations
take their next turn together (`say_all`), and for each turn the model reads only the new tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ar_unified.evaluation.examples import Codec, Example, Scores
from ar_unified.evaluation.right_answers import Protocol
from ar_unified.language.document import CodesPart, Document, ImagePart, Part, TextPart, Turn
from ar_unified.language.grammar import Grammar
from ar_unified.language.reading import GrammarError
from ar_unified.sampling.conversation import Conversation, say_all
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.plan import prompt_tokens
from ar_unified.sampling.request import Request, Sample


def is_conversation(document: Document) -> bool:
    """Whether the assistant has more than one turn."""
    return document.asks and sum(turn.speaker == "assistant" for turn in document.turns) > 1


@dataclass
class _Talk:
    """A document, the conversation about its questions, and the results so far."""

    document: Document
    conversation: Conversation
    questions: list[tuple[Turn, Turn]]  # (question, right answer) of each turn
    prompt: list[Part] = field(default_factory=list)  # everything before the next answer, images as pixels
    done: list[Example] = field(default_factory=list)
    broken: bool = False

    @property
    def example(self) -> Example:
        """The first wrong turn, or the last turn if all are right."""
        return next((example for example in self.done if not example.correct), self.done[-1])


def converse(
    engine: Engine,
    codec: Codec,
    grammar: Grammar,
    protocol: Protocol,
    documents: Sequence[Document],
    scores: Scores,
    skipped: Counter[str],
    *,
    drawn: Request,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Example]:
    """Has the conversations. Returns one example per conversation: its first wrong turn, or its last turn if all are
    right.

    Args:
        codec: a codec that has learnt the documents' pixels.
        documents: only documents in which every answer is one part are used.
        scores: gets the counts of `turn_exact`, `turn_exact/KIND`, `conversation_exact`, `turn_reconstruction_exact`
            and `parse_rate`.
        skipped: counts documents that are longer than the engine's max_length, as `does_not_fit`.
        drawn, seed: how answers are sampled, as in `generation.evaluate`.
        progress: called with ("turn", number of turns done, number of all turns) after each round.

    A conversation cannot go on after an answer that does not parse, so its later turns count as wrong.
    """
    if protocol.turn_matches is None:
        return []
    talks = [talk for document in documents if (talk := _begun(document, engine, grammar, codec, skipped))]
    longest = max((_length(grammar, turn) for talk in talks for _, turn in talk.questions), default=0)
    total, done = sum(len(talk.questions) for talk in talks), 0
    for i in range(max((len(talk.questions) for talk in talks), default=0)):
        asked = [talk for talk in talks if len(talk.questions) > i]
        requests = {
            id(talk): _request(talk, i, codec, grammar, engine, 8 + 2 * longest, replace(drawn, seed=seed + number))
            for number, talk in enumerate(talks)
            if len(talk.questions) > i and not talk.broken
        }
        going = [talk for talk in asked if id(talk) in requests]
        samples = say_all([(talk.conversation, requests[id(talk)]) for talk in going])
        answers = {id(talk): _answer(sample) for talk, sample in zip(going, samples, strict=True)}
        for sample in samples:
            scores.add("parse_rate", sample.document is not None)
        codec.learn_codes(answer for answer in answers.values() if isinstance(answer, np.ndarray))
        for talk in asked:
            _take(talk, i, answers.get(id(talk)), codec, protocol, scores)
        done += len(asked)
        if progress:
            progress("turn", done, total)
    for talk in talks:
        scores.add("conversation_exact", all(example.correct for example in talk.done))
    return [talk.example for talk in talks]


def _begun(document: Document, engine: Engine, grammar: Grammar, codec: Codec, skipped: Counter[str]) -> _Talk | None:
    """Begins the conversation about a document. Returns None if an answer does not have exactly one part, or if the
    document does not fit."""
    first = int(document.turns[0].speaker == "system")
    turns = document.turns[first:]
    questions = list(zip(turns[::2], turns[1::2], strict=True))
    if any(len(answer.parts) != 1 for _, answer in questions):
        return None
    coded = [replace(turn, parts=codec.encoded(turn.parts)) for turn in document.turns]
    try:
        fits = len(grammar.encode(Document(tuple(coded))).tokens) <= engine.max_length
    except GrammarError:
        fits = False
    if not fits:
        skipped["does_not_fit"] += 1
        return None
    return _Talk(document, Conversation(engine, coded[:first]), questions)


def _length(grammar: Grammar, turn: Turn) -> int:
    (part,) = turn.parts
    return len(grammar.text_codec.encode(part.text)) if isinstance(part, TextPart) else 0


def _request(
    talk: _Talk, i: int, codec: Codec, grammar: Grammar, engine: Engine, budget: int, asking: Request
) -> Request:
    """The request for the i-th question. `budget` is the maximum number of tokens of a text answer, if there is room
    for them."""
    question, answer = talk.questions[i]
    talk.prompt += question.parts
    request = replace(asking, id=f"turn-{asking.seed}-{i}", parts=codec.encoded(question.parts))
    (expected,) = answer.parts
    if isinstance(expected, ImagePart):
        height, width = codec.encode(expected.pixels).shape
        return replace(request, mode="image", image_size=(height, width))
    room = engine.max_length - len(prompt_tokens(grammar, replace(request, history=talk.conversation.turns)))
    return replace(request, mode="text", max_tokens=max(1, min(budget, room)))


def _answer(sample: Sample) -> str | np.ndarray | None:
    """The text of a sampled answer, or the codes int32 [h, w] of its image; None if there is neither."""
    if sample.document is None:
        return None
    parts = sample.document.parts
    if sample.request.mode == "image":
        return next((part.codes for part in parts if isinstance(part, CodesPart)), None)
    return " ".join(part.text for part in parts if isinstance(part, TextPart))


def _take(
    talk: _Talk, i: int, answer: str | np.ndarray | None, codec: Codec, protocol: Protocol, scores: Scores
) -> None:
    """Judges the i-th answer and counts it."""
    assert protocol.turn_matches
    document, (wanted,) = talk.document, talk.questions[i][1].parts
    expected = wanted.pixels if isinstance(wanted, ImagePart) else wanted.text  # type: ignore[union-attr]
    got = codec.decode(answer) if isinstance(answer, np.ndarray) else answer
    correct = got is not None and protocol.turn_matches(document, i, got)
    scores.add("turn_exact", correct)
    if kind := protocol.turn_kind(document, i):
        scores.add(f"turn_exact/{kind}", correct)
    reconstruction = None
    if isinstance(expected, np.ndarray):
        reconstruction = codec.decode(codec.encode(expected))
        scores.add("turn_reconstruction_exact", protocol.turn_matches(document, i, reconstruction))
    talk.done.append(Example("turn", document, tuple(talk.prompt), expected, got, reconstruction, correct))
    if got is None:
        talk.broken = True
    else:
        talk.prompt.append(ImagePart(got) if isinstance(got, np.ndarray) else TextPart(got))
