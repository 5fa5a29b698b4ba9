"""Chooses the implementation of a fused op: the caller's choice, or the one for the device that the program is traced
for.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import jax

from ar_unified.kernels import device

BACKENDS = ("auto", "reference", "xla", "tpu", "tpu_interpret", "hopper", "hopper_interpret")


def module(package: str, backend: str) -> ModuleType:
    """The module of a backend. It is imported on first use, because GPU and TPU kernels import much of Pallas."""
    return importlib.import_module(f"{package}.{backend.removesuffix('_interpret')}")


def choose(package: str, backend: str, *args: Any) -> str:
    """Returns the backend that computes the op in `package` for `args`. `unsupported(*args)` of a backend's module says
    whether that backend can compute them.

    "auto" is the kernel of the current device. On CPUs it is xla. If the device has no kernel, or the kernel cannot
    compute `args`, "auto" is xla, with a warning. If the caller names a backend, this backend is used or ValueError is
    raised; no other backend replaces it. tpu_interpret and hopper_interpret emulate the kernels on a CPU;
    hopper_interpret needs JAX 0.12 or later.
    """
    op = package.rpartition(".")[2]
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"{op} backend: expected one of {', '.join(BACKENDS)}; found {backend!r}")
        if backend == "hopper_interpret" and jax.__version_info__ < (0, 12):
            raise ValueError(
                f"{op} backend {backend!r}: JAX can emulate this kernel from version 0.12 on; found {jax.__version__}"
            )
        if reason := module(package, backend).unsupported(*args):
            raise ValueError(f"{op} backend {backend!r}: {reason}; backend='xla' takes any shape")
        return backend
    here = device.current()
    kernel = {"tpu": "tpu", "gpu": "hopper" if here.is_hopper else None}.get(here.platform)
    if kernel is None:
        if here.platform != "cpu":
            warnings.warn(f"{op}: there is no kernel for {here.kind}; XLA computes this operation", stacklevel=3)
        return "xla"
    if reason := module(package, kernel).unsupported(*args):
        warnings.warn(f"{op}: XLA computes it on this {here.kind}, not the kernel: {reason}", stacklevel=3)
        return "xla"
    return kernel
