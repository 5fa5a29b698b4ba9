"""The TPU kernels compile for every generation on a CPU, with libtpu, which needs no chip.

This proves that Mosaic accepts the kernels, that the table's blocks fit into VMEM, and that lists of steps fit into
scalar memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified.kernels.attention import attention
from tests.kernels.topologies import TPUS, needs_libtpu

BF16, F32 = jnp.bfloat16, jnp.float32


def gradients(topology: str, batch, length, heads, kv_heads, head_dim, dtype, shape=(1, 1), soft_cap=None):
    """Compiles forward and backward on a mesh (data, tensor) of this shape."""
    devices = get_topology_desc(platform="tpu", topology_name=TPUS[topology]).devices
    mesh = jax.make_mesh(
        shape, ("data", "tensor"), devices=devices[: shape[0] * shape[1]], axis_types=(AxisType.Auto,) * 2
    )
    rows, by_head = P("data"), P("data", None, "tensor")

    def loss(q, k, v, doc_start):
        out, lse = attention(q, k, v, doc_start=doc_start, backend="tpu", soft_cap=soft_cap, return_lse=True)
        return jnp.sum(out.astype(F32)) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0.0))

    def array(n, dtype, *dims):
        return jax.ShapeDtypeStruct((batch, length, *dims), dtype, sharding=NamedSharding(mesh, n))

    q, kv = (array(by_head, dtype, n, head_dim) for n in (heads, kv_heads))
    with jax.set_mesh(mesh):
        program = jax.shard_map(
            jax.grad(loss, (0, 1, 2)), in_specs=(by_head, by_head, by_head, rows), out_specs=by_head, check_vma=False
        )
        return jax.jit(program).trace(q, kv, kv, array(rows, jnp.int32)).lower(lowering_platforms=("tpu",)).compile()


@needs_libtpu
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 1), (8, 8)])
def test_both_cores_of_v5p_have_a_part_of_every_grid(heads, kv_heads):
    """With tensor=8, a device has 4 query and 4 KV heads of chameleon_7b, and 8 query heads and 1 KV head of 34b."""
    devices = get_topology_desc(platform="tpu", topology_name=TPUS["v5p"]).devices
    mesh = jax.make_mesh((1,), ("data",), devices=devices[:1], axis_types=(AxisType.Auto,))
    q, kv = (jax.ShapeDtypeStruct((2, 4096, n, 128), BF16) for n in (heads, kv_heads))

    def loss(q, k, v, doc_start):
        return attention(q, k, v, doc_start=doc_start, backend="tpu").sum()

    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, kv, kv, jax.ShapeDtypeStruct((2, 4096), jnp.int32))
    grids = [each.params["grid_mapping"].grid for each in _calls(jaxpr.jaxpr)]
    assert len(grids) == 2 and all(grid[0] % 2 == 0 for grid in grids)


def _calls(jaxpr):
    for each in jaxpr.eqns:
        if each.primitive.name == "pallas_call":
            yield each
        else:
            for inner in jax.core.jaxprs_in_params(each.params):
                yield from _calls(inner)


@needs_libtpu
@pytest.mark.parametrize(
    "topology, batch, length, heads, kv_heads, head_dim, dtype, options",
    [
        pytest.param("v4", 2, 4096, 8, 8, 64, BF16, {}, marks=pytest.mark.slow),
        pytest.param("v4", 1, 2048, 4, 4, 256, BF16, {}, marks=pytest.mark.slow),
        ("v5e", 4, 8192, 32, 8, 128, BF16, dict(shape=(2, 2))),
        pytest.param("v5p", 1, 1 << 15, 8, 1, 128, BF16, {}, marks=pytest.mark.slow),
        pytest.param("v5p", 1, 2048, 8, 2, 128, F32, {}, marks=pytest.mark.slow),
        ("v6e", 2, 4096, 8, 1, 256, BF16, dict(soft_cap=50.0)),
        pytest.param("v6e", 1, 1000, 4, 4, 256, F32, {}, marks=pytest.mark.slow),
        pytest.param("tpu7x", 2, 4096, 8, 2, 128, BF16, {}, marks=pytest.mark.slow),
    ],
)
def test_compiles(topology, batch, length, heads, kv_heads, head_dim, dtype, options):
    compiled = gradients(topology, batch, length, heads, kv_heads, head_dim, dtype, **options)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2  # forward and backward
