"""Decoding compiled for absent TPUs: the cache is written in place, and nothing copies it."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.topologies import get_topology_desc

from ar_unified.language.syntax import fixed_grid, vocabulary_for
from ar_unified.model.cache import init_cache
from ar_unified.model.config import config_from
from ar_unified.model.decoded import unstacked
from ar_unified.model.transformer import Transformer, abstract_params, logical_axes
from ar_unified.parallel import rules
from ar_unified.parallel.mesh import decoding_axes, make_mesh
from ar_unified.parallel.rules import on_mesh, shardings
from ar_unified.planning.hlo import bytes_of, called_by, parse
from ar_unified.planning.loops import turn
from ar_unified.planning.programs import Run, sample_programs
from ar_unified.planning.targets import parse_target
from ar_unified.sampling import steps
from ar_unified.sampling.head import Weights, text_logits
from ar_unified.sampling.steps import row_specs
from tests.kernels.topologies import TPUS, needs_libtpu

pytestmark = needs_libtpu
LAYOUT = fixed_grid(32, 32)
VOCABULARY = vocabulary_for(LAYOUT, 57088, 8192)
# All widths are Chameleon's. There are just enough layers to see what one does, and the cache is as large as for 8
# layers.
MODEL = replace(config_from("chameleon_7b", VOCABULARY.size), n_layers=2)
RUN = Run(MODEL, VOCABULARY, LAYOUT, dict(tensor=4), 8, 4096, requests=64, max_length=8192, contexts=2)


def kept(tree, mesh) -> int:
    """Bytes per device of a tree that is divided over a mesh."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // mesh.size


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, kv_dtype",
    [
        ("v5p:2x2x1", None),
        ("v6e:2x2", "int8"),
        pytest.param("v5p:2x2x1", "int8", marks=pytest.mark.exhaustive),
        pytest.param("v6e:2x2", None, marks=pytest.mark.exhaustive),
    ],
)
def test_a_step_copies_no_cache_and_needs_little_beside_it(target, kv_dtype):
    mesh = parse_target(target).mesh(decoding_axes(RUN.mesh))
    (program,) = [p for p in sample_programs(replace(RUN, kv_dtype=kv_dtype), mesh) if p.name == "decode"]
    compiled = program.compile()
    step = turn(compiled.hlo)
    assert step.kernels == {"cache_write": MODEL.n_layers, "decode_attention": MODEL.n_layers}
    cache = program.local_bytes()["cache"]
    scales = 128 * 8 * 8192 * 4  # bytes of the smallest array of the cache; logits of one modality are smaller
    assert not [copy for copy in step.copies if copy.bytes >= scales]
    # Relative to a cache in the compute dtype, because an int8 cache does not make logits smaller.
    whole = cache * (2 if kv_dtype == "int8" else 1)
    assert compiled.temporaries < whole / 50 and compiled.aliased >= cache
    assert not [each for each in gathered(compiled.hlo) if each >= 1 << 20], "no weights travel"


def gathered(hlo):
    """Bytes of numeric arrays that devices gather. (At the end of a chunk they also gather `seen`, which is bool.)"""
    computations, _ = parse(hlo)
    found = [each.type for part in computations.values() for each in part if each.opcode.startswith("all-gather")]
    return [bytes_of(each) for each in found if "pred[" not in each]


def narrow(weights_dtype=None):
    """One layer, narrow except for the cache, on two rows of v5e devices; each row divides the heads.

    Half of the MLP's channels are not a whole number of lanes.
    """
    mesh = make_mesh(dict(data=2, tensor=2), get_topology_desc(platform="tpu", topology_name=TPUS["v5e"]).devices)
    config = replace(MODEL, n_layers=1, d_model=512, d_mlp=1408, n_heads=8, n_kv_heads=8, vocab_size=256)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda p: unstacked(config, p, weights_dtype), abstract_params(config))
    return mesh, config, on_mesh(params, shardings(mesh, logical_axes(params), params))


def by_row(mesh, *trees):
    return (on_mesh(x, jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), row_specs(mesh, x))) for x in trees)


@functools.cache
def loop(kv_dtype=None, weights_dtype=None):
    """The compiled steps of decoding, and the bytes of a device's keys."""
    mesh, config, params = narrow(weights_dtype)
    cache = jax.eval_shape(lambda: init_cache(config, 32, 4096, kv_dtype or config.dtype))

    def decode(params, cache, tokens, start):
        def step(state):
            i, cache, hidden = state
            hidden, cache = Transformer.bind(config, params).extend(tokens, cache, start + i)
            return i + 1, cache, hidden

        hidden = jnp.zeros((32, 1, config.d_model), config.dtype)
        return jax.lax.while_loop(lambda state: state[0] < start[0], step, (jnp.int32(0), cache, hidden))

    rows = (jax.ShapeDtypeStruct((32, 1), jnp.int32), jax.ShapeDtypeStruct((32,), jnp.int32))
    cache, rows = by_row(mesh, cache, rows)
    with jax.set_mesh(mesh):
        traced = jax.jit(decode, donate_argnums=1).trace(params, cache, *rows)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled, kept(cache[0][0], mesh)


@pytest.mark.parametrize("kv_dtype", [None, "int8", "float8_e4m3fn"])
def test_a_loop_that_extends_a_cache_does_so_in_place(kv_dtype):
    compiled, keys = loop(kv_dtype)
    step = turn(compiled.as_text())
    assert step.kernels == {"cache_write": 1, "decode_attention": 1} and step.cycles > 0
    assert not [copy for copy in step.copies if copy.bytes >= keys / 40]  # nor are scales copied
    assert compiled.memory_analysis().temp_size_in_bytes < keys / 10


@pytest.mark.parametrize("weights_dtype", [None, "int8"])
def test_rounded_weights_are_read_as_they_are(weights_dtype):
    """No matrix is converted to a wider dtype before the loop, or anywhere outside the product that reads it. The MLP's
    matrices have whole lanes on each device: 768 channels instead of 704.
    """
    computations, _ = parse(loop(weights_dtype=weights_dtype)[0].as_text())
    fused = {name for part in computations.values() for x in part if x.opcode == "fusion" for name in called_by(x)}
    made = [x.type for name, part in computations.items() if name not in fused for x in part]
    for letters, there in (("bf16", not weights_dtype), ("s8", bool(weights_dtype))):
        matrices = re.compile(rf"{letters}\[(512,768|768,512|512,512)\]")  # MLP and attention, divided by two
        assert any(map(matrices.match, made)) == there, letters


def test_logits_travel_and_not_the_head():
    """Each device computes its part of the logits for all rows, and then draws for its own rows."""
    mesh, config, params = narrow()
    head = jax.ShapeDtypeStruct((1024, config.d_model), config.dtype)
    heads = on_mesh((head, head), (jax.NamedSharding(mesh, rules.spec(mesh, ("vocab", "embed"), head.shape)),) * 2)
    rows = jax.ShapeDtypeStruct((16, config.d_model), config.dtype), jax.ShapeDtypeStruct((16,), jnp.int32)
    with jax.set_mesh(mesh):
        traced = jax.jit(text_logits).trace(Weights(params, *heads), *by_row(mesh, *rows))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" in compiled.as_text()
    (where,) = jax.tree.leaves(compiled.output_shardings)
    assert where.shard_shape((16, 1024)) == (4, 1024)


@pytest.mark.slow
def test_what_a_long_prompt_needs_does_not_grow_with_it():
    """Prompts are read in pieces of 1,024. Two or eight pieces need the same memory besides weights, prompts and
    cache."""
    mesh, config, params = narrow()

    def beside(length):
        (rows,) = by_row(mesh, (jax.ShapeDtypeStruct((4, length), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)))
        with jax.set_mesh(mesh):
            traced = jax.jit(functools.partial(steps.prefill, config)).trace(Weights(params, None, None), *rows)
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert beside(8 * steps.PIECE) < 1.1 * beside(2 * steps.PIECE)
