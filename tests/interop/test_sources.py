"""Published files as sources: tensors are read one at a time, and broken or hostile files are refused by name."""

from __future__ import annotations

import json
import resource

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ar_unified.errors import UserError
from ar_unified.interop.sources import open_source
from ar_unified.tensors import INDEX, Kind, TensorWriter

RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray] = {
    "a.weight": RNG.normal(size=(6, 4)).astype(ml_dtypes.bfloat16),
    "b.weight": RNG.normal(size=(3, 5, 2)).astype(np.float32),
    "c.bias": RNG.normal(size=7).astype(np.float16),
    "d": np.array(3, np.float32),
}


def written(folder, shard_bytes=64, **options):
    folder.mkdir(parents=True)
    kinds = {name: Kind(array.shape, str(array.dtype)) for name, array in TENSORS.items()}
    with TensorWriter(folder, kinds, shard_bytes, **options) as writer:
        for name in reversed(list(kinds)):
            if TENSORS[name].ndim == 3:
                for i in (2, 0, 1):
                    writer.put(name, TENSORS[name][i], i)
            else:
                writer.put(name, TENSORS[name])
    return folder


def test_what_is_written_piece_by_piece_is_read_by_us_and_by_safetensors(tmp_path):
    folder = written(tmp_path / "several")
    source = open_source(folder)
    assert source.names() == set(TENSORS)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == 3 and "model-00001-of-00003.safetensors" in index.values()
    for name, array in TENSORS.items():
        assert source.shape(name) == array.shape
        assert source.read(name).dtype == array.dtype and source.read(name).tobytes() == array.tobytes()
        with safe_open(folder / index[name], framework="numpy") as opened:
            assert opened.get_tensor(name).tobytes() == array.tobytes()
    assert source.dtype("a.weight") == "BF16"
    assert source.read_rows("b.weight", 1, 3).tobytes() == TENSORS["b.weight"][1:].tobytes()


def test_one_file_alone_and_a_cache_that_links(tmp_path):
    one = written(tmp_path / "one", 1 << 20, alone=True)
    assert sorted(path.name for path in one.iterdir()) == ["model.safetensors"]
    assert open_source(one / "model.safetensors").names() == open_source(one).names() == set(TENSORS)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    (one / "model.safetensors").rename(blobs.with_name("model")), blobs.mkdir()
    blobs.with_name("model").rename(blobs / "0f")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f")
    assert open_source(snapshot).read("c.bias").tobytes() == TENSORS["c.bias"].tobytes()


def test_a_tensor_that_is_not_written_whole_is_no_end(tmp_path):
    with (
        pytest.raises(AssertionError, match="a: 8 bytes"),
        TensorWriter(tmp_path, {"a": Kind((2, 2), "float32")}, 99) as writer,
    ):
        writer.put("a", np.ones(2, np.float32), 1)
    with pytest.raises(ValueError, match=r"expected float32 \[2\], found float64"):
        with TensorWriter(tmp_path, {"b": Kind((2,), "float32")}, 99, stem="b") as writer:
            writer.put("b", np.ones(2))
    for at in (0, 2, -1):
        with pytest.raises(ValueError, match=f"once, found {at}"):
            with TensorWriter(tmp_path, {f"c{at}": Kind((2, 2), "float32")}, 99, stem=f"c{at}") as writer:
                writer.put(f"c{at}", np.ones(2, np.float32), 0)
                writer.put(f"c{at}", np.ones(2, np.float32), at)


def changed(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def outside(folder):
    save_file({"a.weight": TENSORS["a.weight"]}, folder.parent / "secret.safetensors")


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-3])


def link_out(folder):
    outside(folder)
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    first.symlink_to(folder.parent / "secret.safetensors")


BROKEN = {
    "a name with ..": (
        lambda f: (outside(f), changed(f, lambda m: m.update({"a.weight": "../secret.safetensors"}))),
        "inside",
    ),
    "a whole path": (
        lambda f: (outside(f), changed(f, lambda m: m.update({"a.weight": str(f.parent / "secret.safetensors")}))),
        "inside",
    ),
    "a link out": (link_out, "is a link to"),
    "a file that is missing": (
        lambda f: changed(f, lambda m: m.update({"a.weight": "more.safetensors"})),
        "found 2: the download is not complete, for example 'more.safetensors' is missing",
    ),
    "a file cut short": (truncate, "cut short"),
    "a tensor too many in the index": (
        lambda f: changed(f, lambda m: m.update({"z": m["a.weight"]})),
        "'z' is only in the index",
    ),
    "a tensor not in the index": (
        lambda f: changed(f, lambda m: m.pop("c.bias")),
        "'c.bias' is not in the index",
    ),
    "an index that is none": (lambda f: (f / INDEX).write_text("[1]"), "keys and values"),
    "an index without files": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), "weight_map"),
    "nested without end": (lambda f: (f / INDEX).write_text("[" * 100000), "JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case, tmp_path):
    breaks, said = BROKEN[case]
    folder = written(tmp_path / "model")
    breaks(folder)
    with pytest.raises(UserError, match=said):
        open_source(folder)


def test_a_tensor_twice_fp8_and_nothing(tmp_path):
    for name in ("x", "y"):
        save_file({"same": np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="'same': expected each tensor once"):
        open_source(tmp_path)
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "fp8.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    source = open_source(tmp_path / "fp8.safetensors")
    with pytest.raises(UserError, match="w: expected numbers of type BF16, F32, F16, I64; found F8_E4M3: convert"):
        source.read("w")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "consolidated.pth").write_bytes(b"")
    with pytest.raises(UserError, match="consolidated.pth is pickled: convert it to .safetensors with"):
        open_source(tmp_path / "empty")


def test_files_that_were_read_are_not_kept(tmp_path):
    """32 tensors of 8 MiB: resident memory grows by a few of them, not by the whole file."""
    kinds = {f"w{i}": Kind((1 << 21,), "float32") for i in range(32)}
    with TensorWriter(tmp_path, kinds, 1 << 30) as writer:
        for name in kinds:
            writer.put(name, np.ones(1 << 21, np.float32))
    source = open_source(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in sorted(source.names()):
        assert source.read(name)[-1] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
