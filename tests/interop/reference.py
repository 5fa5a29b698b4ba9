"""The results of transformers for a published folder, in float32: the reference of every parity test. Needs torch.

Lumina-mGPT, Emu3.5 and Liquid have no class there: Chameleon's, Qwen3's and Gemma's read their tensors, renamed or
repeated (`formats.as_transformers`), and are the oracle.
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

Allowed = Callable[[int], Sequence[int]]  # of step i, the ids one of which is drawn
GAP = 1e-3  # between the two largest logits: less, and rounding could choose

# AdamW of the fine-tuning curves, also `OptimizerConfig`'s: decay on matrices alone, the whole gradient clipped to 1.
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY, CLIP, STEPS = 0.1, 1.0, 20


def load(folder: Path, kind: str | None = None) -> Reference:
    """The model of a folder, by the class that config.json or `kind` names. AssertionError if a tensor is left."""
    kind = kind or json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {what: sorted(names) for what, names in info.items() if names}
    assert not wrong, f"{folder.name}: {wrong}"
    return Reference(model.eval())


@dataclass(frozen=True)
class Drawn:
    """ids int [n] of greedy decoding, and the smallest difference between its two best allowed logits."""

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
        """int [B, T] -> float32 [B, T, D], behind the last norm."""
        with torch.inference_mode():
            return self._hidden(torch.from_numpy(np.asarray(ids, np.int64))).numpy()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """int [B, T] -> float32 [B, T, V]."""
        with torch.inference_mode():
            return self._logits(torch.from_numpy(np.asarray(ids, np.int64))).numpy()

    def greedy(self, prompt: Sequence[int], allowed: Allowed, n: int = 64) -> Drawn:
        """The best of the allowed ids, n times, each from the whole sequence anew."""
        return self.guided([list(prompt)], [1.0], allowed, n)

    def guided(
        self, prompts: Sequence[Sequence[int]], weights: Sequence[float], allowed: Allowed, n: int = 64
    ) -> Drawn:
        """Greedy on a weighted sum of logits of several contexts, all of which go on with what is drawn.

        Two of weights [s, 1 - s]: classifier-free guidance of scale s. Three of [t, i - t, 1 - i]: of texts and images.
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
        """Mean cross-entropy in nats of the T - 1 ids that come after another, over all V."""
        with torch.inference_mode():
            return float(self._loss(torch.from_numpy(np.asarray(ids, np.int64))))

    def fine_tune(self, batches: Sequence[np.ndarray]) -> list[float]:
        """AdamW a batch int [B, T] each, at a constant rate: the loss before each step. Changes the model."""
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
    """The first prompt whose draw has no near tie and none of the ids `without`. Raises AssertionError if none has."""
    for prompt in prompts:
        drawn = draw(prompt)
        if drawn.gap > GAP and not set(without) & set(drawn.ids.tolist()):
            return list(prompt), drawn
    raise AssertionError(f"of {len(prompts)} prompts none is decided by more than {GAP}")


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float [..., V], int [...] -> float32 [...], torch's, each in nats."""
    flat = torch.from_numpy(logits.reshape(-1, logits.shape[-1]))
    loss = torch.nn.functional.cross_entropy(
        flat, torch.from_numpy(targets.reshape(-1).astype(np.int64)), reduction="none"
    )
    return loss.numpy().reshape(targets.shape)
