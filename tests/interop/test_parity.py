"""Imported models are compared with the reference implementations on the same published files, and exported again.

Tolerances are those of `reference/published_weights.md` §7, at least four times the difference between references. All
tests use the verbs and `ar_unified.load`, as a user does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified.cli.main import main

pytestmark = [
    pytest.mark.interop,
]
torch = pytest.importorskip("torch", reason="parity with the reference implementations needs torch (make test-interop)")
pytest.importorskip("transformers", reason="the reference implementations are transformers'")

import ar_unified  # noqa: E402
from ar_unified.language.document import TokensPart  # noqa: E402
from ar_unified.sampling.decoding import Filter  # noqa: E402
from ar_unified.sampling.request import Request  # noqa: E402
from tests.interop import comparing, formats, reference, tables  # noqa: E402
from tests.interop import published as make  # noqa: E402
from tests.interop.tables import Table  # noqa: E402
from tests.interop.weights import interleaved as neighbours  # noqa: E402

LOGITS, RELATIVE, HIDDEN, TUNED = 5e-5, 1e-5, 2e-5, 5e-5
WRONG = 1000 * LOGITS  # the smallest error that a wrong layout causes
GREEDY = Filter(temperature=0.0)


@dataclass(frozen=True)
class Case:
    """One published folder.

    Attributes:
        system: the argument of `--as`.
        make, args, settings: the function that makes the folder, and its arguments.
        table: the ids.
        begin: the name of the token that begins a text, if the table has one.
        oracle: the class of transformers that computes the results: "" is the class in config.json, "twin" reads the
            folder with transformers' names, and another name is a class.
        to: the argument of `--to`.
        at: where the weights are in the folder.
        more: further arguments of the import, in which {} is the folder and {vision} the image tokenizer's folder.
        picture: names between the prompt and the first code.
        codes: the beginning of code names, "" if they have none.
        row_end: the name after each row of 8 codes, "" for none.
        between: whether the last row has no row_end.
        vision: the function that makes the image tokenizer's folder, and its settings.
        context: what guidance compares with.
        apart: names in that context before those of `picture`.
    """

    system: str
    make: Callable[..., Path]
    table: Callable[[], Table]
    args: tuple[Any, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    begin: str = ""
    oracle: str = ""
    to: str = "hf"
    at: str = ""
    more: tuple[str, ...] = ()
    picture: tuple[str, ...] = ()
    codes: str = ""
    row_end: str = ""
    between: bool = False
    vision: tuple[Callable[..., Path], dict[str, Any]] | None = None
    context: str = "bos_boi"
    apart: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return self.system, self.make.__name__, self.args, tuple(sorted(self.settings.items()))


_CHAMELEON: dict[str, Any] = {
    "table": tables.chameleon, "begin": "<s>", "picture": ("<racm3:break>",), "codes": "IMGIMG",
    "apart": ("<s>",),
}  # fmt: skip
_EMU3: dict[str, Any] = {
    "begin": "<|extra_203|>", "picture": ("<|image start|>", "8", "*", "8", "<|image token|>"),
    "codes": "<|visual token", "row_end": "<|extra_200|>", "apart": ("<|extra_203|>",),
}  # fmt: skip
_VISION: dict[str, Any] = {"more": ("--image", "{vision}"), "vision": (make.emu3_vision, {"original": True})}
_EMU3_5: dict[str, Any] = _EMU3 | {
    "more": ("--image", "{vision}", "--size", "16x16"), "vision": (formats.ibq, {}), "between": True, "oracle": "twin",
}  # fmt: skip
_LIQUID: dict[str, Any] = {
    "begin": "<bos>", "picture": ("<unused0>",), "apart": ("<bos>",),
    "more": ("--image", "{vision}/vqgan.safetensors"), "vision": (formats.chameleon_tokenizer, {}),
}  # fmt: skip
_BESIDE = ("--text", "{}/tokenizer", "--image", "{}/tokenizer/vqgan.safetensors")
_META: dict[str, Any] = _CHAMELEON | {"oracle": "twin", "to": "meta", "at": "models/30b", "more": _BESIDE}
_LUMINA: dict[str, Any] = _CHAMELEON | {
    "picture": ("<racm3:break>", "<reserved08804>", "<reserved08804>"),
    "row_end": "<reserved08799>", "context": "from_boi", "apart": (), "oracle": "twin",
}  # fmt: skip
CASES = {
    "chameleon": Case("chameleon", make.chameleon, **_CHAMELEON),
    "chameleon-swin": Case("chameleon", make.chameleon, settings={"swin": True}, **_CHAMELEON),
    "chameleon-equal-heads": Case("chameleon", make.chameleon, settings={"equal_heads": True}, **_CHAMELEON),
    "meta": Case("chameleon", formats.meta, **_META),
    "meta-fused-swin": Case("chameleon", formats.meta, settings={"fused": True, "swin": True}, **_META),
    "anole": Case("anole", make.chameleon, **_CHAMELEON),
    "lumina_mgpt": Case("lumina_mgpt", formats.lumina_1, settings={"tokenizer": True}, more=_BESIDE, **_LUMINA),
    "emu3": Case("emu3", make.emu3, lambda: tables.emu3(placeholder="<image>"), **_EMU3),
    "emu3-original": Case("emu3", make.emu3_original, tables.emu3, oracle="Emu3ForCausalLM", **_VISION, **_EMU3),
    "emu3_5": Case("emu3_5", formats.emu3_5, tables.emu3, **_EMU3_5),
    "liquid": Case("liquid", formats.liquid, lambda: tables.gemma(codes=64), **_LIQUID),
    "simplear": Case(
        "simplear",
        make.simplear,
        tables.simplear,
        begin="<|t2i|>",
        picture=("<|soi|>",),
        apart=("<|t2i|>",),
        more=("--size", "8x8"),
    ),
    "tar": Case(
        "tar",
        make.tar,
        tables.tar,
        begin="<|endoftext|>",
        picture=("<im_start>", "<S2>"),
        codes="<I",
        apart=("<|endoftext|>",),
        more=("--size", "9x9"),
    ),
    "gemma": Case("gemma", make.causal, tables.gemma, ("gemma",), begin="<bos>"),
    **{
        kind: Case("llama", make.causal, tables.llama, (kind,), begin="<|begin_of_text|>")
        for kind in ("llama", "llama_tied", "llama3")
    },
    **{kind: Case("qwen", make.causal, tables.qwen, (kind,)) for kind in ("qwen2", "qwen3")},
}
DRAWING = [
    "chameleon",
    "chameleon-swin",
    "meta",
    "anole",
    "lumina_mgpt",
    "emu3",
    "emu3-original",
    "emu3_5",
    "liquid",
    "simplear",
    "tar",
]
# One case for each system, and for each variant of its transformer.
TUNED_HERE = [*DRAWING, "llama_tied", "llama3", "qwen2", "qwen3", "gemma"]
EXPORTED = [name for name, case in CASES.items() if case.to == "hf"]


def run(*argv: str | Path) -> None:
    assert main([str(argument) for argument in argv]) == 0


def import_as(system: str, folder: Path, bundle: Path, *more: str) -> None:
    run("import", "--from", folder, "--as", system, "--output", bundle, *more)


@pytest.fixture(scope="session")
def bundles(published, tmp_path_factory):
    """bundles(case): the folder of the imported bundle; `edit` changes the published files before the import."""
    made: dict[Any, Path] = {}

    def get(case: Case, edit: Callable[[Path], None] | None = None) -> Path:
        key = (*case.key, getattr(edit, "__name__", ""))
        if key not in made:
            folder, out = published(case.make, *case.args, **case.settings), tmp_path_factory.mktemp("bundle")
            if edit is not None:
                shutil.copytree(folder, out / "edited")
                folder = out / "edited"
                edit(folder)
            vision = published(case.vision[0], **case.vision[1]) if case.vision else ""
            more = [argument.format(folder, vision=vision) for argument in case.more]
            import_as(case.system, folder / case.at, out / "bundle", *more)
            made[key] = out / "bundle"
        return made[key]

    return get


@pytest.fixture(scope="session")
def models(bundles):
    """models(case): the imported model, and our id for each published id."""
    made: dict[Any, tuple[Any, np.ndarray]] = {}

    def get(case: Case) -> tuple[Any, np.ndarray]:
        if case.key not in made:
            model = ar_unified.load(bundles(case), dtype="float32", max_length=256)
            made[case.key] = model, np.asarray(model.ids.ours(np.arange(case.table().size)))
        return made[case.key]

    return get


@pytest.fixture(scope="session")
def oracles(published):
    """oracles(case): what transformers computes."""
    made: dict[Any, reference.Reference] = {}

    def get(case: Case) -> reference.Reference:
        if case.key not in made:
            folder = published(case.make, *case.args, twin=case.oracle == "twin", **case.settings)
            made[case.key] = reference.load(folder, None if case.oracle in ("", "twin") else case.oracle)
        return made[case.key]

    return get


def width(oracle: reference.Reference) -> int:
    return oracle.model.lm_head.weight.shape[0]


def control(model: Any, name: str) -> int:
    """The published id of one of our controls."""
    return int(model.ids.theirs(np.array([model.vocabulary.control(name)]))[0])


def prompts_of(case: Case, model: Any, count: int = 12) -> list[list[int]]:
    """Texts of six random pieces after the beginning of a document, in published ids."""
    table, record = case.table(), model.grammar.layout.record
    begin = control(model, record.begin)
    assert not case.begin or table.id(case.begin) == begin
    return [[begin, *ids] for ids in np.random.default_rng(0).choice(table.text[:256], (count, 6)).tolist()]


def sampled(model: Any, ours: np.ndarray, prompt: Sequence[int], n: int, **settings: Any) -> np.ndarray:
    """The first n ids that our sampler draws, with its cache, after a published prompt; as published ids."""
    request = Request(
        "r", (TokensPart(tuple(ours[list(prompt)].tolist())),), turn=False, text=GREEDY, image=GREEDY, **settings
    )
    (sample,) = model.generate([request])
    assert not sample.error
    return np.asarray(model.ids.theirs(sample.tokens))[:n]


# ---- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states_are_the_references(name, models, oracles):
    case = CASES[name]
    (model, ours), oracle = models(case), oracles(case)
    ids = np.random.default_rng(1).integers(0, width(oracle), (2, 48))
    expected = oracle.logits(ids)
    found = model.logits(ours[ids])[..., ours[: width(oracle)]]
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)
    assert np.abs(found - expected).max() <= max(RELATIVE * np.abs(expected).max(), LOGITS)
    np.testing.assert_allclose(comparing.hidden(model, ours[ids]), oracle.hidden(ids), atol=HIDDEN)
    assert sorted(ours) == list(range(len(ours))) and np.array_equal(model.ids.theirs(ours), np.arange(len(ours)))


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_sixty_four_greedy_words_are_the_references(name, models, oracles):
    case = CASES[name]
    (model, ours), oracle, table = models(case), oracles(case), case.table()
    end = control(model, model.grammar.layout.record.end)
    allowed = [id_ for id_ in (*table.text, end) if id_ < width(oracle)]
    prompt, drawn = reference.settled(lambda p: oracle.greedy(p, lambda _: allowed), prompts_of(case, model), [end])
    found = sampled(model, ours, prompt, 64, mode="text", max_tokens=80)
    assert np.array_equal(found, drawn.ids)


def picture(case: Case) -> tuple[list[int], Callable[[int], Sequence[int]], int]:
    """The ids that begin a picture of 8 x 8 codes, the allowed ids of each step, and the number of steps."""
    table = case.table()
    codes = table.ids(case.codes) if case.codes else range(len(table.names), table.size)
    if not case.row_end:
        return [table.id(name) for name in case.picture], lambda _: codes, 64
    end = [table.id(case.row_end)]
    return [table.id(name) for name in case.picture], lambda step: end if step % 9 == 8 else codes, 72 - case.between


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", DRAWING)
def test_a_greedy_picture_is_the_references(name, guidance, models, oracles):
    """Draws 64 codes and the ends of their rows. Guidance is compared with a loop over both contexts."""
    case = CASES[name]
    (model, ours), oracle, table = models(case), oracles(case), case.table()
    begun, allowed, steps = picture(case)
    apart = [*(table.id(name) for name in case.apart), *begun]

    def draw(prompt: Sequence[int]) -> reference.Drawn:
        if guidance == 1.0:
            return oracle.greedy(prompt, allowed, steps)
        return oracle.guided([prompt, apart], [guidance, 1 - guidance], allowed, steps)

    prompt, drawn = reference.settled(draw, [[*prompt, *begun] for prompt in prompts_of(case, model)])
    found = sampled(model, ours, prompt, steps, mode="image", guidance=guidance, context=case.context)
    assert np.array_equal(found, drawn.ids)


def test_a_picture_changed_with_two_scales_is_the_references(models, oracles):
    """Chameleon's guidance: scales 3.0 for text and 1.2 for images are weights 3, -1.8 and -0.2 of the three
    contexts."""
    case = CASES["chameleon"]
    (model, ours), oracle, table = models(case), oracles(case), case.table()
    codes, boi, eoi = table.ids("IMGIMG"), table.id("<racm3:break>"), table.id("<eoss>")
    shown = [boi, *np.random.default_rng(4).choice(codes, 64).tolist(), eoi]

    def draw(prompt: Sequence[int]) -> reference.Drawn:
        contexts = [prompt, [0, *shown, boi], [0, boi]]
        return oracle.guided(contexts, [3.0, -1.8, -0.2], lambda _: codes)

    prompts = [[0, *shown, *text[1:], boi] for text in prompts_of(case, model)]
    prompt, drawn = reference.settled(draw, prompts)
    settings = {"mode": "image", "guidance": 3.0, "image_guidance": 1.2, "context": "bos_boi"}
    assert np.array_equal(sampled(model, ours, prompt, 64, **settings), drawn.ids)


# ---- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXPORTED)
def test_what_comes_back_is_bit_for_bit_what_came(name, dtype, published, bundles, tmp_path):
    case = CASES[name]
    case = Case(**{**vars(case), "settings": case.settings | {"dtype": dtype}})
    run("export", "--from", bundles(case), "--to", "hf", "--output", tmp_path / "out")
    expected = comparing.tensors(published(case.make, *case.args, **case.settings))
    comparing.assert_same(comparing.tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    "name",
    [
        *("chameleon", "chameleon-swin", "emu3", "emu3-original", "simplear", "tar"),
        *("llama", "llama3", "llama_tied", "gemma"),
    ],
)
def test_what_comes_back_is_read_by_transformers(name, bundles, oracles, tmp_path):
    """`load` asserts that no tensor is missing, unexpected or of another shape."""
    case = CASES[name]
    run("export", "--from", bundles(case), "--to", "hf", "--output", tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, width(oracles(case)), (2, 24))
    read = reference.load(tmp_path / "out", None if case.oracle in ("", "twin") else case.oracle)
    assert np.array_equal(read.logits(ids), oracles(case).logits(ids))


@pytest.mark.parametrize("settings", [{}, {"count": 1}, {"swin": True, "dtype": "bfloat16"}])
def test_metas_shards_come_back(settings, published, bundles, tmp_path):
    at = "models/7b" if settings.get("count") == 1 else "models/30b"
    case = Case("chameleon", formats.meta, settings=settings, **_META | {"at": at})
    run("export", "--from", bundles(case), "--to", "meta", "--output", tmp_path / "out")
    expected = comparing.joined(published(formats.meta, **settings))
    comparing.assert_same(comparing.joined(tmp_path / "out"), expected)


# ---- fine-tuning, images, mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TUNED_HERE)
def test_twenty_steps_of_fine_tuning_are_torchs(name, models, published):
    case = CASES[name]
    model, ours = models(case)
    folder = published(case.make, *case.args, twin=case.oracle == "twin", **case.settings)
    # A fresh model, because fine-tuning changes it.
    oracle = reference.load(folder, None if case.oracle in ("", "twin") else case.oracle)
    table = case.table()
    learned = [*table.text, *(table.ids(case.codes) if case.codes else ())]
    batches = np.random.default_rng(6).choice(learned, (reference.STEPS, 4, 32))
    expected = oracle.fine_tune(batches)
    found = comparing.fine_tune(model, ours[batches])
    np.testing.assert_allclose(found, expected, atol=TUNED, rtol=0)


def test_images_become_the_references_codes(models, oracles):
    """Only Chameleon's encoder is tested, because the published file has no decoder. Codes may differ only where two
    are equally near."""
    (model, _), oracle = models(CASES["chameleon"]), oracles(CASES["chameleon"])
    pixels = np.round((make.pictures(count=4) + 1) * 127.5).astype(np.uint8)
    with torch.inference_mode():
        vq = oracle.model.model.vqmodel
        inputs = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)
        latents = vq.quant_conv(vq.encoder(inputs)).permute(0, 2, 3, 1).numpy()
        expected = vq.encode(inputs).image_tokens.reshape(4, 8, 8).numpy()
    found = model.image_tokenizer.encode(pixels.transpose(0, 2, 3, 1))
    comparing.assert_codes(found, expected, latents, vq.quantize.embedding.weight.detach().numpy())


def test_emu3s_images_go_there_and_back_as_the_references(models, oracles):
    (model, _), oracle = models(CASES["emu3"]), oracles(CASES["emu3"])
    pixels = np.round((make.pictures(64, 2) + 1) * 127.5).astype(np.uint8)
    vq = oracle.model.model.vqmodel
    with torch.inference_mode():
        inputs = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)
        expected = torch.stack(list(vq.encode(inputs, torch.tensor([[64, 64]] * 2)).image_tokens))
        back = vq.decode(expected).numpy()
    assert np.array_equal(model.image_tokenizer.encode(pixels.transpose(0, 2, 3, 1)), expected.numpy())
    shown = np.clip(np.round((back.transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255).astype(np.int32)
    off = np.abs(model.image_tokenizer.decode(expected.numpy().astype(np.int32)).astype(np.int32) - shown)
    assert off.max() <= 1 and (off > 0).mean() <= 1e-3


def swin_flipped(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"swin_norm": not config["swin_norm"]}))


def first_rows(folder: Path) -> None:
    comparing.edit(
        folder, lambda name, x: np.repeat(x[:1], len(x), axis=0) if "_norm.weight" in name else x, "self_attn"
    )


def norms_as_neighbours(folder: Path) -> None:
    comparing.edit(folder, lambda name, x: neighbours(x, len(x)) if "_norm." in name else x, "self_attn")


def heads_as_neighbours(folder: Path) -> None:
    heads = {"q_proj": 4, "k_proj": 2}

    def turned(name: str, x: np.ndarray) -> np.ndarray:
        count = next((n for part, n in heads.items() if part in name), 0)
        return neighbours(x, count) if count else x

    comparing.edit(folder, turned, "self_attn")


@pytest.mark.parametrize("edit", [swin_flipped, first_rows, norms_as_neighbours, heads_as_neighbours])
def test_a_wrong_layout_is_a_thousand_tolerances_off(edit, bundles, models, oracles):
    """Makes mistakes that do not change shapes. With any of them, the tests above would fail."""
    case = CASES["chameleon"]
    _, ours = models(case)
    wrong = ar_unified.load(bundles(case, edit), dtype="float32")
    ids = np.random.default_rng(1).integers(0, len(ours), (2, 24))
    found = wrong.logits(ours[ids])[..., ours]
    assert np.abs(found - oracles(case).logits(ids)).max() > WRONG
