"""Rematerialisation policies: which results of a layer are kept for backward, and which are computed again.

A layer names its results: a product has the name of its weight ("query", ..., "down"), and attention's outputs have
names too. A policy keeps each result in the device's memory, sends it to the host's memory, or drops it.
Backward recomputes dropped results that it needs. No policy runs attention's kernel again, because its output takes
only as much memory as the layer's input. The kernel's log-sum-exp (one number per head and position) and its lists of
work stay on the device with every policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from ar_unified.kernels.attention import LSE, OUT, WORK

INPUT = "layer_input"
_ATTENTION = ("query", "key", "value", OUT, "output")


class Policy(NamedTuple):
    """Names of the results saved on the device and of those sent to the host. The input is saved unless it is sent to
    the host."""

    saved: tuple[str, ...]
    offloaded: tuple[str, ...] = ()


# From the most device memory to the least.
POLICIES: dict[str, Policy | None] = {
    "none": None,  # saves everything: for a model that fits
    "dots": Policy((*_ATTENTION, "gate", "up", "down")),  # saves all products: recomputes norms and activations
    "attention": Policy(_ATTENTION),  # recomputes the MLP
    "full": Policy((OUT,)),  # recomputes all products
    # MaxText's recipe for Llama 3.1 8B on v6e (benchmarks/maxtext_trillium_model_configs.py): 45% MFU with enough rows.
    # PCIe limits it: docs/planning.md.
    "offload_attention": Policy((), (INPUT, *_ATTENTION)),
    "offload": Policy((), (INPUT, OUT)),  # for rows that would fill the memory
}


def rematerialised(layer: Callable, policy: str, scanned: bool) -> Callable:
    """Wraps `layer`, (x, ...) -> x, so that `policy` decides which of its results are kept for backward. scanned:
    whether it is the body of a scan."""
    found = POLICIES[policy]
    if found is None:
        return layer
    names: Any = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(*found.saved, LSE, WORK), names_which_can_be_offloaded=found.offloaded,
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip

    def named(x: jax.Array, *args: Any) -> jax.Array:
        return layer(checkpoint_name(x, INPUT), *args)

    return jax.checkpoint(named, policy=names, prevent_cse=not scanned)


def made_again(policy: str, swin: bool) -> tuple[str, ...]:
    """The matrix products that backward computes again, by the names of their weights. swin: whether a norm follows the
    MLP; that norm's backward pass needs the MLP's output."""
    found = POLICIES[policy]
    if found is None:
        return ()
    needed = ("query", "key", "value", "output", "gate", "up", *(("down",) if swin else ()))
    return tuple(name for name in needed if name not in (*found.saved, *found.offloaded))
