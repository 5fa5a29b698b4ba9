"""`plan` as a user calls it: with any workdir or none, and one sentence for anything that cannot be planned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from ar_tokenizers.image.autoencoder import init
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ar_tokenizers.text import TextTokenizer
from ml_collections import ConfigDict

from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from tests.cli.conftest import ROOT
from tests.planning.test_choices import small

CONFIG = """
from tests.planning.test_choices import small

def get_config(arg=None):
    return small(**{"mesh.tensor": 1, "mesh.data": -1, "training.warmup_steps": 10})
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path / "config.py"


def test_the_tokenizers_of_a_workdir_size_the_vocabulary_and_nothing_is_written(tmp_path):
    config = small(**{"image_tokenizer.codes": 4096, "image_tokenizer.quantizer": "vq"})
    absent = tmp_path / "none yet"
    assert run_of(config, absent) == run_of(config) and not absent.exists()
    assert (run_of(config).vocabulary.text_size, run_of(config).vocabulary.codebook_size) == (512, 4096)

    sentences = [f"A {colour} star in the top {side}." for colour in ("red", "blue") for side in ("left", "right")]
    (tmp_path / "text_tokenizer").mkdir()
    TextTokenizer.train(sentences, 300).save(tmp_path / "text_tokenizer" / "text.model")
    trained = run_of(config, tmp_path).vocabulary
    assert 256 < trained.text_size <= 300 and trained.codebook_size == 4096
    image = AutoencoderConfig(width=8, blocks=(0, 0, 1), levels=(8, 8))
    ImageTokenizer(image, init(image, jax.random.key(0))).save(tmp_path / "image_tokenizer")
    both = run_of(config, tmp_path)
    assert both.vocabulary.codebook_size == 64 and both.model.vocab_size == both.vocabulary.size == 384


def test_the_verb_takes_a_workdir(config, tmp_path, capsys):
    argv = ["plan", "--config", str(config), "--target", "h200:8", "--output", str(tmp_path / "out")]
    assert (
        main([*argv, "--workdir", str(tmp_path / "run"), "--config.model.remat=offload", "--config.lora.alpha=2.0"])
        == 0
    )
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["model"]["remat"] == "offload" and plan["fits"] and not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    assert "8 CPU devices stand in" in said and "note: config.lora.alpha does nothing here" in said


def test_the_largest_batches_of_all_phases_are_planned(config, capsys):
    made = small(**{"training.batch_size": 32, "training.sequence_length": 512})
    longer, fewer = dict(begin=0.5, batch_size=16, sequence_length=1024), dict(begin=0.7, sequence_length=768)
    made.training.phases = (ConfigDict(longer), ConfigDict(fewer))
    run = run_of(made)
    assert (run.batch_size, run.sequence_length) == (16, 1024), "as many tokens as at first, in longer rows"
    phase = "--config.training.phases=({'begin': 0.5, 'batch_size': 4},)"
    assert main(["plan", "--config", str(config), "--target", "h200:4", "--no-advice", phase]) == 0
    assert "batches: 8 rows of 32 tokens, 4 rows of 32 tokens; planned for 8 rows of 32" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_plan_although_the_compiler_does_not_return(number, config, tmp_path):
    """A function of OpenSSL stands in for the compiler. It too lets other threads run, and hears no signal."""
    code = (
        "import hashlib, sys; from ar_unified.cli import main, plan\n"
        "def compiles(*_, say, **__):\n"
        "    say('begun')\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
        "plan.make_plan = compiles; sys.exit(main.main(sys.argv[1:]))"
    )
    argv = ["plan", "--config", str(config), "--target", "h200:8", "--output", str(tmp_path / "out")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = list(iter(process.stdout.readline, "begun\n"))
    assert "1.5 to 9 minutes" in "".join(lines), "the plan says how long compiling takes before it compiles"
    process.send_signal(number)
    try:
        error = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number and "the same command starts from the beginning" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--target", "v9:2x2"], "target 'v9:2x2': expected one of v6e,"),
        (["--target", "v5e:2x2x2"], "expected 2 sizes of at least 1"),
        (["--target", "h200:"], "expected the number of GPUs, as in h200:8"),
        (["--target", "v5p:64"], "as in v5p:4x4x4, which has 64 chips"),
        (["--target", "v5p-128"], "counts TensorCores, of which a chip has two; write v5p:4x4x4, which has 64 chips"),
        (["--target", "h200:4096"], "JAX_NUM_CPU_DEVICES=4096"),
        (["--config.data.layout=Rows"], "data.layout: expected one of grid, rows, "),
        (["--config.sampling.kv_dtype=int4"], 'sampling.kv_dtype: expected one of "", int8,'),
        (
            ["--config.model.remat=some"],
            "model.remat: expected one of none, dots, attention, full, offload_attention, ",
        ),
        (["--config.model.attention=tpu"], "expected auto, xla, reference or hopper for h200:8"),
        (["--config.mesh.fsdp=3"], "multiply to 3"),
        (["--search=0"], "--search: expected at least 1, with --job train; found 0, with --job train"),
        (["--search", "--job=sample"], "found 4, with --job sample"),
        (["--config.training.batch_size=6"], "axis 'batch' has size 6"),
        (["--config.training.accumulation=3"], "training.accumulation: expected a divisor of batch_size, 8; found 3"),
        (["--config.training.optimizer=sgd"], "training.optimizer: expected one of adamw, muon; found 'sgd'"),
        (["--config.training.schedule=linear"], "training.schedule: expected one of cosine, wsd; found 'linear'"),
        (["--config.training.warmup_steps=5000"], "do not fit into 1000 steps"),
        (["--config.image_tokenizer.quantizer=abc"], "quantizer"),
        (["--config.data.image_size=(60,60)"], "60 x 60 pixels does not divide"),
        (["--job", "sample", "--config.sampling.batch_size=6"], "axis 'batch' has size 6"),
        (["--job", "sample", "--config.sampling.max_length=1"], "sampling.max_length: expected at least 2, found 1"),
        (["--config.text_tokenizer.model=/nowhere.model"], "text_tokenizer.model"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(words, said, config, capsys):
    argv = ["plan", "--config", str(config), "--workdir", "/nowhere", *words]
    status = main(argv if "--target" in words else [*argv, "--target", "h200:8"])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("ar-unified plan: ") and said in error, error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1
