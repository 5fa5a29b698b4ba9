"""Conversations are replayed with the model's own answers, turn by turn, and every turn is counted."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ar_unified.data import scenes
from ar_unified.data.conversations import sample_conversation
from ar_unified.evaluation.figures import sample_sections
from ar_unified.evaluation.generation import evaluate
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart, Turn
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import init
from ar_unified.sampling.conversation import Conversation
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Sample
from tests.evaluation.test_generation import Album, Oracle


class Letters:
    """Any byte is a letter, so any drawn ids are a text."""

    def encode(self, text):
        return list(text.encode("latin-1"))

    def decode(self, ids):
        return bytes(ids).decode("latin-1")


def talks(n: int = 12) -> list[Document]:
    rng = np.random.default_rng(3)
    documents = []
    for _ in range(n):
        talk = sample_conversation(rng, "train")
        turns = []
        for i, exchange in enumerate(talk.exchanges):
            shown = (ImagePart(scenes.render(talk.shown, 32)),) if i == 0 and talk.shown else ()
            said = (
                TextPart(exchange.answer)
                if exchange.answer is not None
                else ImagePart(scenes.render(exchange.scene, 32))
            )
            turns += [Turn("user", (*shown, TextPart(exchange.asked))), Turn("assistant", (said,))]
        meta = {
            "kinds": [exchange.kind for exchange in talk.exchanges],
            "scenes": [scenes.scene_to_json(exchange.scene) for exchange in talk.exchanges],
        }
        documents.append(Document(tuple(turns), meta=meta))
    return documents


def run(documents, monkeypatch, answer=lambda i, truth: truth, protocol="shapes", **options):
    """`answer(i, truth)` gives the answer to the i-th turn of a conversation. Also returns the histories of the
    requests."""
    album = Album()
    oracle = Oracle(documents, album, **options)
    histories = []

    def say_all(asked):
        for conversation, request in asked:
            histories.append(conversation.turns)
            i = len(conversation.turns) // 2
            document = next(d for d in documents if _asks(d, i, request, conversation, oracle))
            said = answer(i, oracle.coded(document.turns[2 * i + 1].parts[0]))
            if said is None:
                yield Sample(request, 0, np.zeros(0, np.int32), None, "error", "broken")
                continue
            conversation.turns += (Turn("user", request.parts), Turn("assistant", (said,)))
            yield Sample(request, 0, np.zeros(0, np.int32), Document.of((said,)), "eos")

    monkeypatch.setattr("ar_unified.evaluation.conversations.say_all", lambda asked: list(say_all(asked)))
    found = evaluate(oracle, album, oracle.grammar, PROTOCOLS[protocol], [documents], limit=100)
    return *found, histories


def _asks(document, i, request, conversation, oracle):
    """Whether the user's first i turns are equal to those of a document, so that this is the next turn."""
    users = [tuple(map(oracle.coded, turn.parts)) for turn in document.turns[::2]]
    return users[: i + 1] == [*(turn.parts for turn in conversation.turns[::2]), request.parts]


def test_right_answers_are_right_turn_by_turn_and_as_a_whole(monkeypatch):
    documents = talks()
    metrics, kept, _ = run(documents, monkeypatch)
    counts, turns = metrics["counts"], sum(len(d.turns) // 2 for d in documents)
    assert (metrics["turn_exact"], counts["turn_exact"]) == (1, turns) == (metrics["parse_rate"], counts["parse_rate"])
    assert (metrics["conversation_exact"], counts["conversation_exact"]) == (1, 12)
    assert sum(n for name, n in counts.items() if name.startswith("turn_exact/")) == turns
    drawn = sum(isinstance(turn.parts[0], ImagePart) for d in documents for turn in d.turns[1::2])
    assert (metrics["turn_reconstruction_exact"], counts["turn_reconstruction_exact"]) == (1, drawn) and drawn > 5
    assert {e.kind for e in kept} == {"turn"} and len(kept) == 12 and "note" not in metrics
    assert all(len(e.prompt) >= len(e.document.turns) - 1 for e in kept), "the last turn, with all that was before it"


def wrong(i, truth):
    return CodesPart(np.zeros((1, 1), np.int32)) if isinstance(truth, CodesPart) else TextPart("hm")


def test_the_next_turn_goes_on_from_what_the_model_said(monkeypatch):
    metrics, kept, histories = run(talks(), monkeypatch, wrong)
    assert metrics["turn_exact"] == metrics["conversation_exact"] == 0 and metrics["parse_rate"] == 1
    said = [turn.parts[0] for turns in histories for turn in turns[1::2]]
    assert said and all(part in (TextPart("hm"), CodesPart(np.zeros((1, 1), np.int32))) for part in said)
    assert all(e.correct is False and len(e.prompt) <= 2 for e in kept), "the first that was wrong"


def test_one_wrong_turn_spoils_its_conversation_alone(monkeypatch):
    documents = talks()
    longer = sum(len(d.turns) > 4 for d in documents)
    turns = sum(len(d.turns) // 2 for d in documents)
    metrics, _, _ = run(documents, monkeypatch, lambda i, truth: wrong(i, truth) if i == 2 else truth)
    assert 0 < longer < 12 and metrics["conversation_exact"] == pytest.approx(1 - longer / 12)
    assert metrics["turn_exact"] == pytest.approx(1 - longer / turns)


def test_after_an_answer_that_does_not_parse_the_rest_counts_as_wrong(monkeypatch):
    documents = talks()
    turns = sum(len(d.turns) // 2 for d in documents)
    metrics, _, histories = run(documents, monkeypatch, lambda i, truth: None)
    assert metrics["counts"]["turn_exact"] == turns and metrics["turn_exact"] == metrics["parse_rate"] == 0
    assert len(histories) == metrics["counts"]["parse_rate"] == 12, "each was asked once"


def test_what_does_not_fit_or_nobody_can_judge_is_not_asked(monkeypatch):
    metrics, _, _ = run(talks(), monkeypatch, max_length=120)
    assert metrics["skipped"]["does_not_fit"] == 12 - metrics["counts"].get("conversation_exact", 0) > 0
    metrics, kept, histories = run(talks(), monkeypatch, protocol="exact")
    assert "turn_exact" not in metrics["counts"] and not kept and not histories
    assert "12 of kind conversation" in metrics["note"]


def test_the_report_shows_what_was_said(monkeypatch):
    _, kept, _ = run(talks(), monkeypatch, lambda i, truth: TextPart("hm"))
    ((heading, html),) = sample_sections({"": kept})
    assert heading == "Conversations" and html.count("✗") == len(kept) and "expected: " in html
    assert all(part.text in html for e in kept for part in e.prompt if isinstance(part, TextPart))


def test_the_engine_reads_only_what_is_new(monkeypatch):
    """With a model that knows nothing, all answers parse, and no turn reads the conversation again."""
    documents, album = talks(3), Album(lossy=True)
    vocabulary = Vocabulary(256, 256)
    grammar = Grammar(vocabulary, fixed_grid(1, 1), Letters())
    shape = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_mlp=32)
    config = TransformerConfig(vocab_size=vocabulary.size, **shape)
    engine = Engine(config, init(config, jax.random.key(0)), grammar, batch_size=4, max_length=512)
    held = []
    begin = Conversation.__init__
    monkeypatch.setattr(Conversation, "__init__", lambda self, *args: (begin(self, *args), held.append(self))[0])
    metrics, _ = evaluate(engine, album, grammar, PROTOCOLS["shapes"], [documents], limit=10)
    assert metrics["parse_rate"] == 1 and metrics["counts"]["conversation_exact"] == len(held) == 3
    asked = {d.turns[0].parts[-1]: d for d in documents}
    for talk in held:
        assert len(talk.turns) == len(asked[talk.turns[0].parts[-1]].turns)
        said = sum(len(part.text) for part in talk.turns[-2].parts if isinstance(part, TextPart))
        assert talk.prefilled[0] <= said + 12 < len(talk.tokens)
