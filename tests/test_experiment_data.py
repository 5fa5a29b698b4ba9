"""The scripts of experiments/data, with small stand-ins for their sources, and their messages if data are missing."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ar_unified.data.images import to_png
from ar_unified.data.scenes import read_caption, scene_from_json, split_of
from ar_unified.data.shapes import captions_held_out
from ar_unified.data.sources import open_source
from ar_unified.errors import UserError
from ar_unified.evaluation.shapes import read_scene
from ar_unified.experiment import config as configs
from ar_unified.language.document import ImagePart, TextPart
from tests.data import copies

ROOT = Path(__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def figure(path, shape, color, size=64):
    image = Image.new("RGB", (size, size), (240, 235, 250))
    draw = ImageDraw.Draw(image)
    if shape == "triangle":
        draw.polygon([(30, 10), (10, 50), (50, 50)], fill=color)
    else:
        getattr(draw, {"circle": "ellipse"}.get(shape, shape))([10, 14, 50, 54], fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.mark.parametrize("kind", ["folder", "wheel"])
def test_easy_vqa_of_its_package(tmp_path, kind, capsys):
    data = tmp_path / "package" / "easy_vqa" / "data"
    shown = [("circle", (0, 0, 255)), ("rectangle", (255, 0, 0)), ("triangle", (0, 128, 128)), ("circle", (0, 255, 0))]
    for i, (shape, color) in enumerate(shown):
        figure(data / "train" / "images" / f"{i}.png", shape, color)
    figure(data / "test" / "images" / "10.png", "rectangle", (0, 0, 0))
    (data / "train" / "images" / ".DS_Store").write_bytes(b"")
    others = ["black", "blue", "brown", "gray", "red", "teal", "yellow"]
    asked = [
        ["what is the blue shape?", "circle", 0], ["is there a red shape?", "no", 1],
        ["is there not a triangle?", "no", 2], *([f"is no {color} shape present?", "yes", 3] for color in others),
    ]  # fmt: skip
    (data / "train" / "questions.json").write_text(json.dumps(asked))
    (data / "test" / "questions.json").write_text(json.dumps([["what color is the shape?", "black", 10]]))
    source = tmp_path / "package"
    if kind == "wheel":
        source = tmp_path / "easy_vqa-1.0-py3-none-any.whl"
        with zipfile.ZipFile(source, "w") as wheel:
            for file in sorted(data.rglob("*")):
                wheel.write(file, file.relative_to(tmp_path / "package"))
    maker = script("make_easy_vqa")
    said = maker.facts([tuple(entry) for entry in asked])
    assert said == {
        0: {"color": "blue", "shape": "circle"}, 1: {}, 2: {"shape": "triangle"}, 3: {"color": "green"}
    }  # fmt: skip
    output = tmp_path / "out"
    maker.main(["--source", str(source), "--output", str(output)])
    assert "5 images, 5 captions, 11 questions" in capsys.readouterr().out
    texts = ["a blue circle", "a red rectangle", "a teal triangle", "a green circle", "a black rectangle"]
    assert [row["text"] for row in rows(output / "captions.jsonl")] == texts
    assert (output / "images/train/1.png").read_bytes() == (data / "train/images/1.png").read_bytes()

    config = configs.load(f"{ROOT}/experiments/easy_vqa.py:path={output}")
    captions, questions = (open_source(configs.plain(spec)) for spec in config.data.validation)
    (image, question, answer) = questions[0].parts
    assert isinstance(image, ImagePart) and (question.text, answer.text) == ("what color is the shape?", "black")
    assert captions[0].parts[0] == TextPart("a black rectangle")


def test_easy_vqa_without_its_package(tmp_path, capsys):
    for source, words in [("none", "no such file"), (str(tmp_path), "expected data/train/questions.json in it")]:
        with pytest.raises(SystemExit) as stop:
            script("make_easy_vqa").main(["--source", source, "--output", str(tmp_path / "out")])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_emoji_of_files_and_names(tmp_path, capsys):
    names = {
        "#️⃣": {"name": "keycap #", "group": "Symbols"}, "😀": {"name": "grinning face", "group": "Smileys"},
        "🏳️‍🌈": {"name": "rainbow flag", "group": "Flags"}, "🇫🇷": {"name": "France", "group": "Flags"},
        "🦤": {"name": "dodo", "group": "Animals"},
    }  # fmt: skip
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "128").mkdir()
    for code in ("1f600", "0023_20e3", "1f3f3_200d_1f308", "1f1eb_1f1f7"):
        Image.new("RGBA", (128, 128), (9, 9, 9, 255)).save(tmp_path / "128" / f"emoji_u{code}.png")
    output = tmp_path / "out"
    maker = script("make_emoji")
    arguments = ["--names", str(tmp_path / "names.json"), "--output", str(output)]
    maker.main(["--images", str(tmp_path / "128"), *arguments])
    assert "3 emoji; 1 names without an image" in capsys.readouterr().out
    assert [(row["image"], row["text"], row["codepoints"]) for row in rows(output / "captions.jsonl")] == [
        ("images/emoji_u0023_20e3.png", "keycap #", "23-20e3"),
        ("images/emoji_u1f3f3_200d_1f308.png", "rainbow flag", "1f3f3-200d-1f308"),
        ("images/emoji_u1f600.png", "grinning face", "1f600"),
    ]
    config = configs.load(f"{ROOT}/experiments/emoji.py:path={output}")
    assert len(open_source(configs.plain(config.data.train[0]))) == 3

    for more, words in [
        (["--images", str(tmp_path / "none")], "no such folder"),
        (["--font", str(tmp_path / "names.json")], "expected NotoColorEmoji.ttf with embedded images"),
        (["--images", str(output)], "no emoji in --names has an image"),
    ]:
        with pytest.raises(SystemExit) as stop:
            maker.main([*more, *arguments])
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_photos_of_clones(tmp_path, capsys):
    generator = np.random.default_rng(0)

    def photo(path, height, width):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(path)

    for i in range(102):
        photo(tmp_path / f"clothing/train/longsleeve/{i}.jpg", 16, 12)
    photo(tmp_path / "clothing/train/hat/a.jpg", 300, 400)
    photo(tmp_path / "cooking/static/pix/pie.webp", 300, 800)
    photo(tmp_path / "cooking/static/pix/unseen.webp", 30, 30)
    (tmp_path / "cooking/content").mkdir()
    (tmp_path / "cooking/content/pie.md").write_text("# Pie\n![Pie](/pix/pie.webp)\n![Gone](/pix/gone.webp)")
    maker = script("make_photos")
    for number in maker.KODAK:
        photo(tmp_path / f"kodak/PhotoCD/{number:02d}.png", 20, 30)
    output = tmp_path / "out"
    sources = [f"--{name}={tmp_path / name}" for name in ("clothing", "cooking", "kodak")]
    maker.main([*sources, "--output", str(output)])
    assert capsys.readouterr().out.split()[1::3] == ["101", "1", "8"]
    assert Image.open(output / "clothing/images/train/hat/a.jpg").size == (171, 128)
    assert Image.open(output / "based-cooking/images/pie.jpg").size == (384, 144)
    assert {row["text"] for row in rows(output / "clothing/captions.jsonl")} == {
        "a photo of a hat", "a photo of a long-sleeve shirt"
    }  # fmt: skip
    assert (output / "kodak/images/kodim23.png").read_bytes() == (tmp_path / "kodak/PhotoCD/23.png").read_bytes()
    config = configs.load(f"{ROOT}/experiments/photos.py:path={output}")
    lengths = [len(open_source(configs.plain(spec))) for spec in (*config.data.train[:2], *config.data.validation)]
    assert lengths == [101, 1, 8]
    config = configs.load(f"{ROOT}/experiments/photos.py:path={output}/clothing,validation={output}/kodak")
    assert [spec.path for spec in (*config.data.train, *config.data.validation)] == [
        f"{output}/clothing", f"{output}/kodak"
    ]  # fmt: skip
    config = configs.load(f"{ROOT}/experiments/photos.py:path={output}/clothing")
    assert [spec.path for spec in config.data.train] == [f"{output}/clothing"] and not config.data.validation
    with pytest.raises(SystemExit):
        maker.main(["--kodak", str(tmp_path / "cooking"), "--output", str(output)])
    assert "expected kodim01.png or 01.png under it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["easy_vqa", "emoji", "photos"])
def test_missing_data_name_the_command_that_makes_them(tmp_path, name):
    config = configs.load(f"{ROOT}/experiments/{name}.py:path={tmp_path / 'none'}")
    command = f"python experiments/data/make_{name}.py"
    for spec in (config.data.train[0], config.data.validation[0]):
        with pytest.raises(
            UserError, match=rf"none.*: no such file or folder\. This command makes it: {command} .*--output \S+/none"
        ):
            open_source(configs.plain(spec))
    assert (ROOT / command.split()[1]).is_file()


def test_shape_pairs_differ_in_one_property(tmp_path):
    module = script("make_shape_pairs")
    assert module.make(tmp_path, {"train": (6, 4), "validation": (2, 1)}).endswith("13 pairs")
    again = (tmp_path / "pairs.jsonl").read_bytes()
    module.make(tmp_path, {"train": (6, 4), "validation": (2, 1)})
    assert (tmp_path / "pairs.jsonl").read_bytes() == again
    source = open_source(dict(kind="jsonl", path=tmp_path / "pairs.jsonl", split="train"))
    documents = [source[i] for i in range(len(source))]
    assert [document.task for document in documents] == ["text_to_image"] * 6 + ["image_to_text"] * 4
    for document in documents[:6]:
        right, wrong = document.answer[0].pixels, document.rejected.parts[0].pixels
        scene, other = scene_from_json(document.meta["scene"]), read_scene(wrong)
        assert read_scene(right) == scene != other and len(other) == len(scene)
    for document in documents[6:]:
        assert document.answer != document.rejected.parts and isinstance(document.asked[0].parts[0], ImagePart)


def test_a_mixture_takes_sets_of_any_form_with_their_shares(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    given = [dict(image=to_png(pixels + i), text=f"grey {i}") for i in range(40)]
    copies.folder(tmp_path / "photos", "captions", given)
    copies.parquet(tmp_path / "table", given)
    copies.webdataset(tmp_path / "tars", given)
    for i in range(20):
        (tmp_path / "books" / "old").mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / "old" / f"{i}.txt").write_text(f"text {i}")
    arg = "sources=photos@0.4+table@0.3+tars@0.2+books/old@0.1"
    config = configs.load(f"{ROOT}/experiments/mixture.py:path={tmp_path},{arg}")
    train, held_out = ([configs.plain(spec) for spec in part] for part in (config.data.train, config.data.validation))
    assert [spec["kind"] for spec in train] == ["folder", "parquet", "webdataset", "text"]
    assert [spec["weight"] for spec in train] == [0.4, 0.3, 0.2, 0.1]
    for spec, other in zip(train, held_out, strict=True):
        assert len(open_source(spec)) > 10 * len(open_source(other)) > 0
    for wrong in ("photos", "photos@", "@1", "photos@0", "photos@-1", "photos@much", "photos@1+"):
        with pytest.raises(UserError, match=r"mixture.py: expected sources=NAME@SHARE\+NAME@SHARE, as based-cooking"):
            configs.load(f"{ROOT}/experiments/mixture.py:path={tmp_path},sources={wrong}")


def test_unseen_prompts_are_new_scenes_without_pictures(tmp_path):
    module = script("make_unseen_prompts")
    assert module.make(tmp_path, 40).endswith("40 prompts")
    again = (tmp_path / "prompts.jsonl").read_bytes()
    module.make(tmp_path, 40)
    assert (tmp_path / "prompts.jsonl").read_bytes() == again
    source = open_source(dict(kind="jsonl", path=tmp_path / "prompts.jsonl"))
    captions, tested = captions_held_out("unseen_combinations")
    assert len(source) == 40 and len(captions) > 900 and len(tested) == 874  # of 1,000 examples
    objects = Counter()
    for document in map(source.__getitem__, range(40)):
        (words,) = document.asked[0].parts
        scene = scene_from_json(document.meta["scene"])
        assert document.asks and not document.answer and read_caption(words.text) == scene
        assert split_of(scene) == "unseen_combinations" and words.text not in captions
        assert len(scene) == 1 or document.meta["scene"] not in tested
        objects[len(scene)] += 1
    assert objects[1] > 5 and objects[2] + objects[3] > 15
