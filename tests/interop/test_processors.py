"""Chameleon and Emu3 with the files of their own processors: answers to images, and images for texts.

transformers' processors make the ids and the pixel values, and its models the codes and the answers, one request at a
time. Ours serves all requests in one batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ar_unified.cli.main import main

pytestmark = [pytest.mark.interop]
torch = pytest.importorskip("torch", reason="parity with the reference implementations needs torch (make test-interop)")
transformers = pytest.importorskip("transformers", reason="the reference implementations are transformers'")

from safetensors.numpy import load_file, save_file  # noqa: E402

import ar_unified  # noqa: E402
from ar_unified.data.images import Resize  # noqa: E402
from ar_unified.language.document import CodesPart  # noqa: E402
from ar_unified.sampling.decoding import Filter  # noqa: E402
from tests.interop import formats, reference, tables  # noqa: E402
from tests.interop import published as make  # noqa: E402
from tests.interop.weights import draw, taming_shapes  # noqa: E402
from tests.tokenizers import vqgan_transcription as original  # noqa: E402

GREEDY = Filter(temperature=0.0)
THEIRS = 0.0078  # transformers' factor for pixels; Meta divides by 127.5


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] of blocks. Every row and column has an edge, which shows differences of filters."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


# ---- pixels ----------------------------------------------------------------------------------------------------------


def chameleons(folder: Path, **changes: Any) -> Any:
    kind = transformers.models.chameleon.image_processing_pil_chameleon.ChameleonImageProcessorPil
    return kind.from_pretrained(folder, **changes)


def test_chameleons_pixels_are_its_processors_but_for_a_factor(published) -> None:
    """A square image gives the same 8-bit pixels (Lanczos). Their values differ only because 0.0078 is not 1 /
    127.5."""
    processor, square = chameleons(published(make.chameleon)), noise(40, 40)
    values = processor(Image.fromarray(square), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = Resize("crop", 16, 16)(square)
    np.testing.assert_allclose((values + 1) / THEIRS, ours, atol=1e-3)
    apart = np.abs(values - (ours / 127.5 - 1)).max()
    assert 0.01 < apart < 255 * (1 / 127.5 - THEIRS) + 1e-6
    metas = chameleons(published(make.chameleon), rescale_factor=1 / 127.5)
    values = metas(Image.fromarray(square), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(values, ours / 127.5 - 1, atol=1e-6)


def test_of_another_shape_chameleons_crop_is_whole_pixels_of_what_was_scaled(published) -> None:
    """Theirs scales the whole image, with the long side rounded down to whole pixels, and then crops. Ours scales only
    the window that is kept. The results are the same if both are whole numbers; otherwise they differ by at most half a
    pixel."""
    processor = chameleons(published(make.chameleon), rescale_factor=1 / 127.5)

    def both(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        return (values + 1) * 127.5, Resize("crop", 16, 16)(pixels).astype(np.float64)

    np.testing.assert_allclose(*both(noise(32, 64)), atol=1e-3)
    across = np.broadcast_to(4 * np.arange(53, dtype=np.uint8)[None, :, None], (40, 53, 3))
    theirs, ours = both(np.ascontiguousarray(across))  # 21 x 16, cropped by 2.5 on each side
    assert abs(abs((theirs - ours).mean()) - 4 * 2.5 / 2) < 0.2 and np.abs(theirs - ours).max() < 7


def test_emu3s_pixels_are_its_processors_where_no_size_changes(published) -> None:
    processor = transformers.Emu3ImageProcessor.from_pretrained(published(make.emu3))
    ours = Resize("aspect", 64, 64, 8)
    for height, width in ((64, 64), (32, 128)):
        pixels = noise(height, width)
        found = processor(Image.fromarray(pixels), return_tensors="np")
        assert found["image_sizes"].tolist() == [[height, width]] and ours.target(height, width) == (height, width)
        values = found["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(values, ours(pixels) / 127.5 - 1, atol=1e-6)


def test_emu3s_rule_for_sizes_is_another_than_ours(published) -> None:
    """Theirs keeps sizes between a smallest and a largest area. Ours gives all images one area, as in Emu3's training.
    Theirs scales (bicubic) to whole codes, ours crops the rest (Lanczos)."""
    processor = transformers.Emu3ImageProcessor.from_pretrained(published(make.emu3))
    ours = Resize("aspect", 64, 64, 8)
    for size, theirs, area in (((48, 40), (48, 40), (72, 56)), ((100, 50), (88, 40), (88, 48))):
        found = processor(Image.fromarray(noise(*size)), return_tensors="np")
        assert tuple(found["image_sizes"][0]) == theirs and ours.target(*size) == area


# ---- sixteen requests ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A system on both sides.

    Attributes:
        model: our model.
        oracle: their model.
        table: its ids.
        ids: converts a text and pixels to their ids of the prompt, including codes.
        opening: their ids that begin an image of 8 x 8 codes.
        allowed: the ids that are allowed in step i of that image.
        steps: the number of its steps.
        pixels: converts codes [8, 8] to the image that their decoder makes, float [H, W, 3] in -1..1.
        shape: the shape of images in prompts.
        settings: the settings of our requests.
    """

    model: Any
    oracle: reference.Reference
    table: tables.Table
    ids: Callable[[str, np.ndarray | None], list[int]]
    opening: list[int]
    allowed: Callable[[int], Sequence[int]]
    steps: int
    pixels: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, int]
    settings: dict[str, Any]


def imported(folder: Path, system: str, bundle: Path, *more: object) -> Any:
    command = ["import", "--from", folder, "--as", system, "--output", bundle, *more]
    assert main([str(argument) for argument in command]) == 0
    return ar_unified.load(bundle, dtype="float32", batch_size=16, max_length=256)


def chameleon(folder: Path, here: Path) -> Side:
    """Imports transformers' file together with a decoder from vqgan.ckpt."""
    vq = {name.removeprefix("model.vqmodel."): x for name, x in make_tensors(folder).items() if "vqmodel" in name}
    decoder = {name: shape for name, shape in taming_shapes(**formats.VQ).items() if name not in vq}  # type: ignore[arg-type]
    weights = original.Weights(0)
    weights.update(vq | {name: draw(name, shape) for name, shape in decoder.items()})
    save_file(dict(weights), here / "vqgan.safetensors")
    table, oracle = tables.chameleon(), reference.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = chameleons(folder, rescale_factor=1 / 127.5)
    processor = transformers.ChameleonProcessor(images, tokenizer, image_seq_length=64)

    def ids(text: str, shown: np.ndarray | None) -> list[int]:
        with torch.inference_mode():
            pictures = None if shown is None else [Image.fromarray(shown)]
            made = processor(text=("<image>" if shown is not None else "") + text, images=pictures, return_tensors="pt")
            found = [table.id("<s>"), *made["input_ids"][0].tolist()]
            if shown is not None:
                codes = oracle.model.model.get_image_tokens(made["pixel_values"]).reshape(-1).tolist()
                found = filled(found, table.id("<image>"), codes)
        return found

    def pixels(codes: np.ndarray) -> np.ndarray:
        z = weights["quantize.embedding.weight"].astype(np.float64)[codes[None]].transpose(0, 3, 1, 2)
        z = original.conv(weights, "post_quant_conv", z, 16, (1, 1))
        return original.taming_decoder(weights, z, ch=32, ch_mult=(1, 2), blocks=(2, 2), attended=())[0].transpose(
            1, 2, 0
        )

    model = imported(folder, "chameleon", here / "bundle", "--image", here / "vqgan.safetensors")
    codes = table.ids("IMGIMG")
    return Side(model, oracle, table, ids, [table.id("<racm3:break>")], lambda _: codes, 64, pixels, (16, 16), {})


def emu3(folder: Path, here: Path) -> Side:
    table, oracle = tables.emu3(placeholder="<image>"), reference.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.Emu3Processor(transformers.Emu3ImageProcessor.from_pretrained(folder), tokenizer)

    def ids(text: str, shown: np.ndarray | None) -> list[int]:
        with torch.inference_mode():
            pictures = None if shown is None else [Image.fromarray(shown)]
            made = processor(text=("<image>" if shown is not None else "") + text, images=pictures, return_tensors="pt")
            found = made["input_ids"][0].tolist()
            if shown is not None:
                codes = oracle.model.model.get_image_tokens(made["pixel_values"].float(), made["image_sizes"])
                found = filled(found, table.id("<image>"), codes.reshape(-1).tolist())
        return found

    def pixels(codes: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return (
                oracle.model.model.vqmodel.decode(torch.from_numpy(codes[None].astype(np.int64)))[0]
                .permute(1, 2, 0)
                .numpy()
            )

    model = imported(folder, "emu3", here / "bundle")
    model.resize = Resize("aspect", 64, 64, 8)  # the bundle's default is 720 x 720
    codes, end = table.ids("<|visual token"), [table.id("<|extra_200|>")]
    opening = [table.id(name) for name in ("<|image start|>", "8", "*", "8", "<|image token|>")]
    return Side(
        model, oracle, table, ids, opening, lambda step: end if step % 9 == 8 else codes, 72, pixels, (32, 128),
        {"turn": False},
    )  # fmt: skip


def make_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def filled(ids: Sequence[int], placeholder: int, codes: Sequence[int]) -> list[int]:
    """Published ids with the codes at the places that a processor left for them."""
    assert ids.count(placeholder) == len(codes) > 0
    left = iter(codes)
    return [next(left) if each == placeholder else each for each in ids]


SIDES = {"chameleon": (make.chameleon, chameleon), "emu3": (make.emu3, emu3)}


@pytest.mark.parametrize("name", SIDES)
def test_sixteen_ragged_requests_together_are_the_references_one_by_one(name: str, published, tmp_path: Path) -> None:
    """Requests: every second one shows an image, every fourth asks for one."""
    maker, build = SIDES[name]
    side = build(published(maker), tmp_path)
    rng, model, table = np.random.default_rng(0), side.model, side.table
    end = int(model.ids.theirs(np.array([model.vocabulary.control(model.grammar.layout.record.end)]))[0])
    words = [id_ for id_ in (*table.text, end) if id_ < side.oracle.model.lm_head.weight.shape[0]]
    requests, expected = [], []
    for i in range(16):
        shown = noise(*side.shape, seed=i) if i % 2 else None
        draws, count = i % 4 == 3, 6 + i

        def drawn(prompt: Sequence[int], draws: bool = draws, count: int = count) -> reference.Drawn:
            allowed = side.allowed if draws else lambda _: words
            return side.oracle.greedy(prompt, allowed, side.steps if draws else count)

        texts = [" ".join(rng.choice(["the", "red", "circle", "and", "ceiling"], i % 5 + 2)) for _ in range(12)]
        prompts = [side.ids(text, shown) + (side.opening if draws else []) for text in texts]
        prompt, answer = reference.settled(drawn, prompts, [end])
        content = [*([shown] if shown is not None else []), texts[prompts.index(prompt)]]
        kind = {"mode": "image", "image_size": 8 * model.image_tokenizer.factor} if draws else {"mode": "text"}
        kind |= {} if draws else {"max_tokens": count + 1}
        if model.grammar.layout.record.size is None:
            kind.pop("image_size", None)
        plain = {"guidance": 1.0, "repetition_penalty": 1.0, "text": GREEDY, "image": GREEDY}
        made = model.request(*content, seed=i, **plain, **side.settings, **kind)
        requests.append(dataclasses.replace(made, id=f"{i:02}"))
        expected.append(answer.ids)
    found = sorted(model.generate(requests), key=lambda sample: sample.request.id)
    for i, (sample, ids) in enumerate(zip(found, expected, strict=True)):
        assert not sample.error, sample.error
        if i % 4 != 3:
            assert np.array_equal(model.ids.theirs(sample.tokens)[: len(ids)], ids), i
            continue
        (image,) = (part for part in sample.document.parts if isinstance(part, CodesPart))
        first = min(side.allowed(0))
        codes = np.array([id_ for id_ in ids.tolist() if id_ in set(side.allowed(0))]).reshape(8, 8) - first
        assert np.array_equal(image.codes, codes), i
        want = np.clip(np.round((side.pixels(codes) + 1) * 127.5), 0, 255)
        off = np.abs(model.detokenize_image(image.codes).astype(np.float64) - want)
        assert off.max() <= 1 and np.count_nonzero(off) <= max(2, 1e-3 * off.size)  # .5 may round either way


def test_a_decoder_of_another_encoder_is_refused(published, tmp_path: Path, capsys) -> None:
    save_file(formats.vqgan(seed=9), tmp_path / "vqgan.safetensors")
    command = ["import", "--from", published(make.chameleon), "--as", "chameleon", "--output", tmp_path / "b"]
    assert main([str(each) for each in (*command, "--image", tmp_path / "vqgan.safetensors")]) == 2
    assert "expected the encoder that the model's own file has" in capsys.readouterr().err
