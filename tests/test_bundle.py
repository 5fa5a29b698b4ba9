"""A model as one folder: it is written completely or not at all, reading restores it, and a tampered folder is
refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ar_tokenizers.image.tokenizer import ImageTokenizer
from safetensors.numpy import load_file, save_file

from ar_unified import bundle as bundles
from ar_unified.bundle import BUNDLE, INDEX, Bundle, BundleError, named, typed
from ar_unified.errors import UserError
from ar_unified.model.transformer import abstract_params
from ar_unified.parallel.mesh import make_mesh
from tests.bundles import DATA, SAMPLING, parts, write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("made") / "bundle").folder


def same(found: Any, expected: Any) -> None:
    assert named(found).keys() == named(expected).keys()
    for name, leaf in named(expected).items():
        assert named(found)[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(named(found)[name], leaf, err_msg=name)


@pytest.mark.parametrize("layout", ["grid", "rows", "none"])
def test_what_is_written_comes_back(tmp_path, layout):
    written = parts(layout)
    found = write(tmp_path / "b", layout)
    same(found.params(), written["params"])
    assert found.config == written["config"] and found.text_tokenizer.hash == written["text_tokenizer"].hash
    assert found.grammar.manifest() == written["grammar"].manifest() == found.language
    assert found.sections["sampling"] == SAMPLING and found.sections["data"]["max_tokens"] == DATA["max_tokens"]
    image = found.image_tokenizer(batch_size=2)
    assert (image is None) == (layout == "none") and (image is None or image.hash == written["image_tokenizer"].hash)
    again = write(tmp_path / "again", layout, card="# other words\n")
    assert again.hash == found.hash, "the same but for the card, which is for people"


def test_what_an_imported_image_tokenizer_keeps_is_there_again_and_checked(tmp_path):
    image, kept = parts()["image_tokenizer"], {"time_conv.weight": np.arange(6, dtype=np.float32), "n": np.array(2**40)}
    found = write(tmp_path / "b", image_tokenizer=ImageTokenizer(image.config, image.params, published=kept))
    again = found.image_tokenizer()
    assert again is not None and again.hash == image.hash
    same(again.published, kept)
    file = "image_tokenizer/published.safetensors"
    flipped(file)(tmp_path / "b")
    with pytest.raises(BundleError, match=f"{file}: expected sha256"):
        Bundle(tmp_path / "b").image_tokenizer()
    reseal(tmp_path / "b", **{file: None})
    with pytest.raises(BundleError, match=f"files: {file} is missing"):
        Bundle(tmp_path / "b").image_tokenizer()


def test_weights_are_sharded_by_size_and_keep_their_dtype(tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, parts()["params"])
    found = write(tmp_path / "b", params=half, shard_bytes=20_000)
    index = json.loads((tmp_path / "b" / INDEX).read_text())
    files = sorted((tmp_path / "b").glob("model-*.safetensors"))
    assert len(files) == 3 and {path.name for path in files} == set(index["weight_map"].values())
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(half))
    for path in files:
        leaves = [name for name, file in index["weight_map"].items() if file == path.name]
        assert sum(named(half)[name].nbytes for name in leaves) <= 20_000 or len(leaves) == 1
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "b" / INDEX).stat().st_mode)
    same(found.params(), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params(dtype="float32"))} == {np.dtype("float32")}


def test_each_device_of_a_mesh_holds_its_part(made):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(parts()["config"], mesh))
    found = Bundle(made).params(places)
    query = found["layers"]["attention"]["query"]  # [L, D, N, H]
    assert query.addressable_shards[0].data.shape == (1, 32 // 4, 4 // 2, 8)
    same(found, parts()["params"])


def test_it_is_whole_or_not_at_all_and_never_written_over_something(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundles, "write_text", full)  # fails when the card is written, after the weights
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b").mkdir()
    write(tmp_path / "b")  # an empty folder may be there already
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "file").write_text("mine")
    for there in ("b", "file"):
        with pytest.raises(UserError, match=f"{there}: something is there already.*name another folder"):
            write(tmp_path / there)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "file"])
    assert (tmp_path / "file").read_text() == "mine"


# ---- folders that somebody sent -------------------------------------------------------------------------------------


def reseal(folder: Path, **files: Any) -> None:
    """Makes bundle.json match the files, like an attacker would. files: changes; None leaves a file out."""
    record = json.loads((folder / BUNDLE).read_text())
    for name in list(record["files"]):
        if (folder / name).exists():
            size, digest = (folder / name).stat().st_size, bundles._sha256(folder / name)
            record["files"][name] = {"bytes": size, "sha256": digest}
    for name, facts in files.items():
        record["files"].pop(name) if facts is None else record["files"].__setitem__(name, facts)
    (folder / BUNDLE).write_text(json.dumps(record))


def json_of(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes a JSON file, and bundle.json with it."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))
        if name != BUNDLE:
            reseal(folder)

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Changes the weights, and bundle.json with them."""

    def damage(folder: Path) -> None:
        (path,) = folder.glob("model-0*.safetensors")
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)
        reseal(folder)

    return damage


def cut(folder: Path) -> None:
    (path,) = folder.glob("model-0*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def flipped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = folder.glob(name)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return damage


class Trap:
    """Writes a file if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["TRAP"],)


def pickled(folder: Path) -> None:
    (path,) = folder.glob("model-0*.safetensors")
    path.write_bytes(pickle.dumps(Trap()))
    reseal(folder)


def only_pickles(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def workdir(folder: Path) -> None:
    (folder / BUNDLE).unlink()
    (folder / "model").mkdir()


def linked(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return damage


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"model":' + "[" * 100_000)
    reseal(folder)


def also(name: str, facts: Any = None) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, **{name: facts or {"bytes": 1, "sha256": "0" * 64}})


WEIGHTS = "model-00001-of-00001.safetensors"
HOSTILE = {
    "cut short": (cut, rf"{WEIGHTS}: expected \d+ bytes, found \d+: the file was cut short"),
    "weights edited": (flipped("model-0*.safetensors"), f"{WEIGHTS}: expected sha256 .* the file was changed"),
    "text tokenizer edited": (flipped("text_tokenizer/text.model"), "text_tokenizer/text.model: expected sha256"),
    "image tokenizer edited": (flipped("image_tokenizer/weights.safetensors"), "image_tokenizer/weights.* sha256"),
    "settings edited": (flipped("config.json"), "config.json: expected sha256"),
    "pickled weights": (pickled, f"{WEIGHTS}: SafetensorError"),
    "a folder of pickles": (only_pickles, "it has no .safetensors files, and pytorch_model.bin is pickled"),
    "a workdir": (workdir, "it is a workdir: `ar-unified export --workdir .* makes a bundle of it"),
    "another version": (json_of(BUNDLE, lambda x: x.update(version=2)), "bundle.json: expected version 1, found 2"),
    "not JSON": (lambda folder: (folder / BUNDLE).write_bytes(b"\x80\x04."), "bundle.json: .*"),
    "a list": (json_of(BUNDLE, lambda x: []), "bundle.json: expected keys and values, found"),
    "no files": (json_of(BUNDLE, lambda x: x.pop("files") and None), "bundle.json: files: expected keys and values"),
    "nested": (deep, "config.json: RecursionError"),
    "a file outside": (also("../outside"), "bundle.json: files: a bundle has no file '../outside'"),
    "an absolute file": (also("/etc/passwd"), "bundle.json: files: a bundle has no file '/etc/passwd'"),
    "a foreign file": (also("pytorch_model.bin"), "bundle.json: files: a bundle has no file 'pytorch_model.bin'"),
    "no size": (also(WEIGHTS, {"bytes": "1", "sha256": "0" * 64}), f"files: {WEIGHTS}: expected bytes and sha256"),
    "a file that is missing": (lambda folder: (folder / INDEX).unlink(), f"{INDEX}: no such file"),
    "a file that is not told": (lambda folder: reseal(folder, **{INDEX: None}), f"files: {INDEX} is missing"),
    "half an image tokenizer": (
        lambda folder: reseal(folder, **{"image_tokenizer/config.json": None}),
        "files: image_tokenizer/config.json is missing",
    ),
    "no image tokenizer": (
        lambda folder: reseal(
            folder, **dict.fromkeys(map("image_tokenizer/{}".format, ("config.json", "weights.safetensors")))
        ),
        "language.json: expected all three of image codes, image_tokenizer and its hash, or none",
    ),
    "a link out": (linked("language.json"), "language.json is a link to .*outside"),
    "weights linked out": (linked(WEIGHTS), f"{WEIGHTS} is a link to .*outside"),
    "a folder linked out": (linked("text_tokenizer"), "text_tokenizer is a link to .*outside"),
    "index leads out": (
        json_of(INDEX, lambda x: x["weight_map"].update(embedding="../../x.safetensors")),
        f"{INDEX}: embedding: expected one of {WEIGHTS}; found '../../x.safetensors'",
    ),
    "index is absolute": (
        json_of(INDEX, lambda x: x["weight_map"].update(embedding="/x/model-00001-of-00001.safetensors")),
        f"{INDEX}: embedding: expected one of {WEIGHTS}; found '/x/",
    ),
    "index is no text": (json_of(INDEX, lambda x: x["weight_map"].update(embedding=[1])), f"{INDEX}: embedding: exp"),
    "index has another tensor": (
        json_of(INDEX, lambda x: x["weight_map"].update(embeddings=WEIGHTS)),
        f"{INDEX}: 'embeddings': this model has no such tensor; did you mean 'embedding'",
    ),
    "index lacks a tensor": (
        json_of(INDEX, lambda x: x["weight_map"].pop("norm") and None),
        f"{INDEX}: norm: this tensor of the model is missing",
    ),
    "a tensor is missing": (tensors(lambda x: x.pop("norm")), f"{WEIGHTS}: tensor 'norm' is missing"),
    "a tensor too much": (tensors(lambda x: x.update(more=x["norm"])), f"{WEIGHTS}: tensor 'more' is not listed in"),
    "another shape": (tensors(lambda x: x.update(norm=x["norm"][:-1])), r"norm: expected shape \(32,\), found \(31,\)"),
    "another dtype": (tensors(lambda x: x.update(norm=x["norm"].astype(np.int32))), "norm: expected F32.*found I32"),
    "a huge model": (
        json_of("config.json", lambda x: x["model"].update(d_model=2**62)),
        "config.json: |expected shape",
    ),
    "a text for a number": (
        json_of("config.json", lambda x: x["model"].update(d_model="32")),
        "config.json: model.d_model: expected int, found '32'",
    ),
    "an unknown field": (
        json_of("config.json", lambda x: x["model"].update(experts=4)),
        "config.json: model.experts: there is no such field",
    ),
    "a language of other images": (
        json_of("language.json", lambda x: x.update(image_hash="0" * 64)),
        "language.json: image_hash: expected .*, the hash of image_tokenizer; found '0000",
    ),
    "a language of numbers": (json_of("language.json", lambda x: x.update(text_size="a")), "language.json: .*"),
    "another vocabulary": (
        json_of("config.json", lambda x: x["model"].update(vocab_size=1024)),
        "language.json: expected 1024 ids, as config.json says; found 384",
    ),
    "a size that is none": (
        json_of("config.json", lambda x: x["data"].update(image_size="64")),
        "data.image_size: expected a height and a width",
    ),
    "a filter that is none": (
        json_of("config.json", lambda x: x["sampling"].update(text={"temperature": "hot"})),
        "text.temperature: expected",
    ),
    "a softmax that is none": (
        json_of("config.json", lambda x: x["loss"].update(softmax="both")),
        "softmax: expected one of joint, by_side; found 'both'",
    ),
    "a loss that is none": (json_of("config.json", lambda x: x.update(loss=[])), "loss: expected keys and values"),
    "no length": (json_of("config.json", lambda x: x["sampling"].update(max_length=1e3)), "sampling.max_length: exp"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_bundle_is_refused_by_name(name, made, tmp_path, monkeypatch):
    from ar_unified import load

    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    folder = tmp_path / "bundle"
    shutil.copytree(made, folder)
    damage, words = HOSTILE[name]
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        load(folder)
    assert str(folder) in str(caught.value), "the message says which bundle"
    assert not (tmp_path / "sprung").exists()


def test_one_of_before_there_was_a_loss_says_nothing_of_it(made, tmp_path):
    shutil.copytree(made, tmp_path / "bundle")
    before = json_of("config.json", lambda x: {name: section for name, section in x.items() if name != "loss"})
    before(tmp_path / "bundle")
    assert Bundle(tmp_path / "bundle").sections["loss"] == {}


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(BundleError, match="none: expected the folder of a bundle"):
        Bundle(tmp_path / "none")


def test_the_hugging_face_cache_may_link_into_its_blobs(made, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in made.rglob("*") if path.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    same(Bundle(snapshot).params(), parts()["params"])


def test_values_that_may_be_anything_become_a_dataclass_or_a_sentence():
    kind = type(parts()["config"])
    with pytest.raises(ValueError, match="model.scan_layers: expected bool, found 1"):
        typed(kind, {"scan_layers": 1}, "model")
    assert typed(kind, {**vars(parts()["config"]), "rope_theta": 100}, "model").rope_theta == 100
