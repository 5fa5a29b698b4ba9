"""Cross-entropy over a large vocabulary in chunks of tokens. Logits exist only for one chunk at a time.

On a mesh (`jax.set_mesh`) each device combines its own rows and columns with its part of the vocabulary, and a chunk
exchanges only three numbers per token. The head is gathered over fsdp once, not once per chunk, and its gradient is
scattered once. The compiler would do both inside the loop.

B batch, T position, D model, V vocabulary (the device's part, in device code), C chunks.
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
    [chunk, V] logits. Gradients are right for any function of the two outputs: `(w * nll).sum()` for weighted
    cross-entropy, `+ z * (w * lse**2).sum()` for z-loss (PaLM, arXiv 2204.02311).

    Args:
      hidden: [B, T, D].
      head: [V, D]; cast to the dtype of `hidden`; products accumulate in float32.
      targets: int32 [B, T], in 0 .. used - 1. Padding may have any of these ids; the caller gives it weight 0.
      chunk: number of a device's tokens with logits at the same time; a chunk has the same columns of each row.
      used: rows of the head from this index on have no probability and no gradient; None: all V rows are used.
      split: ids below it have one softmax and ids from it on another, and each target uses the softmax of its side;
        None: one softmax for all.
      spans: int32 [B, T, K, 2], K ranges [first id, one past the last] of the ids in a position's softmax; ranges may
        be empty. None: all ids that `used` and `split` allow.

    Returns:
      nll and lse, float32 [B, T]; nll = lse - logit of the target.

    Raises:
      ValueError: `used` is not in 1 .. V, or `split` not in 1 .. used - 1.
    """
    if used is not None and not 0 < used <= head.shape[0]:
        raise ValueError(f"used: expected 1..{head.shape[0]}, the rows of the head, found {used}")
    ids = used or head.shape[0]
    if split is not None and not 0 < split < ids:
        raise ValueError(f"split: expected 1..{ids - 1}, so that each side has an id, found {split}")
    return _losses(chunk, None if used == head.shape[0] else used, split, hidden, head, targets, spans)


def in_softmax(
    logits: jax.Array,
    ids: jax.Array,
    targets: jax.Array,
    used: int | None = None,
    split: int | None = None,
    spans: jax.Array | None = None,
) -> jax.Array:
    """The logits [..., V] of ids [V], set to -inf for ids outside the softmax of the position's target [...].

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
        """Ids relative to the first of this device's `size` ids; outside 0 .. size - 1 if another device has them."""
        return ids - jax.lax.axis_index("tensor") * size if self.sharded else ids

    def ids(self, head: jax.Array) -> jax.Array:
        """The part of an array for this device's rows."""
        return jnp.arange(head.shape[0]) - self.local(0, head.shape[0])

    def logits(self, hidden: jax.Array, head: jax.Array, targets: jax.Array, spans: jax.Array | None) -> jax.Array:
        logits = jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)
        return in_softmax(logits, self.ids(head), targets, self.used, self.split, spans)


def _forward_part(placement, chunk, hidden, head, targets, spans):
    head = placement.whole_head(head, hidden.dtype)

    def one(piece):
        hidden, targets, spans = piece
        logits = placement.logits(hidden, head, targets, spans)
        highest = placement.over_vocabulary(jax.lax.pmax, logits.max(-1))
        total = jnp.exp(logits - highest[..., None]).sum(-1)
        local = placement.local(targets, head.shape[0])
        there = (local >= 0) & (local < head.shape[0])
        found = jnp.take_along_axis(logits, jnp.where(there, local, 0)[..., None], -1)[..., 0]
        total, found = placement.over_vocabulary(jax.lax.psum, (total, jnp.where(there, found, 0.0)))
        lse = highest + jnp.log(total)
        return lse - found, lse

    split, join = _chunks(chunk, targets.shape)
    nll, lse = jax.lax.map(one, jax.tree.map(split, (hidden, targets, spans)))
    return join(nll), join(lse)


def _backward_part(placement, chunk, hidden, head, targets, spans, lse, nll_bar, lse_bar):
    whole = placement.whole_head(head, hidden.dtype)
    ids = placement.ids(whole)

    def one(head_bar, piece):
        hidden, targets, spans, lse, nll_bar, lse_bar = piece
        probabilities = jnp.exp(placement.logits(hidden, whole, targets, spans) - lse[..., None])
        hit = targets[..., None] == ids
        logits_bar = probabilities * (nll_bar + lse_bar)[..., None] - jnp.where(hit, nll_bar[..., None], 0.0)
        logits_bar = logits_bar.astype(hidden.dtype)
        hidden_bar = product("BTV,VD->BTD", logits_bar, whole)
        head_bar += jnp.einsum("BTV,BTD->VD", logits_bar, hidden, preferred_element_type=jnp.float32)
        return head_bar, hidden_bar

    split, join = _chunks(chunk, targets.shape)
    pieces = jax.tree.map(split, (hidden, targets, spans, lse, nll_bar, lse_bar))
    head_bar, hidden_bar = jax.lax.scan(one, jnp.zeros(whole.shape, jnp.float32), pieces)
    hidden_bar = placement.over_vocabulary(jax.lax.psum, join(hidden_bar))
    return hidden_bar, placement.scattered(head_bar).astype(head.dtype)


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
