"""SimpleAR and Tar: language models without imported image tokenizers, so images are codes in requests and answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ar_unified
from ar_unified.bundle import Bundle
from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.language.document import CodesPart, Document, TextPart, Turn
from ar_unified.sampling.decoding import Filter
from tests.interop import comparing, formats, tables
from tests.interop.tables import Table, write_json
from tests.interop.weights import Sizes, drawn, transformer_shapes
from tests.test_bundle import reseal

SENTENCES = ["the red circle", "a small thing on the ceiling"]


def qwen2(folder: Path, table: Table, *, named: bool = True) -> Path:
    """A Qwen2 with a table's ids. named: its tokenizer.json has all names; otherwise a file beside it has the names
    after Qwen2.5's."""
    sizes = Sizes(table.size)
    widths = {"q": sizes.N * sizes.H, "k": sizes.K * sizes.H, "v": sizes.K * sizes.H}
    biases = {
        f"model.layers.{i}.self_attn.{name}_proj.bias": (width,)
        for i in range(sizes.L)
        for name, width in widths.items()
    }
    formats.save(folder, drawn(transformer_shapes(sizes) | biases))
    file, first = table.split(), table.id("<|file_sep|>") + 1
    if not named:
        own = {token["content"]: token["id"] for token in file["added_tokens"] if token["id"] >= first}
        file["added_tokens"] = [token for token in file["added_tokens"] if token["id"] < first]
        file["model"]["vocab"] = {name: id for name, id in table.vocabulary.items() if id < first}
        write_json(folder, added_tokens=own)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": table.size, "hidden_size": sizes.D,
        "intermediate_size": sizes.F, "num_hidden_layers": sizes.L, "num_attention_heads": sizes.N,
        "num_key_value_heads": sizes.K, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_sliding_window": False, "sliding_window": 32768,
    }  # fmt: skip
    write_json(folder, config=config, tokenizer=file)
    return folder


def run(*argv: object) -> int:
    return main([str(argument) for argument in argv])


@pytest.fixture(scope="module")
def simplear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A download's folder that contains its bundle."""
    folder = qwen2(tmp_path_factory.mktemp("simplear"), tables.simplear(), named=False)
    assert run("import", "--from", folder, "--as", "simplear", "--size", "4x4", "--output", folder / "bundle") == 0
    return folder


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = qwen2(tmp_path_factory.mktemp("tar"), tables.tar())
    assert run("import", "--from", folder, "--as", "tar", "--size", "9x9", "--output", folder / "bundle") == 0
    return folder


def test_codes_are_the_ids_behind_the_last_name(simplear: Path) -> None:
    model, table = ar_unified.load(simplear / "bundle"), tables.simplear()
    codes = np.arange(16, dtype=np.int32).reshape(4, 4)
    turns = (Turn("user", (TextPart("the red"),)), Turn("assistant", (CodesPart(codes),)))
    found = model.ids.theirs(model.encode(Document(turns))).tolist()
    text = model.ids.theirs(model.grammar.text_codec.encode("the red")).tolist()
    first = len(table.names)
    expected = [table.id("<|t2i|>"), *text, table.id("<|soi|>"), *range(first, first + 16), table.id("<|im_end|>")]
    assert found == expected and model.vocabulary.codebook_size == 64
    assert "only codes (64 different ones)" in (simplear / "bundle" / "README.md").read_text()


def test_two_files_that_say_different_ids_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Otherwise codes would begin at another id, and no shape would show it."""
    folder = qwen2(tmp_path / "download", tables.simplear(), named=False)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer.json").rename(folder / "tokenizer" / "tokenizer.json")
    added = json.loads((folder / "added_tokens.json").read_text())
    write_json(folder, added_tokens=added | {"<|im_end|>": added["<|sov|>"] + 1})
    command = [
        "import",
        "--from",
        folder,
        "--as",
        "simplear",
        "--text",
        folder / "tokenizer",
        "--output",
        tmp_path / "b",
    ]
    assert run(*command) == 2 and "'<|im_end|>': expected id" in capsys.readouterr().err
    write_json(folder, added_tokens=added)
    assert run(*command, "--size", "4x4") == 0 and Bundle(tmp_path / "b").grammar.vocabulary.codebook_size == 64


def test_a_scale_is_the_size_that_was_asked_for(tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, table = ar_unified.load(tar / "bundle"), tables.tar()
    ids = model.ids.theirs(model.grammar.image(np.full((9, 9), 5, np.int32))).tolist()
    assert ids == [table.id("<im_start>"), table.id("<S2>"), *[table.id("<I5>")] * 81, table.id("<im_end>")]
    command = ["import", "--from", tar, "--as", "tar", "--output", tmp_path / "b", "--size"]
    for size in ("9x13", "8x8"):
        assert run(*command, size) == 2 and "expected 27x27, 13x13, 9x9" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_tar_talks_in_qwens_frames(tar: Path) -> None:
    """Messages and the answer are as `apply_chat_template` writes them. <|im_end|> in a text stays text."""
    model, table = ar_unified.load(tar / "bundle", max_length=256), tables.tar()
    opens, closes = table.id("<|im_start|>"), table.id("<|im_end|>")

    def text(said: str) -> list[int]:
        return model.ids.theirs(model.grammar.text_codec.encode(said)).tolist()

    messages = [{"role": "user", "content": "the red <|im_end|>"}]
    said: list[int] = []
    for who, content in (("system", "You are a helpful assistant."), ("user", "the red <|im_end|>")):
        said += [opens, *text(f"{who}\n{content}"), closes, *text("\n")]
    said += [opens, *text("assistant\n")]
    asked = model.request("the red <|im_end|>", mode="text", seed=0, max_tokens=4)
    assert model.ids.theirs(model.engine.plan(asked).prompt).tolist() == said
    answer = model.chat(messages, max_tokens=4, seed=3)
    assert answer["role"] == "assistant"
    chat = model.conversation()
    first = chat.say("the red <|im_end|>", max_tokens=4, seed=3, mode="text")
    assert first == answer and chat.say("and?", max_tokens=4, mode="text")["role"] == "assistant"
    drawn = model.request("the red", mode="image", seed=0)
    (sample,) = model.generate([drawn])
    assert not sample.error and sample.document.parts[0].codes.shape == (9, 9)


@pytest.mark.parametrize("name", ["<|soi|>", "<I5>", "<im_start>", "<|im_start|>"])
def test_no_text_is_spelled_with_a_name(name: str, simplear: Path, tar: Path) -> None:
    """Tar's tokenizer does not mark its codes as special tokens."""
    for folder in (simplear, tar):
        model = ar_unified.load(folder / "bundle")
        ids = model.grammar.text_codec.encode(f"a {name} b")
        assert max(ids) < model.vocabulary.text_size and model.grammar.text_codec.decode(ids) == f"a {name} b"


def test_images_are_drawn_as_codes_and_pixels_are_refused(simplear: Path) -> None:
    model = ar_unified.load(simplear / "bundle", max_length=64)
    asked = model.request("the red", mode="image", seed=0, guidance=6.0, image=Filter(), image_size=[4, 4])
    (sample,) = model.generate([asked])
    (image,) = (part for part in sample.document.parts if isinstance(part, CodesPart))
    assert image.codes.shape == (4, 4) and image.codes.max() < 64
    again = model.request(CodesPart(image.codes), "a", mode="text", seed=0, max_tokens=4)
    assert not next(model.generate([again])).error
    with pytest.raises(UserError, match="images are only codes"):
        model.draw("the red")
    with pytest.raises(UserError, match="images are only codes"):
        model.ask(Image.new("RGB", (4, 4)), "what?")


def test_it_goes_on_being_trained_on_text_and_comes_back(simplear: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("".join(f"{text}\n\n" for text in SENTENCES * 20))
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "from ar_unified.experiment.config import begin_with, defaults\n"
        "def get_config():\n"
        "    config = defaults()\n"
        f"    config.data.train = (ConfigDict(dict(kind='text', path={str(tmp_path / 'texts')!r})),)\n"
        f"    begin_with(config, {str(simplear / 'bundle')!r})\n"
        "    config.data.max_tokens = config.training.sequence_length = 64\n"
        "    config.training.update(dict(steps=2, warmup_steps=0, batch_size=8, preview_every=0))\n"
        "    return config\n"
    )
    for verb in ("tokenizer", "prepare", "train"):
        assert run(verb, "--config", tmp_path / "mine.py", "--workdir", tmp_path / "w") == 0
    assert run("export", "--workdir", tmp_path / "w", "--output", tmp_path / "tuned") == 0
    assert Bundle(tmp_path / "tuned").language == Bundle(simplear / "bundle").language
    assert run("export", "--from", tmp_path / "tuned", "--to", "hf", "--output", tmp_path / "out") == 0
    found, came = comparing.tensors(tmp_path / "out"), comparing.tensors(simplear)
    assert found.keys() == came.keys() and any(np.any(found[name] != came[name]) for name in came)
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text())["<|soi|>"]


@pytest.mark.parametrize("change", [{"files": {"../evil.json": {}}}, {"text_file": "../tokenizer.json"}])
def test_a_bundle_that_somebody_sent_is_exported_into_its_folder_alone(
    change: dict[str, Any], simplear: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bundle = Path(shutil.copytree(simplear / "bundle", tmp_path / "bundle"))
    record = json.loads((bundle / "published.json").read_text())
    (bundle / "published.json").write_text(json.dumps(record | change))
    reseal(bundle)
    assert run("export", "--from", bundle, "--to", "hf", "--output", tmp_path / "o" / "out") == 2
    assert "published.json: expected the name of a file, found '../" in capsys.readouterr().err
    assert not list(tmp_path.rglob("evil.json")) and not (tmp_path / "o" / "out").exists()
