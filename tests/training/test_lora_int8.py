"""LoRA with 8-bit weights equals LoRA on the rounded weights, in its gradients and on any mesh; and what is saved."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.model.config import summed
from ar_unified.model.dtypes import MATRICES
from ar_unified.model.lora import LoraConfig, merged
from ar_unified.model.quantized import Quantized, quantized, widened, widened_product
from ar_unified.model.transformer import logical_axes
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch, shardings
from ar_unified.training.step import gradients
from tests.training import tiny
from tests.training.test_lora import adapted, forward
from tests.training.test_step import close

FLOAT = LoraConfig(rank=4, alpha=8.0, targets=("attention", "mlp.up"))
LORA = dataclasses.replace(FLOAT, base_dtype="int8")


def is_rounded(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def wide(params: Any) -> Any:
    """The parameters with 8-bit weights converted to float32."""

    def one(path: Any, leaf: Any) -> Any:
        found = widened(leaf, summed(path[-1].key)) if is_rounded(leaf) else leaf
        return np.asarray(found, np.float32)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_rounded)


def of_adapter(lora: LoraConfig, params: Any, shape: Any, devices: int, **options: Any) -> Any:
    """Loss and gradients of a batch."""
    task = tiny.task(lora=lora, config=dataclasses.replace(tiny.MODEL, **options))
    mesh = make_mesh(shape, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, task.logical_axes(params), params))
        compute = jax.jit(lambda p, b: partial(gradients, task, accumulation=1, mesh=mesh)(p, {}, b, jax.random.key(3)))
        return jax.device_get(compute(placed, place_batch(mesh, tiny.packed(0))))[:2]


def test_a_layers_matrices_are_in_8_bits_and_tables_in_16() -> None:
    shapes = jax.eval_shape(tiny.task(lora=LORA, only=("layers.mlp.down", "head[image]")).init, jax.random.key(0))
    axes = logical_axes(shapes)
    for group, names in (("attention", ("query", "key", "value", "output")), ("mlp", ("gate", "up"))):
        for name in names:
            found, named = shapes["layers"][group][name], axes["layers"][group][name]
            kept = [i for i in range(len(found.shape)) if i not in summed(name)]
            assert found.values.dtype == jnp.int8 and found.scale.dtype == jnp.float32, name
            assert found.scale.shape == tuple(found.shape[i] for i in kept), name
            assert named.scale == tuple(named.values[i] for i in kept), name
    assert shapes["embedding"].dtype == jnp.bfloat16
    trained = shapes["layers"]["mlp"]["down"], shapes["head"], shapes["lora"]["mlp"]["up"]["a"], shapes["norm"]
    assert {str(leaf.dtype) for leaf in trained} == {"float32"}, "what is trained is rounded, or a norm"


def test_the_model_is_that_of_the_rounded_weights_and_near_that_of_the_given() -> None:
    exact, params = adapted(FLOAT), adapted(LORA)
    hidden = forward(FLOAT)(wide(params))
    np.testing.assert_allclose(forward(LORA)(params), hidden, atol=2e-5)
    error = np.linalg.norm(hidden - forward(FLOAT)(exact)) / np.linalg.norm(hidden)
    assert 1e-4 < error < 0.03, error
    whole = merged(LORA, params)
    assert not any(map(is_rounded, jax.tree.leaves(whole, is_leaf=is_rounded)))
    np.testing.assert_allclose(forward(FLOAT)(whole), hidden, atol=2e-5)
    assert merged(LORA, params, dtype="bfloat16")["layers"]["mlp"]["gate"].dtype == jnp.bfloat16


def test_the_adapter_has_the_gradients_of_the_rounded_model() -> None:
    params = adapted(LORA)
    close(of_adapter(LORA, params, {}, 1), of_adapter(FLOAT, wide(params), {}, 1), 1e-5)


@pytest.mark.exact
@pytest.mark.parametrize(
    "shape", [dict(fsdp=2, tensor=2, context=2), pytest.param(dict(fsdp=8), marks=pytest.mark.slow)]
)
def test_no_mesh_changes_anything(shape) -> None:
    params, features = adapted(LORA), dict(scan_layers=True, remat="full")
    close(of_adapter(LORA, params, shape, 8, **features), of_adapter(LORA, params, {}, 1, **features), 1e-5)


def test_backward_keeps_the_8_bits_and_no_widened_matrix() -> None:
    x, matrix = jnp.ones((3, 16)), quantized(jnp.ones((16, 24)), "int8")
    kept = jax.tree.leaves(jax.vjp(lambda x: widened_product(x, matrix), x)[1])
    assert {str(leaf.dtype) for leaf in kept if leaf.shape == (16, 24)} <= {"int8"}
    np.testing.assert_allclose(jax.grad(lambda x: widened_product(x, matrix).sum())(x), 24.0, rtol=1e-6)


def test_a_stack_is_rounded_as_each_of_its_matrices() -> None:
    stack = jax.random.normal(jax.random.key(0), (3, 4, 8, 16))
    for name, inputs in (("query", 1), ("output", 2)):
        whole = quantized(stack, "int8", summed(name))
        assert name in MATRICES and whole.shape == stack.shape
        for layer, each in enumerate(stack):
            one = quantized(each.reshape(np.prod(each.shape[:inputs]), -1), "int8")
            of_layer = jax.tree.map(lambda leaf, layer=layer: leaf[layer], whole).flat(inputs)
            jax.tree.map(np.testing.assert_array_equal, of_layer, one)
