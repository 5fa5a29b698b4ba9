"""A decoding step as compiled for a TPU: its copies, its memory, and the compiler's estimate of its time.

    PYTHONPATH=.:tokenizers python experiments/benchmarks/decode_programs.py [--layers N] [CASE ...]

Compiles the sampler's decoding program with libtpu on this machine's CPU and prints, per device:

    copied       bytes of arrays of 4 MiB and more that one step copies from memory to memory
    temporaries  memory besides weights and cache, also as a percentage of the cache
    XLA          the compiler's estimate, in cycles of CLOCK, of all but the Pallas kernels: first for a batch that
                 draws words and images, then for one that draws only images
    kernels      bytes that attention reads and that are written to the cache / memory bandwidth (computed here, because
                 XLA has no estimate for kernels); every row is as long as the cache
    roofline     bytes of weights and cache, read once, / memory bandwidth

Nothing is timed, because no TPU is used. --layers N takes N layers of the model; fewer compile faster. A case takes two
to ten minutes.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from ar_unified.language.syntax import fixed_grid, vocabulary_for
from ar_unified.model.config import config_from
from ar_unified.parallel.mesh import decoding_axes
from ar_unified.planning.loops import turn
from ar_unified.planning.programs import Run, sample_programs
from ar_unified.planning.report import duration, size
from ar_unified.planning.roofline import roofline
from ar_unified.planning.targets import parse_target

CLOCK = 1.75e9  # of v5p: 459 TFLOP/s are 2 FLOPs x 8 matrix units x 128 x 128 per cycle
# By name: target, KV cache, weights. All are Chameleon-7B with 64 guided requests, 2,048 slots, heads split by four.
CASES: dict[str, tuple[str, str | None, str | None]] = {
    "v5p": ("v5p:2x2x1", None, None),
    "v5p int8 cache": ("v5p:2x2x1", "int8", None),
    "v5p int8": ("v5p:2x2x1", "int8", "int8"),
    "v6e": ("v6e:2x2", None, None),
    "v6e int8": ("v6e:2x2", "int8", "int8"),
}
LARGE = 4 << 20
LAYOUT = fixed_grid(32, 32)
VOCABULARY = vocabulary_for(LAYOUT, 57088, 8192)


def measure(name: str, layers: int | None) -> str:
    """Compiles one case and returns its line of the table."""
    target, kv_dtype, weights_dtype = CASES[name]
    model = config_from("chameleon_7b", VOCABULARY.size)
    model = dataclasses.replace(model, n_layers=layers or model.n_layers)
    run = Run(
        model, VOCABULARY, LAYOUT, {"tensor": 4}, 8, 4096, requests=64, max_length=2048, contexts=2,
        kv_dtype=kv_dtype, weights_dtype=weights_dtype,
    )  # fmt: skip
    wanted = parse_target(target)
    mesh, hardware = wanted.mesh(decoding_axes(run.mesh)), wanted.hardware
    (program,) = [each for each in sample_programs(run, mesh) if each.name == "decode"]
    compiled = program.compile()
    step, images, cache = turn(compiled.hlo), turn(compiled.hlo, "words"), program.local_bytes()["cache"]
    copied = sum(copy.bytes * copy.times for copy in step.copies if copy.bytes >= LARGE)
    said = (
        f"{name}, {model.n_layers} layers (compiled in {compiled.seconds:.0f} s): cache {size(cache)}; copied "
        f"{size(copied)}; temporaries {size(compiled.temporaries)}, {compiled.temporaries / cache:.0%}; "
        f"{step.cycles / 1e6:.2f}M cycles of XLA, {images.cycles / 1e6:.2f}M for images alone"
    )
    if hardware.name != "v5p":
        return said
    written = 2 * 32 // jnp.dtype(kv_dtype or model.dtype).itemsize / run.max_length  # written tiles / cache
    kernels = cache * (1 + written) / hardware.hbm_bandwidth
    least = roofline(program, run, hardware, []).seconds["memory"]
    both, alone = (each.cycles / CLOCK + kernels for each in (step, images))
    return (
        f"{said}; kernels {duration(kernels)}; a step {duration(both)} and {duration(alone)}; roofline "
        f"{duration(least)}: {both / least:.2f} x and {alone / least:.2f} x"
    )


def main() -> None:
    """Prints a line for each case."""
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)}; default: all")
    parser.add_argument("--layers", type=int, help="number of the model's layers; default: all")
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        print(measure(name, arguments.layers), flush=True)


if __name__ == "__main__":
    main()
