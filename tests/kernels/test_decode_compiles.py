"""Decode kernels compile for their devices on a machine that has none: by libtpu for each TPU, to Mosaic for Hopper."""

from __future__ import annotations

import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies

from tests.kernels.decode_shipped import HOPPER, TPU, decode_kernels

# libtpu's lock file outlives its process, and its search for a metadata server takes minutes where there is none.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

TOPOLOGIES = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
@pytest.mark.parametrize(
    ("tpu", "name"), [(tpu, name) for tpu in TOPOLOGIES for name in (TPU if tpu == "v5e" else list(TPU)[:2])]
)
def test_tpu(tpu, name):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{tpu}:{TOPOLOGIES[tpu]}")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    step, arrays = {name: rest for name, *rest in decode_kernels("tpu", sharding)}[name]
    compiled = jax.jit(step).trace(**arrays).lower(lowering_platforms=("tpu",)).compile()
    assert "tpu_custom_call" in compiled.as_text()
    cache = sum(arrays[x].size * arrays[x].dtype.itemsize for x in ("k", "v"))
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 10  # no copy of the cache is made


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_lowers(name):
    step, arrays = {name: rest for name, *rest in decode_kernels("hopper")}[name]
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(step).trace(**arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
