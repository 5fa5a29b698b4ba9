"""The forward passes of LWM and of Meta's Chameleon in numpy, written from their descriptions, because no package has
them.

They share no code with transformers or with ours. RoPE multiplies neighbouring numbers of a head as one complex number,
the two tables of ids are separate in embedding and head, and matrices have the layout of each file. All arithmetic is
float64.

Axes: B rows, T positions, D width, N query heads, K KV heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.interop.weights import Tensors


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred * centred, -1, keepdims=True) + eps) * weight + bias


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """[B, T, N, H]: the numbers 2 j + i (2 j + 1) of a head are rotated by t theta^(-2 j / H) at position t."""
    T, H = x.shape[1], x.shape[-1]
    angles = np.arange(T)[:, None] * theta ** (-np.arange(0, H, 2) / H)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[B, T, N, H], [B, T, K, H] twice -> [B, T, N H]: causal; each KV head serves N / K consecutive query heads."""
    T, N = q.shape[1], q.shape[2]
    k, v = (np.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, v).reshape(*q.shape[:2], -1)


def feed_forward(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> np.ndarray:
    gate = x @ w1
    return (gate / (1 + np.exp(-gate)) * (x @ w3)) @ w2


class Lwm:
    """params: `formats.lwm_params`. eps is 1e-6 as in LWM's 7B; theta is an argument, because the files do not say
    it."""

    def __init__(self, params: Tensors, theta: float, heads: int = 4, eps: float = 1e-6):
        self.params = {name: tensor.astype(np.float64) for name, tensor in params.items()}
        self.theta, self.heads, self.eps = theta, heads, eps
        self.layers = len({name.split("/")[2] for name in params if name.startswith("transformer/h/")})

    def hidden(self, ids: np.ndarray, is_vision: np.ndarray) -> np.ndarray:
        """int [B, T] ids, each of the table that bool [B, T] chooses -> float64 [B, T, D] after the last norm."""
        p, (B, T) = self.params, ids.shape
        x = p["transformer/wte/embedding"][np.where(is_vision, 0, ids)]
        if "transformer/vte/embedding" in p:
            x = np.where(is_vision[..., None], p["transformer/vte/embedding"][np.where(is_vision, ids, 0)], x)
        for i in range(self.layers):
            at = f"transformer/h/{i}/"
            normed = rms(x, p[f"{at}attention_norm/kernel"], self.eps)
            q, k, v = (
                (normed @ p[f"{at}attention/{name}/kernel"]).reshape(B, T, self.heads, -1)
                for name in ("wq", "wk", "wv")
            )
            mixed = attend(rotate(q, self.theta), rotate(k, self.theta), v)
            x = x + mixed @ p[f"{at}attention/wo/kernel"]
            normed = rms(x, p[f"{at}ffn_norm/kernel"], self.eps)
            x = x + feed_forward(normed, *(p[f"{at}feed_forward/{name}/kernel"] for name in ("w1", "w2", "w3")))
        return rms(x, p["transformer/ln_f/kernel"], self.eps)

    def logits(self, ids: np.ndarray, is_vision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> logits float64 [B, T, text ids] and [B, T, vision ids], which have separate softmaxes in the original."""
        hidden = self.hidden(ids, is_vision)
        return hidden @ self.params["lm_head/kernel"], hidden @ self.params["vision_head/kernel"]


def meta_logits(shards: Sequence[Tensors], params: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """Meta's Chameleon as computed by its ranks, each with its own heads and QK-norm vectors: int [B, T] -> [B, T,
    V]."""
    model, ranks = params["model"], len(shards)
    parts = [{name: tensor.astype(np.float64) for name, tensor in shard.items()} for shard in shards]
    N, K, eps, swin = model["n_heads"] // ranks, model["n_kv_heads"] // ranks, model["norm_eps"], model["swin_norm"]
    B, T = ids.shape
    x = np.concatenate([part["tok_embeddings.weight"][ids] for part in parts], -1)

    def attention(x: np.ndarray, at: str) -> np.ndarray:
        out: np.ndarray = np.zeros(())
        for part in parts:
            q, k, v = (
                (x @ part[f"{at}attention.{name}.weight"].T).reshape(B, T, n, -1)
                for name, n in (("wq", N), ("wk", K), ("wv", K))
            )
            norms = [[part[f"{at}attention.{c}_normalization.{kind}"] for kind in ("weight", "bias")] for c in "qk"]
            q, k = (
                rotate(layer_norm(y, norm[0], norm[1]), model["rope_theta"])
                for y, norm in zip((q, k), norms, strict=True)
            )
            out = out + attend(q, k, v) @ part[f"{at}attention.wo.weight"].T
        return np.asarray(out)

    def mlp(x: np.ndarray, at: str) -> np.ndarray:
        names = [f"{at}feed_forward.{name}.weight" for name in ("w1", "w2", "w3")]
        return np.sum([feed_forward(x, *(part[name].T for name in names)) for part in parts], axis=0)

    for i in range(model["n_layers"]):
        at = f"layers.{i}."
        for part, name in ((attention, "attention_norm"), (mlp, "ffn_norm")):
            weight = parts[0][f"{at}{name}.weight"]
            x = x + (rms(part(x, at), weight, eps) if swin else part(rms(x, weight, eps), at))
    x = rms(x, parts[0]["norm.weight"], eps)
    return np.concatenate([x @ part["output.weight"].T for part in parts], -1)
