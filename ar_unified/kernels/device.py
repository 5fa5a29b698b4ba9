"""The device that a program is traced for: a device of the mesh in scope, or else JAX's default one."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """What a kernel is compiled for."""

    platform: str  # "cpu", "tpu" or "gpu"
    kind: str  # as JAX names it: "TPU v5p", "NVIDIA H200"

    @property
    def is_hopper(self) -> bool:
        """Whether the device has compute capability 9.0, which kernels with wgmma and TMA need."""
        return any(name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200"))


def current() -> Device:
    """The device of the mesh of `jax.set_mesh`, even if this host can only compile for it; without a mesh, JAX's
    default device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None:
        return Device("gpu" if device.platform in ("cuda", "rocm") else device.platform, device.device_kind)
    return Device(jax.default_backend(), jax.devices()[0].device_kind)
