"""Training by rewards: groups of samples, their advantages, and the clipped policy gradient (GRPO).

Group relative policy optimisation (Shao et al., arXiv:2402.03300) compares the samples of a prompt with each other and
needs no value network. Later variants are options. DAPO (Yu et al., arXiv:2503.14476) has a higher upper clip, takes
the mean over tokens, and leaves out groups with equal rewards, because they give no signal. Dr. GRPO (Liu et al.,
arXiv:2503.20783) does not divide by the standard deviation, and divides by a constant instead of by lengths.

The policy is exactly the distribution from which samples were drawn. This distribution includes guidance (the mix of
contexts), the temperature, and the restriction to the ids that the grammar allows. So the ratio of new and old
probability starts at exactly 1.

Axes: B samples, T positions, C contexts, K ranges of ids, D model, P prompts, G samples of a group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from ar_tokenizers.trees import Metrics, Totals

from ar_unified.data.batch import A
from ar_unified.errors import nearest, outside
from ar_unified.model.config import TransformerConfig
from ar_unified.model.lora import LoraConfig
from ar_unified.model.loss import token_losses
from ar_unified.model.transformer import Transformer
from ar_unified.training.step import Params
from ar_unified.training.tasks import TransformerTask, ratios

CHOICES = {"normalisation": ("token", "sequence", "constant")}

_BINS, _A_FACTOR, _LEAST = 512, 8, 2.0**-40  # histogram of differences: bins, bins per factor of 2, end of first bin
_MANY = 0.999  # if more than this share of groups has equal rewards, the warning says that all groups have


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """
    Attributes:
      group_size: G, the number of samples that are drawn per prompt and compared with each other.
      scale_rewards: if True, advantages are (reward - mean) / standard deviation of the group. If False, they are
        reward - mean (Dr. GRPO), which gives no extra weight to prompts that are nearly always or nearly never answered
        right.
      kl: the weight of the KL divergence from the initial model. It needs a second forward pass. 0: no divergence.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. DAPO: 0.2 and 0.28.
      normalisation: how the loss is averaged. "token": all tokens have the same weight. "sequence": a mean over the
        tokens of each sample, then over samples, so a token of a long sample weighs less. "constant": the sum over each
        sample, divided by the positions of a row.
      drop_flat: groups with equal rewards are left out of all means, because they would only dilute the means.
      redraws: how often, at most, groups that have a failed reward or only equal rewards are replaced by groups of
        other prompts.
      minibatches, epochs: samples are drawn for `minibatches` steps at once, and are used `epochs` times. If either is
        above 1, the policy changes while they are used, and the clip has an effect.

    Raises ValueError, which names the field, for a number out of range or an unknown choice.
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
        """The number of steps for which samples are drawn at once."""
        return self.epochs * self.minibatches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch(Generic[A]):
    """Samples, one per row. The samples of a group are in adjacent rows. A pytree of numpy arrays, jax arrays or
    shapes.
    """

    tokens: A  # i32 [B, C, T]: prompt and answer in each context; images are in the same columns of all contexts
    positions: A  # i32 [B, C, T], positions in the context; 0 on padding
    doc_start: A  # i32 [B, C, T], where the context begins in the row; T on padding
    mix: A  # f32 [B, C, T], factor on a context's logits, divided by the temperature
    targets: A  # i32 [B, T], the next token of the sample, or pad
    drawn: A  # bool [B, T], whether the target was drawn (neither given nor forced)
    spans: A  # i32 [B, T, K, 2], ranges of ids from which it was drawn; if not drawn, only the target
    sampled: A  # f32 [B, T], the sampler's log-probability of the target
    reward: A  # f32 [B]; 0 if there is none
    advantage: A  # f32 [B]
    deviation: A  # f32 [B], standard deviation of the rewards of its group
    scored: A  # bool [B], whether every sample of its group has a reward
    flat: A  # bool [B], whether all rewards of its group are equal
    cut: A  # bool [B], whether the token budget ended the sample
    old: A | None = None  # f32 [B, T], the policy's log-probabilities when it drew the targets; None: the same as now

    @classmethod
    def shapes(cls, rows: int, length: int, contexts: int, ranges: int, old: bool) -> PolicyBatch[jax.ShapeDtypeStruct]:
        """The batch as ShapeDtypeStructs; `ranges` is K."""
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
    """Returns (advantages, standard deviations, whether all rewards are equal), float64 and bool [P, G], from rewards
    [P, G].

    The standard deviation divides by G. A group with equal rewards has advantages of exactly 0.
    """
    rewards = np.asarray(rewards, np.float64)
    flat = np.broadcast_to(np.all(rewards == rewards[:, :1], axis=1, keepdims=True), rewards.shape)
    off = np.where(flat, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    deviation = np.broadcast_to(np.sqrt(np.mean(off**2, axis=1, keepdims=True)), rewards.shape)
    return (off / np.where(flat, 1.0, deviation) if scale else off), deviation, flat


def divergence(logp: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of KL(policy || reference) at each drawn token, as in GRPO: r - 1 - log r with r = reference /
    policy. It is never negative (k3 of Schulman, joschu.net/blog/kl-approx.html)."""
    difference = reference - logp
    return jnp.exp(difference) - difference - 1


def token_objective(
    config: PolicyConfig, logp: jax.Array, old: jax.Array, advantage: jax.Array, reference: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns (the objective to minimise at each token, whether it is clipped), [B, T] each.

    Args:
      logp, old, reference: log-probabilities [B, T] of the policy, of the policy that drew the samples, and of the
        reference (or None).
      advantage: the advantage of each sample, [B].
    """
    ratio = jnp.exp(logp - old)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    gained, bounded = ratio * advantage[:, None], clipped * advantage[:, None]
    objective = -jnp.minimum(gained, bounded)
    if reference is not None:
        objective = objective + config.kl * divergence(logp, reference)
    return objective, bounded < gained


def token_weights(config: PolicyConfig, drawn: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (the weight of each token [B, T], the divisor of the weighted sum []).

    Args:
      drawn: bool [B, T], whether a token was drawn.
      kept: bool [B], whether a sample is part of the mean.
    """
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
    config: TransformerConfig, chunk: int, params: Params, batch: PolicyBatch[jax.Array], lora: LoraConfig | None = None
) -> jax.Array:
    """f32 [B, T]: the log-probability of each target in the distribution that it was drawn from; 0 if it was not drawn.
    `batch` is a PolicyBatch. lora: settings of an adapter in `params`.

    Logits are linear in the hidden state. So the mixed logits of all contexts, divided by the temperature, are the
    logits of the mixed hidden state. Guidance needs one row per context, but only one product with the head.
    """
    B, C, T = batch.tokens.shape
    model = Transformer.bind(config, params, lora)
    rows = (x.reshape(B * C, T) for x in (batch.tokens, batch.positions, batch.doc_start))
    hidden = model(*rows).reshape(B, C, T, -1)
    mixed = jnp.einsum("BCTD,BCT->BTD", hidden.astype(jnp.float32), batch.mix).astype(hidden.dtype)
    nll, _ = token_losses(mixed, model.head(), batch.targets, chunk, spans=batch.spans)
    return jnp.where(batch.drawn, -nll, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyTask(TransformerTask[PolicyBatch[jax.Array]]):
    """The policy gradient on samples with rewards: `batch` is a `step.Drawing` of PolicyBatches.

    Dropout is off, as it is when samples are drawn. The weights of roles, tasks and prompts are not used, because the
    advantage is the weight of a sample. With `policy.kl`, the model state contains the trained parameters from before
    the first step. So they are in the checkpoint, and a resumed training compares with the same reference.
    """

    policy: PolicyConfig = PolicyConfig()

    def init_state(self, params: Params) -> Params:
        """The reference, if the loss uses one: the trained parameters before the first step."""
        return {"reference": self.selection(params).take(params)} if self.policy.kl else {}

    def state_axes(self, params: Params, model_state: Params) -> Params:
        """The axis names of the reference."""
        return {name: self.selection(params).axes(self.logical_axes(params)) for name in model_state}

    def loss(
        self, params: Params, model_state: Params, batch: PolicyBatch[jax.Array], keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """The clipped objective of the policy gradient, with the divergence from the reference."""
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

    def _told(self, batch: PolicyBatch[jax.Array], logp: jax.Array, old: jax.Array, held: jax.Array) -> Metrics:
        """Sums over a batch. `entropy` is estimated from the drawn tokens, in nats per token. `sampler_trainer` is the
        absolute difference between the log-probabilities of the sampler and of this code, with the same parameters.
        """
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

    def inspect(self, params: Params, model_state: Params, batch: PolicyBatch[jax.Array]) -> Metrics:
        """No further metrics, because batches are samples and not packed rows."""
        return {}

    def summary(self, totals: Totals) -> dict[str, float]:
        """Means, and `sampler_trainer/max`, an upper bound of the differences. It exceeds the largest difference by at
        most about a tenth.
        """
        counted = np.flatnonzero(np.asarray(totals["sampler_trainer"]))
        most = _LEAST * 2.0 ** (counted[-1] / _A_FACTOR) if len(counted) else math.nan
        return ratios(totals) | {"sampler_trainer/max": most if most > _LEAST else 0.0}

    def warning(self, line: Mapping[str, float]) -> str:
        """A warning about groups that have no reward, or whose rewards are equal."""
        if line.get("groups/failed", 0.0) > 0:
            return f"{line['groups/failed']:.1%} of the groups have no reward, and nothing was learned from them"
        if line.get("groups/without_signal", 0.0) > _MANY:
            return (
                "all rewards of each group are equal, so nothing is learned: use prompts that are neither always nor "
                "never answered right, a larger group_size or a finer reward"
            )
        return ""
