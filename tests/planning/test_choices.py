"""A plan takes every choice that a config offers: each is traced and lowered, and its numbers are made.

The choices are read where the code defines them, so that a new one is tried without anyone naming it here.
"""

from __future__ import annotations

import pytest
from ar_tokenizers.image import quantizers

from ar_unified.cli.plan import run_of
from ar_unified.experiment import config as configs
from ar_unified.model.config import CHOICES as MODEL_CHOICES
from ar_unified.planning import JOBS
from ar_unified.planning.memory import at_least
from ar_unified.planning.plan import decoding_axes, with_a_kernel
from ar_unified.planning.programs import programs
from ar_unified.planning.roofline import roofline
from ar_unified.planning.targets import TargetError, parse_target
from ar_unified.sampling.engine import KV_DTYPES
from ar_unified.sampling.request import CONTEXTS
from tests.kernels.topologies import needs_libtpu

# Values of every key that reaches a plan. Attention and context have tests of their own: they depend on the target.
CHOICES = {
    f"model.{field}": choices for field, choices in MODEL_CHOICES.items() if field not in ("attention", "context")
} | {
    "model.tie_embeddings": (True, False),
    "model.scan_layers": (True, False),
    "model.dropout": (0.0, 0.1),
    "loss.chunk": (16, 1024),
    "loss.z_loss": (0.0, 1e-4),
    "training.optimizer": ("adamw", "muon"),
    "training.schedule": ("cosine", "wsd"),
    "training.restarts": ((), (0.5,)),
    "training.code_rows": ("random", "alike"),
    "training.accumulation": (2, 1),
    "training.clip_norm": (1.0, 0.0),
    "data.layout": ("grid", "rows"),
    "data.resize": ("crop", "aspect"),
    "image_tokenizer.quantizer": quantizers.NAMES,
    "sampling.kv_dtype": tuple(name or "" for name in KV_DTYPES),
    "sampling.guidance": (1.0, 3.0),
    "sampling.context": CONTEXTS,
}
# As many configs as the longest list, the i-th with the i-th value of every key: each value is in one of them.
CONFIGS = [
    {key: values[i % len(values)] for key, values in CHOICES.items()} for i in range(max(map(len, CHOICES.values())))
]


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


@pytest.mark.parametrize("changes", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("job", JOBS)
def test_every_choice_makes_a_plan(job, changes):
    if changes["image_tokenizer.quantizer"] == "rq":  # several codes a position, which rows refuse
        changes = changes | {"data.layout": "grid"}
    assert [name for name, _ in tried(small(**changes), job)]


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
