"""The results of transformers for a published folder, in float32: the reference of every parity test. Needs torch.

Lumina-mGPT, Emu3.5 and Liquid have no class there. The classes of Chameleon, Qwen3 and Gemma read their tensors,
renamed or repeated (the `twin` folders of `formats`), and are their oracles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

Allowed = Callable[[int], Sequence[int]]  # step i -> the ids that it may draw
GAP = 1e-3  # least difference of the two largest logits, so that rounding does not choose

# AdamW of the fine-tuning curves, equal to `OptimizerConfig`'s: decay only on matrices, the whole gradient clipped to
# 1.
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY, CLIP, STEPS = 0.1, 1.0, 20


def load(folder: Path, kind: str | None = None) -> Reference:
    """Loads the model of a folder with the class that config.json or `kind` names. AssertionError if a tensor is not
    used."""
    kind = kind or json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {what: sorted(names) for what, names in info.items() if names}
    assert not wrong, f"{folder.name}: {wrong}"
    return Reference(model.eval())


@dataclass(frozen=True)
class Drawn:
    """The ids int [n] of greedy decoding, and the smallest difference between the two best allowed logits."""

    ids: np.ndarray
    gap: float


class Reference:
    """Logits and hidden states of a causal model of transformers, image columns included.

    Chameleon's `forward` always masks the logits of image codes, so all are taken from the last hidden state here.
    """

    def __init__(self, model: Any):
        self.model = model

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.model(input_ids=ids, use_cache=False).last_hidden_state

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self._hidden(ids))

    def hidden(self, ids: np.ndarray) -> np.ndarray:
        """int [B, T] -> states float32 [B, T, D] after the last norm."""
        with torch.inference_mode():
            return self._hidden(torch.from_numpy(np.asarray(ids, np.int64))).numpy()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """int [B, T] -> logits float32 [B, T, V]."""
        with torch.inference_mode():
            return self._logits(torch.from_numpy(np.asarray(ids, np.int64))).numpy()

    def greedy(self, prompt: Sequence[int], allowed: Allowed, n: int = 64) -> Drawn:
        """Greedy decoding of n allowed ids; every step reads the whole sequence again."""
        return self.guided([list(prompt)], [1.0], allowed, n)

    def guided(
        self, prompts: Sequence[Sequence[int]], weights: Sequence[float], allowed: Allowed, n: int = 64
    ) -> Drawn:
        """Greedy decoding of a weighted sum of the logits of several contexts, which are all extended by the chosen
        ids.

        Two contexts with weights [s, 1 - s] are classifier-free guidance with scale s. Three with [t, i - t, 1 - i]
        have scales for texts and images.
        """
        drawn: list[int] = []
        gaps = []
        for step in range(n):
            rows = [self.logits(np.array([[*prompt, *drawn]]))[0, -1].astype(np.float64) for prompt in prompts]
            mixed = sum(weight * row for weight, row in zip(weights, rows, strict=True))
            ids = np.asarray(allowed(step))
            order = np.argsort(mixed[ids])[::-1]
            drawn.append(int(ids[order[0]]))
            if len(ids) > 1:
                gaps.append(mixed[ids[order[0]]] - mixed[ids[order[1]]])
        return Drawn(np.array(drawn), float(min(gaps, default=np.inf)))

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._logits(ids)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))

    def loss(self, ids: np.ndarray) -> float:
        """Mean cross-entropy, in nats, of the last T - 1 ids, over all V."""
        with torch.inference_mode():
            return float(self._loss(torch.from_numpy(np.asarray(ids, np.int64))))

    def fine_tune(self, batches: Sequence[np.ndarray]) -> list[float]:
        """Does one AdamW step for each batch int [B, T], at a constant rate. Returns the loss before each step. Changes
        the model."""
        trained = [(n, p) for n, p in self.model.named_parameters() if "vqmodel" not in n]
        decayed = [p for n, p in trained if p.ndim >= 2 and "norm" not in n]
        others = [p for n, p in trained if p.ndim < 2 or "norm" in n]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, **ADAMW)
        losses = []
        for batch in batches:
            loss = self._loss(torch.from_numpy(np.asarray(batch, np.int64)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in trained], CLIP)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses


def settled(
    draw: Callable[[Sequence[int]], Drawn], prompts: Sequence[Sequence[int]], without: Sequence[int] = ()
) -> tuple[list[int], Drawn]:
    """The first prompt whose greedy result has no near tie and none of the ids `without`. Raises AssertionError if
    there is none."""
    for prompt in prompts:
        drawn = draw(prompt)
        if drawn.gap > GAP and not set(without) & set(drawn.ids.tolist()):
            return list(prompt), drawn
    raise AssertionError(f"of {len(prompts)} prompts none is decided by more than {GAP}")


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float [..., V], int [...] -> torch's cross-entropies float32 [...], in nats."""
    flat = torch.from_numpy(logits.reshape(-1, logits.shape[-1]))
    loss = torch.nn.functional.cross_entropy(
        flat, torch.from_numpy(targets.reshape(-1).astype(np.int64)), reduction="none"
    )
    return loss.numpy().reshape(targets.shape)
