"""Two ways to compute attention for rows split over the context axis in zigzag order (parallel/zigzag.py).

In this order each device has two pieces of a row, an early one and a late one.

`gather`: each device collects the keys and values of the whole row. Devices wait less than with `ring`, but each needs
memory for the keys and values of a whole row. `ring`: keys and values are passed round the devices, and the partial
results of each device are merged by log-sum-exp (Ring Attention, arXiv 2310.01889). Memory does not grow with the
number of devices, and the transfer of a step overlaps with its computation. If a piece of queries and a piece of keys
share no document, nothing is computed for this pair. However, a layer needs as many small kernels and transfers as
there are devices.

Both run on each device, inside `jax.shard_map`; gradients are exact.

B batch, T position on a device, N query heads, K KV heads, H head dim. A piece has T / 2 positions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ar_unified.kernels.attention import LSE, OUT, attention, attention_gradients
from ar_unified.kernels.merge import merge
from ar_unified.parallel.zigzag import pieces


def gather(backend: str, query: jax.Array, key: jax.Array, value: jax.Array, doc_start: jax.Array) -> jax.Array:
    """Attention [B, T, N, H] of query [B, T, N, H], key and value [B, T, K, H], doc_start int32 [B, T]."""

    def whole_row(x: jax.Array) -> jax.Array:
        early, late = jnp.split(jax.lax.all_gather(x, "context", axis=1), 2, axis=2)  # [B, devices, T / 2, K, H] each
        return jnp.concatenate([early, late[:, ::-1]], axis=1).reshape(x.shape[0], -1, *x.shape[2:])

    key, value = whole_row(key), whole_row(value)
    begins = pieces(jax.lax.axis_index("context"), jax.lax.axis_size("context"), query.shape[1] // 2)
    reach = key.shape[1] // 2, key.shape[1]  # an early piece sees only the row's first half
    return jnp.concatenate(
        [
            attention(query, key[:, :seen], value[:, :seen], doc_start=first, q_offset=begin, backend=backend)
            for query, first, begin, seen in zip(_halves(query), _halves(doc_start), begins, reach, strict=True)
        ],
        axis=1,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(backend: str, query: jax.Array, key: jax.Array, value: jax.Array, doc_start: jax.Array) -> jax.Array:
    """The same as `gather`, but keys and values are passed round the devices."""
    return _ring_forward(backend, query, key, value, doc_start)[0]


def _ring_forward(backend, query, key, value, doc_start):
    queries = _halves(query)

    def turn(state, step):
        keys, values, sums = state
        sums = list(sums)
        for mine, theirs, meets, where in _meetings(doc_start, step):

            def add(out, lse, mine=mine, theirs=theirs, where=where):
                more = attention(queries[mine], keys[theirs], values[theirs], return_lse=True, backend=backend, **where)
                return merge((out, more[0].astype(jnp.float32)), (lse, more[1]))

            sums[mine] = jax.lax.cond(meets, add, lambda *same: same, *sums[mine])
        return (*_pass_on((keys, values)), tuple(sums)), None

    nothing = tuple((jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)) for q in queries)
    (_, _, sums), _ = _turns(turn, (_halves(key), _halves(value), nothing))
    out, lse = (jnp.concatenate(halves, axis=1) for halves in zip(*sums, strict=True))
    out, lse = checkpoint_name(out.astype(value.dtype), OUT), checkpoint_name(lse, LSE)
    return out, (query, key, value, doc_start, out, lse)


def _ring_backward(backend, residuals, dout):
    query, key, value, doc_start, out, lse = residuals
    delta = jnp.einsum("BTNH,BTNH->BTN", out.astype(jnp.float32), dout.astype(jnp.float32))
    queries, others = _halves(query), tuple(zip(*map(_halves, (lse, delta, dout)), strict=True))

    def turn(state, step):  # after the last turn, keys and their gradients are on their first device again
        (keys, values, dkeys, dvalues), dqueries = state
        dqueries, dkeys, dvalues = list(dqueries), list(dkeys), list(dvalues)
        for mine, theirs, meets, where in _meetings(doc_start, step):

            def add(*sums, mine=mine, theirs=theirs, where=where):
                more = attention_gradients(
                    queries[mine], keys[theirs], values[theirs], *others[mine], backend=backend, **where
                )
                return tuple(total + x.astype(jnp.float32) for total, x in zip(sums, more, strict=True))

            sums = dqueries[mine], dkeys[theirs], dvalues[theirs]
            dqueries[mine], dkeys[theirs], dvalues[theirs] = jax.lax.cond(meets, add, lambda *same: same, *sums)
        return (_pass_on((keys, values, tuple(dkeys), tuple(dvalues))), tuple(dqueries)), None

    dquery, dkey, dvalue = (_halves(jnp.zeros(x.shape, jnp.float32)) for x in (query, key, value))
    state = (_halves(key), _halves(value), dkey, dvalue), dquery
    ((_, _, dkey, dvalue), dquery), _ = _turns(turn, state)
    gradients = (jnp.concatenate(halves, axis=1) for halves in (dquery, dkey, dvalue))
    return *(x.astype(like.dtype) for x, like in zip(gradients, (query, key, value), strict=True)), None


ring.defvjp(_ring_forward, _ring_backward)


def _meetings(doc_start: jax.Array, step: jax.Array) -> Iterator[tuple[int, int, jax.Array, dict[str, jax.Array]]]:
    """Yields pairs of pieces: a piece of this device's queries, and a piece of the keys that the device has after
    `step` turns.

    Each pair is (own, visiting, whether a query of `own` may see a key of `visiting`, the arguments of `attention` for
    this pair). `own` and `visiting` are 0 for an early piece and 1 for a late one.
    """
    ways, index = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    first = _halves(doc_start)
    width = first[0].shape[1]
    own, visiting = pieces(index, ways, width), pieces((index - step) % ways, ways, width)
    for mine, theirs in ((0, 0), (1, 0), (1, 1)):  # no early piece sees a late one
        begin = visiting[theirs]
        meets = (begin <= own[mine]) & (first[mine].min() < begin + width)
        yield mine, theirs, meets, dict(doc_start=first[mine], q_offset=own[mine], kv_offset=begin)


def _turns(turn, state):
    return jax.lax.scan(turn, state, jnp.arange(jax.lax.axis_size("context")))


def _pass_on(tree: Any) -> Any:
    ways = jax.lax.axis_size("context")
    return jax.lax.ppermute(tree, "context", [(device, (device + 1) % ways) for device in range(ways)])


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    early, late = jnp.split(x, 2, axis=1)
    return early, late
