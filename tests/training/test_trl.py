"""A tiny Llama on three pairs of texts: losses, metrics and gradients equal TRL's.

The numbers below are from TRL 1.16's DPOTrainer (and CPOTrainer for SimPO), torch 2.13 on a CPU, with transformers'
LlamaForCausalLM and the weights that `llama` makes; the reference has another seed. Its prompts and answers are those
of PAIRS, one token per letter, with END after an answer. SimPO's numbers are float64; the others are float32, in which
TRL computes log-probabilities.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.data.batch import PackedBatch, PreferenceBatch
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.metrics import LOGPS, REWARDS
from ar_unified.model.config import TransformerConfig
from ar_unified.training.preference import PreferenceConfig, PreferenceTask

VOCABULARY = Vocabulary(16, 0, rest=0)
END = VOCABULARY.used - 2  # TRL's end of an answer
MODEL = TransformerConfig(
    vocab_size=VOCABULARY.size,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    d_mlp=24,
    qk_norm="none",
    norm_eps=1e-6,
    rope_theta=1e4,
    tie_embeddings=False,
)
PAIRS = [("abc", "defgh", "hgf"), ("ponm", "aa", "ijklm"), ("cafe", "bead", "babe")]


def llama(seed: int) -> Any:
    """Weights from a formula in transformers' layout ([outputs, inputs]), converted to ours."""
    D, N, K, H, F = MODEL.d_model, MODEL.n_heads, MODEL.n_kv_heads, MODEL.head_dim, MODEL.d_mlp
    count = iter(range(seed + 1, seed + 100))

    def make(*shape: int, scale: float) -> np.ndarray:
        return scale * np.sin(1.7 * np.arange(math.prod(shape)) ** 1.1 + next(count)).reshape(shape)

    pad = [(0, VOCABULARY.size - VOCABULARY.used), (0, 0)]  # rows of ids without probability
    embedding, head = (np.pad(make(VOCABULARY.used, D, scale=scale), pad) for scale in (1.0, 0.5))
    norm, layers = 1 + make(D, scale=0.1), []
    for _ in range(MODEL.n_layers):
        before = 1 + make(D, scale=0.1)
        q, k, v = make(N * H, D, scale=0.4), make(K * H, D, scale=0.4), make(K * H, D, scale=0.4)
        o, after = make(D, N * H, scale=0.4), 1 + make(D, scale=0.1)
        gate, up, down = make(F, D, scale=0.4), make(F, D, scale=0.4), make(D, F, scale=0.4)
        attention = {
            "norm": before,
            "query": q.T.reshape(D, N, H),
            "key": k.T.reshape(D, K, H),
            "value": v.T.reshape(D, K, H),
            "output": o.T.reshape(N, H, D),
        }
        layers.append({"attention": attention, "mlp": {"norm": after, "gate": gate.T, "up": up.T, "down": down.T}})
    stacked = jax.tree.map(lambda *each: np.stack(each), *layers)
    whole = {"embedding": embedding, "head": head, "norm": norm, "layers": stacked}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), whole)


def batch() -> PreferenceBatch:
    """The three pairs, each in its own row."""
    rows = PackedBatch.padding(len(PAIRS), 24, VOCABULARY.pad)
    for row, (prompt, *answers) in enumerate(PAIRS):
        start = 0
        for segment, answer in enumerate(answers, 1):
            ids = np.array([*(ord(letter) - ord("a") for letter in prompt + answer), END])
            n = len(ids)
            where = slice(start, start + n)
            rows.tokens[row, where] = ids
            rows.targets[row, start : start + n - 1] = ids[1:]
            rows.roles[row, start : start + n - 1] = VOCABULARY.role(ids[1:])
            rows.positions[row, where], rows.doc_start[row, where] = np.arange(n), start
            rows.segment_ids[row, where] = segment
            rows.prompt[row, start : start + len(prompt) - 1] = True
            start += n
    return PreferenceBatch(rows, np.zeros((len(PAIRS), 1, 2, len(Role)), np.float32))


LOGGED = {"logps/chosen": -19.23758888244629, "logps/rejected": -20.005247116088867, "rewards/accuracies": 2 / 3}
TRL: dict[str, tuple[PreferenceConfig, dict[str, Any]]] = {
    "dpo": (
        PreferenceConfig(beta=0.5),
        dict(
            loss=0.6377745270729065,
            metrics=LOGGED
            | {"rewards/chosen": -0.8971481323242188, "rewards/rejected": -1.7556740045547485}
            | {"rewards/margins": 0.8585259318351746},
            head=[-0.21310003101825714, -0.043942660093307495, -0.036880843341350555],
            query=[-0.02103391088056974, 0.020884133417753997, -0.021905409571659692],
            norm=5.685455178435684,
        ),
    ),
    "dpo, length_normalised": (  # TRL's sigmoid_norm
        PreferenceConfig(beta=2.0, length_normalised=True),
        dict(
            loss=0.5089283585548401,
            metrics=LOGGED,
            head=[-0.12705953419208527, -0.021410401910543442, -0.020108914002776146],
            query=[-0.025282291732444756, 0.019805967608860584, -0.017955777075741614],
            norm=4.600200933574812,
        ),
    ),
    "ipo": (
        PreferenceConfig(loss="ipo", beta=0.2, length_normalised=True),
        dict(
            loss=4.922562122344971,
            metrics=LOGGED,
            head=[-0.7582393884658813, -0.0567212775349617, -0.09268201142549515],
            query=[-0.1674816916871048, 0.12180318573788336, -0.10374555278396183],
            norm=26.287563135948535,
        ),
    ),
    "simpo": (
        PreferenceConfig(loss="simpo", beta=2.0, gamma=0.5),
        dict(
            loss=1.2114433809495826,
            head=[-0.22354694186326335, -0.024226877268258097, -0.030360351268361122],
            query=[-0.03260754081638692, 0.026994916889557078, -0.025265607587457148],
            norm=6.253041053883683,
        ),
    ),
}


@pytest.mark.parametrize("name", TRL)
def test_a_tiny_text_model_has_the_losses_and_gradients_of_trl(name: str) -> None:
    config, expected = TRL[name]
    task = PreferenceTask(
        config=MODEL,
        vocabulary=VOCABULARY,
        batch=lambda *_: None,
        chunk=24,
        attention_share=False,
        preference=config,
    )
    rows = batch()
    reference = jax.jit(task.answers, static_argnums=2)(llama(100), rows.documents, 1)
    pairs = dataclasses.replace(rows, reference=np.asarray(reference))

    def mean(params: Any) -> Any:
        total, weight, metrics = task.loss(params, {}, pairs, None)
        return total / weight, metrics

    (loss, metrics), grads = jax.device_get(jax.jit(jax.value_and_grad(mean, has_aux=True))(llama(0)))
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-5)
    for key, value in expected.get("metrics", {}).items():
        found, count = metrics[{"rewards": REWARDS, "logps": LOGPS}[key.split("/")[0]] + key.split("/")[1]]
        assert found / count == pytest.approx(value, rel=1e-5), key
    np.testing.assert_allclose(grads["head"][3, :3], expected["head"], rtol=1e-4, atol=1e-6)
    query = grads["layers"]["attention"]["query"][0].reshape(MODEL.d_model, -1).T
    np.testing.assert_allclose(query[2, :3], expected["query"], rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    assert norm == pytest.approx(expected["norm"], rel=1e-4)
