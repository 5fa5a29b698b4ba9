"""The numbers of a plan equal sums done by hand: FLOPs, bytes of memory and of the network, seconds, tokens.

Rates are from the data sheet of TPU v5e: 197 TFLOP/s, 819 GB/s of memory, 4 links of 50 GB/s one way, DCN 3.125 GB/s
per chip, 15 GB/s to and from the host.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model import transformer
from ar_unified.model.config import TransformerConfig
from ar_unified.model.lora import LoraConfig
from ar_unified.parallel.hardware import HARDWARE
from ar_unified.parallel.mesh import decoding_axes, make_mesh
from ar_unified.planning.collectives import Collective, collectives
from ar_unified.planning.memory import PARTS, memory
from ar_unified.planning.programs import Compiled, Run, local_bytes, programs
from ar_unified.planning.report import text
from ar_unified.planning.roofline import roofline, traffic
from ar_unified.planning.scaling import scaling
from ar_unified.planning.targets import parse_target
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.weights import read_as, settled
from ar_unified.training.optimizer import OptimizerConfig
from tests.kernels.topologies import needs_libtpu

FLOPS, BANDWIDTH, LINK, DCN = 197e12, 819e9, 50e9, 3.125e9
V5E = next(each for each in HARDWARE if each.name == "v5e")
# Two layers: query, key, value, output 64 x 16 x (4 + 2 + 2 + 4) = 12,288; gate, up, down 3 x 64 x 128 = 24,576.
LAYERS, HEAD = 2 * (12_288 + 24_576), 256 * 64
NORMS = 2 * 2 * 64 + 64
VOCABULARY = Vocabulary(100, 100)  # with 7 controls, rounded up to 256
MODEL = TransformerConfig(
    vocab_size=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_mlp=128, dtype="bfloat16"
)
# 8 rows of 32 tokens; 4 requests, 8 rows with guidance, over 64 slots.
RUN = Run(
    MODEL, VOCABULARY, fixed_grid(4, 4), dict(fsdp=4), 8, 32, document=32, requests=4, max_length=64, contexts=2
)  # fmt: skip
TOKENS, PAIRS = 256, 256 * 33 / 2  # on average a token sees half of its document, including itself


def planned(run: Run, name: str, devices: int = 4):
    """One program on CPU devices that stand in for v5e, and its estimate without traffic between them."""
    job = "train" if name == "train" else "sample"
    mesh = make_mesh(run.mesh if job == "train" else decoding_axes(run.mesh), jax.devices()[:devices])
    (program,) = [each for each in programs(run, mesh, job) if each.name == name]
    return program, roofline(program, run, V5E, [])


# ---- matmuls ------------------------------------------------------------------------------------------------------


def test_matmuls_of_a_training_step():
    _, estimate = planned(RUN, "train")
    # The forward pass has 1 matmul with each weight and the backward pass 2, of 2 FLOPs each. The same is true for
    # scores and values of each pair.
    attention = 2 * 2 * 4 * 16 * PAIRS  # one matmul in 2 layers with 4 heads of 16
    model = 6 * (LAYERS + HEAD) * TOKENS + 6 * attention
    assert estimate.model_flops == model == 144_900_096
    # The two backward kernels (dQ; dK and dV) both compute scores and dP.
    assert estimate.executed == model + 3 * attention == 148_144_128
    assert estimate.seconds["matmuls"] == pytest.approx(148_144_128 / (4 * FLOPS), rel=1e-9)
    assert estimate.tokens == TOKENS


def test_an_adapter_has_the_state_and_the_base_no_gradient():
    """fsdp 4 splits the model's axis D: the input of A, or the output of B; all other axes are not split."""
    program, estimate = planned(replace(RUN, lora=LoraConfig(rank=4, base_dtype="bfloat16")), "train")
    a = 2 * 4 * (5 * 64 // 4 + 64 + 128)  # query, key, value, gate, up; output, down
    b = 2 * 4 * (64 + 2 * 32 + 2 * 128 + 2 * 64 // 4)  # query; key, value; gate, up; output, down
    own = 2 * 4 * (5 * 64 + 64 + 128 + 64 + 2 * 32 + 2 * 128 + 2 * 64)
    held = program.local_bytes()
    assert held["parameters"] == 2 * (LAYERS + 2 * HEAD) // 4 + 4 * NORMS // 4 + 4 * (a + b)
    assert held["optimizer"] == 2 * 4 * (a + b) + 3 * 4, "two moments of the adapter, and counters"
    attention = 2 * 2 * 4 * 16 * PAIRS
    assert estimate.model_flops == 2 * (2 * (LAYERS + HEAD) + 3 * own) * TOKENS + 6 * attention


def test_a_base_in_8_bits_has_a_byte_a_weight_and_a_scale_a_channel():
    """Channels of D are divided by fsdp 4, like weights; those of heads and of the MLP are whole."""
    lora = LoraConfig(rank=4, base_dtype="int8")
    held, float32 = (planned(replace(RUN, lora=each), "train")[0].local_bytes() for each in (lora, LoraConfig(rank=4)))
    scales = 2 * 4 * (64 + 2 * 32 + 2 * 128 + 2 * 64 // 4)  # query; key, value; gate, up; output, down
    assert float32["parameters"] - held["parameters"] == 3 * LAYERS // 4 + 2 * 2 * HEAD // 4 - scales
    assert held["optimizer"] == float32["optimizer"]


DOWN, MLP = 2 * 64 * 128, 2 * 3 * 64 * 128  # weights in two layers


@pytest.mark.parametrize(
    "remat, norms, again",
    [
        ("dots", "pre", 0),
        ("dots", "swin", 0),
        ("attention", "pre", MLP - DOWN),  # the last matrix' result is only added to the stream, so it is not kept
        ("offload_attention", "swin", MLP),  # a norm needs the last result, so it is kept
        ("full", "pre", LAYERS - DOWN),
        ("offload", "swin", LAYERS),
    ],
)
def test_layers_that_are_computed_again_cost_their_products_and_no_attention(remat, norms, again):
    _, without = planned(RUN, "train")
    _, estimate = planned(replace(RUN, model=replace(MODEL, remat=remat, norm_placement=norms)), "train")
    assert estimate.model_flops == without.model_flops
    assert estimate.executed - without.executed == 2 * again * TOKENS


def test_muon_runs_five_iterations_over_the_matrices():
    _, adamw = planned(RUN, "train")
    _, muon = planned(replace(RUN, optimizer=OptimizerConfig(optimizer="muon")), "train")
    # query and output 64 x 64, key and value 64 x 32, gate, up and down 64 x 128; each has X X^T, its square, and their
    # sum times X.
    one = 2 * (6 * 64**3) + 2 * (4 * 32 * 32 * 64 + 2 * 32**3) + 3 * (4 * 64 * 64 * 128 + 2 * 64**3)
    assert muon.executed - adamw.executed == 5 * 2 * one


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_xla_counts_the_same_matmuls(optimizer):
    """An independent count by XLA of the same step. Layers are wide, so that nearly all FLOPs are in matmuls."""
    wide = replace(MODEL, d_model=256, n_heads=8, n_kv_heads=8, head_dim=32, d_mlp=1024)
    run = replace(RUN, model=wide, mesh={}, loss_chunk=512, optimizer=OptimizerConfig(optimizer=optimizer))
    program, estimate = planned(run, "train", devices=1)
    counted = program.lower().cost_analysis()["flops"]
    assert estimate.executed == pytest.approx(counted, rel=0.1)


def test_matmuls_of_prefill_and_decode():
    _, prefill = planned(RUN, "prefill")
    assert prefill.tokens == 8 * 32  # the engine reads 8 prompts at once (twice its slots), here of 32 tokens
    assert prefill.executed == 2 * LAYERS * 256 + 2 * 2 * 2 * 4 * 16 * (256 * 33 / 2)
    _, decode = planned(RUN, "decode")
    assert decode.tokens == 4
    assert decode.executed == 2 * (LAYERS + HEAD) * 8 + 2 * 2 * 2 * 4 * 16 * 8 * 64 == 1_703_936
    assert decode.seconds["matmuls"] == pytest.approx(1_703_936 / (4 * FLOPS), rel=1e-9)


# ---- memory --------------------------------------------------------------------------------------------------------


def test_memory_traffic_of_a_training_step():
    _, estimate = planned(RUN, "train")
    gathered = 3 * 2 * 2 * (LAYERS + HEAD)  # three passes write and read every weight in bfloat16
    gathered += 8 * HEAD  # the head's gradient in float32, once per chunk; a device's 64 tokens are one chunk
    # Three passes move a layer's operands: per token 7 x 64 in and out of projections and MLP, the heads, and 4 x 128.
    operands = 3 * 2 * 2 * (7 * 64 + 2 * (2 * 4 + 2 * 2) * 16 + 4 * 128) * TOKENS / 4
    # A quarter of all parameters in float32: each weight, its two moments and its gradient are read and written once.
    state = 32 * (LAYERS + 2 * HEAD + NORMS) / 4
    assert estimate.seconds["memory"] == pytest.approx((gathered + operands + state) / BANDWIDTH, rel=1e-4)
    _, twice = planned(replace(RUN, accumulation=2), "train")
    assert (twice.seconds["memory"] - estimate.seconds["memory"]) * BANDWIDTH == pytest.approx(gathered, rel=1e-6)
    _, short = planned(replace(RUN, loss_chunk=16), "train")
    assert (short.seconds["memory"] - estimate.seconds["memory"]) * BANDWIDTH == pytest.approx(3 * 8 * HEAD, rel=1e-6)


@pytest.mark.parametrize(
    "dtype, kv_dtype, vector",
    [("bfloat16", None, 32), ("bfloat16", "int8", 16 + 4), ("float32", None, 64), ("float32", "bfloat16", 32)],
)
def test_decoding_reads_the_weights_and_the_cache_as_the_sampler_keeps_them(dtype, kv_dtype, vector):
    """The mesh is data 2 x tensor 2. vector: bytes of a key or value of 16 numbers; int8 has a float32 scale for
    each."""
    run = replace(RUN, model=replace(MODEL, dtype=dtype), mesh=dict(data=2, tensor=2), kv_dtype=kv_dtype)
    program, estimate = planned(run, "decode")
    width = 2 if dtype == "bfloat16" else 4
    # Half of the matrices, and whole norms in float32; the head has 128 rows of text and controls, and 100 of codes.
    weights = width * (LAYERS + (128 + 100) * 64) / 2 + 4 * NORMS
    cache = 2 * 2 * 2 * 64 * vector * 8 / 4  # keys and values, 2 layers, 2 heads, 64 slots, 8 rows on 4 devices
    assert estimate.seconds["memory"] == pytest.approx((weights + cache) / BANDWIDTH, rel=1e-9)
    assert program.local_bytes()["cache"] == cache


def test_the_parts_of_memory_have_what_the_engine_keeps():
    program, _ = planned(replace(RUN, mesh=dict(tensor=2)), "decode")
    head = 2 * HEAD / 2  # half of the vocabulary
    # Tokens and cache, then the last hidden states, divided over two devices.
    prefix = 8 * 32 * (4 + 2 * 2 * 2 * 16 * 2 / 2) / 2 + 8 * 64 * 2 / 2
    where = memory(program, Compiled("", 1 << 20, 0, 0, 5, 7, 0, 0.0), RUN, 1e9)
    assert where.parts["held"] == head + 4 * prefix
    assert where.peak == (1 << 20) + 5 + 7 + where.parts["held"] == sum(where.parts.values())
    assert set(where.parts) < set(PARTS)


@pytest.mark.parametrize("weights_dtype", [None, "int8"])
def test_the_engine_holds_what_the_plan_says(weights_dtype):
    """The plan equals the sizes of real arrays, for a bfloat16 and an int8 model. Each array counts once, and the head
    for scores is added."""
    run = replace(RUN, mesh={}, requests=2, max_length=64, weights_dtype=weights_dtype)
    (program,) = [each for each in programs(run, make_mesh({}, jax.devices()[:1]), "sample") if each.name == "decode"]
    grammar = Grammar(VOCABULARY, run.layout, None)  # the test has no text
    trained = transformer.init(MODEL, jax.random.key(0))
    read = jax.tree.map(lambda x, like: x.astype(like.dtype), trained, read_as(MODEL, None))
    engine = Engine(MODEL, settled(MODEL, read, None, weights_dtype), grammar, batch_size=2, max_length=64)

    def size(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    head, prefixes = program.held
    assert size(engine.weights) == local_bytes(program.arguments["parameters"])
    assert all(stack.is_deleted() for stack in jax.tree.leaves(read["layers"]))
    held = {id(x): x for x in jax.tree.leaves((engine.params, engine.weights))}  # shared parts count once
    assert size(list(held.values())) == local_bytes((program.arguments["parameters"], head)) < size(trained)
    tokens, lengths = np.zeros((engine._prefill_rows, 32), np.int32), np.ones(engine._prefill_rows, np.int32)
    assert size(engine.call(engine._programs.prefill, engine.weights, tokens, lengths)) == local_bytes(prefixes[0])


# ---- the network ---------------------------------------------------------------------------------------------------


@needs_libtpu
def test_a_matrix_that_is_gathered_and_scattered_on_a_real_slice():
    """x [64, 512] w [512, 256] on v5e:2x2 with w in four parts: a module compiled by libtpu is read and converted to
    seconds."""
    mesh = parse_target("v5e:2x2").mesh(dict(fsdp=4))

    def step(x, w):
        whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)  # bfloat16 [512, 256]
        y = jnp.tanh(jnp.dot(x, whole, preferred_element_type=jnp.float32))
        grad = jnp.dot(x.T.astype(jnp.float32), y)  # float32 [512, 256], from this device's rows
        return jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=0, tiled=True)

    split = P("fsdp")
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, split))
        for shape in ((64, 512), (512, 256))
    ]
    mapped = jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=split)
    compiled = jax.jit(mapped).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    # Each device: 16 x 512 x 256, twice.
    assert compiled.cost_analysis()["flops"] == pytest.approx(2 * 2 * 16 * 512 * 256, rel=0.1)
    found = {each.kind: each for each in collectives(compiled.as_text(), 4)}
    assert {kind: each.bytes for kind, each in found.items()} == {
        "all-gather": 512 * 256 * 2, "reduce-scatter": 512 * 256 * 4,
    }  # fmt: skip
    # 3/4 of the array over two links, because a group over both axes of 2 x 2 has no closed rings.
    for each in found.values():
        moved = traffic(each, mesh, V5E)
        assert moved.ici == each.sent == each.bytes * 3 / 4 and moved.dcn == 0
        assert moved.seconds_ici == pytest.approx(each.bytes * 3 / 4 / (2 * LINK), rel=1e-9)
    program = programs(RUN, mesh, "train")[0]
    estimate = roofline(program, RUN, V5E, list(found.values()))
    assert estimate.seconds["ICI"] == pytest.approx(512 * 256 * 6 * 3 / 4 / (2 * LINK), rel=1e-9)
    assert estimate.sent == {"ICI": 512 * 256 * 6 * 3 / 4, "DCN": 0}


@needs_libtpu
def test_links_of_a_group_and_traffic_between_slices():
    wide = parse_target("v5e:16x16").mesh(dict(data=16, fsdp=16))
    every = np.arange(256).reshape(1, -1)
    gather = Collective("all-gather", 1000, every, 2, True, False, "")
    # Both axes are rings of 16: four links.
    assert traffic(gather, wide, V5E).seconds_ici == pytest.approx(2000 * 255 / 256 / (4 * LINK), rel=1e-9)
    two = parse_target("v5e:2x2,slices=2").mesh(dict(data=2, fsdp=4))
    reduce = Collective("all-reduce", 4096, np.arange(8).reshape(1, -1), 1, True, False, "")
    moved = traffic(reduce, two, V5E)
    # A chip sends 2 x 3/4 of the array inside its slice. Then both slices add their quarters: it sends half a quarter,
    # twice.
    assert (moved.ici, moved.dcn) == (4096 * 2 * 3 / 4, 4096 * 2 / 4 / 2)
    assert moved.seconds_dcn == pytest.approx(1024 / DCN, rel=1e-9)
    program = programs(replace(RUN, mesh=dict(data=2, fsdp=4)), two, "train")[0]
    estimate = roofline(program, RUN, V5E, [reduce])
    assert estimate.seconds["DCN"] == moved.seconds_dcn and estimate.sent == {"ICI": moved.ici, "DCN": 1024}


# ---- seconds a step, and tokens ------------------------------------------------------------------------------------


def test_a_step_takes_as_long_as_its_slowest_resource_or_all_of_them():
    program, alone = planned(RUN, "train")
    pairs = np.array([[0, 1], [1, 0], [2, 3], [3, 2]])
    gpu = next(each for each in HARDWARE if each.name == "h200")  # 900 GB/s both ways through a switch
    estimate = roofline(program, RUN, gpu, [Collective("collective-permute", 10**6, pairs, 3, True, False, "")])
    seconds = estimate.seconds
    assert seconds["ICI"] == pytest.approx(3e6 / 450e9, rel=1e-9)
    assert seconds["matmuls"] == pytest.approx(148_144_128 / (4 * 989e12), rel=1e-9)
    # An exchange that overlaps with nothing counts fully. Of matmuls and memory, only the longer time counts.
    assert estimate.fastest == seconds["ICI"] + max(seconds["matmuls"], seconds["memory"]) and estimate.bound == "ICI"
    assert estimate.exposed == seconds["ICI"] == max(seconds.values())
    beside = Collective("collective-permute", 10**6, pairs, 3, True, True, "")
    assert roofline(program, RUN, gpu, [beside]).fastest == seconds["ICI"]
    assert estimate.slowest == pytest.approx(seconds["ICI"] + seconds["memory"] + seconds["matmuls"] / 0.7, rel=1e-9)
    assert estimate.mfu(1e-3) == pytest.approx(144_900_096 / 1e-3 / (4 * 989e12), rel=1e-9)
    assert alone.seconds["ICI"] == alone.seconds["DCN"] == 0
    said = text(_plan_of(program.name, estimate))
    low, high = (float(n.replace(",", "")) for n in re.search(r"([\d,]+) to ([\d,]+) tokens/s", said).groups())
    assert high == pytest.approx(256 / estimate.fastest, rel=1e-6) and low < high


@pytest.mark.parametrize("remat, columns", [("offload", 64 + 64), ("offload_attention", 64 + 64 + 32 + 32 + 64 + 64)])
def test_what_goes_to_the_host_and_back_takes_time(remat, columns):
    """The input and attention's output of a layer; or also queries, keys, values and the result of `output`."""
    run = replace(RUN, model=replace(MODEL, remat=remat))
    program, estimate = planned(run, "train")
    each_way = 2 * columns * 2 * TOKENS / 4  # two layers, bfloat16, one of four devices
    assert estimate.seconds["host"] == pytest.approx(2 * each_way / 15e9, rel=1e-9)
    rest = estimate.seconds["memory"] + estimate.seconds["matmuls"] / 0.7
    assert estimate.slowest == pytest.approx(estimate.seconds["host"] + rest, rel=1e-9)
    slow = estimate._replace(seconds={**estimate.seconds, "host": 1.0})
    assert slow.bound == "host" and slow.fastest == 1.0
    assert "send less to the host" in scaling(program, run, parse_target("v5e:2x2"), slow).breaks
    assert "host" in text(_plan_of(program.name, estimate))
    full = planned(replace(RUN, model=replace(MODEL, remat="full")), "train")[1]
    assert full.seconds["host"] == 0.0


def _plan_of(name, estimate):
    """A plan with only the fields that its text uses."""
    program = {
        "name": name, "compile_seconds": 1.0, "compiler_options": {}, "host": 0, "collectives": [],
        "loops_of_unknown_length": 0, "exposed": estimate.exposed,
        "memory": {"parts": {}, "peak": 1.0, "capacity": 2.0}, "sent": estimate.sent, "tokens": estimate.tokens,
        "flops": {"model": estimate.model_flops, "executed": estimate.executed}, "seconds": estimate.seconds,
        "fastest": estimate.fastest, "slowest": estimate.slowest, "bound": estimate.bound, "mfu": [0.1, 0.2],
    }  # fmt: skip
    return {
        "job": "train", "target": "h200:4", "chips": 4, "processes": 1, "mesh": {}, "batch": {}, "stand_in": None,
        "model": {"parameters": 1, "vocabulary": 256, "remat": "none", "dtype": "bfloat16"}, "warnings": [],
        "programs": [program], "hardware": {"source": ""},
    }  # fmt: skip
