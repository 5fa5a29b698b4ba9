"""The speed and memory of a device, by kind. MFU and the estimates of a plan use these numbers.

A device is what JAX counts as one device: a whole chip from v4 on (the two cores of a v4 count as one, a "megacore"),
but half a chip of TPU7x. All numbers are the vendors' peaks: dense, per device and in one direction. A program reaches
only part of them.
"""

from __future__ import annotations

import dataclasses

GiB = 1 << 30
_CLOUD = "docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Hardware:
    """
    Attributes:
      name: as written in a target, such as "v5p".
      kind: the beginning of `device_kind`.
      flops: FLOP/s of bf16 matrix products.
      hbm: bytes of memory; for TPUs, the bytes that libtpu 0.0.42 leaves to a program (from its error for a program
          that does not fit).
      hbm_bandwidth: bytes/s.
      link: bytes/s in one direction, of one link to one neighbour (TPU) or of all links together (GPU).
      torus: the number of axes of the network that joins the devices of a slice; a device has two links along each
          axis. 0: a switch joins them.
      ring: an axis of the network is closed to a ring if its size is a multiple of this.
      largest: number of devices in the largest slice (TPU) or node (GPU).
      dcn: bytes/s of one device to other slices or nodes.
      host: the number of devices on one host.
      pcie: bytes/s in one direction between a device and its host's memory. "How to Scale Your Model"
          (jax-ml.github.io/scaling-book/tpus) gives 16e9 for v4, 32e9 for v6e and "typically" 15e9, which stands here
          for every other TPU. GPUs: PCIe 5.0 x16 (A100: 4.0 x16).
      source: the source of the numbers.
    """

    name: str
    kind: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    torus: int
    ring: int
    largest: int
    dcn: float
    host: int
    pcie: float
    source: str


# The first row whose `kind` begins the device_kind is taken, so longer names come first.
HARDWARE = (
    Hardware(
        "v6e", "TPU v6 lite", 918e12, 31.25 * GiB, 1638e9, 100e9, 2, 16, 256, 12.5e9, 8, 32e9,
        f"{_CLOUD}v6e and tpu7x: 918 TFLOPs, 32 GB at 1638 GBps, ICI 800 GBps both ways over 4 links, DCN 100 Gbps",
    ),
    Hardware(
        "v5e", "TPU v5 lite", 197e12, 15.75 * GiB, 819e9, 50e9, 2, 16, 256, 3.125e9, 8, 15e9,
        f"{_CLOUD}v5e: 197 TFLOPs, 16 GB at 819 GBps, ICI 400 GBps both ways over 4 links, DCN 6.4 Tbps per 256 chips",
    ),
    Hardware(
        "v5p", "TPU v5", 459e12, 95.74 * GiB, 2765e9, 100e9, 3, 4, 6144, 6.25e9, 4, 15e9,
        f"{_CLOUD}v5p: 459 TFLOPs, 95 GiB at 2765 GBps, ICI 1200 GBps both ways over 6 links, DCN 50 Gbps",
    ),
    Hardware(
        "v4", "TPU v4", 275e12, 30.75 * GiB, 1200e9, 45e9, 3, 4, 4096, 6.25e9, 4, 16e9,
        f"{_CLOUD}v4: 275 TFLOPs, 32 GiB at 1200 GBps; link and DCN (25 GB/s a host): jax-ml.github.io/scaling-book",
    ),
    Hardware(
        "tpu7x", "TPU7x", 1153.5e12, 94.75 * GiB, 3690e9, 50e9, 3, 4, 18432, 6.25e9, 8, 15e9,
        f"{_CLOUD}tpu7x, half of a chip: 2307 TFLOPs, 192 GiB at 7380 GBps, ICI 1200 GBps both ways over 6 links, "
        "DCN 100 Gbps",
    ),
    Hardware(
        "h200", "NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, 0, 0, 8, 50e9, 8, 64e9,
        "NVIDIA H200 SXM data sheet: 989 TFLOPS, 141 GB at 4.8 TB/s, NVLink 900 GB/s both ways; DGX: 400 Gb/s a GPU",
    ),
    Hardware(
        "h100", "NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, 0, 0, 8, 50e9, 8, 64e9,
        "NVIDIA H100 SXM data sheet: 989 TFLOPS, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways; DGX: 400 Gb/s a GPU",
    ),
    Hardware(
        "a100", "NVIDIA A100", 312e12, 80e9, 2039e9, 300e9, 0, 0, 8, 25e9, 8, 32e9,
        "NVIDIA A100 SXM 80GB data sheet: 312 TFLOPS, 2039 GB/s, NVLink 600 GB/s both ways; DGX: 200 Gb/s a GPU",
    ),
)  # fmt: skip


def of_kind(device_kind: str) -> Hardware | None:
    """The hardware of a device, from JAX's name for its kind; None for kinds that the table lacks, such as CPUs."""
    return next((each for each in HARDWARE if device_kind.startswith(each.kind)), None)
