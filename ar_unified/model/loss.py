"""Cross-entropy over a large vocabulary in chunks of tokens: logits exist for one chunk at a time.

B batch, T position, D model, V vocabulary, C chunks, M tokens of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = 1024
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log-partition of each position; the caller weighs, masks and sums.

    Backward computes each chunk's logits again (one more product with the head), so neither direction holds more than
    [chunk, V] of them. Any function of the two outputs has its right gradient: `(w * nll).sum()` for weighted
    cross-entropy, `+ z * (w * lse**2).sum()` for z-loss (PaLM, arXiv 2204.02311).

    Args:
      hidden: [B, T, D].
      head: [V, D]; taken to the dtype of `hidden`, products accumulate in float32.
      targets: int32 [B, T], in 0 .. V - 1. Padding needs any such id, and a weight of 0 from the caller.
      chunk: tokens whose logits exist at once, over all rows; a chunk takes the same columns of every row.

    Returns:
      nll and lse, float32 [B, T]; nll = lse - logit of the target.
    """
    B, T, D = hidden.shape
    width = max(1, min(chunk // B, T))
    pad = -T % width

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [C, B, width, ...]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, width, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(B, T + pad)[:, :T]

    nll, lse = _chunked(split(hidden), head.astype(hidden.dtype), split(targets))
    return join(nll), join(lse)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _chunked(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    def one(piece):
        hidden, targets = piece
        logits = _logits(hidden, head)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], lse

    return jax.lax.map(one, (hidden, targets))


def _forward(hidden, head, targets):
    nll, lse = _chunked(hidden, head, targets)
    return (nll, lse), (hidden, head, targets, lse)


def _backward(residuals, cotangents):
    hidden, head, targets, lse = residuals

    def one(head_grad, piece):
        hidden, targets, lse, nll_bar, lse_bar = piece
        probabilities = jnp.exp(_logits(hidden, head) - lse[..., None])
        hit = targets[..., None] == jnp.arange(head.shape[0], dtype=targets.dtype)
        logits_bar = probabilities * (nll_bar + lse_bar)[..., None] - jnp.where(hit, nll_bar[..., None], 0.0)
        logits_bar = logits_bar.astype(hidden.dtype)
        hidden_bar = jnp.einsum("BTV,VD->BTD", logits_bar, head)
        head_grad += jnp.einsum("BTV,BTD->VD", logits_bar, hidden, preferred_element_type=jnp.float32)
        return head_grad, hidden_bar

    zeros = jnp.zeros(head.shape, jnp.float32)
    head_bar, hidden_bar = jax.lax.scan(one, zeros, (hidden, targets, lse, *cotangents))
    return hidden_bar, head_bar.astype(head.dtype), None


_chunked.defvjp(_forward, _backward)
