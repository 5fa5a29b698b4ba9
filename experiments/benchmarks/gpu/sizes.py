"""The sizes to measure on a GPU, and tiny ones to test the check itself on a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """What to measure, and how often.

    Attributes:
      backend: the backend of our kernels.
      repeats: how often each contender is timed, in turns.
      head_dim, tokens, lengths, document: sizes for attention, which are the dimensions of a head, the tokens of a
        batch, the lengths of dense rows, and the length of a packed document (a row has eight).
      heads: (query heads, KV heads) of each case.
      more_heads: (query heads, KV heads, head dim) of cases that are measured only at the second length.
      decode: (rows, query heads, KV heads, slots, live slots) for decode attention.
      rings: ring buffers that decode attention tries, each (KiB of keys and values in flight, thread blocks per SM).
      training: maps the name of a training to (preset, layers (None: all of the preset), rows, tokens per row, remat,
        compiler options).
      preset, layers, vocabulary, grid, batches: sizes for sampling, which are the model, its layers (None: all of the
        preset), the numbers of text ids and codes, the codes per side, and the numbers of images drawn at once.
    """

    backend: str
    repeats: int
    head_dim: int
    tokens: int
    lengths: tuple[int, ...]
    document: int
    heads: tuple[tuple[int, int], ...]
    more_heads: tuple[tuple[int, int, int], ...]
    decode: tuple[int, int, int, int, int]
    rings: tuple[tuple[int, int], ...]
    training: dict[str, tuple[str, int | None, int, int, str, list[str]]]
    preset: str
    layers: int | None
    vocabulary: tuple[int, int]
    grid: int
    batches: tuple[int, ...]


SIZES = {
    "hopper": Size(
        backend="hopper",
        repeats=10,
        head_dim=128,
        tokens=32768,
        lengths=(4096, 8192, 32768),
        document=1024,
        heads=((16, 16), (32, 8)),
        more_heads=((32, 32, 64), (8, 8, 256)),
        decode=(32, 32, 8, 8192, 4096),
        rings=((64, 4), (32, 4), (32, 6), (48, 6), (64, 8)),
        training={
            "7B's shape, 8 of 32 layers, packed": ("chameleon_7b", 8, 8, 4096, "attention", []),
            "1B, packed": ("1b", None, 8, 4096, "attention", []),
            "8B's shape with grouped heads, 8 of 32 layers": ("emu3_8b", 8, 4, 8192, "full", []),
            "7B's shape, nothing made again": ("chameleon_7b", 8, 8, 4096, "none", []),
            "7B's shape, nothing made again, cuBLAS alone": (
                "chameleon_7b",
                8,
                8,
                4096,
                "none",
                ["xla_gpu_enable_triton_gemm=false"],
            ),
        },
        preset="chameleon_7b",
        layers=None,
        vocabulary=(57088, 8192),
        grid=32,
        batches=(32, 8),
    ),
    "tiny": Size(
        backend="xla",
        repeats=2,
        head_dim=64,
        tokens=512,
        lengths=(256, 512),
        document=32,
        heads=((4, 4), (4, 2)),
        more_heads=((2, 2, 128),),
        decode=(4, 8, 2, 256, 128),
        rings=((64, 4), (32, 4)),
        training={
            "debug": ("debug", None, 2, 256, "attention", []),
            "debug, full": ("debug", 1, 2, 128, "full", ["xla_cpu_enable_fast_math=false"]),
        },
        preset="debug",
        layers=None,
        vocabulary=(256, 64),
        grid=4,
        batches=(4, 2),
    ),
}
