"""The easy-VQA checker: what it reads in spite of blur and noise, and what it refuses to call a shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ar_unified.evaluation.easy_vqa import COLORS, SHAPES, facts, read_image
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.language.document import Document, ImagePart, TextPart

DATA = Path(__file__).parents[3] / "shared" / "data" / "easy-vqa"


def draw(shape: str, color: object, size: float = 20, at: tuple[float, float] = (31, 34)) -> Image.Image:
    """An anti-aliased image like those of the dataset. The figure's box is `size` wide around `at`."""
    side, scale = 64, 4
    x, y, r = (v * scale for v in (*at, size / 2))
    image = Image.new("RGB", (side * scale, side * scale), (244, 236, 250))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "rectangle":
        pen.rectangle((x - r, y - 0.7 * r, x + r, y + 0.7 * r), fill=color)
    else:
        pen.polygon([(x, y - 0.9 * r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=color)
    return image.reduce(scale)


def spoil(image: Image.Image, blur: float = 1.0, noise: float = 8.0) -> np.ndarray:
    """An image as a weak image tokenizer reconstructs it; `blur` in pixels, `noise` in levels."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), np.float32)
    return np.clip(pixels + np.random.default_rng(0).normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)


def seen(pixels: np.ndarray) -> tuple[str, str] | None:
    reading = read_image(pixels)
    return None if reading is None else (reading.color, reading.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_reads_every_figure_through_blur_and_noise(shape, color):
    for size, at in ((14, (20, 40)), (20, (31, 34)), (30, (40, 24))):
        image = draw(shape, COLORS[color], size, at)
        assert seen(np.asarray(image)) == seen(spoil(image)) == (color, shape)
        assert read_image(np.asarray(image)).fit > 0.9


def test_reads_other_sizes_of_image():
    image = draw("triangle", "blue", 24)
    for side in (32, 48, 96):
        assert seen(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))) == ("blue", "triangle")


def test_refuses_what_is_not_one_figure_of_the_set():
    rng = np.random.default_rng(0)
    two = draw("circle", "red", 16, (16, 16))
    two.paste(draw("rectangle", "red", 16, (16, 16)).crop((4, 4, 28, 28)), (36, 36))
    mixed = np.array(draw("rectangle", "red", 24))
    mixed[:, 31:] = np.asarray(draw("rectangle", "blue", 24))[:, 31:]
    refused = {
        "blank": np.full((64, 64, 3), 240, np.uint8),
        "noise": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "gradient": np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (64, 64, 3)).astype(np.uint8),
        "two figures": np.asarray(two),
        "two colours": mixed,
        "foreign colour": np.asarray(draw("circle", (255, 128, 0), 30)),
        "triangle upside down": np.asarray(draw("triangle", "red", 30))[::-1],
    }
    assert {name: seen(pixels) for name, pixels in refused.items()} == dict.fromkeys(refused)


def test_protocol_takes_the_facts_from_meta_or_from_the_caption():
    pixels = np.asarray(draw("circle", COLORS["teal"]))
    check = PROTOCOLS["easy_vqa"].image_matches
    assert check is not None
    parts = (TextPart("a teal circle"), ImagePart(pixels))
    assert check(Document.of(parts, 1), pixels)
    assert not check(Document.of((TextPart("a teal triangle"), parts[1]), 1), pixels)
    assert not check(Document.of(parts, 1, meta={"color": "blue", "shape": "circle"}), pixels)
    assert facts("a gray rectangle") == ("gray", "rectangle") and facts("a red or blue circle") is None


def like_the_real_set(folder: Path) -> Path:
    """A folder in the format of the real one, with a figure of random size and place in each of 120 images."""
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for i in range(120):
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        size, x, y = rng.integers(14, 31), *rng.integers(18, 46, 2)
        draw(shape, COLORS[color], size, (x, y)).save(folder / f"images/{i}.png")
        row = {"image": f"images/{i}.png", "text": f"a {color} {shape}", "shape": shape, "color": color}
        rows.append(json.dumps(row) + "\n")
    (folder / "captions.jsonl").write_text("".join(rows))
    return folder


def test_agrees_with_the_captions_of_a_whole_set(tmp_path):
    """A test on the real dataset if it is beside the repository."""
    real = (DATA / "captions.jsonl").is_file()
    data = DATA if real else like_the_real_set(tmp_path)
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()][:: 12 if real else 1]
    right = {"original": 0, "spoiled": 0}
    for row in rows:
        with Image.open(data / row["image"]) as file:
            image = file.convert("RGB")
        wanted = row["color"], row["shape"]
        right["original"] += seen(np.asarray(image)) == wanted
        right["spoiled"] += seen(spoil(image)) == wanted
    assert right["original"] == len(rows)
    assert right["spoiled"] >= 0.98 * len(rows), right
