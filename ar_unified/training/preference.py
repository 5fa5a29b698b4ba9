"""Learning from preference pairs: DPO and its variants, from a model's log-probabilities of the chosen and the rejected
answer.

The loss of a pair is a function of the log-probabilities of its two answers under the model and under a reference. The
reference is the model before the first step. It is never in memory together with the model: its log-probabilities are
computed once (`answers`), and are part of the batches.

Axes: B rows, T position, P largest number of pairs in a row, R roles of targets; 2: the chosen and the rejected answer.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ar_tokenizers.trees import Metrics
from jax import Array

from ar_unified.data.batch import PackedBatch, PreferenceBatch
from ar_unified.errors import outside
from ar_unified.language.vocabulary import Role
from ar_unified.metrics import LOGPS, LOSS_OF_CHOSEN, LOSS_OF_PAIRS, REWARDS
from ar_unified.training.step import Params
from ar_unified.training.tasks import TransformerTask

LOSSES = ("dpo", "ipo", "simpo")
_MODALITIES = (Role.TEXT, Role.IMAGE)  # modalities with separately logged rewards and log-probabilities
_ANSWERS = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How a pair becomes a loss. Let s be an answer's score and r = beta * s its reward.

    dpo: s = log p - log p_reference; loss = -log sigmoid(r_chosen - r_rejected) (arXiv:2305.18290).
    ipo: the same s; loss = (s_chosen - s_rejected - 1 / (2 beta))^2 (arXiv:2310.12036).
    simpo: s = log p / tokens, no reference; loss = -log sigmoid(r_chosen - r_rejected - gamma) (arXiv:2405.14734).

    Raises ValueError, which names the field, for a number out of range.
    """

    loss: str = "dpo"  # one of LOSSES
    beta: float = 0.1  # how strongly the model is kept near the reference; for simpo a factor of the scores, 2 or more
    gamma: float = 1.0  # for simpo: by how much the chosen answer's reward should be higher
    label_smoothing: float = 0.0  # for dpo and simpo: the assumed share of swapped pairs (cDPO)
    length_normalised: bool = False  # for dpo and ipo: divide s by the tokens (arXiv:2411.15124), as simpo does
    sft: float = 0.0  # weight of the chosen answer's -log p per token, as in RPO (arXiv:2404.19733); 0: none

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
        """Whether the loss uses a reference: the model before training."""
        return self.loss != "simpo"

    @property
    def by_token(self) -> bool:
        """Whether scores are divided by the number of tokens in the answer."""
        return self.length_normalised or not self.uses_reference


def scores(config: PreferenceConfig, logps: Array, reference: Array, tokens: Array) -> Array:
    """The score s of answers, from the log-probabilities of both models and the numbers of tokens. All shapes
    broadcast.
    """
    found = logps - reference if config.uses_reference else logps
    return found / jnp.maximum(tokens, 1e-9) if config.by_token else found


def pair_losses(config: PreferenceConfig, scored: Array) -> Array:
    """The loss of each pair, f32 [...], from the scores of its chosen and its rejected answer, f32 [..., 2]."""
    margin = scored[..., 0] - scored[..., 1]
    if config.loss == "ipo":
        return jnp.square(margin - 1 / (2 * config.beta))
    logits = config.beta * margin - (config.gamma if config.loss == "simpo" else 0.0)
    wrong = config.label_smoothing
    return -(1 - wrong) * jax.nn.log_sigmoid(logits) - wrong * jax.nn.log_sigmoid(-logits)


def trained(batch: PackedBatch[jax.Array]) -> Array:
    """bool [B, T]: whether a target belongs to an answer of a pair."""
    return ~batch.prompt & (batch.roles != Role.PAD) & (batch.segment_ids > 0)


def by_answer(values: Array, batch: PackedBatch[jax.Array], pairs: int) -> Array:
    """The sums of values f32 [B, T] over the trained targets of each answer and role, f32 [B, P, 2, R]."""
    places = 2 * pairs * len(Role)
    own = (batch.segment_ids - 1) * len(Role) + batch.roles
    where = jnp.where(trained(batch), own, places)  # one more place for tokens outside answers

    def of_row(values: Array, where: Array) -> Array:
        return jax.ops.segment_sum(values, where, places + 1)[:-1]

    return jax.vmap(of_row)(values, where).reshape(-1, pairs, 2, len(Role))


class Pairs(NamedTuple):
    """Values of the pairs in a batch. The loss and the metrics use them."""

    logps: Array  # f32 [B, P, 2, R], weighted by role
    scored: Array  # f32 [B, P, 2, R], the parts of each answer's score
    tokens: Array  # f32 [B, P, 2, R], not weighted
    there: Array  # bool [B, P], whether the pair exists
    weight: Array  # f32 [B, P], weight of its chosen document's task; 0 if there is no pair


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceTask(TransformerTask[PreferenceBatch[jax.Array]]):
    """Preference pairs in packed rows (`data.batch.PreferenceBatch`); all other arguments are as in `TransformerTask`.

    The loss of a step is the mean over its pairs. A pair has the weight of its chosen answer's task. role_weights
    multiply the log-probabilities, so they also scale the part of each modality in the scores. Prompts are not part of
    the scores. z_loss is computed on the tokens of the SFT term.
    """

    preference: PreferenceConfig = PreferenceConfig()

    def answers(self, params: Params, batch: PackedBatch[jax.Array], pairs: int) -> Array:
        """Log-probabilities of each answer under the reference `params`, by the target's role, f32 [B, P, 2, R]."""
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
        metrics = super().token_metrics(rows, of_chosen, nll, lse)  # by role and task, for the chosen answers
        metrics[LOSS_OF_CHOSEN] = jnp.sum(of_chosen * nll), jnp.sum(of_chosen)
        metrics[LOSS_OF_PAIRS] = jnp.sum(pairs.weight * losses), jnp.sum(pairs.weight)
        metrics["loss"] = jnp.sum(pairs.weight * total), jnp.sum(pairs.weight)
        return *metrics["loss"], metrics | _told(config, pairs)

    def rows(self, batch: PreferenceBatch[jax.Array]) -> PackedBatch[jax.Array]:
        """The packed rows that contain the pairs."""
        return batch.documents

    def _length(self, tokens: Array) -> Array:
        """f32 [B, P, 2]: the number of tokens in each answer, weighted by role."""
        return jnp.maximum(jnp.sum(tokens * self.of_role, -1), 1e-9)

    def _pairs(self, batch: PreferenceBatch[jax.Array], nll: Array) -> Pairs:
        rows, count = batch.documents, batch.reference.shape[1]
        logps = -by_answer(nll, rows, count) * self.of_role
        tokens = by_answer(jnp.ones_like(nll), rows, count)
        scored = scores(self.preference, logps, batch.reference * self.of_role, self._length(tokens)[..., None])
        task = by_answer(self.of_task[rows.tasks], rows, count)[:, :, 0].sum(-1)  # task weight, summed over tokens
        there = jnp.all(jnp.sum(tokens, -1) > 0, -1)
        weight = jnp.where(there, task / jnp.maximum(tokens[:, :, 0].sum(-1), 1.0), 0.0)
        return Pairs(logps, scored, tokens, there, weight)


def _told(config: PreferenceConfig, pairs: Pairs) -> Metrics:
    """Means over pairs under the usual names. The metrics with `/text` or `/image` at the end are for one modality.
    They are means over the pairs with this modality in an answer.

    `logps/` are sums of log-probabilities in nats, and `rewards/` are beta times the scores. `rewards/margins` is the
    chosen reward minus the rejected reward. `rewards/accuracies` is the share of pairs with a margin above 0.
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
