"""Import says what a folder is that it cannot import, and verbs that take a bundle do so as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ar_unified.cli.main import main
from ar_unified.interop import IMAGE_SYSTEMS, SYSTEMS
from ar_unified.recognised import FAMILIES
from tests.sources import ROOT

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
    "a part of a bundle": ({"config.json": "{}", "language.json": "{}"}, "is a part of a bundle, without"),
    "an empty folder": ({}, "is empty"),
    "a workdir": ({"config.json": "{}", "text_tokenizer/done.json": "", "model/done.json": ""}, "is a workdir"),
    "a checkpoint of Orbax": ({"_CHECKPOINT_METADATA": "{}"}, "is a checkpoint of Orbax"),
    "an adapter": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "is a LoRA adapter"),
    "an image tokenizer of ours": ({"config.json": "{}", "weights.safetensors": ""}, "is an image tokenizer"),
}


@pytest.fixture
def made(tmp_path):
    def make(files: dict[str, str]) -> Path:
        (tmp_path / "given").mkdir(exist_ok=True)
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
    system, kind = {"--text": ("llama", "llama"), "--image": ("liquid", "gemma")}[flag]
    words = ["import", "--from", str(made({"config.json": LLAMA.replace("llama", kind)})), "--as", system]
    assert "tokenizer.pkl is pickled" in refused(capsys, *words, flag, str(pickled), "--output", str(tmp_path / "out"))


def test_a_model_of_no_known_family_keeps_its_own_error(made, tmp_path, capsys):
    folder = made({"config.json": '{"model_type": "bert"}'})
    for system in SYSTEMS:
        said = refused(capsys, "import", "--from", str(folder), "--as", system, "--output", str(tmp_path / "out"))
        assert "expected" in said and "'bert'" in said, said


def test_an_error_about_something_else_is_kept(made, tmp_path, capsys):
    words = ["import", "--from", str(made({"model.gguf": "GGUF"})), "--as", "ibq", "--dtype", "float32"]
    said = refused(capsys, *words, "--output", str(tmp_path / "out"))
    assert "--dtype" in said and "GGUF" not in said


@pytest.mark.parametrize("system", sorted({*SYSTEMS} - {"lwm"}))
def test_a_file_that_is_not_weights(system, made, tmp_path, capsys):
    file = made({"config.json": LLAMA}) / "config.json"
    said = refused(capsys, "import", "--from", str(file), "--as", system, "--output", str(tmp_path / "out"))
    assert "it is a single file: name its folder" in said


@pytest.mark.parametrize("system", IMAGE_SYSTEMS)
def test_shards_that_were_not_downloaded(system, made, tmp_path, capsys):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    folder = made({"model.safetensors.index.json": json.dumps(index)})
    said = refused(capsys, "import", "--from", str(folder), "--as", system, "--output", str(tmp_path / "out"))
    assert "found 0: the download is not complete, for example 'model-1.safetensors' is missing" in said


def test_every_system_has_a_family():
    assert {system for systems in FAMILIES.values() for system in systems} == {*SYSTEMS} - {"lwm"}


# What a verb needs besides the folder of a model.
VERBS = {
    "sample": ("--requests", "none.txt", "--output"),
    "score": ("--data", __file__, "--output"),
    "evaluate": ("--data", "none", "--output"),
    "export": ("--output",),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_say_how_published_files_become_a_bundle(verb, made, tmp_path, capsys):
    folder, more = made({"config.json": LLAMA, "model.safetensors": ""}), (*VERBS[verb], str(tmp_path / "out"))
    said = refused(capsys, verb, "--from", str(folder), *more)
    assert f"`ar-unified import --from {folder} --as llama --output BUNDLE` makes a bundle of it" in said
    file = folder / "config.json"
    assert f"{file}: expected a bundle, which has a bundle.json; it is a single file" in refused(
        capsys, verb, "--from", str(file), *more
    )


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"config.json": LLAMA}, "this folder has a config.json of model_type 'llama': `ar-unified import"),
        ({"config.json": "{}", "bundle.json": "{}"}, "this folder is a bundle: name it with --from"),
    ],
)
def test_a_model_is_no_workdir(files, expected, made, tmp_path, capsys):
    folder = made(files)
    said = refused(capsys, "export", "--workdir", str(folder), "--output", str(tmp_path / "out"))
    assert f"--workdir {folder}: expected a workdir; {expected}" in said
    assert (folder / "config.json").read_text() == files["config.json"]


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"config.json": "{}", "image_tokenizer/config.json": "{}"}, "it has one inside: name"),
        ({"vq.safetensors": ""}, "it has published weights: `ar-unified import --from"),
        ({"vqgan.ckpt": ""}, "it has no .safetensors files, and vqgan.ckpt is pickled"),
    ],
)
def test_what_is_no_image_tokenizer(files, expected, made, tmp_path, capsys):
    folder = made(files)
    config = ("--config", f"{ROOT}/experiments/folder.py:path=none", "--workdir", str(tmp_path / "workdir"))
    said = refused(capsys, "run", *config, f"--config.image_tokenizer.model={folder}")
    assert f"{folder}: expected the folder of an image tokenizer; {expected}" in said
