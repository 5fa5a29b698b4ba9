"""Import says what a folder is that it cannot import, and verbs that take a bundle do so as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ar_unified.cli.main import main
from ar_unified.interop import IMAGE_SYSTEMS, SYSTEMS

LLAMA = json.dumps(
    dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=64,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    )
)  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
# What a person may name, by its files, and words of the message for every model.
FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "pickled weights": (
        {"config.json": LLAMA, "pytorch_model.bin": "PK"},
        "pytorch_model.bin is pickled: convert it with `ar-unified convert-pickle --from",
    ),
    "a GGUF file": ({"model.gguf": "GGUF"}, "GGUF file, which is not read: download the .safetensors"),
    "weights that Git LFS has not fetched": (
        {"config.json": LLAMA, "model.safetensors": POINTER},
        "has only a pointer of Git LFS for model.safetensors",
    ),
    "a bundle": ({"config.json": "{}", "bundle.json": "{}"}, "is a bundle already"),
    "a workdir": ({"config.json": "{}", "text_tokenizer/done.json": "", "model/done.json": ""}, "is a workdir"),
    "a checkpoint of Orbax": ({"_CHECKPOINT_METADATA": "{}"}, "is a checkpoint of Orbax"),
    "an adapter": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "is a LoRA adapter"),
    "an image tokenizer of ours": ({"config.json": "{}", "weights.safetensors": ""}, "is an image tokenizer"),
}


@pytest.fixture
def made(tmp_path):
    def make(files: dict[str, str]) -> Path:
        for name, content in files.items():
            path = tmp_path / "given" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path / "given"

    return make


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("system", [*SYSTEMS, *IMAGE_SYSTEMS])
def test_import_says_what_a_folder_is(system, made, tmp_path, capsys):
    for number, (files, expected) in enumerate(FOLDERS.values()):
        folder = made(files).rename(tmp_path / f"{number}")
        said = refused(capsys, "import", "--from", str(folder), "--as", system, "--output", str(tmp_path / "out"))
        assert expected in said and f"--from {folder}: it " in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--from", "--text", "--image"])
def test_import_names_what_is_not_there(flag, made, tmp_path, capsys):
    given = {"--from": str(made({"config.json": LLAMA})), "--as": "emu3", "--output": str(tmp_path / "out")}
    words = [word for pair in (given | {flag: str(tmp_path / "none")}).items() for word in pair]
    assert f"{flag} {tmp_path / 'none'}: expected a file or a folder, found nothing" in refused(
        capsys, "import", *words
    )


def test_import_names_the_system_of_another_model(made, tmp_path, capsys):
    folder = made({"config.json": LLAMA})
    words = ("import", "--from", str(folder), "--output", str(tmp_path / "out"), "--as")
    for system in sorted({*SYSTEMS} - {"llama"}):
        assert f"model_type 'llama': give --as llama, not {system}" in refused(capsys, *words, system)
    assert "text tokenizer" in refused(capsys, *words, "llama"), "of the right system, its own error is shown"
    (folder / "config.json").write_text("{}")
    assert "describes no model: it has no model_type" in refused(capsys, *words, "emu3")


@pytest.mark.parametrize("flag", ["--text", "--image"])
def test_import_says_what_another_path_is(flag, made, tmp_path, capsys):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "tokenizer.pkl").write_text("")
    words = ["import", "--from", str(made({"config.json": LLAMA.replace("llama", "gemma")})), "--as", "liquid"]
    assert "tokenizer.pkl is pickled" in refused(capsys, *words, flag, str(pickled), "--output", str(tmp_path / "out"))


def test_verbs_say_how_published_files_become_a_bundle(made, tmp_path, capsys):
    folder = made({"config.json": LLAMA, "model.safetensors": ""})
    said = refused(capsys, "sample", "--from", str(folder), "--requests", "none.txt", "--output", str(tmp_path / "out"))
    assert f"`ar-unified import --from {folder} --as llama --output BUNDLE` makes a bundle of it" in said
