from __future__ import annotations

from ar_unified.parallel.hardware import of_kind


def test_a_device_is_found_by_the_kind_that_jax_names():
    found = {kind: of_kind(kind) for kind in ("TPU v5 lite", "TPU v5p", "TPU v5", "NVIDIA H100 80GB HBM3", "cpu")}
    rates = {kind: hardware and hardware.hbm_bandwidth for kind, hardware in found.items()}
    assert rates == {
        "TPU v5 lite": 819e9, "TPU v5p": 2765e9, "TPU v5": 2765e9, "NVIDIA H100 80GB HBM3": 3350e9, "cpu": None,
    }  # fmt: skip
