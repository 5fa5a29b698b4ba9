"""AdamW with weight decay only on matrices, Muon for the layers' matrices, and two schedules: warm-up + cosine, and
WSD.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from ar_unified.errors import nearest, outside

CHOICES = {"optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd"), "decay": ("sqrt", "linear")}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (decoupled decay, Loshchilov & Hutter, arXiv:1711.05101) or Muon, and the learning-rate schedule.

    Muon (Jordan et al., kellerjordan.github.io/posts/muon, 2024) updates the layers' matrices by their orthogonalised
    momentum. AdamW updates embeddings, head and norms (b1, b2 and eps are only for AdamW). Muon's updates are scaled to
    the root mean square of AdamW's updates, which is 0.2 times the rate (Liu et al., arXiv:2502.16982). So a learning
    rate and a decay for AdamW are a good first choice for Muon.

    WSD means warm-up, stable, decay (arXiv:2404.06395). The decay can start from any checkpoint of the stable part.
    With `decay="sqrt"` the rate falls as 1 - sqrt(x), where x goes from 0 to 1 during the decay. This was the best
    shape in the comparison of arXiv:2405.18392.

    A restart repeats the whole schedule with its warm-up (Loshchilov & Hutter, arXiv:1608.03983), for training in
    stages.

    Raises ValueError, which names the field, for an unknown choice or a number out of range.
    """

    optimizer: str = "adamw"  # or "muon"
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 100  # linear from 0
    schedule: str = "cosine"  # or "wsd"
    decay: str = "sqrt"  # WSD only; or "linear"
    decay_fraction: float = 0.2  # WSD only: the last part of the steps, with a falling rate
    final_fraction: float = 0.1  # fraction of the peak at the last step
    restarts: Sequence[float] = ()  # ascending fractions of the steps; at each of them a new schedule begins
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # limit of the norm of the gradient (of each gradient if there are several losses); 0: none

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (found := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; found {found!r}{nearest(found, known)}")
        if problems := outside(
            self,
            learning_rate="[0, inf)",
            warmup_steps="[0, inf)",
            decay_fraction="[0, 1]",
            final_fraction="[0, 1]",
            b1="[0, 1)",
            b2="[0, 1)",
            eps="(0, inf)",
            weight_decay="[0, inf)",
            clip_norm="[0, inf)",
        ):
            raise ValueError(problems[0])


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a jittable function of the step, counted from 0, if training has `steps` steps.

    Raises ValueError if restarts are out of order, or if warm-up and decay are longer than the steps.
    """
    begins = [0, *(math.ceil(share * steps) for share in config.restarts)]
    lengths = [end - begin for begin, end in itertools.pairwise([*begins, steps])]
    if min(lengths) < 1:
        raise ValueError(f"restarts: expected ascending fractions of the steps in (0, 1); found {config.restarts}")
    return optax.join_schedules([_schedule(config, length) for length in lengths], begins[1:])


def _schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """A single schedule with warm-up and decay, over `steps` steps."""
    warmup = config.warmup_steps
    decay_steps = steps - warmup if config.schedule == "cosine" else max(1, round(config.decay_fraction * steps))
    if decay_steps < 1 or warmup + decay_steps > steps:
        raise ValueError(
            f"warmup_steps: {warmup} steps of warm-up and {max(decay_steps, 1)} of decay do not fit into {steps} "
            "steps: lower warmup_steps, or take more steps"
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1  # the first step has a rate above 0; the last ends the decay
        rise = jnp.minimum(done / (warmup + 1), 1.0)
        x = jnp.clip((done - (steps - decay_steps)) / decay_steps, 0.0, 1.0)
        if config.schedule == "cosine":
            fall = 0.5 * (1 + jnp.cos(jnp.pi * x))
        else:
            fall = 1 - (jnp.sqrt(x) if config.decay == "sqrt" else x)
        return config.learning_rate * rise * (config.final_fraction + (1 - config.final_fraction) * fall)

    return schedule


def is_decayed(path: Sequence[Any], leaf: Any) -> bool:
    """Matrices have weight decay. Norms, biases and codebooks do not, because their size has a meaning."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    axes = leaf.ndim - (names[0] == "layers")
    return axes >= 2 and not any(word in name for name in names for word in ("norm", "bias", "codebook"))


def _muon_axes(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
    """The input axes and the output axes of a layer's stacked matrix. None: AdamW updates this leaf.

    All heads together form one matrix, [L, D, N H] or [L, N H, D].
    """
    names = [str(getattr(key, "key", key)) for key in path]
    if names[0] != "layers" or not is_decayed(path, leaf):
        return None
    first_made = leaf.ndim - 1 if names[-1] == "output" else 2
    return MuonDimensionNumbers(tuple(range(1, first_made)), tuple(range(first_made, leaf.ndim)))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation for plain parameter trees. The train step clips the gradient, because it already knows
    the norm, and applies the rates of parts (rates.py).

    Raises ValueError as `learning_rate` does.
    """
    rate = learning_rate(config, steps)
    tx = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(is_decayed, params),
    )
    if config.optimizer == "muon":
        axes = functools.partial(jax.tree_util.tree_map_with_path, _muon_axes)
        orthogonal = muon(
            rate, weight_decay=config.weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=axes
        )
        tx = optax.partition({True: orthogonal, False: tx}, _moved_by_muon)
    return tx


def _moved_by_muon(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _muon_axes(path, leaf) is not None, params)


def state_shardings(tx: optax.GradientTransformation, params: Any, param_shardings: Any, other: Any) -> Any:
    """Shardings for `tx.init(params)`: moments are sharded like their parameters, counters have the sharding
    `other`."""
    return optax.tree_map_params(
        tx,
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        jax.eval_shape(tx.init, params),
        param_shardings,
        transform_non_params=lambda _: other,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # a parameter that another optimizer updates
    )
