"""Learning from preference pairs: DPO and its variants, on a model's log-probabilities of the chosen and the rejected
answer.

A pair's loss is a function of the log-probabilities of its two answers under the model and under a reference, which is
the model as it was before the first step. The reference is never in memory beside the model: its sums are computed once
(`answers`), and come with the batches.

Axes: B rows, T position, P pairs of a row at most, R roles of targets; 2: the chosen answer and the rejected one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ar_unified.data.batch import PackedBatch, PreferenceBatch
from ar_unified.errors import outside
from ar_unified.language.vocabulary import Role
from ar_unified.metrics import LOGPS, LOSS_OF_CHOSEN, LOSS_OF_PAIRS, REWARDS
from ar_unified.training.step import Metrics, Params
from ar_unified.training.tasks import TransformerTask

LOSSES = ("dpo", "ipo", "simpo")
_MODALITIES = (Role.TEXT, Role.IMAGE)  # the modalities whose parts of rewards and log-probabilities are logged
_ANSWERS = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How a pair becomes a loss. Let s be an answer's score and r = beta * s its reward.

    dpo: s = log p - log p_reference; loss = -log sigmoid(r_chosen - r_rejected) (arXiv:2305.18290).
    ipo: the same s; loss = (s_chosen - s_rejected - 1 / (2 beta))^2 (arXiv:2310.12036).
    simpo: s = log p / tokens, no reference; loss = -log sigmoid(r_chosen - r_rejected - gamma) (arXiv:2405.14734).

    Raises ValueError, naming the field, for a number out of range.
    """

    loss: str = "dpo"  # of LOSSES
    beta: float = 0.1  # how dear it is to leave the reference; of simpo the scale of its scores, there 2 or more
    gamma: float = 1.0  # of simpo: how much more reward the chosen answer is to have
    label_smoothing: float = 0.0  # of dpo and simpo: how often a pair is taken to be the wrong way round (cDPO)
    length_normalised: bool = False  # of dpo and ipo: s is divided by the answer's tokens (arXiv:2411.15124); simpo is
    sft: float = 0.0  # weight of the chosen answer's -log p a token, as in RPO (arXiv:2404.19733); 0: none

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}; found {self.loss!r}")
        ranges = dict(beta="(0, inf)", gamma="[0, inf)", label_smoothing="[0, 0.5)", sft="[0, inf)")
        if problems := outside(self, **ranges):
            raise ValueError(problems[0])
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing: expected 0 with loss 'ipo', found {self.label_smoothing}")

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with the model that training begins with."""
        return self.loss != "simpo"

    @property
    def by_token(self) -> bool:
        """Whether scores are divided by the answer's tokens."""
        return self.length_normalised or not self.uses_reference


def scores(config: PreferenceConfig, logps: Array, reference: Array, tokens: Array) -> Array:
    """The score s of answers: log-probabilities of both models, and tokens, which broadcast, in any shape."""
    found = logps - reference if config.uses_reference else logps
    return found / jnp.maximum(tokens, 1e-9) if config.by_token else found


def pair_losses(config: PreferenceConfig, scored: Array) -> Array:
    """Scores f32 [..., 2] of chosen and rejected answers -> the loss of each pair, f32 [...]."""
    margin = scored[..., 0] - scored[..., 1]
    if config.loss == "ipo":
        return jnp.square(margin - 1 / (2 * config.beta))
    logits = config.beta * margin - (config.gamma if config.loss == "simpo" else 0.0)
    wrong = config.label_smoothing
    return -(1 - wrong) * jax.nn.log_sigmoid(logits) - wrong * jax.nn.log_sigmoid(-logits)


def trained(batch: PackedBatch[jax.Array]) -> Array:
    """bool [B, T]: the targets that belong to the answers of pairs."""
    return ~batch.prompt & (batch.roles != Role.PAD) & (batch.segment_ids > 0)


def by_answer(values: Array, batch: PackedBatch[jax.Array], pairs: int) -> Array:
    """Sums of values f32 [B, T] over the trained targets of each answer, by role: f32 [B, P, 2, R]."""
    places = 2 * pairs * len(Role)
    own = (batch.segment_ids - 1) * len(Role) + batch.roles
    where = jnp.where(trained(batch), own, places)  # tokens of no answer have a place of their own

    def of_row(values: Array, where: Array) -> Array:
        return jax.ops.segment_sum(values, where, places + 1)[:-1]

    return jax.vmap(of_row)(values, where).reshape(-1, pairs, 2, len(Role))


class Pairs(NamedTuple):
    """The numbers of a batch's pairs that the loss and the metrics use."""

    logps: Array  # f32 [B, P, 2, R], weighted by role
    scored: Array  # f32 [B, P, 2, R], the parts of each answer's score
    tokens: Array  # f32 [B, P, 2, R], not weighted
    there: Array  # bool [B, P], whether there is such a pair
    weight: Array  # f32 [B, P], of its chosen document's task; 0 where there is none


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceTask(TransformerTask):
    """Preference pairs in packed rows (`data.batch.PreferenceBatch`); all other args as of `TransformerTask`.

    The loss of a step is the mean over its pairs; a pair has the weight of its chosen answer's task. role_weights weigh
    log-probabilities, and so each modality's part of the scores; prompts have no part in them. z_loss is over the
    tokens of the SFT term.
    """

    preference: PreferenceConfig = PreferenceConfig()

    def answers(self, params: Params, batch: PackedBatch[jax.Array], pairs: int) -> Array:
        """Log-probabilities of each answer by role of the target, f32 [B, P, 2, R], under `params`, those of the
        reference.
        """
        return -by_answer(self.of_targets(params, batch)[0], batch, pairs)

    def loss(
        self, params: Params, model_state: Params, batch: PreferenceBatch[jax.Array], keys: Array | None
    ) -> tuple[Array, Array, Metrics]:
        """The mean of `pair_losses` over pairs, with the SFT term."""
        rows, config = batch.documents, self.preference
        nll, lse = self.of_targets(params, rows, keys)
        pairs = self._pairs(batch, nll)
        losses = pair_losses(config, jnp.sum(pairs.scored, -1))
        total = losses
        of_chosen = self.of_role[rows.roles] * trained(rows) * (rows.segment_ids % 2 == 1)
        if config.sft:
            count = pairs.logps.shape[1]
            learned = by_answer(of_chosen * (nll + self.z_loss * jnp.square(lse)), rows, count)[:, :, 0]
            total = total + config.sft * jnp.sum(learned, -1) / self._length(pairs.tokens)[:, :, 0]
        metrics = super().token_metrics(rows, of_chosen, nll, lse)  # by role and task: of the chosen answers
        metrics[LOSS_OF_CHOSEN] = jnp.sum(of_chosen * nll), jnp.sum(of_chosen)
        metrics[LOSS_OF_PAIRS] = jnp.sum(pairs.weight * losses), jnp.sum(pairs.weight)
        metrics["loss"] = jnp.sum(pairs.weight * total), jnp.sum(pairs.weight)
        return *metrics["loss"], metrics | _told(config, pairs)

    def inspect(self, params: Params, model_state: Params, batch: PreferenceBatch[jax.Array]) -> Metrics:
        """As of `TransformerTask`, on the rows of the pairs."""
        return super().inspect(params, model_state, batch.documents)

    def _length(self, tokens: Array) -> Array:
        """f32 [B, P, 2]: the number of an answer's tokens, each with the weight of its role."""
        return jnp.maximum(jnp.sum(tokens * self.of_role, -1), 1e-9)

    def _pairs(self, batch: PreferenceBatch[jax.Array], nll: Array) -> Pairs:
        rows, count = batch.documents, batch.reference.shape[1]
        logps = -by_answer(nll, rows, count) * self.of_role
        tokens = by_answer(jnp.ones_like(nll), rows, count)
        scored = scores(self.preference, logps, batch.reference * self.of_role, self._length(tokens)[..., None])
        task = by_answer(self.of_task[rows.tasks], rows, count)[:, :, 0].sum(-1)  # its weight, once a token
        there = jnp.all(jnp.sum(tokens, -1) > 0, -1)
        weight = jnp.where(there, task / jnp.maximum(tokens[:, :, 0].sum(-1), 1.0), 0.0)
        return Pairs(logps, scored, tokens, there, weight)


def _told(config: PreferenceConfig, pairs: Pairs) -> Metrics:
    """Means over pairs under the usual names, and their parts by modality, `/text` and `/image`, over the pairs with
    that modality in an answer.

    `logps/` are sums of log-probabilities in nats, `rewards/` are beta times the scores, `rewards/margins` chosen minus
    rejected, `rewards/accuracies` the share of pairs whose margin is above 0.
    """
    metrics: Metrics = {}
    whole = [("", pairs.logps.sum(-1), pairs.scored.sum(-1), pairs.there)]
    parts = [
        (f"/{role.name.lower()}", pairs.logps[..., role], pairs.scored[..., role], pairs.tokens[..., role].sum(-1) > 0)
        for role in _MODALITIES
    ]
    for name, logps, scored, where in [*whole, *parts]:
        rewards = config.beta * scored
        margins = rewards[..., 0] - rewards[..., 1]
        values = {f"{LOGPS}{which}": logps[..., i] for i, which in enumerate(_ANSWERS)}
        values |= {f"{REWARDS}{which}": rewards[..., i] for i, which in enumerate(_ANSWERS)}
        values |= {f"{REWARDS}margins": margins, f"{REWARDS}accuracies": (margins > 0).astype(jnp.float32)}
        count = jnp.sum(where, dtype=jnp.float32)
        metrics |= {key + name: (jnp.sum(jnp.where(where, each, 0.0)), count) for key, each in values.items()}
    return metrics
