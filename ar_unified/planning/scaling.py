"""Weak scaling by arithmetic: the batch per device stays the same while the slice grows. The result is the largest size
at which matmuls still bound a step.

A device computes and reads the same amount at every size, and sends the same amount over the axes fsdp, tensor and
context. Over the axis data (of size n) it sends (n - 1) / n of its gradients twice, and this amount hardly grows with
n. In a larger slice, the axes of a group may not be rings, and then the group has half the links. Beyond the largest
slice, gradients are sent between slices, over the slowest network.
"""

from __future__ import annotations

from typing import NamedTuple

from ar_unified.planning.programs import Program, Run, gradient_bytes
from ar_unified.planning.roofline import Roofline
from ar_unified.planning.targets import Target

CRITICAL_TOKENS = 16e6  # tokens per step in the largest batch of a published dense run (Llama 3 405B, arXiv 2407.21783)


class Scaling(NamedTuple):
    """
    Attributes:
      largest: the most chips at which matmuls bound the step; 0 if they do not bound it even at the planned size; None
        if there is no limit.
      per_slice: chips in the largest slice that exists.
      breaks: what limits growth first, in words. This limit may be reached at a smaller size than `largest`.
      tokens_needed: tokens per chip at which matmuls would take as long as the slowest other resource takes now.
    """

    largest: int | None
    per_slice: int
    breaks: str
    tokens_needed: float


def scaling(program: Program, run: Run, target: Target, estimate: Roofline) -> Scaling:
    """Weak scaling of the train step. Only `data` grows; fsdp, tensor and context stay the same."""
    hardware, mesh = target.hardware, program.mesh
    seconds, per_slice = estimate.seconds, target.hardware.largest
    matmuls, per_chip = seconds["matmuls"], estimate.tokens / mesh.size
    needed = per_chip * max(seconds["ICI"], seconds["DCN"], seconds["memory"]) / matmuls
    if (worst := estimate.bound) != "matmuls":
        breaks = f"{worst} takes {seconds[worst] / matmuls:.2f} times as long as the matmuls; " + (
            "more tokens do not help: send less to the host (config.model.remat)"  # it grows with the tokens
            if worst == "host"
            else f"with {needed:,.0f} tokens per chip, both would take the same time"
        )
        return Scaling(0, per_slice, breaks, needed)

    if estimate.open_ici > matmuls:
        longer = estimate.open_ici / matmuls
        breaks = f"ICI: if groups form no closed rings, ICI takes {longer:.2f} times as long as the matmuls"
        return Scaling(mesh.size, per_slice, breaks, needed)

    # A device's shard of gradients (float32) is exchanged between s slices: 2 (s - 1) / s of its bytes are sent. All
    # devices of a slice that have this shard send a part of it.
    inner = mesh.shape["fsdp"] * mesh.shape["tensor"] * mesh.shape["context"]
    shard = gradient_bytes(run, mesh) / max(per_slice // inner, 1)
    share = matmuls * hardware.dcn / (2 * shard)  # the largest (s - 1) / s at which DCN is not slower than the matmuls
    slices = None if share >= 1 else max(int(1 / (1 - share)), 1)
    largest = None if slices is None else slices * per_slice
    batch_chips = int(CRITICAL_TOKENS / per_chip)
    if largest is None or batch_chips < largest:
        breaks = (
            f"the batch: {batch_chips:,} chips already take {CRITICAL_TOKENS / 1e6:.0f}M tokens a step, the largest "
            f"batch of a published dense run; matmuls bound a step if a chip has at least {needed:,.0f} tokens"
        )
    else:
        beyond = slices + 1 if slices else 2
        breaks = (
            f"DCN: with {beyond} slices of {per_slice:,} chips, a device would send "
            f"{2 * shard * (beyond - 1) / beyond / 1e6:,.0f} MB of gradients, which takes "
            f"{(beyond - 1) / beyond / share:.2f} times as long as the matmuls"
        )
    return Scaling(largest, per_slice, breaks, needed)
