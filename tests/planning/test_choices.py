"""Every choice in a config can be planned: each is traced and lowered, and its numbers are computed.

The choices are read from the code that defines them, so a new choice is tested without a change here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ar_unified.cli.plan import run_of
from ar_unified.experiment import check
from ar_unified.experiment import config as configs
from ar_unified.language.layouts import LAYOUTS
from ar_unified.language.syntax import SOFTMAXES
from ar_unified.model.config import CHOICES as MODEL_CHOICES
from ar_unified.model.config import PRESETS, config_from
from ar_unified.planning import JOBS
from ar_unified.planning.memory import at_least
from ar_unified.planning.plan import decoding_axes, with_a_kernel
from ar_unified.planning.programs import programs
from ar_unified.planning.roofline import roofline
from ar_unified.planning.targets import TargetError, parse_target
from tests.kernels.topologies import needs_libtpu

# Every key with choices, and other keys that change a program. Attention and context depend on the target (below).
CHOICES = {key: tuple(known) for key, known in check.CHOICES.items() if key not in ("model.attention", "model.context")}
CHOICES |= {
    "model.tie_embeddings": (True, False),
    "model.qk_norm_per_head": (True, False),
    "model.qkv_bias": (True, False),
    "model.norm_offset": (0.0, 1.0),
    "model.embedding_scale": (1.0, 5.5),
    "model.rope_factor": (1.0, 8.0),
    "model.scan_layers": (True, False),
    "model.dropout": (0.0, 0.1),
    "loss.chunk": (16, 1024),
    "loss.z_loss": (0.0, 1e-4),
    "training.restarts": ((), (0.5,)),
    "training.only": ((), ("embedding[image]", "layers.mlp"), ("norm", "layers.*.norm")),
    "training.accumulation": (2, 1),
    "training.code_embedding_init": ("random", "codebook"),  # "mean" is for the bundle of a language model
    "training.clip_norm": (1.0, 0.0),
    "sampling.guidance": (1.0, 3.0),
}
ADVERSARY = "image_tokenizer.adversary.kind"


def agreeing(changes):
    """A choice with the other settings that `check` requires for it."""
    changes = {"image_tokenizer.blocks": (1, 1, 1)} | changes
    learned = (changes.get("image_tokenizer.codebook_update"), changes.get("image_tokenizer.gradient"))
    far = changes.get("image_tokenizer.space") == "euclidean"
    quantizer = changes.setdefault("image_tokenizer.quantizer", "vq" if learned != (None, None) or far else "fsq")
    if quantizer != "fsq":
        changes["image_tokenizer.activation"] = "tanh"
    if quantizer != "vq":
        changes["image_tokenizer.space"] = "sphere"
    if changes.get("image_tokenizer.perceptual") == "match":
        if changes.setdefault("image_tokenizer.adversary.kind", "patch") == "none":
            changes["image_tokenizer.perceptual"] = "none"
    if changes.get("model.qk_norm_per_head"):
        changes.setdefault("model.qk_norm", "rmsnorm")
    if changes.get("model.qk_norm", "none") == "none":
        changes["model.qk_norm_per_head"] = False
    if changes.get("model.rope_factor", 1.0) != 1.0:
        changes.setdefault("model.rope_scaling", "linear")
    if changes.get("model.rope_scaling", "none") == "none":
        changes["model.rope_factor"] = 1.0
    if changes.get("model.rope_scaling") == "llama3":
        changes |= {"model.rope_low": 2.0, "model.rope_high": 8.0, "model.rope_original_length": 16}
    if quantizer not in ("vq", "rq"):
        changes["image_tokenizer.codebook_update"] = "gradient"
    if quantizer not in ("vq", "rq", "simvq"):
        changes["image_tokenizer.gradient"] = "straight_through"
    if changes.get("data.resize") == "aspect" and LAYOUTS[changes.get("data.layout", "grid")].size is None:
        changes["data.layout"] = "rows"
    if changes.get("image_tokenizer.perceptual") == "match" and changes.get(ADVERSARY, "none") == "none":
        changes[ADVERSARY] = next(kind for kind in CHOICES[ADVERSARY] if kind != "none")
    if changes.get("training.objective", "likelihood") != "likelihood":
        changes |= {"loss.softmax": "joint", "loss.mean": "joint", "training.accumulation": 1}
    if changes.get("image_tokenizer.attention", "none") != "none":
        changes["image_tokenizer.backbone"] = "vqgan"
    return changes


def missed(configs):
    return [(key, x) for key, values in CHOICES.items() for x in values if not any(c.get(key) == x for c in configs)]


# As many configs as the longest list has values: the i-th has the i-th value of every key. Then one config for each
# value that another choice had replaced.
LONGEST = max(map(len, CHOICES.values()))
CONFIGS = [agreeing({key: values[i % len(values)] for key, values in CHOICES.items()}) for i in range(LONGEST)]
CONFIGS += [agreeing({key: value}) for key, value in missed(CONFIGS)]


def small(**changes):
    """The smallest config, on 2 x 2 x 2 devices, with some keys changed."""
    config = configs.defaults()
    config.model = configs.model("debug")
    config.model.n_layers = 1  # a choice changes all layers alike
    config.mesh.update(dict(data=2, fsdp=2, tensor=2))
    config.training.update(dict(batch_size=8, sequence_length=32))
    config.sampling.update(dict(batch_size=8, max_length=32))
    config.update_from_flattened_dict(changes)
    return config


def tried(config, job, target="h200:8"):
    """Lowers the programs of a job and computes their numbers, exactly as `make_plan` does."""
    target = parse_target(target)
    run = with_a_kernel(run_of(config), target)
    mesh = target.mesh(run.mesh) if job == "train" else target.process().mesh(decoding_axes(run.mesh))
    for program in programs(run, mesh, job):
        lowered = program.lower().as_text()
        assert at_least(program, run)["parameters"] > 0
        estimate = roofline(program, run, target.hardware, [])
        assert estimate.seconds["matmuls"] > 0 and estimate.seconds["memory"] > 0
        yield program.name, lowered


def test_every_choice_is_in_a_config():
    assert not missed(CONFIGS)


@pytest.mark.parametrize("changes", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("job", JOBS)
def test_every_choice_makes_a_plan(job, changes):
    config = small(**changes)
    check.check(config, [])
    assert [name for name, _ in tried(config, job)]


def test_a_softmax_for_each_side_is_another_program():
    joint, by_side = (list(tried(small(**{"loss.softmax": softmax}), "train")) for softmax in SOFTMAXES)
    assert joint != by_side


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train", pytest.param("sample", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if "vocab_size" in preset])
def test_every_published_shape_makes_a_plan_at_its_true_size(preset, job):
    config = small()
    config.model = configs.model(preset)
    config.text_tokenizer.vocab_size = PRESETS[preset]["vocab_size"]  # image ids come in addition
    run = run_of(config)
    assert run.model == replace(config_from(preset), vocab_size=run.vocabulary.size)
    assert all(lowered for _, lowered in tried(config, job))


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
    shape = {"model.head_dim": 128, "training.sequence_length": 128, "mesh.tensor": 1, "mesh.data": 2, "mesh.fsdp": 2}
    changed = small(**{"model.attention": backend, **shape})
    if backend == "hopper":
        with pytest.raises(TargetError, match="expected auto, xla, reference or tpu"):
            list(tried(changed, "train", "v5e:2x2"))
        return
    ((_, lowered),) = tried(changed, "train", "v5e:2x2")
    assert ("tpu_custom_call" in lowered) == (backend in ("auto", "tpu"))
