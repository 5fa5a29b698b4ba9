"""A plan takes every choice that a config offers: each is traced and lowered, and its numbers are made.

The choices are read where the code defines them, so that a new one is tried without anyone naming it here.
"""

from __future__ import annotations

import jax
import pytest
from ar_tokenizers.image import quantizers

from ar_unified.cli import config as configs
from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from ar_unified.errors import UNUSABLE
from ar_unified.model.config import _CHOICES as MODEL_CHOICES
from ar_unified.planning.memory import at_least
from ar_unified.planning.plan import decoding_axes, with_a_kernel
from ar_unified.planning.programs import JOBS, programs
from ar_unified.planning.roofline import roofline
from ar_unified.planning.targets import TargetError, parse_target
from ar_unified.sampling.engine import KV_DTYPES
from ar_unified.sampling.request import CONTEXTS
from tests.kernels.topologies import needs_libtpu

# Jobs that a key reaches, and its values. Attention has tests of its own below: it depends on the target.
MODEL = {
    f"model.{field}": (JOBS, choices)
    for field, choices in MODEL_CHOICES.items()
    if field not in ("attention", "context")
}
CHOICES = MODEL | {
    "model.tie_embeddings": (JOBS, (True, False)),
    "model.scan_layers": (JOBS, (True,)),
    "model.dropout": (("train",), (0.1,)),
    "loss.chunk": (("train",), (16, 1024)),
    "loss.z_loss": (("train",), (1e-4,)),
    "training.optimizer": (("train",), ("adamw", "muon")),
    "training.schedule": (("train",), ("cosine", "wsd")),
    "training.restarts": (("train",), ((0.5,),)),
    "training.code_rows": (("train",), ("random", "alike")),
    "training.accumulation": (("train",), (2,)),
    "training.clip_norm": (("train",), (0.0,)),
    "data.layout": (JOBS, ("grid", "rows")),
    "data.resize": (("train",), ("crop", "aspect")),
    "image_tokenizer.quantizer": (("train",), quantizers.NAMES),
    "sampling.kv_dtype": (("sample",), tuple(name or "" for name in KV_DTYPES)),
    "sampling.guidance": (("sample",), (1.0, 3.0)),
    "sampling.context": (("sample",), CONTEXTS),
}


def small(**changes):
    """The smallest config, on 2 x 2 x 2 devices, with some keys changed."""
    config = configs.defaults()
    config.model = configs.model("debug")
    config.mesh.update(dict(data=2, fsdp=2, tensor=2))
    config.training.update(dict(batch_size=8, row_length=32))
    config.sampling.update(dict(batch_size=8, max_length=32))
    config.update_from_flattened_dict(changes)
    return config


def tried(config, job, target="h200:8"):
    """Lowers the programs of a job and makes what is computed of them; the same to the letter as `make_plan` does."""
    target = parse_target(target)
    run = with_a_kernel(run_of(config), target)
    mesh = target.mesh(run.mesh) if job == "train" else target.process().mesh(decoding_axes(run.mesh))
    for program in programs(run, mesh, job):
        lowered = program.lower().as_text()
        assert at_least(program, run)["parameters"] > 0
        estimate = roofline(program, run, target.hardware, [])
        assert estimate.seconds["products"] > 0 and estimate.seconds["memory"] > 0
        yield program.name, lowered


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_makes_a_plan(key):
    jobs, values = CHOICES[key]
    for value in values:
        for job in jobs:
            assert [name for name, _ in tried(small(**{key: value}), job)]


@pytest.mark.parametrize("way", MODEL_CHOICES["context"])
def test_every_context_makes_a_plan(way):
    assert list(tried(small(**{"model.context": way, "mesh.tensor": 1, "mesh.context": 2}), "train"))


@pytest.mark.parametrize("backend", MODEL_CHOICES["attention"])
def test_every_attention_is_planned_for_its_own_hardware_and_refused_in_a_sentence_for_other(backend):
    changed = small(**{"model.attention": backend})
    if "tpu" in backend:
        with pytest.raises(TargetError, match="config.model.attention: expected auto, xla, reference or hopper"):
            list(tried(changed, "train"))
    else:
        assert list(tried(changed, "train"))


@needs_libtpu
@pytest.mark.parametrize("backend", ["auto", "tpu", "xla", "reference", "hopper"])
def test_attention_on_a_tpu(backend):
    shape = {"model.head_dim": 128, "training.row_length": 128, "mesh.tensor": 1, "mesh.data": 2, "mesh.fsdp": 2}
    changed = small(**{"model.attention": backend, **shape})
    if backend == "hopper":
        with pytest.raises(TargetError, match="expected auto, xla, reference or tpu"):
            list(tried(changed, "train", "v5e:2x2"))
        return
    ((_, lowered),) = tried(changed, "train", "v5e:2x2")
    assert ("tpu_custom_call" in lowered) == (backend in ("auto", "tpu"))
