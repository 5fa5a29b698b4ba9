"""What is kept of a layer for backward, and what is computed again: policies that name what they keep.

A layer names what it makes: its products with weights by the weight ("query", ..., "down"), and attention's outputs. A
policy leaves each in the device's memory, sends it to the host's, or drops it; backward makes again what it needs and
does not find. No policy runs attention's kernel again: its output takes as much memory as the layer's input. Its
log-sum-exp and lists of work, two numbers a head, stay on the device under all of them.
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
    """Names of what is saved on the device and of what is sent to the host; the input is saved unless it is sent."""

    saved: tuple[str, ...]
    offloaded: tuple[str, ...] = ()


# From what takes the most of a device's memory to what takes the least.
POLICIES: dict[str, Policy | None] = {
    "none": None,  # all is saved: for a model that fits
    "dots": Policy((*_ATTENTION, "gate", "up", "down")),  # all products: norms and activations again
    "attention": Policy(_ATTENTION),  # the MLP again
    "full": Policy((OUT,)),  # all products again
    # MaxText's recipe for Llama 3.1 8B on v6e (benchmarks/maxtext_trillium_model_configs.py): 45% MFU with rows enough.
    "offload_attention": Policy((), (INPUT, *_ATTENTION)),
    "offload": Policy((), (INPUT, OUT)),  # for rows that fill the memory
}


def rematerialised(layer: Callable, policy: str, scanned: bool) -> Callable:
    """`layer` (x, ...) -> x, with only what `policy` keeps for backward. scanned: it is the body of a scan."""
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
    """The products with weights that backward makes again. swin: whether a norm follows the MLP; its backward pass
    needs the MLP's output."""
    found = POLICIES[policy]
    if found is None:
        return ()
    needed = ("query", "key", "value", "output", "gate", "up", *(("down",) if swin else ()))
    return tuple(name for name in needed if name not in (*found.saved, *found.offloaded))
