"""Compiles every shipped variant of the Hopper kernels for an H200, with ptxas, on a machine without a GPU.

    make check-hopper

installs the CUDA plugin of JAX and NVIDIA's compiler from PyPI into .venv-hopper (1.4 GB; no driver, no cuDNN) and runs
this. It prints registers, spills and shared memory of each kernel. It fails if registers spill, if ptxas serialises
wgmma products (it does so if it cannot prove that their operands are not modified), or if a thread block needs more
shared memory than allowed. It proves that the kernels compile and fit. test_hopper.py and, on a GPU, `make check-gpu`
test that they are right.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="check_hopper_"))
os.environ.update(MOSAIC_GPU_DUMP_TO=str(DUMP), MOSAIC_GPU_DUMP_PTXAS="1", JAX_PLATFORMS="cpu")

import jax  # noqa: E402
from jax.experimental.topologies import get_topology_desc  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from ar_unified.kernels.attention import hopper  # noqa: E402
from tests.kernels.decode_shipped import decode_kernels  # noqa: E402
from tests.kernels.hopper_variants import VARIANTS  # noqa: E402

SHARED_MEMORY = 232448  # bytes a thread block may ask for on compute capability 9.0

# What XLA must know about a device to compile for it: the limits of an SM and the shape of an H200 (CUDA programming
# guide, compute capability 9.0; NVIDIA H200 data sheet).
H200 = f"""
platform_name: "CUDA"
gpu_device_info {{
  name: "NVIDIA H200"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {SHARED_MEMORY}
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
}}
"""


def variants(head_dims: list[int], sharding: SingleDeviceSharding) -> Iterator[tuple[str, list, list[str]]]:
    """(name, [(function, shapes of its arguments)], the kernels that they must contain) of everything that is
    shipped."""
    for variant in VARIANTS:
        if variant.head_dim in head_dims:
            yield str(variant), variant.functions(), ["dkv", "dq", "forward"]
    for name, function, arguments in decode_kernels("hopper", sharding):
        if arguments["q"].shape[-1] in head_dims:
            yield f"decode: {name}", [(function, arguments)], ["decode"]


def compile_functions(functions: list, sharding: SingleDeviceSharding) -> Iterator[tuple[str, str, int]]:
    """(kernel, output of ptxas, bytes of shared memory) of each kernel that the functions need."""
    for path in DUMP.iterdir():
        path.unlink()

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    for function, arguments in functions:
        args, kwargs = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
        args, kwargs = jax.tree.map(placed, (tuple(args), kwargs))
        jax.jit(function).trace(*args, **kwargs).lower(lowering_platforms=("cuda",)).compile()
    for path in sorted(DUMP.glob("*.ptxas")):
        with open(path.with_suffix(".mlir-passes.log")) as log:
            sizes = (re.search(r"dynamic_shared_memory_size %c(\d+)", line) for line in log)
            size = next(found.group(1) for found in sizes if found)
        yield re.sub(r"^attention_|_attention|_\d+$", "", path.stem), path.read_text(), int(size)


def complaints(log: str, shared: int) -> str:
    """What is wrong with a kernel, or ""."""
    found = [f"spills {n} B" for n in re.findall(r"(\d+) bytes spill stores", log) if n != "0"]
    found += ["wgmma serialised"] if "wgmma" in log else []
    found += [f"shared memory over {SHARED_MEMORY}"] if shared > SHARED_MEMORY else []
    return ", ".join(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", nargs="+", type=int, default=hopper.HEAD_DIMS)
    args = parser.parse_args()
    device = get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices[0]
    sharding = SingleDeviceSharding(device)
    print(f"jax {jax.__version__}, for {H200.split('name: ')[2].splitlines()[0]}, sm_90a")
    print(f"{'variant':42s} {'kernel':8s} {'registers':>9s} {'spills':>7s} {'shared memory':>14s}")
    bad = 0
    try:
        for variant, functions, expected in variants(args.head_dims, sharding):
            kernels = list(compile_functions(functions, sharding))
            if sorted(name for name, *_ in kernels) != expected:
                raise RuntimeError(f"expected the logs of {expected}; found {[name for name, *_ in kernels]}")
            for name, log, shared in kernels:
                (registers,) = re.findall(r"Used (\d+) registers", log)
                (spills,) = re.findall(r"(\d+) bytes spill stores", log)
                wrong = complaints(log, shared)
                bad += bool(wrong)
                print(f"{variant:42s} {name:8s} {registers:>9s} {spills:>7s} {shared:14d}  {wrong}", flush=True)
    finally:
        shutil.rmtree(DUMP)
    print(f"{bad} kernels with complaints" if bad else "all kernels compile and fit")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
