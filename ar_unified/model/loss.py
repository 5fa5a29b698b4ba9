"""Cross-entropy over a large vocabulary in chunks of tokens. Logits exist only for one chunk at a time.

On a mesh (`jax.set_mesh`) each device combines its own tokens with its part of the vocabulary, and devices exchange
only three numbers per token. The head is gathered over fsdp once, not once per chunk, and its gradient is
scattered once. The compiler would do both inside the loop.

B batch, T position, D model, V vocabulary (or a device's part of it), C chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_unified.kernels.product import product
from ar_unified.parallel.rules import spec


def token_losses(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    chunk: int = 1024,
    used: int | None = None,
    split: int | None = None,
    spans: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log-partition of each position. The caller weights, masks and sums them.

    Backward computes each chunk's logits again (one more product with the head), so neither pass stores more than
    [chunk, V] logits. Gradients are right for any function of the two outputs. If the weights of the positions are
    known in advance, `weighted_loss` is faster.

    Args:
      hidden: [B, T, D].
      head: [V, D]; cast to the dtype of `hidden`; products accumulate in float32.
      targets: int32 [B, T], in 0 .. used - 1. Padding may have any of these ids; the caller gives it weight 0.
      chunk: how many of a device's tokens have logits at the same time; a chunk has the same positions of each row.
      used: rows of the head from this index on have no probability and no gradient; None means V.
      split: ids below it have one softmax, and ids from it on have another. Each target uses the softmax of its side.
        None means one softmax for all.
      spans: int32 [B, T, K, 2], K ranges [first id, one past the last] of the ids in a position's softmax; ranges may
        be empty. None means all ids that `used` and `split` allow.

    Returns:
      nll and lse, float32 [B, T]; nll = lse - logit of the target.

    Raises:
      ValueError: if `used` is not in 1 .. V, or `split` not in 1 .. used - 1.
    """
    return _losses(chunk, _checked(head, used, split), split, hidden, head, targets, spans)


def weighted_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    chunk: int = 1024,
    used: int | None = None,
    split: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """sum(weights * (nll + z_loss * lse**2)): weighted cross-entropy and z-loss (PaLM, arXiv 2204.02311).

    Its gradient is computed while a chunk's logits are in memory, so training multiplies with the head three times and
    not four times. Without differentiation, only the loss is computed.

    All arguments not listed here are as for `token_losses`.

    Args:
      weights: f32 [B, T], the weight of each position. It has no gradient.

    Returns:
      The loss, float32 []; nll and lse, float32 [B, T], through which no gradient flows.

    Raises ValueError like `token_losses`.
    """
    loss, nll, lse = _weighted(chunk, _checked(head, used, split), split, z_loss, hidden, head, targets, weights)
    return loss, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(lse)


def _checked(head: jax.Array, used: int | None, split: int | None) -> int | None:
    """Returns `used`, or None if it includes all rows of the head. Raises ValueError."""
    if used is not None and not 0 < used <= head.shape[0]:
        raise ValueError(f"used: expected 1 to {head.shape[0]}, the number of rows of the head; found {used}")
    ids = used or head.shape[0]
    if split is not None and not 0 < split < ids:
        raise ValueError(f"split: expected 1 to {ids - 1}, so that each side has an id; found {split}")
    return None if used == head.shape[0] else used


def in_softmax(
    logits: jax.Array,
    ids: jax.Array,
    targets: jax.Array,
    used: int | None = None,
    split: int | None = None,
    spans: jax.Array | None = None,
) -> jax.Array:
    """Sets the logits [..., V] of ids [V] to -inf if the id is outside the softmax of the position's target [...].

    `used`, `split` and `spans` [..., K, 2] are as in `token_losses`.
    """
    if spans is not None:
        first, behind = spans[..., 0, None], spans[..., 1, None]  # [..., K, 1]
        logits = jnp.where(jnp.any((first <= ids) & (ids < behind), axis=-2), logits, -jnp.inf)
    if used is not None:
        logits = jnp.where(ids < used, logits, -jnp.inf)
    if split is not None:
        logits = jnp.where((ids >= split) == (targets >= split)[..., None], logits, -jnp.inf)
    return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _losses(
    chunk: int,
    used: int | None,
    split: int | None,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    spans: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    placement = _Placement(hidden, head, used, split)
    return placement.run(_forward_part, chunk, (hidden, head, targets, spans), (placement.tokens, placement.tokens))


def _forward(chunk, used, split, hidden, head, targets, spans):
    nll, lse = _losses(chunk, used, split, hidden, head, targets, spans)
    return (nll, lse), (hidden, head, targets, spans, lse)


def _backward(chunk, used, split, residuals, cotangents):
    hidden, head, *_ = residuals
    placement = _Placement(hidden, head, used, split)
    return (
        *placement.run(_backward_part, chunk, (*residuals, *cotangents), (placement.hidden, placement.head)),
        None,
        None,
    )


_losses.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _weighted(
    chunk: int,
    used: int | None,
    split: int | None,
    z_loss: float,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    nll, lse = _losses(chunk, used, split, hidden, head, targets, None)
    return _sum(weights, nll, lse, z_loss), nll, lse


def _sum(weights: jax.Array, nll: jax.Array, lse: jax.Array, z_loss: float) -> jax.Array:
    return jnp.sum(weights * (nll + z_loss * jnp.square(lse)))


def _weighted_forward(chunk, used, split, z_loss, hidden, head, targets, weights):
    placement = _Placement(hidden, head, used, split)
    outs = (placement.tokens, placement.tokens, placement.hidden, placement.head)
    part = functools.partial(_gradient_part, z_loss)
    nll, lse, *bars = placement.run(part, chunk, (hidden, head, targets, weights), outs)
    return (_sum(weights, nll, lse, z_loss), nll, lse), bars


def _weighted_backward(chunk, used, split, z_loss, bars, cotangents):
    return *(cotangents[0].astype(bar.dtype) * bar for bar in bars), None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


class _Placement:
    """How arrays are placed on the mesh in scope, and which mesh axes are summed over. Without a mesh, nothing is
    sharded.
    """

    def __init__(self, hidden: jax.Array, head: jax.Array, used: int | None, split: int | None):
        self.used, self.split = used, split
        mesh = jax.sharding.get_abstract_mesh()
        self.sharded = not mesh.empty and mesh.size > 1
        self.hidden = self.tokens = self.head = jax.P()
        if self.sharded:
            self.hidden = spec(mesh, ("batch", "sequence", None), hidden.shape, "hidden")
            self.tokens = spec(mesh, ("batch", "sequence"), hidden.shape[:2], "targets")
            self.head = spec(mesh, ("vocab", "embed"), head.shape, "head")

    def run(self, part: Callable, chunk: int, args: tuple, outs: tuple) -> Any:
        part = functools.partial(part, self, chunk)
        if not self.sharded:
            return part(*args)
        ins = (self.hidden, self.head, *(self.tokens,) * (len(args) - 2))
        return jax.shard_map(part, in_specs=ins, out_specs=outs, check_vma=False)(*args)

    def whole_head(self, head: jax.Array, dtype: DTypeLike) -> jax.Array:
        head = head.astype(dtype)
        return jax.lax.all_gather(head, "fsdp", axis=1, tiled=True) if self.sharded else head

    def scattered(self, head_bar: jax.Array) -> jax.Array:
        if not self.sharded:
            return head_bar
        head_bar = jax.lax.psum_scatter(head_bar, "fsdp", scatter_dimension=1, tiled=True)
        return jax.lax.psum(head_bar, ("data", "context"))

    def over_vocabulary(self, collective: Callable, x: Any) -> Any:
        return collective(x, "tensor") if self.sharded else x

    def local(self, ids: Any, size: int) -> Any:
        """Counts ids from the first of this device's `size` ids on. Other devices' ids get numbers outside 0 .. size -
        1."""
        return ids - jax.lax.axis_index("tensor") * size if self.sharded else ids

    def ids(self, head: jax.Array) -> jax.Array:
        """The ids of the head's rows that are on this device."""
        return jnp.arange(head.shape[0]) - self.local(0, head.shape[0])

    def logits(self, hidden: jax.Array, head: jax.Array, targets: jax.Array, spans: jax.Array | None) -> jax.Array:
        logits = jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)
        return in_softmax(logits, self.ids(head), targets, self.used, self.split, spans)

    def losses(self, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """nll and lse of a chunk, float32 [B, T]."""
        highest = self.over_vocabulary(jax.lax.pmax, logits.max(-1))
        total = jnp.exp(logits - highest[..., None]).sum(-1)
        local = self.local(targets, logits.shape[-1])
        there = (local >= 0) & (local < logits.shape[-1])
        found = jnp.take_along_axis(logits, jnp.where(there, local, 0)[..., None], -1)[..., 0]
        total, found = self.over_vocabulary(jax.lax.psum, (total, jnp.where(there, found, 0.0)))
        lse = highest + jnp.log(total)
        return lse - found, lse

    def gradients(
        self, hidden: jax.Array, head: jax.Array, logits: jax.Array, targets: jax.Array, lse: jax.Array, bars: Any
    ) -> tuple[jax.Array, jax.Array]:
        """A chunk's gradients for `hidden` (to be summed over the devices along "tensor") and for `head` (float32).

        bars: the gradients of nll and lse.
        """
        nll_bar, lse_bar = bars
        probabilities = jnp.exp(logits - lse[..., None])
        hit = targets[..., None] == self.ids(head)
        logits_bar = probabilities * (nll_bar + lse_bar)[..., None] - jnp.where(hit, nll_bar[..., None], 0.0)
        logits_bar = logits_bar.astype(hidden.dtype)
        head_bar = jnp.einsum("BTV,BTD->VD", logits_bar, hidden, preferred_element_type=jnp.float32)
        return product("BTV,VD->BTD", logits_bar, head), head_bar


def _forward_part(placement, chunk, hidden, head, targets, spans):
    head = placement.whole_head(head, hidden.dtype)

    def one(piece):
        hidden, targets, spans = piece
        return placement.losses(placement.logits(hidden, head, targets, spans), targets)

    split, join = _chunks(chunk, targets.shape)
    nll, lse = jax.lax.map(one, jax.tree.map(split, (hidden, targets, spans)))
    return join(nll), join(lse)


def _backward_part(placement, chunk, hidden, head, targets, spans, lse, *bars):
    whole = placement.whole_head(head, hidden.dtype)

    def one(head_bar, piece):
        hidden, targets, spans, lse, *bars = piece
        logits = placement.logits(hidden, whole, targets, spans)
        hidden_bar, more = placement.gradients(hidden, whole, logits, targets, lse, bars)
        return head_bar + more, hidden_bar

    split, join = _chunks(chunk, targets.shape)
    pieces = jax.tree.map(split, (hidden, targets, spans, lse, *bars))
    head_bar, hidden_bar = jax.lax.scan(one, jnp.zeros(whole.shape, jnp.float32), pieces)
    hidden_bar = placement.over_vocabulary(jax.lax.psum, join(hidden_bar))
    return hidden_bar, placement.scattered(head_bar).astype(head.dtype)


def _gradient_part(z_loss, placement, chunk, hidden, head, targets, weights):
    whole = placement.whole_head(head, hidden.dtype)

    def one(head_bar, piece):
        hidden, targets, weights = piece
        logits = placement.logits(hidden, whole, targets, None)
        nll, lse = placement.losses(logits, targets)
        bars = weights, 2 * z_loss * weights * lse
        hidden_bar, more = placement.gradients(hidden, whole, logits, targets, lse, bars)
        return head_bar + more, (nll, lse, hidden_bar)

    split, join = _chunks(chunk, targets.shape)
    pieces = jax.tree.map(split, (hidden, targets, weights))
    head_bar, (nll, lse, hidden_bar) = jax.lax.scan(one, jnp.zeros(whole.shape, jnp.float32), pieces)
    hidden_bar = placement.over_vocabulary(jax.lax.psum, join(hidden_bar))
    return join(nll), join(lse), hidden_bar, placement.scattered(head_bar).astype(head.dtype)


def _chunks(chunk: int, shape: tuple[int, ...]) -> tuple[Callable, Callable]:
    """Converts arrays [B, T, ...] to [C, B, width, ...] and back."""
    B, T = shape
    width = max(1, min(chunk // B, T))
    pad = -T % width

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, width, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(B, T + pad, *x.shape[3:])[:, :T]

    return split, join
