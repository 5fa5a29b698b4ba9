"""Compiler options for each kind of device. Like the mesh, they belong to a program.

They are compile options and not environment variables, so that a plan is compiled with the options of its target, and a
checkpoint records the options that were really used. The purpose of each:

  async_collective_fusion, overlap_compute_collective_tc, enable_async_all_gather
      a gather of weights is split into steps, and runs inside a fusion that computes at the same time
  minor_sharding_for_major_trivial_input, relayout_group_size_threshold, assign_all_reduce_scatter_layout
      gradients get a layout in which one reduce-scatter replaces two operations: an all-reduce of the whole gradient,
      and a slice of the result

Names and values for TPUs come from MaxText's benchmarks/xla_flags_library.py. docs/tpu_training.md says how they affect
our programs.

A transformer's training step in float32 on a CPU is compiled without YNNPACK, the library that XLA uses for products by
default, and is 13% to 23% faster (docs/benchmarks.md). YNNPACK is faster in bfloat16, and for the few rows of decoding.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from ar_unified.errors import UserError
from ar_unified.parallel.hardware import of_kind

_OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
_SCATTER = {
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
}
# Keys are names of parallel/hardware.py. Other kinds use the compiler's own defaults.
OPTIONS: dict[str, dict[str, str]] = dict.fromkeys(("v4", "v5e", "v5p", "v6e", "tpu7x"), _OVERLAP | _SCATTER)
_CPU_FLOAT32 = {"xla_cpu_experimental_ynn_fusion_type": ""}

_BOOLEANS = {"true": "True", "false": "False"}
_UNKNOWN = re.compile(r"No such compile option: '([^']*)'")


def compiler_options(mesh: Mesh, own: Sequence[str] = (), products: str | None = None) -> dict[str, str]:
    """The options to compile a training step for the devices of `mesh`.

    Args:
      own: strings "name=value". Each is added to OPTIONS, or replaces the option of this name.
      products: the dtype of a transformer's matrix products; None: the model is no transformer.

    Options set by LIBTPU_INIT_ARGS are not changed. If this compiler does not know one of our own options, this option
    is left out with a warning, because the next libtpu may rename options. Raises UserError if the compiler does not
    know one of `own` or cannot read its value.
    """
    device = mesh.devices.flat[0]
    hardware = of_kind(device.device_kind)
    chosen = dict(each.removeprefix("--").split("=", 1) for each in own)
    if device.platform != "tpu":  # compile options, unlike flags, take only the booleans of _BOOLEANS
        chosen = {name: _BOOLEANS.get(value, value) for name, value in chosen.items()}
    set_already = re.findall(r"--([^\s=]+)", os.environ.get("LIBTPU_INIT_ARGS", ""))
    ours = dict(OPTIONS.get(hardware.name, {}) if hardware else {})
    if device.platform == "cpu" and products == "float32":
        ours |= _CPU_FLOAT32
    ours = {name: value for name, value in ours.items() if name not in {*set_already, *chosen}}
    while unknown := _refused(mesh, tuple((ours | chosen).items())):
        name, message = unknown
        if name not in ours:
            raise UserError(f"config.training.compiler_options: {message}")
        warnings.warn(f"{name}={ours.pop(name)}: this compiler has no such option, so it is left out", stacklevel=2)
    return ours | chosen


@functools.cache
def _refused(mesh: Mesh, options: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    """Returns (option, message) for the first option that the compiler refuses; the option is "" if the message does
    not name it. Returns None if the compiler accepts all.

    This compiles an empty program, because the real one takes minutes.
    """
    if not options:
        return None
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()] or list(mesh.devices.flat)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(here[0]))
    lowered = jax.jit(lambda x: x + 1).trace(number).lower(lowering_platforms=(here[0].platform,))
    try:
        lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        name = _UNKNOWN.search(str(error))
        return name[1] if name else "", str(error)
    return None
