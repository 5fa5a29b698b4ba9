"""The chunked cross-entropy is compared with the naive one: values, gradients, and memory."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.model.loss import token_losses, weighted_loss
from ar_unified.parallel.mesh import make_mesh

B, T, D, V = 3, 11, 8, 50


def naive(hidden, head, targets, split=None):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head)
    if split is not None:
        text, images = logits.at[..., split:].set(-jnp.inf), logits.at[..., :split].set(-jnp.inf)
        logits = jnp.where((targets < split)[..., None], text, images)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], lse


def make_inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    weights = jax.random.uniform(keys[3], (B, T)).at[:, -3:].set(0.0)  # the last positions are padding
    return (
        jax.random.normal(keys[0], (B, T, D)),
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, T), 0, V),
        weights,
    )


@pytest.mark.parametrize("chunk", [1, 9, 12, 1000])  # chunks of 33 tokens: one column, uneven, even, all at once
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_values_and_gradients_equal_the_naive_ones(chunk, z_loss):
    hidden, head, targets, weights = make_inputs()

    def objective(losses: Callable):
        def loss(hidden, head):
            nll, lse = losses(hidden, head, targets)
            return (weights * (nll + z_loss * lse**2)).sum(), (nll, lse)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def at_once(hidden, head):
        loss, *parts = weighted_loss(hidden, head, targets, weights, z_loss, chunk)
        return loss, tuple(parts)

    expected = objective(naive)
    for found in (objective(lambda h, w, t: token_losses(h, w, t, chunk)), at_once(hidden, head)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, found)
        assert not np.asarray(found[1][0])[:, -3:].any()
    assert weighted_loss(hidden, head, targets, weights, z_loss, chunk)[0] == at_once(hidden, head)[0][0]


USED, PADDED = 1006, 1024  # 18 rows without probability, all on the last device


@pytest.mark.parametrize("split", [None, 1, 333, PADDED // 2, USED - 1])
@pytest.mark.parametrize("shape", [None, dict(tensor=2), dict(fsdp=2, tensor=2, context=2)], ids=str)
def test_rows_behind_the_used_ones_have_no_probability_and_no_gradient(shape, split):
    """There is one softmax over all used ids, or one for each side of `split`. A device may have no id of a side."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, targets = jax.random.normal(keys[0], (4, 12, D)), jax.random.randint(keys[2], (4, 12), 0, USED)
    edges = [USED - 1, 0, PADDED // 2, (split or 1) - 1, split or 1]  # borders of devices, of used ids, and of sides
    targets = targets.at[0, : len(edges)].set(jnp.array(edges))
    head = jax.random.normal(keys[1], (PADDED, D)).at[USED:].multiply(9)  # unused rows would have the largest logits
    weights = jax.random.uniform(keys[3], (4, 12))

    def objective(losses: Callable, head):
        def loss(hidden, head):
            nll, lse = losses(hidden, head, targets)
            return (weights * (nll + 0.1 * lse**2)).mean(), (nll, lse)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def at_once(hidden, head):
        loss, *parts = weighted_loss(hidden, head, targets, weights, 0.1, 16, USED, split)
        return loss / weights.size, tuple(parts)

    expected = objective(lambda h, w, t: naive(h, w, t, split), head[:USED])
    with jax.set_mesh(make_mesh(shape, jax.devices()[: math.prod(shape.values())])) if shape else nullcontext():
        either = objective(lambda h, w, t: token_losses(h, w, t, 16, USED, split), head), at_once(hidden, head)
    for (loss, parts), grads in jax.device_get(either):
        assert not grads[1][USED:].any() and grads[1][:USED].any(axis=1).all()
        found = (loss, parts), (grads[0], grads[1][:USED])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


def test_a_head_that_is_used_whole_costs_nothing_more():
    hidden, head, targets, _ = make_inputs()

    def traced(*used):
        grad = jax.grad(lambda h, w: sum(x.sum() for x in token_losses(h, w, targets, 12, *used)), argnums=(0, 1))
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(grad)(hidden, head)))

    assert traced() == traced(None) == traced(V) and "inf" not in traced(V) and "-inf" in traced(V - 1)
    for wrong in (0, V + 1):
        with pytest.raises(ValueError, match=f"used: expected 1 to {V}, the number of rows of the head; found {wrong}"):
            traced(wrong)
    for wrong in (0, V - 1):
        expected = f"split: expected 1 to {V - 2}, so that each side has an id; found {wrong}"
        with pytest.raises(ValueError, match=expected):
            traced(V - 1, wrong)


def test_no_array_of_all_logits_forward_or_backward():
    hidden, head, targets, weights = make_inputs()
    for loss in (
        lambda h, w: sum(x.sum() for x in token_losses(h, w, targets, 2 * B)),
        lambda h, w: weighted_loss(h, w, targets, weights, 0.1, 2 * B)[0],
    ):
        # Arrays of the logits' kind have an axis V; the head's own gradient is V * D.
        traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head).jaxpr
        sizes = [a.size for a in arrays_of(traced) if V in a.shape]
        assert sizes and max(sizes) <= max(2 * B * V, V * D) < B * T * V


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weighted_loss_multiplies_with_the_head_once_less(frozen):
    """It needs three products with the head, two if the head is not trained, and one if there is no gradient."""
    hidden, head, targets, weights = make_inputs()

    def products(function):
        return len(re.findall(r" = .* dot\(", jax.jit(function).lower(hidden, head).compile().as_text()))

    def loss(h, w):
        return weighted_loss(h, w, targets, weights, 0.1, 2 * B)[0]

    def recomputed(h, w):
        return sum((weights * x).sum() for x in token_losses(h, w, targets, 2 * B))

    trained = (0,) if frozen else (0, 1)
    assert products(jax.grad(loss, trained)) == 3 - frozen
    assert products(jax.grad(recomputed, trained)) == 4 - frozen
    assert products(loss) == 1


def arrays_of(jaxpr):
    """The abstract value of everything computed in a jaxpr and in the jaxprs it calls."""
    for equation in jaxpr.eqns:
        yield from (out.aval for out in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def test_bfloat16_hidden_gives_float32_losses_and_gradients_of_the_right_dtypes():
    hidden, head, targets, weights = make_inputs()
    nll, lse = token_losses(hidden.astype(jnp.bfloat16), head, targets)
    assert nll.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(nll, naive(hidden, head, targets)[0], atol=0.1)
    grads = jax.grad(
        lambda h, w: (weights * token_losses(h, w, targets)[0]).sum(), argnums=(0, 1)
    )(hidden.astype(jnp.bfloat16), head)  # fmt: skip
    at_once = jax.grad(lambda h, w: weighted_loss(h, w, targets, weights)[0], argnums=(0, 1))
    for found in (grads, more := at_once(hidden.astype(jnp.bfloat16), head)):
        assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float32]
    jax.tree.map(np.testing.assert_array_equal, grads, more)
