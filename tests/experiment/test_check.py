"""A config is checked completely before the first stage. Errors name the key, the expected value and the value
found."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict

from ar_unified.data.sources import open_source
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment.check import CHOICES, check
from ar_unified.experiment.check_opened import check_devices, check_sources
from ar_unified.experiment.experiment import STAGES, Experiment
from ar_unified.experiment.settings import autoencoder, longest, shapes
from ar_unified.paths import home
from ar_unified.workdir import Workdir
from tests import bundles

ROOT = Path(__file__).resolve().parents[2]
SHAPES = str(ROOT / "experiments" / "shapes.py")


def load(**changes: Any) -> ConfigDict:
    return configs.load(SHAPES, [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()])


def says(words: str, changes: Mapping[str, Any], stages: Any = STAGES) -> None:
    with pytest.raises(UserError) as caught:
        check(load(**changes), stages)
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_is_told_what_there_is(key):
    first = next(name for name in CHOICES[key] if name)
    near = "" if len(first) < 5 else f".*did you mean '{first}'"
    says(rf"config\.{key}: expected one of .*{first}.*; found '{first}x'{near}", {key: f"{first}x"})


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("seed", -1, r"in \[0, 4294967295\], found -1"),
        ("data.max_tokens", 0, "at least 1, found 0"),
        ("data.image_size", "(64,)", r"a height and a width in pixels, found \[64\]"),
        ("data.image_size", "(60,64)", "does not divide into codes of 16 x 16"),
        ("text_tokenizer.vocab_size", 0, "at least 1"),
        ("text_tokenizer.temperature", 0.5, "at least 1, found 0.5"),
        ("text_tokenizer.model", "no.model", "no.model: no such file"),
        ("image_tokenizer.factor", 15, "patch times a power of two"),
        ("image_tokenizer", {"blocks": "(1,2)"}, "make 3 levels, fine to coarse, but blocks has 2"),
        ("image_tokenizer", {"levels": "(2,3)"}, "levels of at least 3"),
        ("image_tokenizer", {"quantizer": "lfq", "activation": "tanh", "codes": 1000}, "power of two"),
        ("image_tokenizer.codebook_update", "ema", "is only for vq or rq; for quantizer fsq it must be 'gradient'"),
        ("image_tokenizer.beta", "nan", "at least 0, found nan"),
        ("image_tokenizer.l2_weight", -1, "0 or more"),
        ("image_tokenizer.ema", 1, r"in \[0, 1\)"),
        ("image_tokenizer.perceptual", "match", "there is no adversary"),
        ("image_tokenizer.perceptual", "lpips", "needs a weight file"),
        ("image_tokenizer", {"perceptual_file": "x.npz"}, "perceptual: .* has no weights, so it cannot use x.npz"),
        ("image_tokenizer.adversary.width", 0, "at least 1"),
        ("image_tokenizer.adversary", {"adversary.kind": "patch", "adversary.layers": 6}, "at least 192 pixels a side"),
        ("image_tokenizer.steps", -1, "at least 0, found -1"),
        ("image_tokenizer.batch_size", 0, "at least 1"),
        ("image_tokenizer.accumulation", 3, "a divisor of batch_size, 16; found 3"),
        ("image_tokenizer.learning_rate", 0, "more than 0"),
        ("image_tokenizer.final_fraction", 2, r"in \[0, 1\]"),
        ("image_tokenizer.b1", 1, r"in \[0, 1\)"),
        ("image_tokenizer.crop", 24, "24 x 24 pixels does not divide"),
        (
            "image_tokenizer.short_side",
            {"crop": 32, "short_side": 16},
            "at least 32, which is config.image_tokenizer.crop; found 16",
        ),
        ("model", {"n_heads": 5}, "n_kv_heads: expected a divisor of n_heads = 5; found 4"),
        ("model.head_dim", 3, "an even number"),
        ("model.dropout", 1, r"in \[0, 1\)"),
        ("model.rope_theta", 0, "more than 0"),
        ("loss.roles", {"roles.text": -1}, r"0 or more, found \{'text': -1.0\}"),
        (
            "loss.tasks",
            {f"tasks.{task}": 0 for task in ("text", "text_to_image", "image_to_text", "interleaved")},
            "all",
        ),
        ("loss.prompt", -0.1, "at least 0"),
        ("loss.chunk", 0, "at least 1"),
        ("training.steps", -5, "at least 1, found -5"),
        ("training.warmup_steps", 5000, "do not fit into 2900 steps"),
        ("training.warmup_steps", -1, "at least 0"),
        ("training.decay_fraction", 1.5, r"in \[0, 1\]"),
        ("training.restarts", "(0.9,0.5)", "ascending fractions"),
        ("training.batch_size", 0, "at least 1"),
        ("training.accumulation", 3, "a divisor of batch_size, 8; found 3"),
        ("training.sequence_length", 100, "at least config.data.max_tokens, 256, .*found 100"),
        ("training.learning_rate", -1, "at least 0"),
        ("training.weight_decay", -1, "at least 0"),
        ("training.clip_norm", "nan", "at least 0, found nan"),
        ("training.flip_pairs", 2, r"in \[0, 1\], found 2"),
        ("training.log_every", -1, "at least 0"),
        ("training.keep_every", 7, "a multiple of checkpoint_every"),
        ("sampling.batch_size", 0, "at least 1"),
        ("sampling.max_length", 1, "at least 2"),
        ("sampling.guidance", "inf", "a finite number"),
        ("sampling.context", "negative_prompt", "held-out documents have none"),
        ("sampling.negative_prompt", "blurry", "a text if the context is .negative_prompt., and no text otherwise"),
        ("sampling.image_guidance", "inf", "a finite number"),
        ("sampling.repetition_penalty", 0, "a number > 0"),
        ("training.eps", 0, "more than 0"),
        ("training.only", "('layer',)", "'layer' matches no parameter of this model .*did you mean 'layers'"),
        ("sampling.text.temperature", -1, "a finite number >= 0"),
        ("sampling.image.top_k", -1, "a whole number >= 0"),
        ("sampling.image.top_p", 0, "0 < top_p <= 1"),
        ("evaluation.limit", 0, "at least 1"),
        ("evaluation.lpips_file", "x.npz", "no weight file x.npz"),
        ("evaluation.inception_file", str(ROOT / "README.md"), "expected a .safetensors or .npz file"),
    ],
)
def test_a_value_out_of_range_is_told_by_its_key(key, value, words):
    section = key.partition(".")[0]
    changes = {f"{section}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    says(rf"config\.{key}\b.*{words}", changes)


def test_what_does_not_go_together_is_told():
    says(r"config.data.layout: expected 'rows' or .* with resize 'aspect'", {"data.resize": "aspect"})
    plain = {"image_tokenizer.activation": "tanh"}  # the demo's value is for its quantizer
    rows = plain | {"data.layout": "rows", "image_tokenizer.quantizer": "rq", "image_tokenizer.codes": 64}
    check(load(**rows))  # because the codes of a position are side by side
    check(load(**{"data.layout": "rows", "data.resize": "aspect"}))
    # Without a decay, because branches of this training decay.
    check(load(**{"training.schedule": "wsd", "training.decay_fraction": 0}))
    kept = {"sampling.checkpoint": "best", "training.keep_best": False}
    says("config.sampling.checkpoint: expected 'last' if config.training.keep_best is False", kept)
    check(load(**kept), ["samples"])  # an earlier training may have kept the best step
    averaged = plain | {"image_tokenizer.quantizer": "vq", "image_tokenizer.codebook_update": "ema"}
    check(load(**averaged))
    assert autoencoder(load(**averaged)).codebook_update == "ema"


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as caught:
        check(load(training__optimizer="adam", evaluation__protocol="exactly", sampling__context="none"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems:" and len(lines) == 4 and all("expected one of" in line for line in lines[1:])


def test_stages_that_do_not_run_are_not_asked_how_they_go_together():
    check(load(training__sequence_length=10), ["text_tokenizer", "image_tokenizer"])
    check(load(sampling__context="negative_prompt"), ["requests"])
    check(load(sampling__context="negative_prompt", sampling__negative_prompt="blurry"))
    check(load(text_tokenizer__model="gone.model"), ["model"])
    says("optimizer", {"training.optimizer": "adam"}, ["text_tokenizer"])  # checked for every stage


def phases(*changes: dict[str, Any]) -> ConfigDict:
    config = configs.defaults()
    config.training.accumulation = 2
    config.training.phases = tuple(map(ConfigDict, changes))
    return config


@pytest.mark.parametrize(
    "changes, words",
    [
        ([dict(begin=1.0)], r"phases\[0\]: expected a `begin` between 0 and 1"),
        ([dict(begin=0.5, flips=1.0)], r"phases\[0\].*did you mean 'flip_pairs'"),
        ([dict(begin=0.5, flip_pairs=2.0)], r"phases\[0\]: flip_pairs: expected a probability, found 2.0"),
        ([dict(begin=0.5), dict(begin=0.2)], "phases: expected .* to begin after the one before it"),
        ([dict(begin=0.5, sequence_lenght=64)], r"phases\[0\].*did you mean 'sequence_length'"),
        ([dict(begin=0.5, sequence_length=0)], r"phases\[0\]: sequence_length: expected a whole number, at least 1"),
        ([dict(begin=0.5, batch_size="8")], r"phases\[0\]: batch_size: expected a whole number.*found '8'"),
        ([dict(begin=0.5, batch_size=9)], r"phases\[0\].batch_size: expected a multiple of accumulation, 2; found 9"),
    ],
)
def test_phases_are_checked(changes, words):
    with pytest.raises(UserError, match=words):
        check(phases(*changes))


def test_the_longest_rows_of_all_phases_hold_a_document():
    config = phases(dict(begin=0.25, sequence_length=256, batch_size=4))
    config.training.sequence_length, config.training.batch_size, config.data.max_tokens = 64, 16, 256
    check(config)
    assert shapes(config.training) == {"training": (16, 64), "training.phases[0]": (4, 256)}
    assert longest(config.training) == (4, 256)
    config.data.max_tokens = 257
    with pytest.raises(UserError, match="training.sequence_length: expected at least .* 257, .* found 256"):
        check(config)
    config.data.max_tokens, config.training.objective = 256, "reward"
    with pytest.raises(UserError, match=r"phases\[0\]: expected no sequence_length or batch_size with .*'reward'"):
        check(config)


def test_each_shape_of_batches_must_go_onto_the_mesh(tmp_path):
    made = experiment(tmp_path, training__batch_size=16)
    made.config.training.phases = (ConfigDict(dict(begin=0.5, batch_size=12)),)
    with pytest.raises(UserError, match=r"training.phases\[0\].batch_size: .*size 12, not a multiple of .* = 8"):
        check_devices(made)


# ---- keys and files ---------------------------------------------------------------------------------------------


def keys(config: ConfigDict) -> list[str]:
    return [key for name, value in config.items() for key in (name, *(keys(value) if hasattr(value, "items") else ()))]


def test_no_key_is_hidden_by_a_method_of_the_config():
    assert not [key for key in keys(configs.defaults()) if hasattr(ConfigDict, key)]


@pytest.mark.parametrize(
    "change, words",
    [
        ("training.stepz=7", r"config.training.stepz: there is no such key; did you mean 'training.steps'\?"),
        ("steps=7", r"config.steps: there is no such key; did you mean '\w+.steps'\?"),
        ("training.steps.more=7", "config.training.steps.more: there is no such key"),
        ("data.train[0].wieght=7", r"config.data.train\[0\].wieght: there is no such key; did you mean .*weight'\?"),
        ("training.steps=many", "config.training.steps: expected a whole number, found 'many'"),
        ("training.learning_rate=fast", "config.training.learning_rate: expected a number, found 'fast'"),
        ("image_tokenizer.mirror=perhaps", "config.image_tokenizer.mirror: expected True or False, found 'perhaps'"),
        (
            "data.image_size=(6.5,64)",
            r"config.data.image_size: expected a tuple in which each item is a whole number; found \[6.5, 64\]",
        ),
        ("training=3", "config.training: expected a dict, found '3'"),
        ("data.train=(1,)", r"config.data.train: expected a tuple in which each item is a dict; found \[1\]"),
    ],
)
def test_an_override_that_is_no_key_or_of_another_type(change, words):
    with pytest.raises(UserError, match=words):
        configs.load(SHAPES, [f"--config.{change}"])


BEGIN = "from ar_unified.experiment.config import defaults\nfrom ml_collections import ConfigDict\n"


@pytest.mark.parametrize(
    "text, arg, words",
    [
        ("def get_config(:\n", "", "own.py, line 1: invalid syntax"),
        ("import nothing_of_this_name\n", "", "own.py, line 1: ModuleNotFoundError: No module"),
        ("x = 1\n", "", "own.py: expected a function get_config"),
        ("def get_config():\n    return 1 / 0\n", "", "own.py, line 2: ZeroDivisionError"),
        ("def get_config():\n    raise ValueError('a folder is needed')\n", "", "own.py: a folder is needed"),
        ("def get_config():\n    return open('nothing.txt')\n", "", "own.py: nothing.txt: No such file"),
        ("def get_config():\n    return {}\n", "", "own.py: expected get_config to return a ConfigDict, found dict"),
        (
            BEGIN + "def get_config():\n    return defaults()\n",
            ":x=1",
            "own.py: its get_config takes no `:arg`, found 'x=1'",
        ),
        (
            BEGIN + "def get_config(arg):\n    return defaults()\n",
            "",
            "own.py: its get_config needs an `:arg`, as in .*own.py:arg",
        ),
        (BEGIN + "def get_config():\n    c = defaults(); c.trainig = 1; return c\n", "", "did you mean 'training'"),
        (BEGIN + "def get_config():\n    return ConfigDict(dict(name='x'))\n", "", "config: .*seed.* missing"),
        (BEGIN + "def get_config():\n    c = defaults(); c.training.steps = 'x'; return c\n", "", "line 4: TypeError"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(tmp_path, text, arg, words):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        configs.load(f"{tmp_path / 'own.py'}{arg}", ["--config.training.batch_size=4"])
    assert "\n" not in str(caught.value)


def test_a_config_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match="shape.py: no such file; did you mean '.*shapes.py'"):
        configs.load(str(ROOT / "experiments" / "shape.py"))


@pytest.mark.parametrize("arg", ["pth=x", "path", "path=a,b", "side=big", "side=0"])
def test_an_argument_that_an_experiment_cannot_use(arg):
    with pytest.raises(UserError, match="folder.py: .*(expected path, side|side: expected a whole number)"):
        configs.load(f"{ROOT}/experiments/folder.py:{arg if arg.startswith(('p', 'x')) else f'path=a,{arg}'}")


def test_every_experiment_passes(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    own = {"folder": f":path={tmp_path}", "text_tokenizer": f":path={tmp_path}"}
    own |= dict.fromkeys(["dpo", "grpo", "instruct", "lora"], f":from={bundles.write(tmp_path / 'bundle').folder}")
    files = [*ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/image_tokenizers/*.py")]
    assert len(files) > 10
    for file in files:
        config = configs.load(f"{file}{own.get(file.stem, '')}")
        alone = file.parent.name == "image_tokenizers" or file.stem in ("photos", "text_tokenizer")
        check(config, STAGES[:2] if alone else STAGES)


# ---- the home folder --------------------------------------------------------------------------------------------


def test_the_home_folder_wherever_a_path_comes_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home("~/a") == str(tmp_path / "a") and home("a/~b") == "a/~b" and home("gs://a/b") == "gs://a/b"
    with pytest.raises(ValueError, match="~nobody-of-this-name is not a user's home folder"):
        home("~nobody-of-this-name/x")
    (tmp_path / "own.py").write_text(Path(ROOT / "experiments" / "folder.py").read_text())
    config = configs.load(
        "~/own.py:path=~/pics", ["--config.text_tokenizer.model=~/t.model", "--config.checkpoint_folder=~/c"]
    )
    assert config.data.train[0].path == str(tmp_path / "pics")
    assert config.text_tokenizer.model == str(tmp_path / "t.model") and config.checkpoint_folder == str(tmp_path / "c")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    assert len(open_source(dict(kind="text", path="~/texts"))) == 1


# ---- devices and sources ----------------------------------------------------------------------------------------


def experiment(tmp_path: Path, **changes: Any) -> Experiment:
    return Experiment(load(**changes), Workdir(tmp_path / "work"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(mesh__fsdp=3), "config.mesh: .*there are 8 devices"),
        (
            dict(mesh__context=2, training__sequence_length=258, data__max_tokens=256),
            "config.training.sequence_length: .*multiple of 4",
        ),
        (dict(mesh__tensor=8), "config.mesh: .*'heads' has size 4, not a multiple of mesh tensor = 8"),
        (dict(training__batch_size=12), "config.training.batch_size: .*size 12, not a multiple of .* = 8"),
        (dict(training__batch_size=8, training__accumulation=2), "config.training.batch_size: .*size 4"),
        (dict(image_tokenizer__batch_size=12), "config.image_tokenizer.batch_size: .*size 12"),
        (dict(sampling__batch_size=12), "config.sampling.batch_size: .*8 data devices, found 12"),
        (dict(model__attention="hopper"), "config.model.attention: expected 'auto' or 'xla' on this cpu"),
    ],
)
def test_what_the_devices_cannot_share_is_told(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        check_devices(experiment(tmp_path, **changes))


def test_devices_are_asked_for_what_runs_on_them(tmp_path):
    check_devices(experiment(tmp_path))
    check_devices(experiment(tmp_path, mesh__fsdp=3, training__batch_size=12), ["samples"])


def with_sources(tmp_path: Path, *specs: dict[str, Any], **changes: Any) -> Experiment:
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "texts.txt").write_text("a text\n")
    made = experiment(tmp_path, **changes)
    made.config.data.validation = ()
    made.config.data.tests = ConfigDict()
    made.config.data.train = tuple(
        ConfigDict(dict(kind="text") | spec | dict(path=str(tmp_path / spec["path"]))) for spec in specs
    )
    return made


@pytest.mark.parametrize(
    "specs, words",
    [
        ([], "config.data.train: expected a source, found none"),
        ([dict(path="none")], r"config.data.train\[0\]: .*none"),
        ([dict(path="a"), dict(path="a", kind="floppy")], r"config.data.train\[1\]: .*expected a kind, one of"),
        ([dict(path="a", lines=3)], r"config.data.train\[0\]: .*lines"),
        (
            [dict(path="a"), dict(path="a", by="line")],
            r"data.train\[1\]: its name 'a' means the same folder as the name of config.data.train\[0\]",
        ),
        ([dict(path="a", weight=0.0), dict(path="b", weight=0.0)], "config.data.train: .*not all 0"),
    ],
)
def test_sources_are_opened_before_the_first_stage(tmp_path, specs, words):
    with pytest.raises(UserError, match=words):
        check_sources(with_sources(tmp_path, *specs))


@pytest.mark.parametrize(
    "specs, words",
    [
        ([dict(weight=-1.0)], r"config.data.train\[0\].weight: expected a number, 0 or more; found -1.0"),
        ([dict(), dict(weight="much")], r"config.data.train\[1\].weight: expected a number"),
        ([dict(image_weight=1.0), dict(kind="text"), dict()], r"train\[2\].image_weight: .* none \(0 trains"),
    ],
)
def test_shares_of_sources_are_checked_by_every_verb(specs, words):
    made = load()
    made.data.train = tuple(ConfigDict(dict(kind="images", path="a") | spec) for spec in specs)
    with pytest.raises(UserError, match=words):
        check(made, [])
    made.data.train = tuple(ConfigDict(dict(kind="images", path="a", weight=0.5, image_weight=0)) for _ in specs)
    check(made, [])


def test_the_sources_of_a_phase_are_those_of_the_training(tmp_path):
    made = with_sources(tmp_path, dict(path="a"), dict(path="b"))
    check_sources(made)
    made.config.training.phases = (ConfigDict(dict(begin=0.5, weights=dict(aa=1.0))),)
    with pytest.raises(UserError, match=r"training.phases\[0\].weights: expected sources a, b; found 'aa'"):
        check_sources(made)


def test_a_image_has_room_in_a_document_and_in_a_sample(tmp_path):
    made = with_sources(tmp_path, dict(path="a"), data__max_tokens=17, sampling__max_length=18)
    check_sources(made)  # no source has images yet
    vars(made)["train"] = [SimpleNamespace(name="images", fingerprint={})]
    with pytest.raises(
        UserError, match="2 problems:\n.*data.max_tokens: .*at least 20.*\n.*sampling.max_length: .*at least 21"
    ):
        check_sources(made)


def test_nothing_is_computed_before_the_processes_of_a_job_have_met():
    """The platform does not exist, so any computation would end with an error."""
    changes = ['--config.training.only=["head"]', "--config.model.tie_embeddings=False"]
    program = (
        "from ar_unified.experiment import config as configs\n"
        "from ar_unified.experiment.check import check\n"
        f"check(configs.load({SHAPES!r}, {changes!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "not_here"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_package_of_a_filter_must_be_there_before_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cykooz_resizer" else known(name))
    for stage in ("image_tokenizer", "data"):
        says(r"config\.data\.resample: 'bilinear_simd' needs the package", {"data__resample": "bilinear_simd"}, [stage])
    check(load(data__resample="bilinear_simd"), ["samples"])  # this stage reads no images
    check(load(data__resample="bilinear"), STAGES)
