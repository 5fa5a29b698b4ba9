"""Decode kernels compile for their devices on a machine that has none: by libtpu for each TPU, to Mosaic for Hopper."""

from __future__ import annotations

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from ar_unified.kernels.decode_attention import decode_attention

# libtpu's lock file outlives its process, and its search for a metadata server takes minutes where there is none.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

TPUS = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
# B, S, N, K, H, dtype, int8, options: what is shipped, each part of the kernels at least once.
SHIPPED = {
    "grouped by 4": (32, 4096, 32, 8, 128, jnp.bfloat16, False, {}),
    "multi-head, float32, ragged end": (2, 1100, 4, 4, 64, jnp.float32, False, {}),
    "multi-query, window and soft cap": (1, 8192, 8, 1, 256, jnp.bfloat16, False, dict(window=1024, soft_cap=50.0)),
    "int8": (16, 2048, 16, 2, 128, jnp.bfloat16, True, {}),
}


def shapes(B, S, N, K, H, dtype, int8, sharding=None) -> dict[str, jax.ShapeDtypeStruct]:
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    arrays = dict(q=shape((B, N, H), dtype), lengths=shape((B,), jnp.int32))
    arrays |= {name: shape((B, K, S, H), jnp.int8 if int8 else dtype) for name in ("k", "v")}
    return arrays | ({name: shape((B, K, S), jnp.float32) for name in ("k_scale", "v_scale")} if int8 else {})


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("tpu", TPUS)
def test_tpu(tpu, name):
    *shape, options = SHIPPED[name]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{tpu}:{TPUS[tpu]}")
    arrays = shapes(*shape, sharding=jax.sharding.SingleDeviceSharding(topology.devices[0]))
    step = jax.jit(functools.partial(decode_attention, backend="tpu", return_lse=True, **options))
    compiled = step.trace(**arrays).lower(lowering_platforms=("tpu",)).compile()
    assert "tpu_custom_call" in compiled.as_text()
    cache = sum(arrays[x].size * arrays[x].dtype.itemsize for x in ("k", "v"))
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 10 + 2**20  # no copy of the cache is made


HOPPER = {
    "grouped by 4": SHIPPED["grouped by 4"],
    "multi-head, ragged end": (2, 1104, 4, 4, 64, jnp.bfloat16, False, {}),
    "multi-query, window and soft cap": SHIPPED["multi-query, window and soft cap"],
    "int8": SHIPPED["int8"],
    "int8, head dim 64": (2, 1104, 16, 1, 64, jnp.bfloat16, True, {}),
    "int8, head dim 256": (1, 1104, 8, 1, 256, jnp.bfloat16, True, {}),
}


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_lowers(name):
    *shape, options = HOPPER[name]
    step = jax.jit(functools.partial(decode_attention, backend="hopper", return_lse=True, **options))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = step.trace(**shapes(*shape)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
