"""Decode kernels compile for devices that this machine does not have: with libtpu for each TPU, to Mosaic for
Hopper."""

from __future__ import annotations

import jax
import pytest
from jax.experimental import topologies

from tests.kernels.decode_shipped import HOPPER, TPU, decode_kernels
from tests.kernels.topologies import TPUS, needs_libtpu


@needs_libtpu
@pytest.mark.parametrize(
    ("tpu", "name"), [(tpu, name) for tpu in TPUS for name in (TPU if tpu == "v5e" else list(TPU)[:2])]
)
def test_tpu(tpu, name):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[tpu])
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    step, arrays = {name: (step, arrays) for name, step, arrays in decode_kernels("tpu", sharding)}[name]
    compiled = jax.jit(step).trace(**arrays).lower(lowering_platforms=("tpu",)).compile()
    assert "tpu_custom_call" in compiled.as_text()
    cache = sum(arrays[x].size * arrays[x].dtype.itemsize for x in ("k", "v"))
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 10  # no copy of the cache is made


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_lowers(name):
    step, arrays = {name: (step, arrays) for name, step, arrays in decode_kernels("hopper")}[name]
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(step).trace(**arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
