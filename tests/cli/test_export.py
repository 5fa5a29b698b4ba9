"""A trained workdir is exported as a bundle without its config file and sources, and a training starts from a
bundle."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ar_tokenizers.image.autoencoder import init as init_image

import ar_unified
from ar_unified.bundle import Bundle, named
from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment import objective, settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.language.document import CodesPart, Document, TextPart
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from, parameter_count
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Request
from ar_unified.workdir import Workdir, read_json, write_json
from tests import bundles, wheel_alone
from tests.bundles import SENTENCES, parts
from tests.cli.conftest import ROOT, command, refused
from tests.cli.workdirs import config_of, trained


def export(workdir: Workdir, output: Path, *more: str) -> list[str]:
    return ["export", "--workdir", str(workdir.path), "--output", str(output), *more]


def test_a_workdir_becomes_a_bundle_that_draws_the_same(tmp_path, capsys):
    workdir = trained(tmp_path / "w")
    assert main(export(workdir, tmp_path / "b", "--license", "apache-2.0")) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'b'}: step 2, 0.0" in said and "its card has no numbers" in said and "licence" not in said
    found = Bundle(tmp_path / "b")
    for name, leaf in named(found.params()).items():
        np.testing.assert_array_equal(leaf, 2 * named(parts()["params"])[name], err_msg=name)
    assert found.sections["data"] == {"image_size": [16, 16], "resize": "crop", "layout": "grid", "max_tokens": 48}
    assert found.sections["loss"] == {"softmax": "by_side"}
    opened = Experiment(configs.recorded(workdir.config), workdir)
    model = ar_unified.load(found.folder, opened.decoding_mesh, batch_size=8)
    request = Request(
        "a",
        (TextPart(SENTENCES[0]),),
        mode="image",
        seed=7,
        n=2,
        guidance=1.5,
        text=opened.filter("text"),
        image=opened.filter("image"),
    )
    asked = model.request(SENTENCES[0], mode="image", seed=7, n=2)
    assert dataclasses.replace(request, id="") == asked, "a request that says nothing is drawn as the experiment says"
    engine = opened.engine
    ours, theirs = ({s.index: s.tokens.tolist() for s in each.generate([request])} for each in (model, engine))
    assert ours == theirs and len(ours) == 2
    document = Document.of((TextPart(SENTENCES[0]), CodesPart(np.zeros((2, 2), np.int32))), prompt=1)
    likely, by_side = (each.score([document])[0].log_likelihood for each in (model, engine))
    (joint,) = Engine(engine.config, engine.params, engine.grammar, batch_size=8, max_length=64).score([document])
    assert likely == by_side > joint.log_likelihood + 0.01, "each side has a softmax of its own here and there"
    refused(export(workdir, tmp_path / "b"), "b: something is there already.*name another folder")


def test_the_card_has_the_numbers_of_these_weights(tmp_path, capsys):
    workdir = trained(tmp_path / "w")
    assert main(export(workdir, tmp_path / "one")) == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert "license: unknown\n" in card and "write its licence here" in card
    assert "the licence is unknown; --license" in capsys.readouterr().out
    assert f"| parameters | {parameter_count(parts()['config']):,} (1 layers of 32) |" in card
    assert "24 image codes" in card and "300 text pieces" in card
    assert (
        "| checkpoint | step 2 of 2 |" in card
        and "| time | 1.50 hours" in card
        and "| validation loss | 3.0000 |" in card
    )
    assert "Nothing was measured" in card and "/gone" not in card, "no path of who trained it"

    scores = {"parse_rate": 1.0, "text_to_image_exact": 0.87654, "counts": {"text_to_image_exact": 400}, "note": "no"}
    scores |= {"validation": {"loss": 3.25, "fill": 0.5}, "unseen": {"parse_rate": 0.75, "counts": {}}}
    scores |= {"tokenizer": {"validation": {"psnr": 24.5, "shown": [1]}}}
    write_json(workdir.evaluation, scores)
    of = Experiment(config_of("grid"), workdir).trained()
    for step, there in ((1, False), (2, True)):
        write_json(workdir.path / "evaluation" / "done.json", {"fingerprint": {"model": of, "checkpoint_step": step}})
        assert main(export(workdir, tmp_path / f"step{step}", "--license", 'mine: "all | of it"')) == 0
        card = (tmp_path / f"step{step}" / "README.md").read_text()
        assert ("| Text to image | 0.8765 | 400 |" in card) == there
    for row in ("validation loss | 3.25", "unseen: Sequences that parse | 0.75", "tokenizer validation psnr | 24.5"):
        assert f"| {row} |" in card
    assert 'license: "mine: \\"all | of it\\""\n' in card and '| license | mine: "all \\| of it" |' in card


@pytest.mark.parametrize("kind", ["grid", "none", "mute"])
def test_the_card_names_the_model_and_its_example_runs(tmp_path, monkeypatch, kind):
    """`mute`: as if the image tokenizer had no decoder."""
    workdir = trained(tmp_path / "w", "none" if kind == "none" else "grid")
    if kind == "mute":
        monkeypatch.setattr("ar_unified.cli.export.draws_none", lambda tokenizer: "it has no decoder")
    monkeypatch.chdir(tmp_path)
    assert main(export(workdir, Path("my model"))) == 0
    card = Path("my model/README.md").read_text()
    assert "\n# my model\n\nAn autoregressive transformer of 0.0" in card and "experiment `tiny`" in card
    names = bundles.run_card(card)
    assert isinstance(names["answer"], str)
    assert [image.size for image in names.get("images", ())] == [(16, 16)] * (4 if kind == "grid" else 0)


def test_the_best_checkpoint_is_exported_when_asked(tmp_path):
    workdir = trained(tmp_path / "w")
    assert main(export(workdir, tmp_path / "b", "--config.sampling.checkpoint=best", "--shard-mib=1")) == 0
    found = Bundle(tmp_path / "b").params()
    np.testing.assert_array_equal(found["embedding"], parts()["params"]["embedding"])
    assert "step 1 of 2" in (tmp_path / "b" / "README.md").read_text()


def test_text_alone_needs_no_sources_either(tmp_path):
    workdir = trained(tmp_path / "w", "none")
    assert main(export(workdir, tmp_path / "b")) == 0
    assert not (tmp_path / "b" / "image_tokenizer").exists()
    assert ar_unified.load(tmp_path / "b").vocabulary.codebook_size == 0
    card = (tmp_path / "b" / "README.md").read_text()
    assert "no images" in card and "draw" not in card and "pixels" not in card


def test_what_cannot_be_exported_is_said(tmp_path):
    workdir, output = trained(tmp_path / "w"), tmp_path / "b"
    for changes, words in (
        (
            ["--config.model.rope_theta=100.0"],
            "config.model.rope_theta: expected 500.0, as in the training; found 100.0",
        ),
        (["--config.data.max_tokens=50"], "config.data.max_tokens: expected 48"),
        (["--config.loss.softmax=joint"], "config.loss.softmax: expected 'by_side'"),
        (["--shard-mib=0"], "--shard-mib: expected at least 1, found 0"),
        (["--config.modle.d_model=1"], "config.modle.d_model: there is no such key"),
    ):
        refused(export(workdir, output, *changes), words)
    refused(export(Workdir(tmp_path / "none"), output), "config.json: no such file; give --config")
    record = read_json(workdir.config)
    write_json(workdir.config, record | {"modle": {}})
    refused(export(workdir, output), "config.json, which another .*--config.*: config.modle: there is no such key")
    write_json(workdir.config, [])
    refused(export(workdir, output), "config.json: expected the config of an experiment")
    write_json(workdir.config, {name: value for name, value in record.items() if name != "init"})  # as in an old config
    (workdir.model / "done.json").unlink()
    refused(export(workdir, output), "done.json is not there yet; run `ar-unified train`")
    assert not output.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_recorded_config_is_the_config(tmp_path):
    config = configs.load(f"{ROOT}/experiments/shapes.py", ["--config.training.phases=({'begin': 0.5},)"])
    write_json(tmp_path / "config.json", configs.plain(config))
    found = configs.recorded(tmp_path / "config.json", ["--config.seed=7"])
    assert configs.plain(found) == configs.plain(config) | {"seed": 7}
    assert found.data.image_size == (64, 64) and found.is_locked
    with pytest.raises(UserError, match="config.seed: expected int|config.seed: expected a whole number"):
        configs.recorded(tmp_path / "config.json", ["--config.seed=a"])


def test_the_bundle_of_the_demo_is_under_6_MB():
    config = configs.load(f"{ROOT}/experiments/shapes.py")
    image = settings.autoencoder(config)
    weights = jax.tree.leaves(jax.eval_shape(functools.partial(init_image, image), jax.random.key(0)))
    vocabulary = Vocabulary(config.text_tokenizer.vocab_size, image.codebook_size)
    model = config_from(configs.plain(config.model), vocab_size=vocabulary.size)
    size = 4 * (parameter_count(model) + sum(leaf.size for leaf in weights))  # float32; the rest is a few kilobytes
    assert 5e6 < size < 6e6


# ---- a training that begins with a bundle ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.write(tmp_path_factory.mktemp("bundle") / "tiny")


def start(folder: Path, bundle: Bundle, workdir: Path, *changes: str) -> list[str]:
    config = f"{ROOT}/experiments/folder.py:path={folder},init={bundle.folder}"
    return ["train", "--config", config, "--workdir", str(workdir), *changes]


@pytest.mark.parametrize(
    "changes, words",
    [
        (["model.d_model=64"], "config.model.d_model: expected 32, as the bundle in config.init has; found 64"),
        (
            ["model.rope_theta=1e4", "image_tokenizer.width=8"],
            r"2 problems:\n.*model.rope_theta: expected 500.0.*\n.*image_tokenizer.width: expected 4, .*found 8",
        ),
        (["image_tokenizer.levels=(5,5)"], r"image_tokenizer.levels: expected \[6, 4\].*found \[5, 5\]"),
        (["data.image_size=(32,32)"], "'layout.height': config.init=.* has 2, this config has 4"),
        (["data.layout=rows"], "'size_tokens': config.init=.* has 0, this config has 4"),
        (
            [f"text_tokenizer.model={ROOT}/README.md"],
            "text_tokenizer.model: expected none, because the bundle in config.init has one",
        ),
        (["init=/nowhere"], "config.init: /nowhere: expected the folder of a bundle"),
        (["training.sequence_length=32"], "training.sequence_length: expected at least config.data.max_tokens, 48"),
    ],
)
def test_a_config_of_another_model_is_refused_before_anything_is_made(bundle, folder, tmp_path, changes, words):
    refused(start(folder, bundle, tmp_path / "w", *(f"--config.{change}" for change in changes)), words)
    assert not (tmp_path / "w").exists() or not [path for path in (tmp_path / "w").rglob("*") if path.is_file()]


def test_a_bundle_of_text_alone_takes_images_where_there_is_a_tokenizer_of_them(folder, tmp_path):
    text = bundles.write(tmp_path / "b", "none")
    run = ["run", *start(folder, text, tmp_path / "w")[1:]]
    refused(run, "image_tokenizer.steps is 0 and no model is given, but .* may have")
    raised = start(folder, text, tmp_path / "w", "--config.image_tokenizer.steps=5")
    refused(raised, "text_tokenizer is not there yet")  # tests/cli/test_from_llm.py extends a text model


def test_a_bundle_that_draws_no_images_is_not_begun_with_what_draws_them(folder, tmp_path):
    mute = bundles.write_without_decoder(tmp_path / "b")
    run = ["run", *start(folder, mute, tmp_path / "w")[1:]]
    refused(
        run,
        "config.init: this image tokenizer can read images.*vqgan.ckpt.*`ar-unified train` do not need",
    )


def test_a_config_takes_from_a_bundle_what_it_decides(bundle):
    config = configs.load(f"{ROOT}/experiments/folder.py:path=x,init={bundle.folder}")
    assert configs.plain(config.data.image_size) == [16, 16] and config.data.layout == "grid"
    assert config.model.rope_theta == 500.0 and config.image_tokenizer.levels == (6, 4)
    assert config.model.dropout == 0.1, "how much dropout to train with stays the experiment's choice"
    assert config.training.sequence_length >= config.data.max_tokens == 48 and config.sampling.max_length == 64


def test_other_weights_are_another_training(bundle, folder, tmp_path):
    """The stage stores the hash of the bundle that it starts from, so the folder may move, but its weights may not
    change."""

    def facts(of: Bundle) -> dict[str, Any]:
        config = configs.load(f"{ROOT}/experiments/folder.py:path={folder},init={of.folder}")
        experiment = Experiment(config, Workdir(tmp_path))
        experiment.__dict__["grammar"] = parts()["grammar"]
        return objective.facts(experiment, {})

    moved = bundles.write(tmp_path / "moved")
    other = bundles.write(tmp_path / "other", params=jax.tree.map(lambda x: x + 1, parts()["params"]))
    assert facts(bundle)["init"] == facts(moved)["init"] == bundle.hash != facts(other)["init"]


# ---- somewhere else -------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
import ar_unified
assert "site-packages" in ar_unified.__file__, ar_unified.__file__
model = ar_unified.load(sys.argv[1], batch_size=int(sys.argv[2]))
tokens = {}
for row in map(json.loads, open(sys.argv[3])):
    request = model.request(row["prompt"], mode="image", seed=row["seed"], n=row["n"])
    for sample in model.generate([request]):
        tokens[f"{row['id']} {sample.index}"] = sample.tokens.tolist()
print(json.dumps(tokens))
"""


@pytest.mark.slow
def test_elsewhere_it_draws_what_its_workdir_draws_token_for_token(folder, tmp_path):
    """A model is trained, sampled and exported here, then moved, and loaded by a process that has only the wheel."""
    work, few = tmp_path / "work", dict(image_tokenizer__steps=4, training__steps=6, training__validate_every=6)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tokenizers'}", "JAX_NUM_CPU_DEVICES": "1"}
    rows = [dict(id=f"r{i}", prompt=text, seed=i, n=2) for i, text in enumerate(SENTENCES[:3])]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verbs = [command(verb, folder, work, **few) for verb in ("tokenizer", "prepare", "train", "sample")]
    verbs[-1] += ["--requests", str(requests), "--output", str(tmp_path / "out")]
    verbs += [["export", "--workdir", str(work), "--output", str(tmp_path / "bundle"), "--license", "mit"]]
    here = "import json, sys\nfrom ar_unified.cli.main import main\nsys.exit(any(map(main, json.loads(sys.argv[1]))))"
    run = [sys.executable, "-c", here, json.dumps(verbs)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "else").mkdir()
    (tmp_path / "bundle").rename(tmp_path / "else" / "moved")
    work.rename(tmp_path / "hidden")

    alone = wheel_alone.environment(tmp_path)
    moved = str(tmp_path / "else" / "moved")
    said = alone.run(ELSEWHERE, moved, "8", str(requests), cwd=tmp_path / "else")
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    expected = {f"{line['id']} {line['sample']}": line["tokens"] for line in lines}
    assert json.loads(said) == expected and len(expected) == 6
