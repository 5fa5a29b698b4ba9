"""Converting pickles to safetensors. Nothing in them is executed, and everything that tensors do not need is
refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ar_tokenizers.files import UNFINISHED

from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.interop.conversion import convert, open_pickled
from ar_unified.interop.sources import open_source

RNG = np.random.default_rng(2)
W = RNG.normal(size=(4, 6)).astype(np.float32)


class Named:
    """Is pickled as a global of any module, even of one that does not exist."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, module, name, *arguments):
        self.called, self.arguments = Named(module, name), arguments


_PYTHONS: Any = pickle._Pickler


class Pickler(_PYTHONS):
    """Python's pickler, which also writes names that do not exist, and writes storages like torch."""

    def persistent_id(self, value):
        return value.id if isinstance(value, Id) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Named):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.called)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


class Id:
    def __init__(self, *parts):
        self.id = parts


def pickled(value, protocol=2):
    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def tensor(key, shape, strides, offset=0, size=24, kind="FloatStorage"):
    storage = Id("storage", Named("torch", kind), key, "cpu", size)
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, OrderedDict())


def torch_file(path, tree, storages, mode=zipfile.ZIP_STORED, order=b"little", **more):
    with zipfile.ZipFile(path, "w", mode) as archive:
        archive.writestr("archive/data.pkl", pickled(tree))
        archive.writestr("archive/byteorder", order)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        for name, data in more.items():
            archive.writestr(name, data)
    return path


def converted(path, folder):
    said = []
    convert(path, folder, said.append)
    return open_source(folder), said


def test_a_torch_file_with_views_settings_and_half_numbers(tmp_path):
    bf16 = RNG.normal(size=5).astype(ml_dtypes.bfloat16)
    tree = {
        "state_dict": OrderedDict(
            {
                "w": tensor("0", (4, 6), (6, 1)),
                "turned": tensor("0", (6, 4), (1, 6)),
                "part": tensor("0", (2, 3), (6, 2), 7),
                "empty": tensor("0", (0, 3), (3, 1)),
                "b": Call(
                    "torch._utils", "_rebuild_parameter", tensor("1", (5,), (1,), 0, 5, "BFloat16Storage"), True, None
                ),
                "n": tensor("2", (), (), 0, 1, "LongStorage"),
            }
        ),
        "epoch": 3,
        "hyper_parameters": {"lr": 1e-3, "dtype": Named("torch", "bfloat16")},
        "optimizer": {"m": tensor("0", (24,), (1,))},
    }
    path = torch_file(tmp_path / "vqgan.ckpt", tree, {"0": W, "1": bf16, "2": np.array(9)})
    source, said = converted(path, tmp_path / "new")
    assert source.names() == {"w", "turned", "part", "empty", "b", "n"}
    assert source.read("w").tobytes() == W.tobytes() and source.read("turned").tobytes() == W.T.tobytes()
    assert source.read("part").tobytes() == W.reshape(-1)[7:][[[0, 2, 4], [6, 8, 10]]].tobytes()
    assert source.read("b").dtype == bf16.dtype and source.read("b").tobytes() == bf16.tobytes()
    assert source.shape("empty") == (0, 3) and source.shape("n") == ()
    other = json.loads((tmp_path / "new" / "vqgan.other.json").read_text())
    assert other == {"epoch": 3, "hyper_parameters": {"lr": 1e-3, "dtype": "torch.bfloat16"}}
    assert (
        "6 tensors" in said[0]
        and "epoch" in said[1]
        and said[2].endswith("these tensors are not the model's: optimizer")
    )


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_tree_of_arrays_as_flax_users_pickle_it(protocol, tmp_path):
    tree = {
        "params": {
            "encoder": {"kernel": W, "half": W.astype(ml_dtypes.bfloat16), "turned": np.asfortranarray(W)},
            "quantize": {"embeddings": jnp.arange(6.0).reshape(2, 3), "n": np.int32(3)},
        }
    }
    (tmp_path / "vqgan").write_bytes(pickle.dumps(tree, protocol))
    source, _ = converted(tmp_path / "vqgan", tmp_path / "new")
    assert source.names() == {"encoder/kernel", "encoder/half", "encoder/turned", "quantize/embeddings"}
    assert source.read("encoder/half").tobytes() == W.astype(ml_dtypes.bfloat16).tobytes()
    assert source.read("encoder/turned").tobytes() == source.read("encoder/kernel").tobytes() == W.tobytes()
    assert source.read("quantize/embeddings").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert json.loads((tmp_path / "new" / "vqgan.other.json").read_text()) == {"quantize/n": 3}


def test_a_folder_keeps_its_form_and_what_is_beside(tmp_path, capsys):
    old = tmp_path / "chameleon"
    (old / "models").mkdir(parents=True)
    for i in range(2):
        torch_file(old / "models" / f"consolidated.0{i}.pth", {"w": tensor("0", (4, 6), (6, 1))}, {"0": W + i})
    (old / "models" / "params.json").write_text("{}")
    (old / "README.md").write_text("hello")
    new = tmp_path / "new"
    assert main(["convert-pickle", "--from", str(old), "--output", str(new)]) == 0
    assert sorted(str(path.relative_to(new)) for path in new.rglob("*.*")) == [
        "models/consolidated.00.safetensors", "models/consolidated.01.safetensors", "models/params.json",
    ]  # fmt: skip
    assert open_source(new / "models" / "consolidated.01.safetensors").read("w").tobytes() == (W + 1).tobytes()
    assert "left out: README.md" in capsys.readouterr().out
    assert main(["convert-pickle", "--from", str(old), "--output", str(new)]) == 2
    assert "never overwritten" in capsys.readouterr().err


class Runs:
    """A call that is made when the file is unpickled, as in a malicious file."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def dotted(canary):
    """pickle's STACK_GLOBAL with a name with dots, which getattr would follow."""
    name = (
        pickle.SHORT_BINUNICODE + b"\x05numpy" + pickle.SHORT_BINUNICODE + b"\x10ndarray.__base__" + pickle.STACK_GLOBAL
    )
    return b"\x80\x04" + name + b")R."


RAW = {
    "os.system": (lambda c: pickle.dumps({"w": Runs(os.system, f"touch {c}")}), "posix.system"),
    "eval": (lambda c: pickle.dumps({"w": Runs(eval, f"open({str(c)!r}, 'w')")}), "builtins.eval"),
    "exec, old protocol": (lambda c: pickle.dumps({"w": Runs(exec, f"open({str(c)!r}, 'w')")}, 2), "__builtin__.exec"),
    "getattr": (lambda c: pickled({"w": Call("builtins", "getattr", 1, "real")}), "builtins.getattr"),
    "copyreg": (lambda c: pickled({"w": Call("copyreg", "_reconstructor", 1)}), "copyreg._reconstructor"),
    "a module within an allowed one": (lambda c: pickled({"w": Call("torch", "os.system", "x")}), "torch.os.system"),
    "numpy's own loader": (lambda c: pickled({"w": Call("numpy", "load", str(c))}), "numpy.load"),
    "a name with dots": (dotted, "numpy.ndarray.__base__"),
    "a name made by a call": (lambda c: b"\x80\x04(cos\nsystem\nX\x01\0\0\0atR.", "os.system"),
    "a class that is no array": (
        lambda c: pickled(
            {"w": Call("numpy._core.multiarray", "_reconstruct", Named("ml_dtypes", "bfloat16"), (0,), b"b")}
        ),
        "an array of class",
    ),
    "a call of what is no name": (lambda c: b"\x80\x02K\x01)R.", "a call of 1"),
    "objects as numbers": (
        lambda c: pickle.dumps({"w": np.array([Runs(os.system, f"touch {c}")], object)}),
        "an array of 'O8'",
    ),
    "an instance": (lambda c: b"\x80\x02(cos\nsystem\noq\0.", "os.system"),
    "an instance by an old opcode": (lambda c: b"\x80\x02(X\x01\0\0\0xios\nsystem\n.", "the opcode INST"),
    "an extension's number": (lambda c: b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "another's storage": (lambda c: pickled({"w": Id("storage")}), "a persistent id"),
    "attributes of a list": (lambda c: b"\x80\x02]}b.", "attributes of a list"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_pickle_that_runs_something_is_refused_by_its_name(case, tmp_path, capsys):
    canary = tmp_path / "canary"
    make, name = RAW[case]
    data = make(canary)
    (tmp_path / "vqgan").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    for file in ("vqgan", "file.pth"):
        assert main(["convert-pickle", "--from", str(tmp_path / file), "--output", str(tmp_path / "new" / "x")]) == 2
        said = capsys.readouterr().err
        assert file in said and name in said and "nothing in it was run" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pth", "vqgan"]


def deflated(path):
    torch_file(path, {"w": tensor("0", (4, 6), (6, 1))}, {"0": W}, zipfile.ZIP_DEFLATED)


def cut(path):
    torch_file(path, {"w": tensor("0", (4, 6), (6, 1))}, {"0": W})
    path.write_bytes(path.read_bytes()[:-40])


def of(tree, **options):
    return lambda path: torch_file(path, tree, {"0": W}, **options)


def raw(data):
    return lambda path: path.write_bytes(data)


def endless():
    tree = []
    tree.append(tree)
    return pickle.dumps({"w": tree})


TORCH = {
    "packed, as a bomb is": (deflated, "is compressed"),
    "cut short": (cut, "damaged"),
    "leads out": (of({"w": tensor("0", (4, 6), (6, 1))}, **{"archive/../../x": b""}), "points outside the zip"),
    "a storage of more than there is": (
        of({"w": tensor("0", (5, 6), (6, 1), size=30)}),
        "has 96 bytes, expected 30 numbers",
    ),
    "a storage that is not there": (of({"w": tensor("7", (4, 6), (6, 1))}), "data/7' is not in the zip"),
    "a storage by a path": (of({"w": tensor("../data/0", (4, 6), (6, 1))}), "is not in the zip"),
    "a storage of another kind": (
        of({"w": tensor("0", (4, 6), (6, 1), kind="Float8_e4m3fnStorage")}),
        "torch.Float8_e4m3fnStorage",
    ),
    "no storage": (of({"w": Call("torch._utils", "_rebuild_tensor_v2", 1, 0, (1,), (1,))}), "without a storage"),
    "another persistent id": (of({"w": Id("module", 1, 2, 3, 4)}), "a persistent id"),
    "beyond its storage": (of({"w": tensor("0", (4, 6), (6, 1), 1)}), "in a storage of 24"),
    "before its storage": (of({"w": tensor("0", (4,), (-1,), 5)}), "strides"),
    "a tensor that grows": (of({"w": tensor("0", (1 << 40,), (0,))}), "in a storage of 24"),
    "big numbers first": (of({"w": tensor("0", (4, 6), (6, 1))}, order=b"big"), "its byte order is"),
    "a program": (of({"w": 1}, **{"archive/constants.pkl": b""}), "TorchScript"),
    "no tensors": (of({"w": 1}), "found none"),
    "a list": (of([1, 2]), "from names to tensors"),
    "an old torch file": (raw(pickle.dumps(0x1950A86A20F9469CFC6C, 2)), "torch before 1.6"),
    "a pickle of protocol 0": (raw(pickle.dumps({"w": W}, 0)), "of protocol 2 or later"),
    "a picture": (raw(b"\x89PNG\r\n\x1a\n"), "damaged"),
    "empty": (raw(b""), "damaged"),
    "without end": (raw(endless()), "nested too deeply"),
    "a length of more": (raw(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\0\0."), "cut short"),
    "an array of other bytes": (raw(pickle.dumps({"w": np.ones(3, ">f4")})), "the byte order"),
    "two names in one": (raw(pickle.dumps({"a": {"b": W}, "a/b": W})), "a name that no other tensor has"),
}


@pytest.mark.parametrize("case", TORCH)
def test_broken_files_are_refused_and_nothing_is_written(case, tmp_path):
    make, said = TORCH[case]
    make(tmp_path / "file.pth")
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "file.pth", tmp_path / "new", print)
    assert not (tmp_path / "new").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_conversion_that_is_stopped_leaves_no_folder(tmp_path, monkeypatch):
    path = torch_file(tmp_path / "a.pth", {"w": tensor("0", (4, 6), (6, 1))}, {"0": W})
    with monkeypatch.context() as patch:
        patch.setattr("ar_unified.interop.conversion.Pickled.read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            converted(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert converted(path, tmp_path / "new")[0].read("w").tobytes() == W.tobytes()


KILLED = """
import os, signal, sys
from ar_unified.interop import conversion
read = conversion.Pickled.read
def kill(self, name):
    os.kill(os.getpid(), signal.SIGKILL) if name == "b" else None
    return read(self, name)
conversion.Pickled.read = kill
conversion.convert(sys.argv[1], sys.argv[2], print)
"""


def test_a_conversion_that_is_killed_leaves_nothing_that_looks_finished(tmp_path):
    tree = {name: tensor("0", (4, 6), (6, 1)) for name in "abc"}
    path, new = torch_file(tmp_path / "a.pth", tree, {"0": W}), tmp_path / "new"
    run = subprocess.run([sys.executable, "-c", KILLED, str(path), str(new)], timeout=100)
    assert run.returncode == -signal.SIGKILL and not new.exists()
    left = [each for each in tmp_path.iterdir() if each.name.endswith(UNFINISHED)]
    assert left
    assert converted(path, new)[0].names() == {"a", "b", "c"}
    assert not left[0].exists()


@pytest.mark.interop
def test_files_of_torch_itself(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    layer = torch.nn.BatchNorm2d(3)
    tree = {"w": w, "turned": w.T, "rows": w[1:3, ::2], "size": w.shape, **layer.state_dict()}
    torch.save({"model": tree, "layer": "x"}, tmp_path / "new.pt")
    source, _ = converted(tmp_path / "new.pt", tmp_path / "out")
    for name in ("w", "turned", "rows", "running_var", "num_batches_tracked"):
        assert tuple(source.shape(name)) == tuple(tree[name].shape)
        if name != "num_batches_tracked":
            assert source.read(name).astype(np.float32).tolist() == tree[name].float().tolist()
    torch.save(layer.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="torch before 1.6"):
        open_pickled(tmp_path / "old.pt")
    torch.save(layer, tmp_path / "module.pt")
    with pytest.raises(UserError, match="the pickle has torch.nn.modules.batchnorm.BatchNorm2d"):
        open_pickled(tmp_path / "module.pt")
