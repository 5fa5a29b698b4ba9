"""A text model learns images. Its logits for text stay the same until they are trained too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ar_tokenizers.image import autoencoder
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ar_tokenizers.text import TextTokenizer

from ar_unified import bundle
from ar_unified.bundle import Bundle
from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from ar_unified.experiment import config as configs
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import TEXT_ALONE, ImageLayout
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.model import transformer
from ar_unified.model.config import TransformerConfig
from ar_unified.sampling.request import DEFAULTS
from tests.cli.conftest import SMALL, command, refused

ONLY = "('embedding[new]','head[new]')"


def model(size: int) -> TransformerConfig:
    fields = {key.removeprefix("model."): value for key, value in SMALL.items() if key.startswith("model.")}
    return TransformerConfig(vocab_size=size, **{"qk_norm": "rmsnorm", "tie_embeddings": True} | fields)


def write(folder: Path, text: TextTokenizer, *, codes: int = 0, layout: ImageLayout = TEXT_ALONE, **changes) -> Path:
    """A bundle of a random model."""
    vocabulary = Vocabulary(text.size, codes, layout.size_tokens, text_hash=text.hash)
    config = dataclasses.replace(model(vocabulary.size), **changes)
    sampling = configs.plain(configs.defaults().sampling)
    bundle.write(
        folder,
        config=config,
        params=jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(3)),
        grammar=Grammar(vocabulary, layout, text),
        text_tokenizer=text,
        image_tokenizer=None,
        data={"max_tokens": 160},
        sampling={name: sampling[name] for name in ("max_length", "kv_dtype", *DEFAULTS)},
        card="",
    )
    return folder


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    lines = [
        f"a {size} {colour} circle is in the top left {i}"
        for size in ("big", "small")
        for colour in "rgb"
        for i in range(9)
    ]
    return TextTokenizer.train(lines, 300)


@pytest.fixture(scope="module")
def llm(text: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llm") / "bundle", text)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image tokenizer that was never trained."""
    config = AutoencoderConfig(width=8, blocks=(0, 0, 1))
    folder = tmp_path_factory.mktemp("images") / "tokenizer"
    ImageTokenizer(config, jax.device_get(jax.jit(autoencoder.init, static_argnums=0)(config, jax.random.key(0)))).save(
        folder
    )
    return folder


def extending(verb: str, folder: Path, workdir: Path, llm: Path, images: Path, **changes: object) -> list[str]:
    argv = command(verb, folder, workdir, init=llm, image_tokenizer__model=images, **changes)
    own = tuple(f"--config.image_tokenizer.{key}" for key in ("crop", "width", "blocks", "steps", "batch_size"))
    return [each for each in argv if not each.startswith(own)]


def text_logits(found: Bundle, ids: list[int]) -> np.ndarray:
    """The logits of text ids, f32 [T, text_size]."""
    tokens = jnp.asarray([[found.grammar.vocabulary.bos, *ids]], jnp.int32)
    positions = jnp.arange(tokens.shape[1])[None]
    net = transformer.Transformer.bind(found.config, found.params(dtype="float32"))
    hidden = net(tokens, positions, jnp.zeros_like(tokens))
    return np.asarray(hidden[0] @ net.head().T)[:, : found.grammar.vocabulary.text_size]


@pytest.mark.slow
@pytest.mark.parametrize("tied, how", [(True, "codebook"), (False, "mean")])
def test_new_rows_learn_alone_and_text_is_as_it_was(folder, text, images, tmp_path, capsys, tied, how):
    llm = write(tmp_path / "llm", text, tie_embeddings=tied)
    more = dict(model__tie_embeddings=tied, training__code_embedding_init=how)
    only = ONLY if not tied else "('embedding[new]',)"
    small = dict(training__steps=6, training__only=only, **more)

    def run(verb: str, **changes: object) -> str:
        assert main(extending(verb, folder, tmp_path / "w", llm, images, **small | changes)) == 0
        return capsys.readouterr().out

    run("tokenizer")
    run("prepare")
    said = run("train")
    assert "begins with the weights of" in said and "ids are new; rows of image codes begin" in said
    assert main(["export", "--workdir", str(tmp_path / "w"), "--output", str(tmp_path / "out")]) == 0
    before, after = Bundle(llm), Bundle(tmp_path / "out")
    ids = text.encode("a big red circle is in the top left")
    assert after.text_tokenizer.encode("a big red circle is in the top left") == ids
    np.testing.assert_allclose(text_logits(after, ids), text_logits(before, ids), atol=1e-5)
    codes = after.grammar.vocabulary.ids(Role.IMAGE)
    rows = np.asarray(after.params()["embedding"])[codes.start : codes.stop]
    assert len(np.unique(rows, axis=0)) > 1, "rows that began alike have learnt"
    losses = [json.loads(line) for line in (tmp_path / "w" / "model" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["step"] == 6
    # The exported model draws, and other programs can read it.
    assert main(["export", "--from", str(tmp_path / "out"), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == after.config.vocab_size


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(model__d_model=64), "config.model.d_model: expected 32, as the bundle in config.init has; found 64"),
        (
            dict(text_tokenizer__model=__file__),
            "config.text_tokenizer.model: expected none, because the bundle in config.init has one",
        ),
        (
            dict(training__only="('layer',)"),
            "config.training.only: 'layer' matches no parameter.*did you mean 'layers'",
        ),
        (
            dict(training__objective="preference", training__sequence_length=320),
            "config.training.objective: expected likelihood, because .* has no rows for images yet",
        ),
        (
            dict(training__objective="reward", reward__function="length"),
            "config.training.objective: expected likelihood, because .* the images that it draws .* are random",
        ),
        (
            dict(training__rates="('layer=2',)"),
            "config.training.rates: 'layer' matches no parameter.*did you mean 'layers'",
        ),
    ],
)
def test_what_does_not_go_with_the_language_model_is_refused_before_anything_runs(
    folder, llm, images, tmp_path, changes, said
):
    refused(extending("run", folder, tmp_path / "w", llm, images, **changes), said)
    assert not (tmp_path / "w").exists() or not any((tmp_path / "w").glob("*/started.json"))


def test_a_tokenizer_that_is_not_the_vocabularys_is_refused_by_name(folder, text, images, tmp_path):
    """A model is refused if it has fewer rows than its tokenizer has pieces, or a vocabulary of another tokenizer."""
    with pytest.raises(bundle.BundleError, match=r"language.json: expected 256 ids, as config.json says; found 384"):
        assert Bundle(write(tmp_path / "few", text, vocab_size=256)).grammar
    refused(extending("run", folder, tmp_path / "w", tmp_path / "few", images), "expected 256 ids.*found 384")
    other = TextTokenizer.train(["quite other words " * 9], 280)
    forged = write(tmp_path / "forged", text)
    record = json.loads((forged / "bundle.json").read_text())
    (forged / "text_tokenizer" / other.file).write_bytes(other.data)
    record["files"][f"text_tokenizer/{other.file}"] = dict(
        bytes=len(other.data), sha256=bundle._sha256(forged / "text_tokenizer" / other.file)
    )
    (forged / "bundle.json").write_text(json.dumps(record))
    refused(extending("run", folder, tmp_path / "w", forged, images), "was made for a text tokenizer with hash")


def test_a_bundle_that_has_images_is_not_extended(folder, text, images, tmp_path):
    pictured = write(tmp_path / "pictured", text, codes=20, layout=ImageLayout("grid", 4, 4))
    argv = command("run", folder, tmp_path / "w", init=pictured)
    refused(argv, "config.image_tokenizer.steps: expected 0, because the bundle in config.init has image codes, but no")
    argv = command(
        "run", folder, tmp_path / "w", init=pictured, image_tokenizer__steps=0, training__only="('embedding[new]',)"
    )
    refused(argv, r"'embedding\[new\]': no ids are new, because the bundle in config.init is not extended")


def test_a_plan_and_a_validation_know_the_extended_vocabulary(folder, llm, images, tmp_path, capsys):
    argv = extending("validate", folder, tmp_path / "w", llm, images)[1:]
    overrides = [each for each in argv if each.startswith("--config.")]
    vocabulary = run_of(configs.load(argv[1], overrides)).vocabulary
    before = Bundle(llm).grammar.vocabulary
    assert vocabulary.text_size == before.text_size and vocabulary.codebook_size == 1000
    assert run_of(configs.load(argv[1], [*overrides, "--config.lora.rank=2"])).only == ("embedding[image]",)
    assert main(["validate", *argv[:2], "--workdir", str(tmp_path / "w"), *overrides]) == 0
    said = capsys.readouterr().out
    assert "tokens" in said and "image_too_large" not in said and "text alone" not in said


def test_mean_rows_need_text_rows(folder, tmp_path):
    argv = command("run", folder, tmp_path / "w", training__code_embedding_init="mean")
    refused(
        argv, "config.training.code_embedding_init: expected random or codebook, because mean is only for extending"
    )
