"""The training step of a TPU slice, compiled by libtpu with our options: which operations wait, and how often they
run."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from, layer_matrices
from ar_unified.parallel.compiler import OPTIONS
from ar_unified.planning.collectives import collectives
from ar_unified.planning.programs import Run, train_program
from ar_unified.planning.targets import parse_target
from tests.kernels.topologies import needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.slow]
VOCABULARY = Vocabulary(2000, 2000)
MODEL = replace(
    config_from("debug", VOCABULARY.size, qk_norm="layernorm", dtype="bfloat16", scan_layers=True, remat="dots"),
    d_model=1024, n_heads=8, n_kv_heads=8, head_dim=128, d_mlp=2816, n_layers=4,
)  # fmt: skip
RUN = Run(MODEL, VOCABULARY, fixed_grid(4, 4), dict(data=2, fsdp=8), 128, 256)


@pytest.fixture(scope="module")
def step():
    """A model in which gathers take less time than products, like in a real one."""
    mesh = parse_target("v5p:2x2x4").mesh(RUN.mesh)
    program = train_program(RUN, mesh)
    return program, program.compile()


def over_fsdp(found, mesh):
    fsdp = {tuple(sorted(ids)) for ids in np.arange(mesh.size).reshape(mesh.shape["data"], -1).tolist()}
    return [each for each in found if {tuple(sorted(ids)) for ids in each.groups.tolist()} == fsdp]


def test_no_gradient_of_a_matrix_is_reduced_whole_over_fsdp(step):
    program, compiled = step
    found = over_fsdp(collectives(compiled.hlo, program.mesh.size), program.mesh)
    sizes = [2 * rows * columns for rows, columns in layer_matrices(MODEL).values()]  # in bfloat16
    assert not [each for each in found if each.kind == "all-reduce" and each.bytes >= min(sizes)]
    scattered = sum(each.bytes * each.times for each in found if each.kind == "reduce-scatter")
    assert scattered >= MODEL.n_layers * sum(sizes)


def test_what_is_gathered_travels_beside_computation(step):
    program, compiled = step
    gathers = [each for each in collectives(compiled.hlo, program.mesh.size) if each.kind == "all-gather"]
    layers = [each for each in over_fsdp(gathers, program.mesh) if each.times >= MODEL.n_layers]
    sent, hidden = (sum(each.sent * each.overlapped**n for each in layers) for n in (0, 1))
    assert hidden / sent >= 0.8


def test_backward_runs_no_attention_of_forward(step):
    assert step[1].hlo.count('custom_call_target="tpu_custom_call"') == 2  # forward and backward of the scanned layer


def test_lists_of_visits_are_made_once_a_step(step):
    """Making them takes a hundred small operations, which every layer's backward pass would otherwise repeat."""
    made = re.compile(r"op_name=\"[^\"]*while/body/[^\"]*shard_map/[^\"]*(gather|scatter|floor_divide)")
    assert not [line for line in step[1].hlo.splitlines() if made.search(line)]
    assert "floor_divide" in step[1].hlo  # the lists are made, but outside the loop


def test_options_are_those_of_the_kind(step):
    assert step[0].options == OPTIONS["v5p"]
