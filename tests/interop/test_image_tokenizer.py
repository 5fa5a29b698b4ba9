"""Separate image tokenizers: `import` makes a folder like that of a trained one, `export` writes the published file
again.

An imported tokenizer has the same parameters and network as in tests/tokenizers (test_published_image.py and
test_movq.py), where they are compared with the originals.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from ar_tokenizers.image import movq_weights, published, taming
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig
from ar_tokenizers.image.published import settings_of
from ar_tokenizers.image.tokenizer import ImageTokenizer
from safetensors.numpy import load_file, save_file

from ar_unified.cli.main import main
from ar_unified.interop import DIALECTS, IMAGE_SYSTEMS, images
from tests.interop import comparing
from tests.tokenizers import test_movq
from tests.tokenizers import test_published_image as tiny


class File(NamedTuple):
    """A tiny tokenizer's published file: its tensors, its settings by file, and the config and parameters that they
    give. `known`: whether a file has the settings."""

    config: AutoencoderConfig
    tensors: dict[str, np.ndarray]
    params: dict
    settings: dict[str, str]
    known: bool = True


def _of(name: str, settings: Callable[[AutoencoderConfig], dict[str, str]] | None) -> File:
    here = tiny.reference(name)
    more = settings(here.config) if settings else {}
    return File(here.config, dict(here.tensors), tiny.imported(name).params, more, settings is not None)


def _movq(dialect: str, settings: Callable[[AutoencoderConfig], dict[str, str]] | None) -> File:
    config, tensors, params, _ = test_movq.imported(dialect)
    return File(config, tensors, params, settings(config) if settings else {}, settings is not None)


def _json(config: AutoencoderConfig, dialect: str) -> dict[str, str]:
    return {"config.json": json.dumps(settings_of(config, dialect))}


def _yaml(config: AutoencoderConfig) -> dict[str, str]:
    return {"vqgan.yaml": "# theirs\n" + yaml.safe_dump({"model": {"params": settings_of(config, "taming")}})}


FILES: dict[str, Callable[[], File]] = {
    "chameleon_vq": lambda: _of("chameleon", _yaml),
    "llamagen_vq": lambda: _of("llamagen", lambda config: _json(config, "llamagen")),
    "janus_vq": lambda: _of("janus", lambda config: _json(config, "janus_hf")),
    "emu3_vq": lambda: _movq("emu3", lambda config: _json(config, "emu3")),
    "movqgan": lambda: _movq("movqgan", None),
    "showo_vq": lambda: _of("showo", None),
    "lwm_vq": lambda: _of("lwm", None),
    "ibq": lambda: _of("ibq", None),
}


def run(*argv: object) -> int:
    return main([str(argument) for argument in argv])


def download(folder: Path, system: str, patch: pytest.MonkeyPatch, **more: np.ndarray) -> tuple[Path, File]:
    """The folder as it is published, with additional tensors `more`. Sizes that are fixed in our code become tiny."""
    file = FILES[system]()
    folder.mkdir()
    save_file(file.tensors | more, folder / "vq.safetensors")
    for name, content in file.settings.items():
        (folder / name).write_text(content)
    if not file.known:
        patch.setattr(images, "config_of", lambda *_: file.config)
    small = PRESETS["taming_f8"] | dict(factor=4, width=32, multipliers=(1, 2, 2), blocks=(1, 1, 1))
    patch.setitem(published._LEVELS, 3, small)  # VQ-16 has five levels, VQ-8 four
    return folder, file


def test_every_system_and_dialect_is_named_once() -> None:
    assert set(IMAGE_SYSTEMS) == set(images.SETTINGS) == set(published.SYSTEMS) == set(FILES)
    assert set(DIALECTS) == {*taming.DIALECTS, *movq_weights.DIALECTS}


@pytest.mark.parametrize("system", FILES)
def test_it_is_what_computes_as_the_original_does_and_comes_back(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = download(tmp_path / "download", system, monkeypatch)
    assert run("import", "--from", folder, "--as", system, "--output", tmp_path / "made") == 0
    tokenizer = ImageTokenizer.load(tmp_path / "made")
    assert dataclasses.replace(tokenizer.config, beta=file.config.beta) == file.config
    jax.tree.map(np.testing.assert_array_equal, tokenizer.params, file.params)
    assert run("export", "--from", tmp_path / "made", "--output", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*file.settings, "vq.safetensors"])
    comparing.assert_same(load_file(tmp_path / "out" / "vq.safetensors"), file.tensors)
    assert all((tmp_path / "out" / name).read_text() == content for name, content in file.settings.items())


def test_a_tokenizer_in_a_models_file_of_two_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The tokenizer's tensors are exported with their dtypes, and a message says that those of the language model are
    left out."""
    folder, file = download(tmp_path / "download", "janus_vq", monkeypatch)
    own = {f"gen_vision_model.{name}": x.astype(ml_dtypes.bfloat16) for name, x in file.tensors.items()}
    used = "gen_vision_model.quantize.codebook_used"
    own[used] = file.tensors["quantize.codebook_used"]
    save_file(own | {"language_model.lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "vq.safetensors")
    assert run("import", "--from", folder, "--as", "janus_vq", "--output", tmp_path / "made") == 0
    assert "Left out: 1 tensors of the model in the same file." in capsys.readouterr().out
    assert run("export", "--from", tmp_path / "made", "--output", tmp_path / "out") == 0
    comparing.assert_same(load_file(tmp_path / "out" / "vq.safetensors"), own)


def test_one_dialect_becomes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Janus' original file in transformers' form gives the same tokenizer after an import."""
    folder, _ = download(tmp_path / "download", "janus_vq", monkeypatch)
    assert run("import", "--from", folder, "--as", "janus_vq", "--output", tmp_path / "made") == 0
    assert run("export", "--from", tmp_path / "made", "--to", "janus_hf", "--output", tmp_path / "port") == 0
    assert run("import", "--from", tmp_path / "port", "--as", "janus_vq", "--output", tmp_path / "again") == 0
    assert ImageTokenizer.load(tmp_path / "again").hash == ImageTokenizer.load(tmp_path / "made").hash


def test_losses_and_averages_of_a_training_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    extra = {"loss.discriminator.main.0.weight": np.zeros(3, np.float32)}
    folder, file = download(tmp_path / "download", "ibq", monkeypatch, **extra)
    assert run("import", "--from", folder / "vq.safetensors", "--as", "ibq", "--output", tmp_path / "made") == 0
    assert "Left out: 1 tensors that the network does not use, such as loss." in capsys.readouterr().out
    assert run("export", "--from", tmp_path / "made", "--to", "taming", "--output", tmp_path / "out") == 0
    comparing.assert_same(load_file(tmp_path / "out" / "vq.safetensors"), file.tensors)


# ---- files that are not what they should be --------------------------------------------------------------------------


def _cut(folder: Path) -> None:
    path = folder / "vq.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        found = dict(load_file(folder / "vq.safetensors"))
        change(found)
        save_file(found, folder / "vq.safetensors")

    return changed


def _outside(folder: Path) -> None:
    for name in ("vq.safetensors", "config.json"):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)


def _pickled(folder: Path) -> None:
    (folder / "vq.safetensors").rename(folder / "vq_ds16.pt")


FIRST = "encoder.conv_in.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (_cut, "vq.safetensors: .*cut short"),
    "missing": (_tensors(lambda found: found.pop(FIRST)), f"missing arrays .1.: {FIRST}"),
    "misnamed": (
        _tensors(lambda found: found.update({"encoder.conv_im.weight": found.pop(FIRST)})),
        "missing arrays .1.",
    ),
    "left over": (_tensors(lambda found: found.update(extra=np.zeros(3, np.float32))), "no place for .1.: extra"),
    "another shape": (_tensors(lambda f: f.update({FIRST: f[FIRST][:, :2].copy()})), r"conv_in.weight: .*asks for"),
    "fp8": (_tensors(lambda f: f.update({FIRST: f[FIRST].astype(ml_dtypes.float8_e4m3fn)})), "F8_E4M3: convert"),
    "another's": (_tensors(lambda f: f.update({k.replace("conv_blocks", "down"): f.pop(k) for k in [*f]})), "taming"),
    "outside": (_outside, "config.json is a link to .*outside"),
    "pickled": (_pickled, "vq_ds16.pt is pickled: convert it with `ar-unified convert-pickle --from"),
    "settings": (lambda folder: folder.joinpath("config.json").write_text("[1]"), "expected keys and values"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said_and_nothing_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    change, said = BROKEN[name]
    folder, _ = download(tmp_path / "download", "llamagen_vq", monkeypatch)
    change(folder)
    assert run("import", "--from", folder, "--as", "llamagen_vq", "--output", tmp_path / "made") == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count("\n") == 1, err
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".made*"))


@pytest.mark.parametrize("begin", [b"PK\3\4", b"\x80\2}q\0."])
def test_a_pickled_file_is_sent_to_the_verb_that_reads_it(
    begin: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "vqgan").write_bytes(begin)  # the name of LWM's file has no ending
    assert run("import", "--from", tmp_path / "vqgan", "--as", "lwm_vq", "--output", tmp_path / "made") == 2
    assert (
        "vqgan: it is pickled: convert it to .safetensors with `ar-unified convert-pickle`" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"file": "../out.safetensors"}, "found '../out.safetensors'"),
        ({"settings": {"../config.json": "{}"}}, "found '../config.json'"),
        ({"settings": {"config.json": 3}}, "found 'config.json'"),
        ({"image_dtypes": {"": "F8"}}, "found 'F8'"),
        ({"image_dtypes": {}}, "found 'no dtype'"),
        ({"image_dialect": "mine"}, "found 'mine'"),
        ({"image_prefix": None}, "image_prefix: expected a value that `ar-unified import` wrote, found None"),
    ],
)
def test_a_record_that_was_changed_leads_nowhere(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = download(tmp_path / "download", "showo_vq", monkeypatch)
    assert run("import", "--from", folder, "--as", "showo_vq", "--output", tmp_path / "made") == 0
    record = tmp_path / "made" / "published.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert run("export", "--from", tmp_path / "made", "--output", tmp_path / "o" / "out") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o" / "out").exists()


def test_what_a_tokenizer_has_no_use_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = download(tmp_path / "download", "lwm_vq", monkeypatch)
    into = ["import", "--from", folder, "--as", "lwm_vq", "--output", tmp_path / "made"]
    assert run(*into, "--dtype", "bfloat16") == 2
    assert "--dtype does nothing for an image tokenizer alone" in capsys.readouterr().err
    assert run(*into) == 0 and run(*into) == 2
    assert "name another folder" in capsys.readouterr().err
    out = ["export", "--from", tmp_path / "made", "--output", tmp_path / "out", "--to"]
    assert run(*out, "meta") == 2 and "found meta" in capsys.readouterr().err
    assert run(*out, "llamagen") == 2 and "weights named as in llamagen: expected space" in capsys.readouterr().err
    (tmp_path / "made" / "published.json").unlink()
    assert run(*out[:-1]) == 2 and "that was not imported; found none" in capsys.readouterr().err
