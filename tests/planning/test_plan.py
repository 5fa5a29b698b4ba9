"""Plans of small models, compiled for an absent TPU, or for CPU devices instead of GPUs."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import pytest

from ar_unified.cli.plan import run_of, save
from ar_unified.experiment import config as configs
from ar_unified.language.syntax import fixed_grid
from ar_unified.model.config import PRESETS, config_from
from ar_unified.model.remat import POLICIES
from ar_unified.parallel.mesh import make_mesh
from ar_unified.planning.advice import _changes
from ar_unified.planning.plan import make_plan
from ar_unified.planning.programs import Run, sample_programs
from ar_unified.planning.report import text
from ar_unified.planning.targets import TargetError, parse_target
from ar_unified.sampling.steps import CHUNK, FACTS
from tests.kernels.topologies import needs_libtpu
from tests.training import tiny

MODEL = replace(
    config_from("debug", tiny.VOCABULARY.size, qk_norm="rmsnorm", dtype="bfloat16", scan_layers=True, remat="full"),
    d_model=256, n_heads=2, n_kv_heads=2, head_dim=128, d_mlp=512,
)  # fmt: skip
RUN = Run(MODEL, tiny.VOCABULARY, fixed_grid(4, 4), dict(data=-1, fsdp=2), 8, 128, requests=8, max_length=64)
SMALL = replace(RUN, model=tiny.MODEL, sequence_length=16)


def quiet(line: str) -> None:
    pass


def test_targets_by_name():
    target = parse_target("v5p:4x4x8,slices=2")
    assert (target.name, target.chips, target.hardware.kind) == ("v5p:4x4x8,slices=2", 256, "TPU v5")
    errors = {"v9:2x2": "expected one of", "v5e:4x4x4": "expected 2 sizes", "v5e:4x4,hosts=2": "slices="}
    for wrong, said in errors.items():
        with pytest.raises(TargetError, match=said):
            parse_target(wrong)
    assert parse_target("v5p:4x4x4,slices=2").google == "v5p-128" and parse_target("v5e:16x16").google == ""


@pytest.mark.parametrize(
    "wrong, instead",
    [
        ("v5p:64", "v5p:4x4x4, which has 64 chips"), ("v5p:8x8", "v5p:4x4x4, which has 64 chips"),
        ("v5p:", "v5p:4x4x4, which has 64 chips"), ("v4:2", "v4:2x2x1, which has 4 chips"),
        ("v5e:32", "v5e:4x8, which has 32 chips"), ("v6e:4x4x4", "v6e:8x8, which has 64 chips"),
        ("v5e:1000", "v5e:16x16, which has 256 chips"), ("tpu7x:0x0", "tpu7x:4x4x4, which has 64 chips"),
        ("v5p-8", "v5p:2x2x1, which has 4 chips"), ("v4-4096", "v4:8x16x16, which has 2048 chips"),
        ("v5litepod-16", "v5e:4x4, which has 16 chips"), ("v6e-1", "v6e:1x1, which has 1 chip"),
    ],
)  # fmt: skip
def test_what_is_no_shape_is_refused_with_a_slice_that_exists(wrong, instead):
    with pytest.raises(TargetError, match=re.escape(instead)):
        parse_target(wrong)


@needs_libtpu
def test_a_slice_that_does_not_exist_is_refused():
    for wrong, said in {"v5p:3x3x3": "try v5p:2x4x4, which", "v5e:32x32": "at most 256 devices in a slice"}.items():
        with pytest.raises(TargetError, match=said):
            parse_target(wrong).devices()


@pytest.mark.parametrize("name", ["chameleon_7b", "chameleon_34b", "emu3_8b", "lwm_7b"])
def test_the_pretraining_config_has_the_published_vocabulary_and_an_even_mesh(name):
    run = run_of(configs.load(f"experiments/pretrain.py:model={name},chips=512"))
    assert 0 <= run.vocabulary.size - PRESETS[name]["vocab_size"] < 128
    inner = run.mesh["fsdp"] * run.mesh["context"]
    assert 512 % inner == 0 and run.batch_size % (512 // run.mesh["context"]) == 0
    assert run.model.d_model % run.mesh["fsdp"] == 0


def test_a_window_is_planned_as_it_is_decoded():
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    _, decode = sample_programs(replace(SMALL, window="4", contexts=2), mesh)
    assert decode.lower().out_info[1].shape == (SMALL.requests, 4 * CHUNK + FACTS)


def test_gpus_are_planned_with_cpus_in_their_place(tmp_path):
    plan = make_plan(SMALL, parse_target("h200:8"), say=quiet)
    assert plan["mesh"] == dict(data=4, fsdp=2, tensor=1, context=1) and plan["fits"]
    (step,) = plan["programs"]
    where = step["memory"]["parts"]
    # AdamW keeps two moments like the parameters, and two counters.
    assert where["optimizer"] - 2 * where["parameters"] < 64
    assert sum(where.values()) == step["memory"]["peak"]
    # Weights are gathered over fsdp, and gradients are summed over data.
    assert any(row["over"] == "fsdp" and row["kind"] == "all-gather" for row in step["collectives"])
    assert any("data" in row["over"] for row in step["collectives"])
    assert step["flops"]["executed"] > step["flops"]["model"] > 6 * 2 * 32 * 32 * 8 * 16
    said = text(plan)
    assert "8 CPU devices stand in" in said and re.search(r"peak +[\d.]+ [KM]iB", said)
    save(plan, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<rect") > len(where) and "http" not in page


def test_a_part_that_is_trained_is_planned_without_what_the_rest_would_need():
    codes = tiny.VOCABULARY.codebook_size * tiny.MODEL.d_model * 4 // 2  # bytes per device; fsdp divides their width
    run = replace(SMALL, model=replace(tiny.MODEL, remat="full"))
    (whole,), (part,) = (
        make_plan(replace(run, only=only), parse_target("h200:8"), say=quiet)["programs"]
        for only in ((), ("head[image]",))
    )
    assert part["memory"]["parts"]["gradients"] == codes
    assert 2 * codes <= part["memory"]["parts"]["optimizer"] < 2 * codes + 64
    assert part["memory"]["parts"]["parameters"] == whole["memory"]["parts"]["parameters"]
    assert part["memory"]["parts"]["activations"] < whole["memory"]["parts"]["activations"] / 2
    assert part["flops"]["executed"] < part["flops"]["model"] * 1.5 < whole["flops"]["model"]


@pytest.mark.parametrize("remat", [*POLICIES][:-1])
def test_advice_has_a_remat_policy_of_less_memory_for_each_other_one(remat):
    run, mesh = replace(SMALL, model=replace(tiny.MODEL, remat=remat)), make_mesh(dict(data=1), jax.devices()[:1])
    (change,) = [c for c, *_ in _changes(run, mesh, "train") if c.startswith("config.model.remat=")]
    policies = [*POLICIES]
    assert policies.index(change.partition("=")[2]) > policies.index(remat)


def test_sampling_is_planned_by_its_two_programs():
    plan = make_plan(SMALL, parse_target("h200:8"), "sample", say=quiet)
    prefill, decode = plan["programs"]
    assert (prefill["name"], decode["name"]) == ("prefill", "decode")
    # Keys and values of 2 layers, 2 heads, 64 slots, 8 dimensions in float32; 8 rows on 8 devices.
    assert decode["memory"]["parts"]["cache"] == 2 * 2 * 2 * 64 * 8 * 4
    # 8 tokens per step; an image of 4 x 4 codes is 16 tokens, plus the layout's tokens around them.
    low, high = decode["images"]
    assert decode["image_tokens"] == RUN.layout.block(4, 4) > 16
    assert high == pytest.approx(8 / decode["image_tokens"] / decode["fastest"]) and low < high
    assert decode["memory_share"][1] == pytest.approx(decode["seconds"]["memory"] / decode["fastest"])
    assert re.search(r"of the memory roofline: \d+% to \d+%.*\n +images of 1[89] tokens: [\d.e+]+ to", text(plan))
    # Loops over tokens, and in the search for top-k and top-p.
    assert decode["loops_of_unknown_length"] >= 1 and prefill["loops_of_unknown_length"] == 0


def test_what_does_not_divide_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match="multiply to 3"):
        make_plan(replace(SMALL, mesh=dict(fsdp=3)), parse_target("h200:8"), say=quiet)
    with pytest.raises(ValueError, match="axis 'batch' has size 6"):
        make_plan(replace(SMALL, batch_size=6), parse_target("h200:8"), say=quiet)


def test_a_stand_in_needs_enough_devices():
    assert len(jax.devices("cpu")) == 8
    with pytest.raises(TargetError, match="JAX_NUM_CPU_DEVICES=16"):
        parse_target("h200:16").devices()


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_slice_is_planned_and_what_is_too_large_is_refused():
    target = parse_target("v5e:2x2")
    plan = make_plan(RUN, target, say=quiet)
    (step,) = plan["programs"]
    assert plan["fits"] and step["memory"]["parts"]["code"] > 0
    assert {"all-gather"} <= {row["kind"] for row in step["collectives"] if row["over"] == "fsdp"}

    # 2 x 8 layers of this width need more memory than a chip has, which is known before anything is compiled.
    huge = replace(RUN, model=replace(MODEL, d_model=8192, d_mlp=32768, n_layers=8))
    plan = make_plan(huge, target, say=quiet)
    refused = plan["refused"]
    assert not plan["fits"] and refused["used"] > refused["capacity"] == pytest.approx(15.75 * 2**30)
    assert "exceeds available HBM" in refused["message"] or "hbm" in refused["message"]
    assert refused["trials"] and all(trial["fits"] is None for trial in refused["trials"])
    assert "REFUSED: train does not fit" in text(plan)
