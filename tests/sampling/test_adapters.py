"""Evaluation harnesses call an engine and get its results, in the order of their requests and with their settings."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ar_unified.language.document import CodesPart
from ar_unified.model.transformer import Transformer
from ar_unified.sampling.adapters.harness import Harness
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.model import Model
from ar_unified.sampling.request import Request
from tests.sampling import vlmeval_stand_in
from tests.sampling.test_job import Tiles, few_programs
from tests.sampling.tiny import CONFIG, GRAMMARS

GREY = Image.new("RGB", (30, 20), (90, 90, 90))
GREEDY = Filter(temperature=0.0)
GREY_CODES = CodesPart(np.full((2, 3), 9, np.int32))


@pytest.fixture(scope="module")
def engine(params):
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch.setattr)
        yield Engine(CONFIG, params, GRAMMARS["grid"], batch_size=3, max_length=64)


def by_hand(params, ids, begin):
    """The log-likelihood of ids[begin:] after ids[:begin], and whether each of these ids is the most likely one."""
    tokens = jnp.asarray([ids])
    model = Transformer.bind(CONFIG, params)
    logits = np.asarray(model.logits(model(tokens, jnp.arange(len(ids))[None], jnp.zeros_like(tokens)))[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = sum(logprobs[i - 1, ids[i]] for i in range(begin, len(ids)))
    return total, all(np.argmax(logits[i - 1]) == ids[i] for i in range(begin, len(ids)))


def instance(*args):
    return SimpleNamespace(args=args)


def test_answers_come_in_order_and_under_their_settings(engine, caplog):
    model = Harness(Model(engine, Tiles()), max_tokens=6)
    asked = [(["abc"], {}), ([GREY, "h"], {"max_new_tokens": 3}), (["a" * 90], {}), (["abc"], {"do_sample": True})]
    first, second, long, drawn = model.answers(asked)
    assert len(first) == 6 and len(second) <= 3 and long == "" and "max_length is 64" in caplog.text
    assert drawn != first == model.answers(asked[:1])[0]
    assert len(model.answers([(["abc"], {"max_gen_toks": 1})])[0]) == 1
    (cut,) = model.answers([(["abc"], {"until": [first[2]]})])
    assert cut == first[: first.index(first[2])]
    (greedy,) = engine.generate([Request("x", model.parts([GREY, "h"]), mode="text", max_tokens=4, text=GREEDY)])
    assert second == "".join(part.text for part in greedy.document.parts)
    likely = model.likelihoods([(["abc"], first), (["a" * 70], "b"), (["abc"], "a" + first[1:])])
    assert likely[0][0] > likely[2][0] and not likely[2][1] and likely[1] == (-np.inf, False)


@pytest.mark.interop
def test_lm_evaluation_harness(engine, params):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm-eval) is not installed")
    from ar_unified.sampling.adapters.lm_eval import EngineLM

    model = EngineLM(Model(engine), max_gen_toks=5)
    bos = engine.grammar.vocabulary.bos
    found = model.loglikelihood([instance("abc", "de"), instance("", "de"), instance("a" * 80, "bc")])
    ids = [[bos, 0, 1, 2, 3, 4], [bos, 3, 4], [bos, *[0] * 60, 1, 2]]
    for (value, greedy), row in zip(found, ids, strict=True):
        expected = by_hand(params, row, len(row) - 2)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        assert greedy == expected[1]
    short, long = model.loglikelihood_rolling([instance("abcd"), instance("ab" * 40)])
    np.testing.assert_allclose(short, by_hand(params, [bos, 0, 1, 2, 3], 1)[0], rtol=1e-5)
    text = [0, 1] * 40
    parts = by_hand(params, [bos, *text[:62]], 1)[0] + by_hand(params, [bos, *text[18:]], 45)[0]
    np.testing.assert_allclose(long, parts, rtol=1e-5)
    answers = model.generate_until([instance("abc", {"until": []}), instance("a" * 90, {"max_gen_toks": 4})])
    assert 1 <= len(answers[0]) <= 5 and len(answers[1]) <= 4


@pytest.mark.interop
def test_lmms_eval(engine):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from ar_unified.sampling.adapters.lmms_eval import EngineLMM

    model, plain = EngineLMM(Model(engine, Tiles())), Harness(Model(engine, Tiles()))
    model.task_dict = {"t": {"test": [{"image": GREY, "answer": "ab"}]}}

    def visual(doc):
        return [doc["image"]]

    settings = {"max_new_tokens": 4}
    found = model.generate_until([instance(text, settings, visual, 0, "t", "test") for text in ("h", "b<image>h")])
    assert found == plain.answers([([GREY, "h"], settings), (["b", GREY, "h"], settings)])
    (likely,) = model.loglikelihood([instance("h", lambda doc: doc["answer"], visual, 0, "t", "test")])
    assert likely == plain.likelihoods([([GREY, "h"], "ab")])[0]

    def rounds(doc, previous_output, round_idx, previous_round_info):
        """Asks for one more round per letter of the wanted answer. Each round's prompt is the previous answer."""
        if round_idx > len(doc["answer"]):
            return None, None, True, previous_output, None
        assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
        return [GREY], previous_output[-1], False, previous_output, round_idx

    model.task_dict["t"]["test"].append({"image": GREY, "answer": ""})
    two = [instance("h", settings, visual, rounds, id, "t", "test") for id in (0, 1)]
    three_answers, one_answer = model.generate_until_multi_round(two)
    first = plain.answers([([GREY, "h"], settings)])[0]
    second = plain.answers([([GREY, first], settings)])[0]
    assert three_answers == [first, second, plain.answers([([GREY, second], settings)])[0]] and one_answer == [first]


@pytest.fixture
def vlmeval(monkeypatch):
    """VLMEvalKit, or a stand-in for its base class, because it is on no package index."""
    if importlib.util.find_spec("vlmeval") is None:
        for name in ("vlmeval", "vlmeval.vlm"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", vlmeval_stand_in)
        monkeypatch.delitem(sys.modules, "ar_unified.sampling.adapters.vlmevalkit", raising=False)


def test_vlmevalkit(engine, tmp_path, vlmeval):
    from ar_unified.sampling.adapters.vlmevalkit import EngineVLM

    GREY.save(tmp_path / "grey.png")
    model = EngineVLM(Model(engine, Tiles()), max_new_tokens=4)
    message = [{"type": "image", "value": str(tmp_path / "grey.png")}, {"type": "text", "value": "h"}]
    expected = Harness(Model(engine, Tiles())).answers([([GREY, "h"], {"max_tokens": 4})])[0]
    assert model.generate(message, dataset="MME") == expected
    assert model.generate([str(tmp_path / "grey.png"), "h"]) == expected
    with pytest.raises(AssertionError, match="video"):  # the kit asks which types a model accepts
        model.generate([{"type": "video", "value": str(tmp_path / "grey.mp4")}])
