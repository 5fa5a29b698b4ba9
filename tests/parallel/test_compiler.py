"""Compiler options: ours depend on the kind of device, the user's override them, and unknown options are no error."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

from ar_unified.errors import UserError
from ar_unified.parallel import compiler
from ar_unified.parallel.hardware import HARDWARE
from ar_unified.parallel.mesh import make_mesh
from ar_unified.planning.targets import parse_target
from tests.kernels.topologies import TPUS, needs_libtpu

LEVEL = "xla_backend_optimization_level"  # an option that XLA's CPU compiler has too


@pytest.fixture
def mesh():
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture
def as_v5p(monkeypatch):
    """Makes this CPU look like a kind of device that has options."""
    monkeypatch.setattr(compiler, "of_kind", lambda kind: next(each for each in HARDWARE if each.name == "v5p"))
    return lambda **options: monkeypatch.setitem(compiler.OPTIONS, "v5p", options)


def test_a_device_without_options_gets_the_users_alone(mesh):
    assert compiler.compiler_options(mesh) == {}
    assert compiler.compiler_options(mesh, [f"--{LEVEL}=1"]) == {LEVEL: "1"}


def test_true_and_false_are_written_as_in_xla_flags(mesh):
    found = compiler.compiler_options(mesh, ["xla_cpu_enable_fast_math=false"])
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=found)


def test_the_users_option_stands_above_ours_and_so_does_the_environment(mesh, as_v5p, monkeypatch):
    as_v5p(**{LEVEL: "0"})
    assert compiler.compiler_options(mesh) == {LEVEL: "0"}
    assert compiler.compiler_options(mesh, [f"{LEVEL}=2"]) == {LEVEL: "2"}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{LEVEL}=1 --xla_other=true")
    assert compiler.compiler_options(mesh) == {}


def test_an_option_of_ours_that_a_compiler_does_not_know_is_left_out_and_one_of_the_users_is_named(mesh, as_v5p):
    as_v5p(xla_tpu_renamed="true", **{LEVEL: "0"})
    with pytest.warns(UserWarning, match="xla_tpu_renamed=true: this compiler has no such option"):
        assert compiler.compiler_options(mesh) == {LEVEL: "0"}
    as_v5p(**{LEVEL: "0"})
    with pytest.raises(UserError, match="config.training.compiler_options: .*xla_tpu_mistyped"):
        compiler.compiler_options(mesh, ["xla_tpu_mistyped=true"])


def test_a_float32_transformer_on_a_cpu_is_compiled_without_ynnpack_unless_the_user_says_otherwise(mesh):
    ((name, value),) = compiler.compiler_options(mesh, (), "float32").items()
    product, with_it = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))), "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    texts = [str(product.compile(compiler_options={name: each}).as_text()) for each in (value, with_it)]
    assert ["ynn_fusion" in text for text in texts] == [False, True]
    assert compiler.compiler_options(mesh, (), "bfloat16") == {} == compiler.compiler_options(mesh)
    assert compiler.compiler_options(mesh, [f"{name}={with_it}"], "float32") == {name: with_it}


@needs_libtpu
@pytest.mark.parametrize("name", TPUS)
def test_libtpu_knows_all_that_we_set(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no such option")
        found = compiler.compiler_options(parse_target(TPUS[name]).mesh(dict(data=-1)))
    assert found == compiler.OPTIONS[name]
