"""The plan of a run on preference pairs is like its training: the batch has pairs, and there is no second model."""

from __future__ import annotations

from dataclasses import replace

import jax

from ar_unified.cli.plan import run_of
from ar_unified.experiment import config as configs
from ar_unified.parallel.mesh import make_mesh
from ar_unified.planning.programs import gradient_bytes, saved_for_backward, train_program
from ar_unified.training.preference import PreferenceConfig
from tests.planning.test_plan import SMALL

PAIRS = replace(SMALL, sequence_length=32, document=8, preference=PreferenceConfig(sft=0.5))


def test_a_config_says_it():
    config = ["--config.training.objective=preference", "--config.preference.loss=ipo"]
    run = run_of(configs.load("experiments/pretrain.py:model=chameleon_7b,chips=64", config))
    assert run.preference == PreferenceConfig(loss="ipo")
    assert run_of(configs.load("experiments/pretrain.py:model=chameleon_7b,chips=64")).preference is None


def test_it_costs_what_training_on_both_answers_costs():
    mesh = make_mesh(dict(data=4, fsdp=2), jax.devices()[:8])
    plain, pairs = (train_program(run, mesh) for run in (replace(PAIRS, preference=None), PAIRS))
    ours, theirs = pairs.local_bytes(), plain.local_bytes()
    assert ours["parameters"] == theirs["parameters"] and ours["optimizer"] == theirs["optimizer"]
    assert ours["batch"] - theirs["batch"] == 2 * 2 * 5 * 4  # per device a row of two pairs: both answers by role, f32
    assert gradient_bytes(PAIRS, mesh) == gradient_bytes(replace(PAIRS, preference=None), mesh)
    saved = saved_for_backward(PAIRS, mesh), saved_for_backward(replace(PAIRS, preference=None), mesh)
    assert saved[1] <= saved[0] < 1.2 * saved[1]
    assert pairs.lower().as_text()
