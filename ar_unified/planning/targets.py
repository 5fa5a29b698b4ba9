"""Hardware by name, such as "v5p:8x8x8,slices=2", and its devices, for which programs can be compiled on a host without
that hardware.

libtpu compiles for TPUs. It is the complete compiler and needs no TPU. For GPUs, the same number of CPU devices stands
in, and all numbers from the compiler come from XLA for CPUs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh

from ar_unified.errors import UserError
from ar_unified.manifests import Json
from ar_unified.parallel.hardware import HARDWARE, Hardware
from ar_unified.parallel.mesh import make_mesh

LIBTPU = (
    "libtpu, the compiler for TPUs, is not installed: `pip install ar_unified[tpu]` installs it, or `make libtpu` in a "
    "checkout (or point TPU_LIBRARY_PATH at a libtpu.so)"
)

# Google's names of slices, such as v5p-128 or v5litepod-64: the word, and the number of what it counts in a chip. The
# names of v4 and v5p count TensorCores, those of v5e and v6e count chips.
_GOOGLE = {"v4": ("v4", 2), "v5p": ("v5p", 2), "v5e": ("v5litepod", 1), "v6e": ("v6e", 1)}

# This host has no TPU. With these settings, libtpu does not ask a server where the host is, does not lock out other
# processes, and prints no complaints.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


class TargetError(UserError):
    """A target that does not exist or that this host cannot compile for; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """
    Attributes:
      hardware: the hardware of each device.
      shape: chips in a slice along each axis of its network, such as (8, 8, 8); for GPUs, (devices,).
      slices: the number of slices of that shape, joined by the data-centre network.
    """

    hardware: Hardware
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """The target as a person writes it: "v6e:16x16,slices=2"."""
        name = f"{self.hardware.name}:{'x'.join(map(str, self.shape))}"
        return f"{name},slices={self.slices}" if self.slices > 1 else name

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def google(self) -> str:
        """Google's name of a slice whose number is not that of the chips, such as "v5p-128" for v5p:4x4x4; else ""."""
        name, cores = _GOOGLE.get(self.hardware.name, ("", 1))
        return f"{name}-{math.prod(self.shape) * cores}" if cores > 1 else ""

    @property
    def is_tpu(self) -> bool:
        """Whether the hardware is a TPU, for which libtpu compiles."""
        return self.hardware.torus > 0

    def devices(self) -> list[jax.Device]:
        """All devices, slice by slice. Raises TargetError if this host cannot provide them."""
        if not self.is_tpu:
            return _cpu_devices(self)
        _find_libtpu()
        name = self.hardware.name
        options: dict[str, Json] = {"num_slices": self.slices} if self.slices > 1 else {}
        if name == "v4":
            options["chip_config_name"] = "megacore"  # JAX sees two cores as one device
        if self.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        near = _slice_of(self.hardware, math.prod(self.shape))
        try:
            found = get_topology_desc(
                platform="tpu", topology_name=f"{name}:{'x'.join(map(str, self.shape))}", **options
            ).devices
        except jax.errors.JaxRuntimeError as error:
            raise TargetError(f"target {self.name}: libtpu does not know this slice; try {near} ({error})") from error
        if len(found) > (largest := self.hardware.largest) * self.slices:
            raise TargetError(
                f"target {self.name}: expected at most {largest:,} devices in a slice of {name}, found "
                f"{len(found) // self.slices:,}; for more, write several slices: ,slices=NUMBER"
            )
        return list(found)

    def process(self) -> Target:
        """The target of one process of a job: the devices of one host."""
        if not self.is_tpu:
            return Target(self.hardware, (min(self.chips, self.hardware.host),))
        devices = self.devices()
        mine = np.array([d.coords for d in devices if d.process_index == devices[0].process_index])  # type: ignore[attr-defined]
        return Target(self.hardware, tuple(int(n) for n in np.ptp(mine, axis=0)[: self.hardware.torus] + 1))

    def mesh(self, shape: Mapping[str, int]) -> Mesh:
        """The mesh of a config on these devices. The axis `data` is split over slices first.

        Raises ValueError, as make_mesh does, for sizes that do not fit.
        """
        return make_mesh(shape, self.devices())


def parse_target(text: str) -> Target:
    """Reads "v5p:8x8x8", "v5e:16x16,slices=2" or "h200:8". Raises TargetError."""
    known = {hardware.name: hardware for hardware in HARDWARE}
    head, *options = text.split(",")
    name, _, shape = head.partition(":")
    if (google := re.fullmatch(r"([a-z0-9]+)-(\d+)", head)) and (found := _of_google(google[1], int(google[2]))):
        raise TargetError(f"target {text!r}: {found}")
    if name not in known:
        raise TargetError(f"target {text!r}: expected one of {', '.join(known)} and a shape, as in v5p:4x4x4 or h200:8")
    hardware = known[name]
    sizes = [int(size) if size.isdigit() else 0 for size in shape.split("x")]
    axes = hardware.torus or 1
    if len(sizes) != axes or min(sizes) < 1:
        if not hardware.torus:
            raise TargetError(f"target {text!r}: expected the number of GPUs, as in {name}:8")
        raise TargetError(
            f"target {text!r}: expected {axes} sizes of at least 1, the shape of a slice, as in "
            f"{_slice_of(hardware, math.prod(sizes) or 64)}"
        )
    slices = 1
    for option in options:
        key, _, value = option.partition("=")
        if key != "slices" or not value.isdigit() or int(value) < 1:
            raise TargetError(f"target {text!r}: expected slices=NUMBER after the shape; found {option!r}")
        slices = int(value)
    return Target(hardware, tuple(sizes), slices)


def _slice_of(hardware: Hardware, chips: int) -> str:
    """A slice that exists and has about as many chips, such as "v5p:4x4x4, which has 64 chips"."""
    power = min(round(math.log2(max(chips, 1))), int(math.log2(min(hardware.largest, 4096))))
    power, axes = 2 if power == 1 else power, hardware.torus  # no slice has two chips
    sizes = [1 << (power + axis) // axes for axis in range(axes)]
    sizes = sizes[::-1] if sizes[0] == 1 else sizes  # one host of four chips is 2x2x1
    return f"{hardware.name}:{'x'.join(map(str, sizes))}, which has {math.prod(sizes)} chip{'s' * (power > 0)}"


def _of_google(name: str, number: int) -> str:
    """How to write a slice that Google names so, such as v5p-128; "" if there is no such name."""
    known = {google: (hardware, cores) for hardware, (google, cores) in _GOOGLE.items()}
    if name not in known:
        return ""
    hardware, cores = known[name]
    counted = "counts TensorCores, of which a chip has two" if cores > 1 else "counts chips"
    near = _slice_of(next(each for each in HARDWARE if each.name == hardware), number // cores)
    return f"expected a shape: Google's name {name}-{number} {counted}; write {near}"


def _find_libtpu() -> None:
    """Makes libtpu loadable as a compiler."""
    beside = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"  # where `make libtpu` puts it
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        if not beside.exists():
            raise TargetError(LIBTPU)
        os.environ["TPU_LIBRARY_PATH"] = str(beside)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _cpu_devices(target: Target) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < target.chips:
        raise TargetError(
            f"target {target.name}: expected {target.chips} CPU devices in place of its chips, found {len(devices)}; "
            f"set JAX_NUM_CPU_DEVICES={target.chips} before the process starts"
        )
    return list(devices[: target.chips])
