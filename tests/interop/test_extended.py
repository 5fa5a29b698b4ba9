"""A published language model that has learned images here is exported to its published form, and transformers reads
it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ar_tokenizers.image import autoencoder
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer
from PIL import Image

import ar_unified
from ar_unified.bundle import Bundle
from ar_unified.cli.main import main
from ar_unified.language.vocabulary import Role

pytestmark = [pytest.mark.interop, pytest.mark.slow]
torch = pytest.importorskip("torch", reason="the reference implementations need torch (make test-interop)")
transformers = pytest.importorskip("transformers", reason="the reference implementations are transformers'")

from tests.interop import published as make  # noqa: E402
from tests.interop import reference  # noqa: E402
from tests.interop.test_published import ids_for  # noqa: E402
from tests.sources import ROOT  # noqa: E402

LOGITS = 5e-5
SMALL = {
    "data.image_size": "(32,32)",
    "data.max_tokens": 160,
    "training.steps": 3,
    "training.warmup_steps": 0,
    "training.batch_size": 8,
    "training.sequence_length": 160,
    "training.validate_every": 0,
    "training.preview_every": 0,
    "sampling.max_length": 192,
}


def run(*argv: object) -> None:
    assert main([str(argument) for argument in argv]) == 0


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Captioned images, and an image tokenizer that was never trained."""
    root = tmp_path_factory.mktemp("beside")
    config = AutoencoderConfig(width=8, blocks=(0, 0, 1))
    weights = jax.jit(autoencoder.init, static_argnums=0)(config, jax.random.key(0))
    ImageTokenizer(config, jax.device_get(weights)).save(root / "images")
    (root / "data").mkdir()
    rows = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / "data" / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "text": f"the picture {i}"}))
    (root / "data" / "captions.jsonl").write_text("\n".join(rows))
    return root / "data", root / "images"


@pytest.mark.parametrize("kind, system", [("llama", "llama"), ("qwen2", "qwen"), ("gemma", "gemma")])
def test_its_table_grows_at_the_end_and_text_is_as_it_was(published, beside, tmp_path, kind, system):
    theirs, (data, images) = published(make.causal, kind), beside
    run("import", "--from", theirs, "--as", system, "--output", tmp_path / "llm")
    tied = kind == "gemma"
    only = "('embedding[new]',)" if tied else "('embedding[new]','head[new]')"
    argv = [
        "--config",
        f"{ROOT}/experiments/folder.py:path={data},init={tmp_path / 'llm'}",
        "--workdir",
        tmp_path / "w",
    ]
    settings = SMALL | {
        "image_tokenizer.model": images,
        "training.only": only,
        "training.code_embedding_init": "codebook",
    }
    argv += [f"--config.{key}={value}" for key, value in settings.items()]
    for verb in ("tokenizer", "prepare", "train"):
        run(verb, *argv)
    run("export", "--workdir", tmp_path / "w", "--output", tmp_path / "bundle")
    run("export", "--from", tmp_path / "bundle", "--output", tmp_path / "hf")
    before, after = reference.load(theirs), reference.load(tmp_path / "hf")
    size, found = before.model.config.vocab_size, Bundle(tmp_path / "bundle")
    vocabulary, border = found.grammar.vocabulary, found.border
    new = len(vocabulary.ids(Role.IMAGE)) + len(vocabulary.ids(Role.SIZE)) + len(vocabulary.controls) - 3
    assert after.model.config.vocab_size == border.size == size + new
    ids = ids_for(size)
    np.testing.assert_allclose(after.logits(ids)[..., :size], before.logits(ids), atol=LOGITS)

    names = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    old = transformers.AutoTokenizer.from_pretrained(theirs)
    assert names.encode("The cat sat.") == old.encode("The cat sat.")
    for name, id in (("<boi>", vocabulary.control("boi")), ("<image_0>", vocabulary.image_offset)):
        assert names.convert_tokens_to_ids(name) == border.theirs[id]
    assert (tmp_path / "hf" / "image_tokenizer" / "config.json").exists()


@pytest.mark.parametrize("kind, system", [("llama", "llama"), ("gemma", "gemma")])
def test_an_adapter_beside_it_has_its_new_rows_with_it_and_peft_reads_both(published, beside, tmp_path, kind, system):
    peft_library = pytest.importorskip("peft", reason="the other side of this test is PEFT (make test-interop)")
    theirs, (data, images) = published(make.causal, kind), beside
    run("import", "--from", theirs, "--as", system, "--output", tmp_path / "llm")
    config = f"{ROOT}/experiments/folder.py:path={data},init={tmp_path / 'llm'}"
    argv = ["--config", config, "--workdir", tmp_path / "w"]
    settings = SMALL | {"image_tokenizer.model": images, "lora.rank": 2, "training.learning_rate": 0.02}
    argv += [f"--config.{key}={value}" for key, value in settings.items()]
    for verb in ("tokenizer", "prepare", "train"):
        run(verb, *argv)
    run("export", "--workdir", tmp_path / "w", "--output", tmp_path / "merged")
    run("export", "--workdir", tmp_path / "w", "--output", tmp_path / "base", "--to", "base")
    run("export", "--workdir", tmp_path / "w", "--output", tmp_path / "adapter", "--to", "peft")
    run("export", "--from", tmp_path / "base", "--output", tmp_path / "hf")
    oracle = reference.load(tmp_path / "hf")
    size = oracle.model.config.vocab_size
    old = reference.load(theirs).model
    old.resize_token_embeddings(size)  # adds rows as a user who has only the language model does
    merged = ar_unified.load(tmp_path / "merged", dtype="float32")
    served = ar_unified.load(tmp_path / "base", dtype="float32", adapters={"mine": tmp_path / "adapter"})
    ids = np.stack([ids_for(size, 1, 6)[0], np.arange(size - 6, size)])
    columns = np.asarray(merged.ids.ours(np.arange(size)))
    logits = merged.logits(merged.ids.ours(ids))[..., columns]
    beside_it = served.logits(served.ids.ours(ids), adapter="mine")[..., columns]
    assert np.abs(beside_it - logits).max() < LOGITS * max(np.abs(logits).max(), 1.0)
    for model in (oracle.model, old):
        loaded = peft_library.PeftModel.from_pretrained(model, tmp_path / "adapter")
        found = reference.Reference(loaded.base_model.model.eval()).logits(ids)[..., :size]
        assert np.abs(found - logits).max() < LOGITS * max(np.abs(logits).max(), 1.0)
