"""Systems without an installed class: LWM is compared with its transcription, Lumina-mGPT 2.0 with its twin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ar_tokenizers.image import config as image_config
from ar_tokenizers.image.autoencoder import init
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.published import config_of, to_published
from ar_tokenizers.image.tokenizer import ImageTokenizer
from safetensors.numpy import save_file

import ar_unified
from ar_unified.bundle import Bundle
from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.interop import lwm
from ar_unified.language.document import CodesPart, Document, TextPart, TokensPart, Turn
from ar_unified.language.vocabulary import Role
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.request import Request
from tests.interop import comparing, formats, interleaved, tables
from tests.language import transcriptions
from tests.sources import ROOT

LOGITS = 5e-5
_TINY = dict(width=32, multipliers=(1, 1, 1, 1, 1), blocks=(1, 1, 1, 1, 1))


def run(*argv: object) -> int:
    return main([str(argument) for argument in argv])


def write_tokenizer(config: AutoencoderConfig, dialect: str, path: Path) -> Path:
    tokenizer = ImageTokenizer(config, init(config, jax.random.key(0)), batch_size=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(to_published(tokenizer, dialect), path)
    return path


# ---- LWM -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lwm_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A download with tables of 320 and 8,448 ids, and a tiny vqgan with LWM's codes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "LWM_VISION", 8448)
        patch.setitem(image_config.PRESETS, "lwm_f16", image_config.PRESETS["lwm_f16"] | _TINY)
        folder = tmp_path_factory.mktemp("lwm")
        formats.lwm(folder / "LWM-1M-Jax", dtype="float32")
        (folder / "LWM-1M-Jax" / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
        yield folder / "LWM-1M-Jax", write_tokenizer(config_of("lwm_vq", {}), "lwm", folder / "vqgan.safetensors")


@pytest.fixture(scope="module")
def lwm_bundle(lwm_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("bundle") / "lwm"
    files = ["--from", lwm_files[0], "--image", lwm_files[1]]
    assert run("import", *files, "--as", "lwm", "--rope-theta", formats.LWM_THETA, "--output", bundle) == 0
    return bundle


@pytest.fixture(scope="module")
def lwm_model(lwm_bundle: Path) -> ar_unified.Model:
    return ar_unified.load(lwm_bundle, dtype="float32", max_length=512)


def test_lwm_answers_with_both_tables_as_its_transcription(lwm_model: ar_unified.Model) -> None:
    """Text and images are in one row. The original had such rows in training, but not in its sampler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "LWM_VISION", 8448)
        original = interleaved.Lwm(formats.lwm_params(), formats.LWM_THETA)
    rng = np.random.default_rng(0)
    sees = rng.random((2, 40)) < 0.5
    ids = np.where(sees, rng.integers(0, 8448, sees.shape), rng.integers(0, 320, sees.shape))
    ours = lwm_model.ids.ours(np.where(sees, ids + 320, ids))
    logits = lwm_model.logits(ours)[..., lwm_model.ids.ours(range(320 + 8448))]
    text, images = original.logits(ids, sees)
    np.testing.assert_allclose(logits, np.concatenate([text, images], -1), atol=LOGITS, rtol=0)
    np.testing.assert_allclose(comparing.hidden(lwm_model, ours), original.hidden(ids, sees), atol=2e-5)
    other = interleaved.Lwm(original.params, 10 * formats.LWM_THETA).logits(ids, sees)[0]
    assert np.abs(other - text).max() > 1000 * LOGITS, "which theta it is would not be seen"


def greedy(
    original: interleaved.Lwm, contexts: list[list[int]], scales: list[float], allowed: np.ndarray, n: int
) -> np.ndarray:
    """n greedy ids after the first context. The logits of both tables are summed over all contexts, with the weights
    `scales`. Raises AssertionError at a near tie."""
    drawn: list[int] = []
    for _ in range(n):
        mixed = np.zeros(320 + 8448)
        for context, scale in zip(contexts, scales, strict=True):
            ids = np.array([[*context, *drawn]])
            sees = ids >= 320
            mixed += scale * np.concatenate(original.logits(np.where(sees, ids - 320, ids), sees), -1)[0, -1]
        second, best = allowed[np.argsort(mixed[allowed])[-2:]]
        assert mixed[best] - mixed[second] > 1e-3
        drawn.append(int(best))
    return np.array(drawn)


@pytest.mark.parametrize("mode, guidance", [("text", 1.0), ("image", 1.0), ("image", 3.0)])
def test_sixty_four_greedy_ids_of_lwm_are_its_transcriptions(
    mode: str, guidance: float, lwm_model: ar_unified.Model
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "LWM_VISION", 8448)
        original = interleaved.Lwm(formats.lwm_params(), formats.LWM_THETA)
    grammar, vocabulary, ids = lwm_model.grammar, lwm_model.vocabulary, lwm_model.ids
    shown = CodesPart(np.zeros((16, 16), np.int32))
    end = int(ids.theirs([vocabulary.control(grammar.layout.record.end)])[0])
    of = ids.theirs(np.array(vocabulary.ids(Role.TEXT if mode == "text" else Role.IMAGE)))
    for text in ("the red", "a circle", "blue", "square and green"):  # until no id ends the expected answer
        ours = grammar.encode(Document((Turn("document", (TextPart(text), shown)),))).tokens
        said, begun = 1 + len(grammar.text_codec.encode(text)), int(np.argmax(vocabulary.role(ours) == Role.IMAGE))
        asked = ours[: said if mode == "text" else begun]
        contexts = [ids.theirs(asked).tolist(), ids.theirs([ours[0], *ours[said:begun]]).tolist()]
        allowed = np.append(of, end) if mode == "text" else of
        expected = greedy(original, contexts, [guidance, 1 - guidance], allowed, 64)
        if end not in expected:
            break
    assert end not in expected

    request = Request(
        "r", (TokensPart(tuple(asked.tolist())),), turn=False, mode=mode, max_tokens=80 if mode == "text" else None,
        guidance=guidance, context="bos_boi", text=Filter(0.0), image=Filter(0.0),
    )  # fmt: skip
    (sample,) = lwm_model.generate([request])
    assert not sample.error
    assert ids.theirs(sample.tokens)[:64].tolist() == expected.tolist()


def test_lwms_ids_are_its_own(lwm_model: ar_unified.Model) -> None:
    grammar, codes = lwm_model.grammar, np.arange(256, dtype=np.int32).reshape(16, 16) * 31
    document = Document((Turn("document", (TextPart("the red"), CodesPart(codes), TextPart("circle"))),))
    found = lwm_model.ids.theirs(grammar.encode(document).tokens)

    def text(run: str) -> list[int]:
        return lwm_model.ids.theirs(grammar.text_codec.encode(run)).tolist()

    own = transcriptions.LWM | {"vision": 320}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transcriptions, "LWM", own)
        expected = transcriptions.lwm(text, [["the red", codes, "circle"]], adds_bos=False)
    assert found.tolist() == expected


def test_lwms_likelihoods_are_of_two_softmaxes_when_scored_and_when_trained(
    lwm_bundle: Path, lwm_model: ar_unified.Model
) -> None:
    """The expected numbers are from the two tables of LWM's transcription. Ends of frames and clips are image ids,
    "</vision>" is text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "LWM_VISION", 8448)
        original = interleaved.Lwm(formats.lwm_params(), formats.LWM_THETA)
    codes = np.random.default_rng(2).integers(0, 8192, (16, 16)).astype(np.int32)
    document = Document((Turn("document", (TextPart("the red"), CodesPart(codes), TextPart("circle"))),))
    ours = lwm_model.grammar.encode(document).tokens
    theirs = lwm_model.ids.theirs(ours)
    sees = theirs >= 320
    logits = original.logits(np.where(sees, theirs - 320, theirs)[None], sees[None])
    shifted = [table[0, :-1] - np.log(np.exp(table[0, :-1]).sum(-1, keepdims=True)) for table in logits]
    targets, of_image = theirs[1:], sees[1:]
    assert of_image.sum() == 257 and not of_image[-1]
    rows = np.arange(len(targets))
    own = np.where(of_image, shifted[1][rows, targets - 320], shifted[0][rows, np.where(of_image, 0, targets)])
    (score,) = lwm_model.score([document])
    np.testing.assert_allclose([score.log_likelihood, score.eos.log_likelihood], [own[:-1].sum(), own[-1]], rtol=1e-5)

    config = configs.load(f"{ROOT}/experiments/folder.py:path=x,init={lwm_bundle}")
    assert config.loss.softmax == "by_side"
    split = lwm_model.grammar.layout.split(lwm_model.vocabulary, config.loss.softmax)
    (loss,) = comparing.fine_tune(lwm_model, [ours[None]], split=split)
    np.testing.assert_allclose(loss, -own.mean(), rtol=1e-5)


def test_lwm_is_asked_as_published(lwm_model: ar_unified.Model) -> None:
    asked = lwm_model.request("a red circle", mode="image", seed=0)
    assert (asked.guidance, asked.context, asked.image) == (5.0, "bos_boi", Filter(1.0, 8192))


@pytest.mark.slow
def test_a_picture_of_lwm_has_as_many_codes_as_its_decoder_reads(lwm_model: ar_unified.Model) -> None:
    (image,) = lwm_model.draw("a red circle", seed=0, n=1)
    assert image.size == (256, 256)


def test_both_tables_of_lwm_come_back(lwm_bundle: Path, lwm_files: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("export", "--from", lwm_bundle, "--to", "lwm", "--output", tmp_path / "out") == 0
    comparing.assert_same(comparing.stream(tmp_path / "out"), comparing.stream(lwm_files[0]))
    assert run("export", "--from", lwm_bundle, "--to", "hf", "--output", tmp_path / "hf") == 2


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lwms_stream_comes_back(scanned: bool, dtype: str, tmp_path: Path) -> None:
    folder = formats.lwm(tmp_path / "LWM-Text-256K-Jax", vision=False, scanned=scanned, dtype=dtype)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert run("import", "--from", folder, "--as", "lwm", "--output", tmp_path / "bundle") == 0
    config = Bundle(tmp_path / "bundle").config
    assert (config.rope_theta, config.dtype) == (1e7, dtype), "it computes in what its weights are in"
    assert Bundle(tmp_path / "bundle").sections["loss"] == {}, "one table has one softmax"
    assert run("export", "--from", tmp_path / "bundle", "--to", "lwm", "--output", tmp_path / "out") == 0
    comparing.assert_same(comparing.stream(tmp_path / "out"), comparing.stream(folder))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    "name, theta",
    [("LWM-Text-Chat-128K-Jax", 1e7), ("models--LargeWorldModel--LWM-512k/snapshots/3f", 2.5e7), ("lwm-1m-jax", 5e7)],
)
def test_theta_is_that_of_the_published_name(name: str, theta: float, tmp_path: Path) -> None:
    assert lwm.theta_of(tmp_path / name, {}, None) == theta
    assert lwm.theta_of(tmp_path / name, {"rope_theta": 3.0}, None) == 3.0
    assert lwm.theta_of(tmp_path / name, {"rope_theta": 3.0}, 4.0) == 4.0


def test_what_no_file_of_lwm_says_is_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="give --rope-theta, which is 1e.07 for 128K"):
        lwm.theta_of(tmp_path / "mine", {}, None)
    folder = formats.lwm(tmp_path / "mine", vision=False)
    assert run("import", "--from", folder, "--as", "lwm", "--rope-theta", "1e7", "--output", tmp_path / "b") == 2
    assert "found 2 of 64. For another model, give num_attention_heads in a config.json" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


# ---- Lumina-mGPT 2.0 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lumina_2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, ar_unified.Model]]:
    """A download, the twin that transformers reads, and the imported bundle, with a tiny MoVQGAN of 64 codes."""
    folder = tmp_path_factory.mktemp("lumina_2")
    formats.lumina_2(folder / "download", folder / "twin")
    with pytest.MonkeyPatch.context() as patch:
        small = AutoencoderConfig.from_dict(
            image_config.PRESETS["movqgan_f8"]
            | dict(width=32, multipliers=(1, 1, 1, 1), blocks=(1, 1, 1, 1))
            | dict(quantizer="vq", codes=64, code_dim=4, space="euclidean")
        )
        patch.setattr("ar_tokenizers.image.movq_weights.movqgan_270m", lambda: small)
        image = write_tokenizer(small, "movqgan", folder / "movqgan" / "model.safetensors")
        files = ["--from", folder / "download", "--image", image]
        assert run("import", *files, "--as", "lumina_mgpt", "--output", folder / "bundle") == 0
        yield folder / "download", folder / "twin", ar_unified.load(folder / "bundle", dtype="float32")


def test_lumina_2s_ids_are_its_own(lumina_2: tuple[Path, Path, ar_unified.Model]) -> None:
    *_, model = lumina_2
    table, codes = tables.lumina_2(), np.arange(32, dtype=np.int32).reshape(8, 4)
    turns = (Turn("user", (TextPart("draw the circle"),)), Turn("assistant", (CodesPart(codes),)))
    found = model.ids.theirs(model.grammar.encode(Document(turns)).tokens)
    marks = {"boi": "<racm3:break>", "eoi": "<eoss>", "eol": "<reserved08799>", "code": "IMGIMGAZ"}
    named = {key: table.id(name) for key, name in marks.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transcriptions, "LUMINA_2", named)
        expected = transcriptions.lumina_mgpt_2(
            lambda run: model.ids.theirs(model.grammar.text_codec.encode(run)).tolist(),
            [["draw the circle"], [codes]],
            bos=table.id("<|endoftext|>"),
            eot=table.id("<reserved08706>"),
            size=table.id("<reserved08800>"),
        )
    assert found.tolist() == expected


def test_lumina_2_is_asked_as_published(lumina_2: tuple[Path, Path, ar_unified.Model]) -> None:
    asked = lumina_2[2].request("a red circle", mode="image", seed=0)
    assert (asked.guidance, asked.context) == (4.0, "from_boi")
    assert (asked.text, asked.image) == (Filter(1.0, 10), Filter(1.0, 4096))


def test_lumina_2_comes_back(lumina_2: tuple[Path, Path, ar_unified.Model], tmp_path: Path) -> None:
    download, *_ = lumina_2
    bundle = download.parent / "bundle"
    assert run("export", "--from", bundle, "--to", "hf", "--output", tmp_path / "out") == 0
    comparing.assert_same(comparing.tensors(tmp_path / "out"), comparing.tensors(download))


@pytest.mark.interop
def test_lumina_2s_logits_are_its_twins(lumina_2: tuple[Path, Path, ar_unified.Model]) -> None:
    oracle, model = oracle_of(lumina_2), lumina_2[2]
    V = tables.lumina_2().size
    ids = np.random.default_rng(1).integers(0, V, (2, 48))
    ours = model.ids.ours(range(V))
    np.testing.assert_allclose(model.logits(ours[ids])[..., ours], oracle.logits(ids), atol=LOGITS, rtol=0)
    np.testing.assert_allclose(comparing.hidden(model, ours[ids]), oracle.hidden(ids), atol=2e-5)


def oracle_of(lumina_2: tuple[Path, Path, ar_unified.Model]) -> Any:
    """A `reference.Reference` of transformers' Chameleon with the twin's weights."""
    pytest.importorskip("torch", reason="parity with the reference implementations needs torch (make test-interop)")
    from tests.interop import reference

    return reference.load(lumina_2[1])


@pytest.mark.interop
@pytest.mark.parametrize("mode, guidance", [("text", 1.0), ("image", 1.0), ("image", 4.0)])
def test_sixty_four_greedy_ids_of_lumina_2_are_its_twins(
    mode: str, guidance: float, lumina_2: tuple[Path, Path, ar_unified.Model]
) -> None:
    """The ids are words, or an image of 8 x 8 codes with the ends of its rows. The image's size is given in units of
    four codes."""
    oracle, model, table = oracle_of(lumina_2), lumina_2[2], tables.lumina_2()
    from tests.interop import reference

    begin, end = table.id("<|endoftext|>"), table.id("<reserved08706>")
    words = np.random.default_rng(0).choice(table.text[:256], (12, 6)).tolist()
    opening = [table.id(name) for name in ("<racm3:break>", "<reserved08802>", "<reserved08802>")]
    codes, row_end = table.ids("IMGIMG"), [table.id("<reserved08799>")]

    def draw(prompt: Sequence[int]) -> reference.Drawn:
        if mode == "text":
            return oracle.greedy(prompt, lambda _: [*table.text, end])
        allowed = lambda step: row_end if step % 9 == 8 else codes  # noqa: E731
        return oracle.guided([prompt, opening], [guidance, 1 - guidance], allowed, 72)

    prompts = [[begin, *each, *(opening if mode == "image" else ())] for each in words]
    prompt, drawn = reference.settled(draw, prompts, [end])
    request = Request(
        "r", (TokensPart(tuple(model.ids.ours(np.array(prompt)).tolist())),), turn=False, mode=mode,
        max_tokens=80 if mode == "text" else None, guidance=guidance, context="from_boi", text=Filter(0.0),
        image=Filter(0.0),
    )  # fmt: skip
    (sample,) = model.generate([request])
    assert not sample.error
    assert model.ids.theirs(sample.tokens)[: len(drawn.ids)].tolist() == drawn.ids.tolist()


@pytest.mark.interop
def test_twenty_steps_of_fine_tuning_lumina_2_are_torchs(lumina_2: tuple[Path, Path, ar_unified.Model]) -> None:
    oracle, model, table = oracle_of(lumina_2), lumina_2[2], tables.lumina_2()
    from tests.interop import reference

    learned = [*table.text, *table.ids("IMGIMG")]
    batches = np.random.default_rng(6).choice(learned, (reference.STEPS, 4, 32))
    found = comparing.fine_tune(model, np.asarray(model.ids.ours(batches)))
    np.testing.assert_allclose(found, oracle.fine_tune(batches), atol=5e-5, rtol=0)
