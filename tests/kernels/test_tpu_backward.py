"""The two ways of the backward pass on TPUs: one kernel if VMEM has room for the gradients of a row's queries, else two
kernels."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified.kernels import device
from ar_unified.kernels.attention import attention, attention_gradients, blocks, recomputed, tpu, tpu_steps
from ar_unified.kernels.attention.bounds import make_bounds
from ar_unified.kernels.attention.spec import Spec
from experiments.benchmarks import attention_cycles
from tests.kernels.cases import CASES
from tests.kernels.test_attention import HASTILY, relative, run
from tests.kernels.topologies import TPUS, needs_libtpu

# One case for each variant of blocks, heads and masks; test-all has the others.
SOME = ("T no multiple of a block", "many tiny ones", "grouped by 8", "soft cap")


@pytest.fixture(params=["one kernel", "two kernels"])
def way(request, monkeypatch) -> str:
    choose(monkeypatch, request.param)
    return request.param


def choose(monkeypatch, way: str) -> None:
    """Without room for the sums of queries, backward has two kernels."""
    monkeypatch.setitem(blocks.ROOM, "cpu", 0 if way == "two kernels" else 1 << 20)


def of_lse(doc_start, heads: int):
    """A gradient of the log-sum-exp, float32 [B, T, N]; 0 on padding, where the log-sum-exp is -inf."""
    return jnp.where(doc_start[..., None] < doc_start.shape[1], jnp.cos(jnp.arange(heads, dtype=jnp.float32)), 0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=HASTILY)
def of(way: str, backend: str, options: tuple, q, k, v, bar, doc_start):
    """Gradients of attention. `way` only keeps programs apart.

    The log-sum-exp has a gradient, too: without it, queries that see one key have none but rounding.
    """

    def attend(q, k, v):
        return attention(q, k, v, doc_start=doc_start, return_lse=True, backend=backend, **dict(options))

    found = jax.vjp(attend, q, k, v)[1]((bar, of_lse(doc_start, q.shape[2])))
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


def both(monkeypatch, function) -> list[dict[str, np.ndarray]]:
    """function(way) with one kernel and with two."""
    found = []
    for way in ("one kernel", "two kernels"):
        choose(monkeypatch, way)
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float64), function(way)))
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SOME else (pytest.mark.slow, pytest.mark.exhaustive)) for name in CASES],
)
def test_one_kernel_and_two_compute_the_same_gradients(monkeypatch, name):
    case, doc_start = CASES[name], jnp.asarray(CASES[name].doc_start)
    arrays, options = case.arrays(), tuple(case.options.items())
    one, two = both(monkeypatch, lambda way: of(way, "tpu_interpret", options, *arrays, doc_start))
    for what, expected in of("", "reference", options, *arrays, doc_start).items():
        assert relative(one[what], np.asarray(expected)) < 1e-5, what
        assert relative(two[what], np.asarray(expected)) < 1e-5, what
        assert relative(one[what], two[what]) < 1e-6, what
        assert not one[what][case.doc_start == case.T].any(), what


@pytest.mark.parametrize("name", ["padding at the end", pytest.param("grouped by 8", marks=pytest.mark.slow)])
def test_in_bfloat16_they_differ_by_less_than_its_rounding(monkeypatch, name):
    case = CASES[name]
    arrays, options = case.arrays(jnp.bfloat16), tuple(case.options.items())
    one, two = both(monkeypatch, lambda way: of(way, "tpu_interpret", options, *arrays, jnp.asarray(case.doc_start)))
    for what, value in one.items():
        assert relative(value, two[what]) < 2**-9, what


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=HASTILY)
def of_part(way: str, backend: str, q, k, v, lse, delta, dout, doc_start, q_offset, kv_offset):
    found = attention_gradients(
        q, k, v, lse, delta, dout, doc_start=doc_start, q_offset=q_offset, kv_offset=kv_offset, backend=backend
    )
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


@pytest.mark.parametrize("queries, keys", [((0, 384), (256, 320)), ((256, 301), (0, 256)), ((0, 128), (256, 384))])
def test_gradients_of_a_part_of_the_keys(way, queries, keys):
    """Other numbers of queries than of keys, blocks of queries that no key block visits, and parts that do not meet."""
    case = dataclasses.replace(CASES["padding at the end"], kv_heads=1)
    q, k, v, dout = case.arrays()
    (t, t_end), (s, s_end) = queries, keys
    doc_start = jnp.asarray(case.doc_start)[:, t:t_end]
    lse = jnp.full((*doc_start.shape, case.heads), 3.0)
    q, dout, k, v = q[:, t:t_end], dout[:, t:t_end], k[:, s:s_end], v[:, s:s_end]
    arrays = q, k, v, lse, jnp.cos(lse * jnp.arange(4)), dout, doc_start, jnp.int32(t), jnp.int32(s)
    expected, found = of_part("", "xla", *arrays), of_part(way, "tpu_interpret", *arrays)
    for what, value in expected.items():
        if t_end <= s:
            assert not value.any() and not found[what].any()
        assert relative(np.asarray(found[what]), np.asarray(value)) < 1e-5, what
    assert not found["dq"][:, : max(s - t, 0)].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi-query", "nothing but padding"])
def test_copies_race_with_nothing(way, name):
    case = CASES[name]
    q, k, v, bar = case.arrays()
    spec = Spec(case.head_dim**-0.5, shift=0, interpret=pltpu.InterpretParams(detect_races=True))
    expected = run(case, "reference")
    work = tpu.prepare(spec, q, k, make_bounds(jnp.asarray(case.doc_start), case.T))
    out, lse = tpu.forward(spec, q, k, v, work)
    assert relative(np.asarray(out), expected["out"]) < 1e-5
    lse_bar = jnp.swapaxes(of_lse(jnp.asarray(case.doc_start), case.heads), 1, 2)
    delta = jnp.einsum("BTNH,BTNH->BNT", out, bar) - lse_bar
    found = dict(zip(("dq", "dk", "dv"), tpu.backward(spec, q, k, v, work, lse, delta, bar), strict=True))
    plain = of("", "reference", tuple(case.options.items()), q, k, v, bar, jnp.asarray(case.doc_start))
    for what, value in plain.items():
        assert relative(np.asarray(found[what]), np.asarray(value)) < 1e-5, what
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # `races` has no public name

    assert not interpreter.races.races_found


def shapes(N: int, K: int, T: int, S: int = 0, dtype=jnp.bfloat16):
    return (jax.ShapeDtypeStruct((1, length, heads, 128), dtype) for length, heads in ((T, N), (S or T, K)))


@pytest.mark.parametrize(
    "kind, N, K, T, heads",  # the heads of a step; 0 if there are two kernels
    [
        ("TPU v5p", 32, 32, 4096, 4),
        ("TPU v5p", 4, 4, 4096, 2),  # each core has two of four heads
        ("TPU v5p", 8, 1, 4096, 4),  # each core has four heads of one KV head
        ("TPU v5p", 1, 1, 4096, 0),  # one core would be idle
        ("TPU v6 lite", 1, 1, 4096, 1),
        ("TPU v5p", 64, 8, 4096, 8),
        ("TPU v6 lite", 32, 8, 8192, 8),
        ("TPU v5 lite", 32, 8, 8192, 8),
        ("TPU7x", 32, 8, 8192, 8),
        ("TPU v4", 32, 32, 4096, 0),
        ("TPU v5p", 32, 32, 1 << 17, 0),  # too long a row
    ],
)
def test_where_backward_is_one_kernel(monkeypatch, kind, N, K, T, heads):
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", kind))
    q, k = shapes(N, K, T)
    tile = tpu_steps.backward_tile(q, k)
    assert (tile.heads if tile.fused else 0) == heads
    assert recomputed(q, k, "tpu") == (1 if heads else 3)  # scores; or scores twice and the gradient of weights


def kernels(text: str) -> Counter[str]:
    """How often each kernel is called, by name."""
    called = r'custom_call_target="tpu_custom_call".*?op_name="[^"]*?(attention_\w+)[^"/]*/pallas_call"'
    return Counter(re.findall(called, text))


@needs_libtpu
@pytest.mark.parametrize(
    "topology, N, K, T, dtype, fused",
    [
        ("v5p", 8, 8, 4096, jnp.bfloat16, True),
        pytest.param("v5e", 4, 2, 2048, jnp.float32, True, marks=pytest.mark.slow),
        pytest.param("v4", 2, 2, 1 << 14, jnp.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_the_compiled_backward_pass_has_one_kernel(topology, N, K, T, dtype, fused):
    devices = get_topology_desc(platform="tpu", topology_name=TPUS[topology]).devices
    mesh = jax.make_mesh((1,), ("data",), devices=devices[:1], axis_types=(AxisType.Auto,))

    def loss(q, k, v, doc_start):
        return attention(q, k, v, doc_start=doc_start, backend="tpu").astype(jnp.float32).sum()

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))

    q, k = map(placed, shapes(N, K, T, dtype=dtype))
    doc_start = placed(jax.ShapeDtypeStruct(q.shape[:2], jnp.int32))
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, doc_start)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    backward = ["attention_backward"] if fused else ["attention_dkey", "attention_dquery"]
    assert kernels(compiled.as_text()) == Counter(["attention_forward", *backward])


# A loop over visits with a loop over the heads of a masked step and one of a clean step, as libtpu writes them.
SCHEDULE = """
     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { %s3 = sadd.s32 1, %s2 }
   0x3 PF: > { %7 = vst [vmem:%s3] %v1 }
   0x4 LB: >> { %9 = vpow2.f32 %v1  ;;  %10 = vmatmul.bf16.gmra.mxu0 %v2  ;;  %11 = vmatmul.bf16.gmra.mxu1 %v2 }
   0x5   : >> { %12 = vmatmul.bf16.gmra.mxu1 %v3 }
   0x6 PF: > { %s4 = sadd.s32 1, %s3 }
   0x7 LB: >> { %13 = vpow2.f32 %v4 }
"""


def test_cycles_of_a_schedule_are_its_bundles_or_the_time_of_its_products():
    found, case = list(attention_cycles.pieces(SCHEDULE)), attention_cycles.Case(N=2, K=2, T=256, document=256)
    assert [(each.depth, each.bundles, each.products) for each in found] == [
        (1, 2, 0), (1, 1, 0), (2, 2, 2), (1, 1, 0), (2, 1, 0)
    ]  # fmt: skip
    tile = dict(queries=128, keys=128, heads=1, cores=1, parts=1)
    # Two heads; three visits of three bundles, of which two have a mask and one has none.
    for occupied, masked in ((16, 32), (0, 2)):
        cycles = attention_cycles.cycles(found, "attention_backward", tile, case, occupied)
        assert cycles == 2 * (3 * 3 + 2 * (1 + masked) + 1)
