"""A table of K code vectors: the nearest code, a softmax over all codes, and ways to keep every code in use.

Axes: B batch, N positions (any axes before the last), C code dim, K codebook size.

Functions that need all N x K scores work through blocks of codes. At most SCORES scores exist at one time, also in the
backward pass, so K = 262144 fits in memory together with a network. Blocks divide the codes and not the positions,
because positions are spread over the devices of a mesh and should stay there.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.quantizers.base import GRADIENTS, Params, Quantizer, State

SCORES = 2**24  # most scores in memory at one time, over all devices: 64 MB of float32
DECAY = 0.99  # decay of the moving averages, per step (VQ-VAE, arXiv:1711.00937, appendix A)
UPDATES = ("gradient", "ema")
_NEVER = -1e30  # the score of a padding code; finite, because 0 * inf is NaN


# ---- all codes, a block at a time -------------------------------------------------------------------------------


def nearness(table: jax.Array) -> jax.Array:
    """[K, C] -> the bias [K] such that the code with the largest x . t + bias has the smallest distance to x."""
    return -0.5 * jnp.sum(jnp.square(table), axis=-1)


def nearest(x: jax.Array, table: jax.Array, bias: jax.Array | float = 0.0) -> jax.Array:
    """x [N, C], table [K, C] -> int32 [N]: the first code with the largest x . t + bias."""
    x, table, bias = jax.lax.stop_gradient((x, table, bias))

    def better(best: tuple[jax.Array, jax.Array], block: _Block) -> tuple[tuple[jax.Array, jax.Array], None]:
        score, code = best
        scores = _scores(x, block)
        there, then = jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1).astype(jnp.int32) + block["first"]
        return (jnp.maximum(score, there), jnp.where(there > score, then, code)), None

    start = (jnp.full(x.shape[:-1], -jnp.inf), jnp.zeros(x.shape[:-1], jnp.int32))
    return jax.lax.scan(better, start, _blocks(x, table, bias))[0][1]


def log_partition(x: jax.Array, table: jax.Array, bias: jax.Array | float = 0.0) -> jax.Array:
    """x [N, C], table [K, C] -> [N]: the log of the sum over codes of exp(x . t + bias); differentiable."""

    @jax.checkpoint
    def of_block(x: jax.Array, block: _Block) -> jax.Array:
        return jax.nn.logsumexp(_scores(x, block), axis=-1)

    def add(total: jax.Array, block: _Block) -> tuple[jax.Array, None]:
        return jnp.logaddexp(total, of_block(x, block)), None

    return jax.lax.scan(add, jnp.full(x.shape[:-1], _NEVER), _blocks(x, table, bias))[0]


def soft_lookup(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [N, C], table [K, C] -> [N, C]: the mean of the codes under softmax(x . t).

    The gradient flows only through the softmax, to x and to all codes. It does not flow through the code vectors that
    are averaged.
    """

    @jax.checkpoint
    def of_block(x: jax.Array, total: jax.Array, block: _Block) -> jax.Array:
        p = jnp.exp(_scores(x, block) - total[..., None])
        return jnp.einsum("...k,kc->...c", p, jax.lax.stop_gradient(block["table"]), precision="highest")

    total = log_partition(x, table)
    add = lambda mean, block: (mean + of_block(x, total, block), None)  # noqa: E731
    return jax.lax.scan(add, jnp.zeros_like(x), _blocks(x, table, 0.0))[0]


def entropy_penalty(x: jax.Array, table: jax.Array, bias: jax.Array | float = 0.0) -> jax.Array:
    """x [N, C], table [K, C] -> []: the mean entropy of p = softmax(x . t + bias) minus the entropy of the mean p, in
    nats.

    It is small if each position is sure of its code and all codes are used equally (Yu et al. 2023, arXiv:2310.05737).
    Both means are over the positions of one call. So if a batch is split, the mean of the parts' values differs a
    little from the value of the whole batch.
    """

    @jax.checkpoint
    def of_block(x: jax.Array, total: jax.Array, block: _Block) -> jax.Array:
        scores = _scores(x, block)
        p = jnp.exp(scores - total[..., None])
        each = jnp.mean(jnp.sum(p * (total[..., None] - scores), axis=-1))
        return each - entropy(jnp.mean(p, axis=tuple(range(p.ndim - 1))))

    total = log_partition(x, table, bias)
    add = lambda penalty, block: (penalty + of_block(x, total, block), None)  # noqa: E731
    return jax.lax.scan(add, jnp.zeros(()), _blocks(x, table, bias))[0]


def entropy(p: jax.Array) -> jax.Array:
    """The entropy of probabilities, [] in nats; its gradient at zero is finite."""
    return -jnp.sum(p * jnp.log(p + 1e-12))


_Block = dict[str, jax.Array]  # table [k, C], bias [k], first []


def _blocks(x: jax.Array, table: jax.Array, bias: jax.Array | float) -> _Block:
    """The table as a stack of blocks [n, k, ...]. The last block is padded with codes that are never chosen."""
    codes = table.shape[0]
    size = min(codes, max(1, SCORES // max(1, math.prod(x.shape[:-1]))))
    count = -(-codes // size)
    bias = jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (codes,))
    spare = count * size - codes
    return {
        "table": jnp.pad(table, [(0, spare), (0, 0)]).reshape(count, size, -1),
        "bias": jnp.pad(bias, (0, spare), constant_values=_NEVER).reshape(count, size),
        "first": jnp.arange(count, dtype=jnp.int32) * size,
    }


def _scores(x: jax.Array, block: _Block) -> jax.Array:
    # HIGHEST, because with an accelerator's default precision, similar codes of a large codebook are confused.
    return jnp.einsum("...c,kc->...k", x, block["table"], precision="highest") + block["bias"]


# ---- a table that follows the latents ---------------------------------------------------------------------------


class CodebookQuantizer(Quantizer):
    """A quantizer with a learned table, moving averages, and restarts of unused codes.

    Args:
      codebook_update: "gradient": the optimiser updates the codes. "ema": a code is the moving average of the latents
        that chose it (van den Oord et al. 2017, arXiv:1711.00937, appendix A); `update_state` computes it, and codes
        get no gradient.
      gradient: how the gradient reaches the latents, "straight_through" or "rotation".
      restart: if a code's moving average of uses is below this share of the mean over codes, one of the batch's latents
        replaces it; 0: never (Lee et al. 2022, arXiv:2203.01941; their threshold is a count, which depends on the batch
        size). A step should have at least one position per 32 codes, or the average forgets codes that are in use.

    Raises:
      ValueError: codebook_update or gradient is unknown, or the sizes are too small for a codebook.
    """

    def __init__(
        self, codes: int, dim: int, *, codebook_update: str, gradient: str, beta: float, restart: float, rngs: nnx.Rngs
    ) -> None:
        check_sizes(type(self).__name__, codes, dim)
        check_gradient(gradient)
        if codebook_update not in UPDATES:
            raise ValueError(f"codebook_update must be one of {', '.join(UPDATES)}, got {codebook_update!r}")
        if not 0 <= restart < 1:
            raise ValueError(f"restart must be in [0, 1), because it is a share of a code's mean use; got {restart}")
        self.dim, self.codebook_size, self.beta, self.restart = dim, codes, beta, restart
        self.codebook_update, self.gradient = codebook_update, gradient
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (codes, dim), jnp.float32) / math.sqrt(dim))

    def table(self) -> jax.Array:
        """float32 [K, C]: the code vectors."""
        codebook = self.codebook[...]
        return jax.lax.stop_gradient(codebook) if self.codebook_update == "ema" else codebook

    def through(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """The codes' vectors. The setting `gradient` decides how gradients reach the latents."""
        return GRADIENTS[self.gradient](bounded, vectors)

    def sums(self, bounded: jax.Array, codes: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """`count` [K] and `latent` [K, C]: the number and the sum of the latents that chose each code.

        `drawn_weight` [K] and `drawn_latent` [K, C]: for each code, the sum of the weights of the latents that drew it,
        and the weighted sum of these latents.

        A restarted code should become one latent, not the mean of many, and the draws must not depend on how a batch is
        split. So each latent draws a random code and a random weight. The weights have such a long-tailed distribution
        that the heaviest latent makes up nearly all of a code's sum.
        """
        zeros, sums = jnp.zeros((self.codebook_size, self.dim)), {}
        if self.restart or self.codebook_update == "ema":
            sums["count"] = zeros[:, 0].at[codes].add(1.0)
        if self.codebook_update == "ema":
            sums["latent"] = zeros.at[codes].add(bounded)
        if self.restart:

            def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
                code, weight = jax.random.split(key)
                tail = jax.random.uniform(weight, codes.shape[1:], minval=1e-3) ** -8
                return jax.random.randint(code, codes.shape[1:], 0, self.codebook_size), tail

            code, weight = jax.vmap(draw)(keys)
            sums["drawn_weight"] = zeros[:, 0].at[code].add(weight)
            sums["drawn_latent"] = zeros.at[code].add(weight[..., None] * bounded)
        return sums

    def init_state(self, params: Params) -> State:
        """For each code, the moving averages of its number of uses and of the sum of the latents that chose it, if the
        settings need them."""
        state = {}
        if self.restart or self.codebook_update == "ema":
            state["count"] = jnp.zeros(self.codebook_size)
        if self.codebook_update == "ema":
            state["latent"] = jnp.zeros((self.codebook_size, self.dim))
        return state

    def update_state(self, params: Params, state: State, sums: dict[str, jax.Array]) -> tuple[Params, State]:
        """Updates the moving averages. Then it computes the codes from them if `codebook_update` is "ema", and restarts
        unused codes."""
        state = {name: DECAY * old + (1 - DECAY) * sums[name] for name, old in state.items()}
        codebook = params["codebook"]
        if self.codebook_update == "ema":  # both averages start at zero with the same bias, which cancels
            used = state["count"] > 1e-12
            mean = state["latent"] / jnp.where(used, state["count"], 1.0)[:, None]
            codebook = jnp.where(used[:, None], mean, codebook)
        if self.restart:
            usual = jnp.mean(state["count"])
            weight = sums["drawn_weight"]
            again = (state["count"] < self.restart * usual) & (weight > 0)
            latent = sums["drawn_latent"] / jnp.where(weight > 0, weight, 1.0)[:, None]
            codebook = jnp.where(again[:, None], latent, codebook)
            state["count"] = jnp.where(again, usual, state["count"])  # so the next steps keep the new code
            if self.codebook_update == "ema":
                state["latent"] = jnp.where(again[:, None], usual * latent, state["latent"])
        return params | {"codebook": codebook}, state


def check_sizes(name: str, codes: int, dim: int) -> None:
    """Raises ValueError for a codebook that is too small."""
    if codes < 2 or dim < 2:
        raise ValueError(f"{name} needs at least 2 codes of at least 2 dimensions, got {codes} of {dim}")


def check_gradient(gradient: str) -> None:
    """Raises ValueError unless `gradient` is a key of GRADIENTS."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")


def pull_together(bounded: jax.Array, vectors: jax.Array, beta: float) -> jax.Array:
    """The loss that moves codes to their latents, plus beta times the loss that moves latents to their codes (VQ-VAE,
    arXiv:1711.00937).

    In taming-transformers' default ("legacy"), and in systems that copied it, beta multiplies the other term.
    """
    codebook = jnp.mean(jnp.square(jax.lax.stop_gradient(bounded) - vectors))
    return codebook + beta * commitment(bounded, vectors)


def commitment(bounded: jax.Array, vectors: jax.Array) -> jax.Array:
    """The mean squared distance of latents from their codes. Its gradient moves only the latents."""
    return jnp.mean(jnp.square(bounded - jax.lax.stop_gradient(vectors)))
