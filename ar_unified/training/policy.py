"""Training by rewards: groups of samples, their advantages, and the clipped policy gradient on them (GRPO).

Group relative policy optimisation (Shao et al., arXiv:2402.03300) compares the samples of a prompt with each other and
needs no value network. Later variants are options: from DAPO (Yu et al., arXiv:2503.14476) a higher clip above than
below, the mean over tokens, and leaving out groups without a signal; from Dr. GRPO (Liu et al., arXiv:2503.20783) no
division by the deviation, and a constant in place of lengths.

The policy is exactly the distribution that was sampled: with contexts mixed by guidance, at the temperature, over the
ids that the grammar allows. So the ratio of new and old probability begins at 1 exactly.

Axes: B samples, T positions, C contexts, K ranges of ids, D model, P prompts, G samples of a group.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.data.batch import A
from ar_unified.errors import nearest, outside
from ar_unified.model.config import TransformerConfig
from ar_unified.model.lora import LoraConfig
from ar_unified.model.loss import token_losses
from ar_unified.model.transformer import Transformer
from ar_unified.training.step import Batch, Metrics, Params
from ar_unified.training.tasks import TransformerTask, ratios

CHOICES = {"normalisation": ("token", "sequence", "constant")}

_BINS, _A_FACTOR, _LEAST = 512, 8, 2.0**-40  # bins of differences; bins for a factor of 2; the first bin
_MANY = 0.999  # share of the groups that counts as all of them


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """
    Attributes:
      group_size: G, samples that are drawn of a prompt and compared with each other.
      scale_rewards: advantages are (reward - mean) / deviation of the group; False: reward - mean (Dr. GRPO), which
        gives no extra weight to prompts that are answered right nearly always or nearly never.
      kl: weight of the divergence from the weights that the training began with, a second forward pass; 0: none.
      clip_low, clip_high: the ratio counts between 1 - clip_low and 1 + clip_high. DAPO: 0.2 and 0.28.
      normalisation: what is averaged. "token": all tokens alike. "sequence": tokens of a sample, then samples, so that
        a token of a long one weighs less. "constant": the sum of each sample over the positions of a row.
      drop_flat: groups whose rewards are all the same are left out of all means, which they would only dilute.
      redraws: how often other prompts are drawn in place of those whose groups have no signal.
      minibatches, epochs: a drawing has samples for so many steps, and is used so many times. Beyond 1 x 1 the policy
        has changed since the drawing, and the clip matters.

    Raises ValueError, naming the field, for a number out of range and an unknown choice.
    """

    group_size: int = 8
    scale_rewards: bool = True
    kl: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalisation: str = "token"
    drop_flat: bool = True
    redraws: int = 0
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (found := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; found {found!r}{nearest(found, known)}")
        counts = dict.fromkeys(("epochs", "minibatches"), "[1, inf)")
        at_least = dict.fromkeys(("kl", "redraws", "clip_high"), "[0, inf)")
        if problems := outside(self, group_size="[2, inf)", clip_low="[0, 1]", **counts, **at_least):
            raise ValueError(problems[0])

    @property
    def steps(self) -> int:
        """How many steps one drawing serves."""
        return self.epochs * self.minibatches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch(Generic[A]):
    """Samples, one a row, groups side by side: numpy arrays, jax arrays, or shapes. A pytree."""

    tokens: A  # i32 [B, C, T]: prompt and answer in each context; images of all contexts stand in the same columns
    positions: A  # i32 [B, C, T], in the context; 0 on padding
    doc_start: A  # i32 [B, C, T], where in the row it begins; T on padding
    mix: A  # f32 [B, C, T], what a context's logits count for, over the temperature
    targets: A  # i32 [B, T], the next token of the sample, else pad
    drawn: A  # bool [B, T], whether the target was drawn: not given, not forced
    spans: A  # i32 [B, T, K, 2], the ids that it was drawn from; of the others the target alone
    sampled: A  # f32 [B, T], the sampler's log-probability of the target
    reward: A  # f32 [B]; 0 where there is none
    advantage: A  # f32 [B]
    deviation: A  # f32 [B], of the rewards of its group
    scored: A  # bool [B], every sample of its group has a reward
    flat: A  # bool [B], and all have the same
    cut: A  # bool [B], the sample ended with its budget
    old: A | None = None  # f32 [B, T], the policy's log-probabilities when the sample was drawn; None: as they are now

    @classmethod
    def shapes(cls, rows: int, length: int, contexts: int, ranges: int, old: bool) -> PolicyBatch[jax.ShapeDtypeStruct]:
        """ShapeDtypeStructs; `ranges` is K."""
        deep, wide, alone = (rows, contexts, length), (rows, length), (rows,)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            **dict.fromkeys(("tokens", "positions", "doc_start"), (deep, np.int32)),
            "mix": (deep, np.float32),
            "targets": (wide, np.int32),
            "drawn": (wide, np.bool_),
            "spans": ((*wide, ranges, 2), np.int32),
            "sampled": (wide, np.float32),
            **dict.fromkeys(("reward", "advantage", "deviation"), (alone, np.float32)),
            **dict.fromkeys(("scored", "flat", "cut"), (alone, np.bool_)),
        }
        if old:
            shapes["old"] = (wide, np.float32)
        return PolicyBatch(**{name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()})


# ---- the pure part: arrays in, arrays out -----------------------------------------------------------------------


def group_advantages(rewards: np.ndarray, scale: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(advantages, deviations, whether all rewards are the same), float64 and bool [P, G], of rewards [P, G].

    The deviation divides by G. A group of equal rewards has advantages of exactly 0.
    """
    rewards = np.asarray(rewards, np.float64)
    flat = np.broadcast_to(np.all(rewards == rewards[:, :1], axis=1, keepdims=True), rewards.shape)
    off = np.where(flat, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    deviation = np.broadcast_to(np.sqrt(np.mean(off**2, axis=1, keepdims=True)), rewards.shape)
    return (off / np.where(flat, 1.0, deviation) if scale else off), deviation, flat


def divergence(logp: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of KL(policy || reference) at each drawn token, never negative: r - 1 - log r, r = reference / policy
    (k3 of Schulman, joschu.net/blog/kl-approx.html, as GRPO has it)."""
    difference = reference - logp
    return jnp.exp(difference) - difference - 1


def token_objective(
    config: PolicyConfig, logp: jax.Array, old: jax.Array, advantage: jax.Array, reference: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(the objective to minimise at each token, whether the clip holds it back), [B, T] each.

    Args:
      logp, old, reference: log-probabilities [B, T] of the policy, of the one that drew, and of the reference or None.
      advantage: [B].
    """
    ratio = jnp.exp(logp - old)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    gained, bounded = ratio * advantage[:, None], clipped * advantage[:, None]
    objective = -jnp.minimum(gained, bounded)
    if reference is not None:
        objective = objective + config.kl * divergence(logp, reference)
    return objective, bounded < gained


def token_weights(config: PolicyConfig, drawn: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(weight of each token [B, T], the divisor of the weighted sum []), from drawn [B, T] and kept [B], bool."""
    there = drawn & kept[:, None]
    weight = there.astype(jnp.float32)
    if config.normalisation == "token":
        return weight, jnp.sum(weight)
    rows = jnp.sum(jnp.any(there, axis=1).astype(jnp.float32))
    if config.normalisation == "sequence":
        return weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0), rows
    return weight, rows * drawn.shape[1]


# ---- on the transformer -----------------------------------------------------------------------------------------


def log_probabilities(
    config: TransformerConfig, chunk: int, params: Params, batch: Batch, lora: LoraConfig | None = None
) -> jax.Array:
    """f32 [B, T]: the log-probability of each target in the distribution that it was drawn from; 0 where it was not
    drawn. `batch` is a PolicyBatch; lora: of an adapter in `params`.

    Logits are linear in the hidden state, so those of all contexts, mixed and over the temperature, are the logits of
    the mixed hidden state: guidance costs a row for each context, but no second product with the head.
    """
    B, C, T = batch.tokens.shape
    model = Transformer.bind(config, params, lora)
    rows = (x.reshape(B * C, T) for x in (batch.tokens, batch.positions, batch.doc_start))
    hidden = model(*rows).reshape(B, C, T, -1)
    mixed = jnp.einsum("BCTD,BCT->BTD", hidden.astype(jnp.float32), batch.mix).astype(hidden.dtype)
    nll, _ = token_losses(mixed, model.head(), batch.targets, chunk, spans=batch.spans)
    return jnp.where(batch.drawn, -nll, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyTask(TransformerTask):
    """The policy gradient on samples with rewards: `batch` is a `step.Drawing` of PolicyBatches.

    Dropout is off, as it is when samples are drawn. The weights of roles, tasks and prompts are not used: a sample is
    weighed by its advantage. With `policy.kl` the weights that the training began with are its model state, so that a
    checkpoint has them and a training that goes on compares with the same.
    """

    policy: PolicyConfig = PolicyConfig()

    def init_state(self, params: Params) -> Params:
        """The reference, if the loss compares with one: what is trained, as it is when training begins."""
        return {"reference": self.selection(params).take(params)} if self.policy.kl else {}

    def state_axes(self, params: Params, model_state: Params) -> Any:
        """The axes' names of the reference."""
        return {name: self.selection(params).axes(self.logical_axes(params)) for name in model_state}

    def loss(
        self, params: Params, model_state: Params, batch: Batch, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """The clipped policy gradient's objective, with the divergence from the reference."""
        logp = log_probabilities(self.config, self.chunk, params, batch, self.lora)
        reference = None
        if self.policy.kl:
            frozen = jax.lax.stop_gradient(self.selection(params).put(params, model_state["reference"]))
            reference = log_probabilities(self.config, self.chunk, frozen, batch, self.lora)
        old = jax.lax.stop_gradient(logp) if batch.old is None else batch.old
        objective, held = token_objective(self.policy, logp, old, batch.advantage, reference)
        kept = batch.scored & ~batch.flat if self.policy.drop_flat else batch.scored
        weight, total = token_weights(self.policy, batch.drawn, kept)
        loss = jnp.sum(weight * objective)
        metrics = {"loss": (loss, total)} | self._told(batch, jax.lax.stop_gradient(logp), old, held)
        if reference is not None:
            metrics["kl"] = self._mean(divergence(jax.lax.stop_gradient(logp), reference), batch.drawn)
        return loss, total, metrics

    def _mean(self, values: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where.astype(jnp.float32))

    def _told(self, batch: Batch, logp: jax.Array, old: jax.Array, held: jax.Array) -> Metrics:
        """Sums over a batch. `entropy` is estimated by the drawn tokens: nats a token. `sampler_trainer` are the
        absolute differences of the sampler's log-probabilities and those of this forward pass at the same weights."""
        everywhere = jnp.ones_like(batch.scored)
        drawn = batch.drawn
        apart = jnp.abs(old - batch.sampled)
        octaves = jnp.log2(jnp.maximum(apart, _LEAST) / _LEAST)
        place = jnp.clip(jnp.ceil(octaves * _A_FACTOR), 0, _BINS - 1).astype(jnp.int32)
        present = batch.doc_start < batch.doc_start.shape[-1]
        length = jnp.sum(drawn, axis=1).astype(jnp.float32)
        return {
            "reward": self._mean(batch.reward, batch.scored),
            "reward_deviation": self._mean(batch.deviation, batch.scored),
            "groups/without_signal": self._mean(batch.flat.astype(jnp.float32), batch.scored),
            "groups/failed": self._mean((~batch.scored).astype(jnp.float32), everywhere),
            "clipped": self._mean(held.astype(jnp.float32), drawn),
            "entropy": self._mean(-logp, drawn),
            "drawn_tokens": self._mean(length, everywhere),
            "cut": self._mean(batch.cut.astype(jnp.float32), everywhere),
            "sampler_trainer/mean": self._mean(apart, drawn),
            "sampler_trainer": jnp.zeros(_BINS).at[place].add(drawn.astype(jnp.float32)),
            "fill": (jnp.sum(present, dtype=jnp.float32), jnp.float32(present.size)),
            "tokens": jnp.sum(present, dtype=jnp.float32),
            "attended": jnp.sum(jnp.where(present, batch.positions + 1, 0), dtype=jnp.float32),
        }

    def inspect(self, params: Params, model_state: Params, batch: Batch) -> Metrics:
        """Nothing: batches are samples, not packed rows."""
        return {}

    def summary(self, totals: Metrics) -> dict[str, float]:
        """Means, and `sampler_trainer/max`: an upper bound of the differences, at most about a tenth above the
        largest.
        """
        counted = np.flatnonzero(np.asarray(totals["sampler_trainer"]))
        most = _LEAST * 2.0 ** (counted[-1] / _A_FACTOR) if len(counted) else math.nan
        return ratios(totals) | {"sampler_trainer/max": most if most > _LEAST else 0.0}

    def warning(self, line: Any) -> str:
        """A warning about groups without a reward or a signal."""
        if line.get("groups/failed", 0.0) > 0:
            return f"{line['groups/failed']:.1%} of the groups have no reward, and nothing was learned from them"
        if line.get("groups/without_signal", 0.0) > _MANY:
            return (
                "every group's rewards are all the same, so nothing is learned: prompts that are neither always nor "
                "never answered right, a larger group_size or a finer reward would give a signal"
            )
        return ""
