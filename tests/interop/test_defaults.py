"""The published sampling settings of a system are its bundle's defaults, and work as if a request had set them.

test_systems tests LWM and Lumina-mGPT 2.0, because it has their files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ar_unified
from ar_unified.bundle import Bundle
from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.interop import emu3
from ar_unified.language.document import CodesPart
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.requests import read_requests
from tests.interop import formats, tables
from tests.language import transcriptions

QUALITY = "lowres, bad anatomy, "  # how Emu3's negative prompt begins
PRAISE = " masterpiece, film grained, best quality."  # the text after each of Emu3-Gen's prompts
DEFAULTS: dict[str, dict[str, Any]] = {
    "chameleon": {
        "guidance": 3.0, "image_guidance": 1.2, "context": "bos_boi", "repetition_penalty": 1.2,
        "text": Filter(0.7, 0, 0.9), "image": Filter(0.7, 0, 0.9),
    },
    "anole": {
        "guidance": 3.0, "image_guidance": 1.2, "context": "bos_boi", "repetition_penalty": 1.2,
        "text": Filter(1.0, 0, 0.9), "image": Filter(0.7, 0, 0.9),
    },
    "lumina_mgpt": {
        "guidance": 4.0, "context": "from_boi", "text": Filter(1.0, 10), "image": Filter(1.0, 2000),
    },
    "emu3": {"guidance": 3.0, "context": "negative_prompt", "prompt_suffix": "", "image": Filter(1.0, 2048)},
    "emu3_gen": {"guidance": 3.0, "context": "negative_prompt", "prompt_suffix": PRAISE, "image": Filter(1.0, 2048)},
    "emu3_5": {
        "guidance": 2.0, "context": "empty_prompt", "text": Filter(1.0, 1024, 0.9), "image": Filter(1.0, 5120),
    },
    "liquid": {"guidance": 7.0, "context": "empty_prompt", "image": Filter(0.99, 4096, 0.96)},
}  # fmt: skip
_EMU3 = ("emu3", "emu3_gen")  # transformers writes their files
_SYSTEMS = [pytest.param(name, marks=pytest.mark.interop) if name in _EMU3 else name for name in DEFAULTS]


def files_of(system: str, folder: Path) -> list[Path | str]:
    """A tiny download, and the arguments of its import."""
    if system in ("chameleon", "anole"):
        formats.meta(folder, count=1)
        beside = ["--text", folder / "tokenizer", "--image", folder / "tokenizer" / "vqgan.safetensors"]
        return ["--from", folder / "models" / "7b", *beside]
    if system == "lumina_mgpt":
        formats.lumina_1(folder, tokenizer=True)
        beside = ["--text", folder / "tokenizer", "--image", folder / "tokenizer" / "vqgan.safetensors"]
        return ["--from", folder, *beside]
    if system in _EMU3:
        pytest.importorskip("torch", reason="transformers writes Emu3's files: needs torch (make test-interop)")
        from tests.interop import published

        if system == "emu3_gen":
            published.emu3_original(folder)
            vision = published.emu3_vision(folder.parent / "vision", levels=2, original=True)
            return ["--from", folder, "--size", "8x8", "--image", vision]
        published.emu3(folder, levels=2)
        return ["--from", folder, "--size", "8x8"]
    if system == "emu3_5":
        formats.emu3_5(folder)
        return ["--from", folder, "--size", "8x8", "--image", formats.ibq(folder.parent / "ibq")]
    formats.liquid(folder)
    tokenizer = formats.chameleon_tokenizer(folder.parent / "tokenizer")
    return ["--from", folder, "--image", tokenizer / "vqgan.safetensors"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(system: str) -> Path:
        if system not in made:
            folder = tmp_path_factory.mktemp(system)
            files = list(map(str, files_of(system, folder / "download")))
            named = "emu3" if system == "emu3_gen" else system  # config.json tells Gen from Chat
            assert main(["import", *files, "--as", named, "--output", str(folder / "bundle")]) == 0
            made[system] = folder / "bundle"
        return made[system]

    return get


def model_of(bundle: Path) -> ar_unified.Model:
    return ar_unified.load(bundle, dtype="float32", max_length=512)


@pytest.mark.parametrize("system", _SYSTEMS)
def test_a_request_that_says_nothing_has_the_published_settings(system: str, bundle: Callable[[str], Path]) -> None:
    model = model_of(bundle(system))
    asked = model.request("a red circle", mode="image", seed=0)
    for name, expected in DEFAULTS[system].items():
        assert getattr(asked, name) == expected, name
    assert asked.image_guidance == DEFAULTS[system].get("image_guidance", 0)
    assert asked.repetition_penalty == DEFAULTS[system].get("repetition_penalty", 1)
    assert asked.negative_prompt.startswith(QUALITY) if system in _EMU3 else not asked.negative_prompt
    config = configs.defaults()
    configs.begin_with(config, str(bundle(system)))
    assert config.sampling.guidance == asked.guidance and config.sampling.context == asked.context
    assert config.sampling.image_guidance == asked.image_guidance
    assert config.sampling.negative_prompt == asked.negative_prompt
    assert config.sampling.prompt_suffix == asked.prompt_suffix


def test_a_batch_of_openais_has_them_too(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_of(bundle("chameleon"))
    body = {"model": "m", "prompt": "a circle"}
    own = body | {"guidance": 5.0, "image_guidance": 2.0, "repetition_penalty": 1.0, "image": {"top_p": 0.5}}
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/images/generations", "body": each}
        for i, each in enumerate((body, own))
    ]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = read_requests(tmp_path / "batch.jsonl", cells=model.image_tokenizer, defaults=model.defaults)
    asked = one.request
    assert (asked.guidance, asked.image_guidance, asked.repetition_penalty) == (3.0, 1.2, 1.2)
    assert (two.request.guidance, two.request.image_guidance, two.request.repetition_penalty) == (5.0, 2.0, 1.0)
    assert two.request.image == Filter(0.7, 0, 0.5) and asked.image == Filter(0.7, 0, 0.9)


def test_chameleons_two_scales_compare_what_its_own_sampler_compares(bundle: Callable[[str], Path]) -> None:
    """The contexts of chameleon.py: the prompt; its image codes with <s> and both ends of images but no end of turn;
    <s> and an image."""
    model = model_of(bundle("chameleon"))
    v, codes = model.vocabulary, np.arange(64, dtype=np.int32).reshape(8, 8)
    shown = model.grammar.image(codes)
    part = model.detokenize_image(codes)
    asked = model.request("a red circle", part, mode="image", seed=0)
    plan = model.engine.plan(asked)
    again = [v.bos, *model.grammar.image(model.tokenize_image(part)), v.control("boi")]
    assert [list(prefix) for prefix in plan.prefixes[1:]] == [[v.bos, v.control("boi")], again]
    assert len(again) == len(shown) + 2 and v.control("eot") in plan.prefixes[0]
    np.testing.assert_allclose(plan.weights, [3.0, -0.2, -1.8])
    alone = model.engine.plan(model.request("a red circle", mode="image", seed=0))
    assert alone.weights == [3.0, -2.0], "nothing to look at: one comparison, which is the same"
    none = model.engine.plan(model.request("a red circle", part, mode="image", seed=0, guidance=1))
    assert none.weights == [1.0]
    other = model.request("a red circle", part, mode="image", seed=0, context="image_only")
    assert len(model.engine.plan(other).weights) == 2


@pytest.mark.interop
def test_emu3_compares_with_its_negative_prompt_in_the_place_of_the_prompt(bundle: Callable[[str], Path]) -> None:
    model = model_of(bundle("emu3"))
    v, size = model.vocabulary, 8 * model.image_tokenizer.factor
    asked = model.request("a red circle", mode="image", seed=0, turn=False, image_size=size)
    own, other = model.engine.plan(asked).prefixes
    texts = [model.grammar.text_codec.encode(text) for text in ("a red circle", asked.negative_prompt)]
    opening = model.grammar.image(np.zeros((8, 8), np.int32))[: -8 * 9 - 2]
    assert [list(prefix) for prefix in (own, other)] == [[v.bos, *text, *opening] for text in texts]
    assert [v.name(id) for id in (opening[0], opening[-1])] == ["<boi>", "<img>"]


@pytest.mark.interop
def test_emu3_gen_is_asked_as_its_authors_do_with_no_option(bundle: Callable[[str], Path]) -> None:
    """The contexts of image_generation.py: BOS, the prompt, the words of praise and the beginning of an image; the same
    with the negative prompt, without words after it."""
    model = model_of(bundle("emu3_gen"))
    table, size = tables.emu3(), 8 * model.image_tokenizer.factor
    text = model.grammar.text_codec.encode
    asked = model.request("a red circle.", mode="image", seed=0, image_size=size)
    named = {"boi": "<|image start|>", "img": "<|image token|>", "bos": "<|extra_203|>"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transcriptions, "EMU3", {key: table.id(name) for key, name in named.items()})
        expected = [
            transcriptions.emu3_prompt(lambda run: model.ids.theirs(text(run)).tolist(), prompt, 8, 8)
            for prompt in ("a red circle." + PRAISE, asked.negative_prompt)
        ]
    plan = model.engine.plan(asked)
    # The ids that begin an image are fed as the first drawn ids.
    found = [model.ids.theirs(np.append(plan.prompt, plan.given)).tolist(), model.ids.theirs(plan.prefixes[1]).tolist()]
    assert found == expected and plan.weights == [3.0, -2.0]
    exact = model.request("a red circle.", mode="image", seed=0, image_size=size, turn=False)
    assert exact.asked == exact.parts, "a document that goes on is what was said"
    assert model.request("what?", mode="text", seed=0).asked[-1].text == "what?"


def test_which_emu3_it_is_is_told_by_its_config_or_asked() -> None:
    assert emu3.kind_of({"image_area": 518400}, {"max_position_embeddings": 9216}, "here") == "gen"
    assert emu3.kind_of({}, {"max_position_embeddings": 131072}, "here") == "chat"
    for config in ({}, {"max_position_embeddings": 512}, {"image_area": 262144, "max_position_embeddings": 5120},
                   {"image_area": 518400, "max_position_embeddings": 131072}, {"image_area": [1]}):  # fmt: skip
        with pytest.raises(UserError, match="--as emu3_gen for Emu3-Gen or Stage1, --as emu3_chat for"):
            emu3.kind_of(config, {}, "here")


@pytest.mark.interop
def test_a_choice_goes_before_what_the_config_says(
    bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    download = bundle("emu3").parent / "download"
    shutil.copytree(download, tmp_path / "download")
    config = json.loads((download / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 512
    (tmp_path / "download" / "config.json").write_text(json.dumps(config))
    command = ["import", "--from", str(tmp_path / "download"), "--size", "8x8", "--output", str(tmp_path / "b"), "--as"]
    assert main([*command, "emu3"]) == 2 and "--as emu3_gen for" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main([*command, "emu3_gen"]) == 0
    found = Bundle(tmp_path / "b")
    assert (found.sections["sampling"]["prompt_suffix"], found.grammar.layout.kind) == (PRAISE, "emu3_gen")
    assert found.published is not None and found.published["system"] == "emu3", "whose recipe it is fine-tuned with"
    assert Bundle(bundle("emu3")).grammar.layout.kind == "emu3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "system, by_hand, without",
    [
        ("chameleon", dict(guidance=3.0, image_guidance=1.2, context="bos_boi"), dict(image_guidance=0)),
        pytest.param(
            "emu3",
            dict(guidance=3.0, context="negative_prompt"),
            dict(context="bos_boi"),
            marks=pytest.mark.interop,
        ),
        ("lumina_mgpt", dict(guidance=4.0, context="from_boi"), dict(guidance=1.0)),
    ],
)
def test_they_draw_what_the_same_said_by_hand_draws(
    system: str, by_hand: dict[str, Any], without: dict[str, Any], bundle: Callable[[str], Path]
) -> None:
    """Codes are chosen greedily, so that only the logits can differ."""
    model = model_of(bundle(system))
    if system == "emu3":
        by_hand = by_hand | {"negative_prompt": Bundle(bundle(system)).sections["sampling"]["negative_prompt"]}
    shown = CodesPart(np.random.default_rng(0).integers(0, 64, (8, 8)).astype(np.int32))
    size = {"image_size": 8 * model.image_tokenizer.factor} if model.grammar.layout.sized else {}
    greedy = {"image": {"temperature": 0.0}, **size}

    def drawn(**settings: Any) -> np.ndarray:
        (answer,) = model.generate([model.request("a red circle", shown, mode="image", seed=0, **greedy | settings)])
        assert answer.document is not None, answer.error
        return answer.document.parts[0].codes  # type: ignore[union-attr]

    expected = drawn(**by_hand)
    assert np.array_equal(drawn(), expected)
    assert not np.array_equal(drawn(**without), expected)
