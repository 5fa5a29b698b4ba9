"""Reading and writing LWM's streams, compared with flax's bytes; and files that are not streams."""

from __future__ import annotations

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from ar_unified.errors import UserError
from ar_unified.interop import streams
from ar_unified.interop.streams import Stream, StreamWriter
from ar_unified.tensors import Kind

RNG = np.random.default_rng(1)
TREE = {
    "transformer/wte/embedding": RNG.normal(size=(300, 40)).astype(ml_dtypes.bfloat16),
    "transformer/h/scan_decoder/attention/wq/kernel": RNG.normal(size=(3, 4, 5)).astype(np.float32),
    "transformer/h/scan_decoder/attention_norm/kernel": RNG.normal(size=(3, 4)).astype(np.float16),
    "transformer/ln_f/kernel": RNG.normal(size=1).astype(ml_dtypes.bfloat16),
    "lm_head/kernel": RNG.normal(size=(40, 300)).astype(ml_dtypes.bfloat16),
}


def reference(tree, prefix=("params", "params")):
    """A stream like tux's: its packer on (key, flax.serialization.to_bytes(array))."""
    return b"".join(msgpack.packb(((*prefix, *name.split("/")), serialization.to_bytes(a))) for name, a in tree.items())


@pytest.fixture(params=[1 << 30, 1000], ids=["whole", "in pieces"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", request.param)
    monkeypatch.setattr(streams, "_CHUNK", request.param)


@pytest.mark.parametrize("prefix", [(), ("params",), ("params", "params")])
def test_a_stream_of_flax_is_read(prefix, chunk, tmp_path):
    (tmp_path / "params").write_bytes(reference(TREE, prefix))
    source = Stream(tmp_path / "params")
    assert "transformer/h/2/attention/wq/kernel" in source.names() and len(source.names()) == 3 + 2 * 3
    for name, array in TREE.items():
        scanned = "scan_decoder" in name
        for i in range(3):
            new, one = (name.replace("scan_decoder", str(i)), array[i]) if scanned else (name, array)
            assert source.shape(new) == one.shape
            assert source.read(new).dtype == one.dtype and source.read(new).tobytes() == one.tobytes()
    assert source.dtype("lm_head/kernel") == "BF16"
    assert source.read_rows("lm_head/kernel", 7, 31).tobytes() == TREE["lm_head/kernel"][7:31].tobytes()


def test_what_is_written_is_byte_for_byte_what_flax_writes(chunk, tmp_path):
    kinds = {name: Kind(array.shape, array.dtype.name) for name, array in TREE.items()}
    with StreamWriter(tmp_path / "params", kinds) as writer:
        for name, array in reversed(list(TREE.items())):
            if "scan" in name:
                for i in (1, 2, 0):
                    writer.put(name, array[i], i)
            else:
                writer.put(name, array)
    assert (tmp_path / "params").read_bytes() == reference(TREE)
    for (_, value), array in zip(msgpack.Unpacker(open(tmp_path / "params", "rb")), TREE.values(), strict=True):
        np.testing.assert_array_equal(serialization.from_bytes(None, value), array)


def test_a_trainings_state_gives_its_parameters_alone(tmp_path):
    state = reference({"step": np.int32(3).reshape(()), "opt_state/0/mu/lm_head/kernel": TREE["lm_head/kernel"]}, ())
    (tmp_path / "state").write_bytes(
        msgpack.packb((("opt_state", "1"), serialization.to_bytes({}))) + state + reference(TREE)
    )
    assert len(Stream(tmp_path / "state").names()) == 9


GOOD = reference({"w": np.ones(4, np.float32)})
BROKEN = {
    "cut short": (GOOD[:-3], "cut short"),
    "empty": (b"", "nothing in it"),
    "a pickle": (b"\x80\x04K\x01.", "damaged"),
    "an object": (msgpack.packb((("w",), b"\xc1")), "damaged"),
    "twice": (GOOD + GOOD, "'w': expected each tensor once"),
    "a shape of more": (
        GOOD.replace(b"\x91\x04", b"\x91\x05"),
        r"the wrong number of bytes, 16, for an array of float32 \[5\]",
    ),
    "a length of more": (b"\x92\x91\xa1w\xc6\xff\xff\xff\xff", "cut short"),
    "nested without end": (b"\x91" * 100000, "damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_stream_is_refused(case, tmp_path):
    data, said = BROKEN[case]
    (tmp_path / "params").write_bytes(data)
    with pytest.raises(UserError, match=said):
        Stream(tmp_path / "params")


def test_other_numbers_and_arrays_too_large_for_the_format(tmp_path):
    (tmp_path / "params").write_bytes(reference({"w": np.ones(4, np.float64)}))
    with pytest.raises(UserError, match="w: expected numbers of type .*; found 'float64'"):
        Stream(tmp_path / "params").read("w")
    with pytest.raises(UserError, match="a tensor for each layer"):
        StreamWriter(tmp_path / "new", {"h/scan_decoder/w": Kind((32, 4096, 11008), "float32")})
    assert not (tmp_path / "new").exists()
