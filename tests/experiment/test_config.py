"""Experiment files and their overrides."""

from pathlib import Path

import jax
import pytest
from ar_tokenizers.image.adversary import AdversaryConfig
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig
from ar_tokenizers.image.objective import Objective, ObjectiveConfig
from ar_tokenizers.image.perceptual import Perceptual
from ml_collections import ConfigDict

from ar_unified.data.phases import Phase
from ar_unified.data.sizes import default_resize
from ar_unified.data.sources import open_source
from ar_unified.errors import UserError
from ar_unified.evaluation.report import NAMES
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.settings import phases
from ar_unified.model.config import config_from

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["shapes", "easy_vqa", "emoji", "folder:path=somewhere"])
def test_every_experiment_describes_a_model(name):
    file, _, arg = name.partition(":")
    config = configs.load(f"{ROOT}/experiments/{file}.py" + (f":{arg}" if arg else ""))
    assert config_from(configs.plain(config.model), vocab_size=1024).n_layers > 0
    assert config.training.sequence_length >= config.data.max_tokens
    assert set(config.evaluation.thresholds) <= NAMES.keys()  # a bar with another name would never be shown


def test_an_override_changes_one_key_and_a_wrong_one_is_refused():
    file = f"{ROOT}/experiments/shapes.py"
    assert configs.load(file, ["--config.training.steps=7"]).training.steps == 7
    with pytest.raises(UserError, match="stepz"):
        configs.load(file, ["--config.training.stepz=7"])
    with pytest.raises(UserError, match="many"):
        configs.load(file, ["--config.training.steps=many"])


def test_of_a_key_that_is_given_twice_the_last_value_counts():
    shapes = str(ROOT / "experiments" / "shapes.py")
    twice = [f"--config.data.image_size={size}" for size in ("(32,32)", "(64,48)")]
    assert configs.load(shapes, twice).data.image_size == (64, 48)
    assert configs.load(shapes, ["--config.training.steps=5", *twice, "--config.training.steps=7"]).training.steps == 7


@pytest.mark.parametrize("preset", PRESETS)
def test_an_image_tokenizer_takes_a_preset(preset):
    config = configs.defaults()
    config.image_tokenizer.update(PRESETS[preset])
    expected = {**configs.plain(configs.defaults().image_tokenizer), **PRESETS[preset]}
    assert configs.pick(AutoencoderConfig, config.image_tokenizer) == configs.pick(AutoencoderConfig, expected)


@pytest.mark.parametrize("name", ["vqgan", "llamagen", "maskgit", "ibq", "emu3"])
def test_every_recipe_describes_an_image_tokenizer_and_its_losses(name):
    settings = configs.load(str(ROOT / f"experiments/image_tokenizers/{name}.py")).image_tokenizer
    adversary = configs.pick(AdversaryConfig, settings.adversary)
    config = configs.pick(ObjectiveConfig, settings, adversary=adversary)
    objective = Objective(configs.pick(AutoencoderConfig, settings), config, Perceptual.load(config.perceptual))
    params = jax.eval_shape(objective.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params["autoencoder"])) > 50e6 and params["discriminator"]


def test_config_arguments_are_named():
    assert configs.parse_arg("path=a=b", path=None, side="96") == {"path": "a=b", "side": "96"}
    with pytest.raises(ValueError, match="expected path; found pth"):
        configs.parse_arg("pth=x", path=None)


def test_an_unknown_source_kind_says_what_there_is():
    with pytest.raises(ValueError, match="folder"):
        open_source({"kind": "floppy"})


def test_phases_change_what_they_name_and_keep_the_rest() -> None:
    settings = configs.defaults().training
    settings.update(steps=1000, flip_pairs=1.0, condition_dropout=0.05)
    settings.phases = (ConfigDict(dict(begin=0.25, weights=dict(a=1.0))), ConfigDict(dict(begin=0.9, flip_pairs=0.0)))
    assert phases(settings, dict(a=0.5, b=0.5)) == [
        Phase(0, dict(a=0.5, b=0.5), 1.0, 0.05),
        Phase(250, dict(a=1.0), 1.0, 0.05),
        Phase(900, dict(a=1.0), 0.0, 0.05),
    ]
    for wrong in (dict(begin=1.0), dict(begin=0), dict(flip_pairs=0.5), dict(begin=0.5, flips=0.5)):
        settings.phases = (ConfigDict(wrong),)
        with pytest.raises(UserError, match=r"config.training.phases\[0\]: expected a `begin` between 0 and 1"):
            phases(settings, dict(a=1.0))


def test_the_filter_and_the_decoding_of_a_config_reach_the_images():
    config = configs.defaults()
    assert settings.resize(config).way == {}
    config.data.resample, config.data.decoding = "bilinear", "reduced"
    assert settings.resize(config).way == {"resample": "bilinear", "decoding": "reduced"}


@pytest.mark.parametrize("layout, resize", [("grid", "crop"), ("rows", "aspect"), ("rows", "crop")])
def test_the_layout_and_the_resize_of_an_experiment_imply_each_other(layout, resize):
    config = configs.defaults()
    config.data.image_size, config.data.layout, config.data.resize = (64, 96), layout, resize
    image = settings.autoencoder(config)
    vocabulary, written = settings.language(config, image, 300)
    ours, implied = settings.resize(config), default_resize(written, image)
    assert (implied.height, implied.width, implied.factor) == (64, 96, 16)
    assert implied.kind == ("aspect" if layout == "rows" else "crop")
    if layout == "rows":
        assert implied.largest == ours.largest == (written.height * 16, written.width * 16) == (128, 192)
        assert vocabulary.size_tokens == 12
