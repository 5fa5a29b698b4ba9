"""Pallas lowers every shipped variant of the Hopper kernels, and Mosaic GPU's verifier accepts it, without a GPU or
CUDA.

`make check-hopper` continues from there to ptxas.
"""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from tests.kernels.hopper_variants import VARIANTS

HOPPER = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_lowers(variant):
    with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=HOPPER)):
        for (function, shapes), kernels in zip(variant.functions(), (1, 2), strict=True):
            lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
            assert lowered.as_text().count("@mosaic_gpu_v2") == kernels
