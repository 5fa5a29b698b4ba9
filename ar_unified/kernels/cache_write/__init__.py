"""Writes one new key and value of each row into the KV cache, in place: one public function, two implementations.

A decoding step adds one vector for each row and head to a cache of gigabytes. XLA would write it by a scatter, for
which TPU's compiler chooses its own layout. The attention kernel reads another layout, so the whole cache would be
copied twice in each step. The kernel here leaves the cache in its place, in the layout that `decode_attention` reads.

xla.py  by XLA: any platform and shape
tpu.py  Pallas for TPU
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels import backend as backends
from ar_unified.kernels import device
from ar_unified.kernels.cache_write import xla

Layer = tuple[jax.Array, ...]


def cache_write(layer: Layer, new: Layer, slots: jax.Array, *, backend: str = "auto") -> Layer:
    """Writes one slot of each row, and returns the cache of the layer.

    Args:
      layer: keys and values [B, K, S, H]; for an int8 cache also their scales, float32 [B, K, 1, S].
      new: the new entry of each array, [B, K, H] or [B, K], of the same dtype.
      slots: int32 [B], where to write; a row whose slot is not in 0 .. S - 1 stays unchanged.
      backend: one of kernels.backend.BACKENDS, the same as for the attention that reads the cache. "tpu",
        "tpu_interpret" and, on a TPU, "auto" run the kernel if it can write such a cache. Otherwise XLA writes.

    Returns:
      Arrays like `layer`, in the same memory if `layer` is donated or the carry of a loop.
    """
    for old, x in zip(layer, new, strict=True):
        expected = (*old.shape[:2], old.shape[3]) if x.ndim == 3 else old.shape[:2]
        if x.shape != expected or x.dtype != old.dtype:
            raise ValueError(
                f"cache_write: expected new entries {old.dtype} {expected} for a cache array {old.shape}; "
                f"found {x.dtype} {x.shape}"
            )
    if slots.shape != layer[0].shape[:1] or slots.dtype != jnp.int32:
        raise ValueError(f"cache_write: expected slots int32 {layer[0].shape[:1]}; found {slots.dtype} {slots.shape}")
    if backend in ("tpu", "tpu_interpret") or (backend == "auto" and device.current().platform == "tpu"):
        tpu = backends.module(__name__, "tpu")
        if tpu.unsupported(layer) is None:
            return tpu.forward(layer, new, slots, interpret=backend == "tpu_interpret")
    return xla.forward(layer, new, slots)
