"""Attention and decode attention on one H100 or H200: ours beside cuDNN and stock Pallas, on one card in one run.

    python experiments/benchmarks/attention.py            # under ten minutes; needs pip install ".[cuda]"

First parity: all of tests/kernels/cases.py and decode_cases.py in bfloat16 against the reference, with gradients where
there are any. Then times, bfloat16, H 128, 32k tokens a batch:

    dense    causal rows of 4k, 8k and 32k; ours, cuDNN (jax.nn.dot_product_attention), the stock Pallas kernel
             (jax.experimental.pallas.ops.gpu.attention, Triton: deprecated, multi-head only, its default blocks)
    packed   rows of 8k with 8 documents of 1k: ours skips what no query sees; cuDNN has no answer but the dense row,
             so its time is the dense one
    decode   32 rows with 4k live slots of 8k, 32 heads over 8; cuDNN with sequence lengths, XLA; and an int8 cache

Times are of the device (CUPTI, the sum over the kernels of a call), the contenders in turns, medians of --repeats;
where CUPTI is not to be had, wall time of ten calls in a row, and the results say so. FLOPs are 4 B N T S H over the
documents' own T and S, half of it for being causal; backward 2.5 times that. Decode counts the bytes of the live slots.
Clocks and power are logged before each
row, for an H100 under a power limit is another device. Everything lands in results/attention_<device>_<time>.json.

No run has been recorded yet. What to hold it against, H100 SXM, TFLOP/s causal forward at 4k / 8k / 16k (tokamax's
recorded autotuning data): cuDNN 595 / 629 / 645, tokamax Mosaic GPU 568 / 620 / 636; backward, tokamax 408 / 438 / 452.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.kernels.cases, from a checkout

from ar_unified.kernels import device  # noqa: E402
from ar_unified.kernels.attention import attention  # noqa: E402
from ar_unified.kernels.decode_attention import decode_attention, quantize  # noqa: E402
from tests.kernels.cases import CASES, Case  # noqa: E402
from tests.kernels.decode_cases import CASES as DECODE_CASES  # noqa: E402
from tests.kernels.decode_cases import HOPPER_CASES, DecodeCase  # noqa: E402

RESULTS = Path(__file__).parent / "results"
HEAD_DIM, TOKENS = 128, 32768
TOLERANCE = 2e-2  # of bfloat16 outputs and gradients, |found - expected| / |expected|


@dataclasses.dataclass
class Row:
    """One line of the table: contenders that are timed in turns on the same arrays.

    Attributes:
      name: what is computed.
      work: FLOPs, or bytes, of the part that is useful.
      unit: "TFLOP/s", or "GB/s" where the work is bytes.
      arrays: makes the arguments of every contender.
      contenders: by name; the first is ours.
    """

    name: str
    work: float
    unit: str
    arrays: Callable[[], tuple]
    contenders: dict[str, Callable]


# ---- what is timed -------------------------------------------------------------------------------------------------


def ours(q, k, v, doc_start):
    return attention(q, k, v, doc_start=doc_start, backend="hopper")


def cudnn(q, k, v, doc_start):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def stock_pallas(q, k, v, doc_start):
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, segment_ids=None, sm_scale=HEAD_DIM**-0.5, causal=True)


def forward_and_backward(function: Callable) -> Callable:
    def run(q, k, v, doc_start, bar):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, doc_start), q, k, v)
        return out, *pull(bar)

    return run


def forward_only(function: Callable) -> Callable:
    return lambda q, k, v, doc_start, bar: function(q, k, v, doc_start)


def random_arrays(B: int, T: int, N: int, K: int, document: int) -> tuple:
    """q, k, v, doc_start of documents of one length, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, bar = (
        jax.random.normal(key, (B, T, n, HEAD_DIM), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N), strict=True)
    )
    doc_start = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // document * document, (B, T))
    return q, k, v, doc_start, bar


def attention_rows(name: str, T: int, N: int, K: int, document: int, contenders: tuple[Callable, ...]) -> Iterator[Row]:
    B = TOKENS // T
    flops = 0.5 * 4 * B * N * T * document * HEAD_DIM
    for what, wrap, factor in (("forward", forward_only, 1.0), ("forward+backward", forward_and_backward, 3.5)):
        yield Row(
            f"{name} T={T} N={N} K={K} {what}",
            factor * flops,
            "TFLOP/s",
            functools.partial(random_arrays, B, T, N, K, document),
            {function.__name__: jax.jit(wrap(function)) for function in contenders},
        )


def dense_rows() -> Iterator[Row]:
    for T in (4096, 8192, 32768):
        yield from attention_rows("dense", T, 16, 16, T, (ours, cudnn, stock_pallas))
        yield from attention_rows("dense", T, 32, 8, T, (ours, cudnn))


def packed_rows() -> Iterator[Row]:
    for N, K in ((16, 16), (32, 8)):
        yield from attention_rows("packed 8 x 1k", 8192, N, K, 1024, (ours, cudnn))


def decode_rows() -> Iterator[Row]:
    """32 rows that each read 4k live slots; what lies behind them is another 4k that must not be read."""
    B, N, K, S, live = 32, 32, 8, 8192, 4096

    def arrays(int8: bool) -> tuple:
        q, k, v = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(
                jax.random.split(jax.random.key(0), 3),
                ((B, N, HEAD_DIM), (B, K, S, HEAD_DIM), (B, K, S, HEAD_DIM)),
                strict=True,
            )
        )
        (k, *k_scale), (v, *v_scale) = (quantize(k), quantize(v)) if int8 else ((k,), (v,))
        scales = (x[0][:, :, None] if x else None for x in (k_scale, v_scale))
        return q, k, v, jnp.full(B, live, jnp.int32), *scales

    def by(backend: str) -> Callable:
        def run(q, k, v, lengths, k_scale, v_scale):
            return decode_attention(q, k, v, lengths=lengths, k_scale=k_scale, v_scale=v_scale, backend=backend)

        return jax.jit(run)

    def cudnn(q, k, v, lengths, k_scale, v_scale):
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        ends = dict(query_seq_lengths=jnp.ones_like(lengths), key_value_seq_lengths=lengths)
        return jax.nn.dot_product_attention(q[:, None], k, v, implementation="cudnn", **ends)

    slots = 2 * B * K * live
    yield Row(
        f"decode B={B} live={live} N={N} K={K} bfloat16", slots * HEAD_DIM * 2.0, "GB/s",
        functools.partial(arrays, False), dict(ours=by("hopper"), cudnn=jax.jit(cudnn), xla=by("xla")),
    )  # fmt: skip
    yield Row(
        f"decode B={B} live={live} N={N} K={K} int8", slots * (HEAD_DIM + 4.0), "GB/s",
        functools.partial(arrays, True), dict(ours=by("hopper"), xla=by("xla")),
    )  # fmt: skip


SUITES: dict[str, Callable[[], Iterator[Row]]] = {
    "decode": decode_rows,
    "packed": packed_rows,
    "dense": dense_rows,
}


# ---- is it right ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(case: Case, backend: str, q, k, v, bar, doc_start) -> dict[str, jax.Array]:
    def run(q, k, v):
        return attention(q, k, v, doc_start=doc_start, return_lse=True, backend=backend, **case.options)

    (out, lse), pull = jax.vjp(run, q, k, v)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *pull((bar, jnp.zeros_like(lse)))), strict=True))


def parity(case: Case) -> dict[str, float]:
    """Relative error of each result in bfloat16 against the reference in float32; inf where padding is not exact."""
    arrays = case.arrays(jnp.bfloat16)
    doc_start = jnp.asarray(case.doc_start)
    found = outputs_and_gradients(case, "hopper", *arrays, doc_start)
    expected = outputs_and_gradients(case, "reference", *(x.astype(jnp.float32) for x in arrays), doc_start)
    padding = case.doc_start == case.T
    errors = {}
    for what, value in found.items():
        value, right = np.asarray(value, np.float64), np.asarray(expected[what], np.float64)
        exact = (value[padding] == (-np.inf if what == "lse" else 0.0)).all()
        value, right = value[~padding], right[~padding]
        # Where a query sees one key its gradient is exactly 0: what is left of it then counts beside 0.01.
        error = np.linalg.norm(value - right) / max(np.linalg.norm(right), 1e-2 * right.size**0.5, 1e-30)
        errors[what] = float(error) if exact and np.isfinite(value).all() else float("inf")
    return errors


def decode_parity(case: DecodeCase) -> dict[str, float]:
    """The same of decode attention, against the reference on the numbers that the case has in bfloat16."""
    arrays = case.arrays(jnp.bfloat16)
    wide = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}
    step = functools.partial(decode_attention, return_lse=True, **case.options)
    found, expected = step(**arrays, backend="hopper"), step(**wide, backend="reference")
    empty, errors = np.array(case.lengths) == 0, {}
    for what, value, right in zip(("out", "lse"), found, expected, strict=True):
        value, right = np.asarray(value, np.float64), np.asarray(right, np.float64)
        exact = (value[empty] == (-np.inf if what == "lse" else 0.0)).all()
        error = np.linalg.norm(value[~empty] - right[~empty]) / max(np.linalg.norm(right[~empty]), 1e-30)
        errors[what] = float(error) if exact and np.isfinite(value[~empty]).all() else float("inf")
    return errors


# ---- how long does it take -----------------------------------------------------------------------------------------


def device_milliseconds(run: Callable, args: tuple) -> float:
    from jax.experimental.mosaic.gpu import profiler

    return profiler.measure(run)(*args)[1]


def wall_milliseconds(run: Callable, args: tuple, calls: int = 10) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = run(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls * 1e3


def choose_timer() -> Callable[[Callable, tuple], float]:
    try:
        if device_milliseconds(jax.jit(lambda x: x + 1), (jnp.zeros(1024),)) is not None:
            return device_milliseconds
    except Exception as error:  # whatever CUPTI's absence looks like here, the run must go on
        print(f"no device-side times: {error}")
    return wall_milliseconds


def clocks() -> str:
    query = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def measure(row: Row, timer: Callable, repeats: int) -> dict[str, Any]:
    args = row.arrays()
    record: dict[str, Any] = dict(
        name=row.name, work=row.work, unit=row.unit, clocks=clocks(), milliseconds={}, failed={}
    )
    ready = {}
    for name, run in row.contenders.items():
        try:
            jax.block_until_ready(run(*args))
            timer(run, args)
            ready[name] = run
        except Exception as error:  # a peer that cannot do a shape is a result too
            record["failed"][name] = f"{type(error).__name__}: {error}"[:300]
    for _ in range(repeats):
        for name, run in ready.items():
            record["milliseconds"].setdefault(name, []).append(timer(run, args))
    return record


def report(record: dict[str, Any]) -> None:
    medians = {name: statistics.median(times) for name, times in record["milliseconds"].items()}
    per_second = record["work"] / {"TFLOP/s": 1e9, "GB/s": 1e6}[record["unit"]]
    cells = [f"{name} {ms:.3f} ms {per_second / ms:.0f} {record['unit']}" for name, ms in medians.items()]
    cells += [f"{name} failed" for name in record["failed"]]
    print(f"{record['name']:44s} " + " | ".join(cells) + f"   [{record['clocks']}]", flush=True)


def packed_ratio(records: list[dict[str, Any]], N: int, what: str) -> dict[str, float]:
    """Time of our packed row over the dense row of the same tokens, ours and cuDNN's."""

    def median(prefix: str, name: str) -> float:
        for record in records:
            if (
                record["name"].startswith(prefix)
                and f"N={N} " in record["name"]
                and record["name"].endswith(f" {what}")
            ):
                return statistics.median(record["milliseconds"].get(name, [float("nan")]))
        return float("nan")

    packed = median("packed", "ours")
    return {name: packed / median("dense T=8192", name) for name in ("ours", "cudnn")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=540, help="start no new row after this")
    parser.add_argument("--no-parity", action="store_true", help="only times")
    args = parser.parse_args()
    here = device.current()
    if not here.is_hopper:
        print(f"needs an H100 or H200 and jax[cuda13]; this is {here.kind} ({here.platform}). Nothing was measured.")
        return 2

    start = time.monotonic()
    timer = choose_timer()
    results: dict[str, Any] = dict(
        device=here.kind,
        jax=jax.__version__,
        timer=timer.__name__,
        when=time.strftime("%Y-%m-%dT%H:%M:%S"),
        parity={},
        rows=[],
    )
    path = RESULTS / f"attention_{here.kind.replace(' ', '_')}_{time.strftime('%Y%m%d_%H%M%S')}.json"
    RESULTS.mkdir(exist_ok=True)

    def save() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n")

    wrong = 0
    # Caches whose slots TMA cannot copy are XLA's on a GPU too.
    decode_cases = {f"decode: {name}": case for name, case in (DECODE_CASES | HOPPER_CASES).items() if case.S % 8 == 0}
    for name, case in ({} if args.no_parity else CASES | decode_cases).items():
        try:
            errors = parity(case) if isinstance(case, Case) else decode_parity(case)
        except Exception as error:  # the other cases, and the times, are still worth having
            errors = {f"{type(error).__name__}: {error}"[:300]: float("inf")}
        bad = max(errors.values()) > TOLERANCE
        wrong += bad
        results["parity"][name] = {what: str(error) for what, error in errors.items()}
        print(
            f"{'WRONG' if bad else 'right'}  {name:28s} " + "  ".join(f"{w} {e:.1e}" for w, e in errors.items()),
            flush=True,
        )
        save()

    skipped = 0
    for row in (row for suite in args.suites for row in SUITES[suite]()):
        if time.monotonic() - start > args.seconds:
            skipped += 1
            continue
        results["rows"].append(measure(row, timer, args.repeats))
        report(results["rows"][-1])
        save()
    for N in (16, 32):
        for what in ("forward", "forward+backward"):
            ratio = packed_ratio(results["rows"], N, what)
            print(f"packed over dense, N={N} {what}: {ratio['ours']:.2f} of ours, {ratio['cudnn']:.2f} of cuDNN's")
    print(f"{wrong} cases wrong, {skipped} rows skipped for time; {timer.__name__}; written to {path}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
