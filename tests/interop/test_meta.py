"""Shards of Meta's checkpoints are joined and divided again, and compared with a plain implementation of the rules."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from ar_unified.errors import UserError
from ar_unified.interop.meta import Joined, split
from ar_unified.interop.sources import open_source

N, K, H, D, F, V = 8, 4, 4, 16, 24, 12
RNG = np.random.default_rng(3)


def r(*shape):
    return RNG.normal(size=shape).astype(np.float32)


WHOLE = {
    "tok_embeddings.weight": r(V, D), "output.weight": r(V, D), "norm.weight": r(D),
    "layers.0.attention_norm.weight": r(D), "layers.0.ffn_norm.weight": r(D),
    "layers.0.attention.wq.weight": r(N * H, D), "layers.0.attention.wk.weight": r(K * H, D),
    "layers.0.attention.wv.weight": r(K * H, D), "layers.0.attention.wo.weight": r(D, N * H),
    "layers.0.feed_forward.w1.weight": r(F, D), "layers.0.feed_forward.w3.weight": r(F, D),
    "layers.0.feed_forward.w2.weight": r(D, F), "rope.freqs": r(H // 2),
}  # fmt: skip
NORMS = {f"layers.0.attention.{side}_normalization.{kind}": r(4, H) for side in "qk" for kind in ("weight", "bias")}


def shards(S, fused=False):
    """File r of S: the r-th rows of tensors that are divided by rows, the r-th columns of tensors divided by columns;
    others are whole."""
    files = []
    for i in range(S):
        rows = lambda a, i=i: a[i * len(a) // S : (i + 1) * len(a) // S]  # noqa: E731
        file = {}
        for name, array in WHOLE.items():
            part = name.split(".")[-2]
            if part in ("output", "wq", "wk", "wv", "w1", "w3"):
                array = rows(array)
            elif part in ("tok_embeddings", "wo", "w2"):
                array = rows(array.T).T
            file[name] = array
        file |= {name: array[i] for name, array in NORMS.items()}
        if fused:
            for new, parts in (("attention.wqkv", ("wq", "wk", "wv")), ("feed_forward.w13", ("w1", "w3"))):
                room = new.split(".")[0]
                file[f"layers.0.{new}.weight"] = np.concatenate(
                    [file.pop(f"layers.0.{room}.{p}.weight") for p in parts]
                )
        files.append(file)
    return files


def saved(files, folder):
    sources = []
    for i, file in enumerate(files):
        path = folder / f"consolidated.{i:02d}.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in file.items()}, path)
        sources.append(open_source(path))
    return sources


@pytest.mark.parametrize("S", [1, 2, 4])
@pytest.mark.parametrize("fused", [False, True])
def test_shards_joined_are_the_whole(S, fused, tmp_path):
    joined = Joined(saved(shards(S, fused), tmp_path), N, K)
    assert joined.names() == {*WHOLE, *NORMS} and joined.dtype("norm.weight") == "F32"
    for name, array in WHOLE.items():
        assert joined.shape(name) == array.shape
        np.testing.assert_array_equal(joined.read(name), array)
    for name, array in NORMS.items():
        expected = array[0] if S == 1 else array[:S]
        assert joined.shape(name) == expected.shape
        np.testing.assert_array_equal(joined.read(name), expected)
    np.testing.assert_array_equal(joined.read_rows("output.weight", 2, 9), WHOLE["output.weight"][2:9])


@pytest.mark.parametrize("S", [1, 2, 4])
def test_what_was_joined_is_cut_into_the_same(S, tmp_path):
    files = shards(S)
    joined = Joined(saved(files, tmp_path), N, K)
    for name in joined.names():
        for file, part in zip(files, split(name, joined.read(name), S), strict=True):
            np.testing.assert_array_equal(part, file[name])


def test_one_vector_goes_to_every_file_and_two_to_half_of_them():
    name = "layers.3.attention.q_normalization.weight"
    one, two = r(H), r(2, H)
    assert all((part == one).all() for part in split(name, one, 4))
    assert [int((part == two[1]).all()) for part in split(name, two, 4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="divides 2, the number of files; found 4"):
        split(name, r(4, H), 2)
    with pytest.raises(ValueError, match="a multiple of .*, the number of files"):
        split("output.weight", r(5, D), 2)


BROKEN = {
    "other norms": (
        lambda f: f[1].update({"norm.weight": r(D)}),
        "norm.weight: expected the same numbers in every file",
    ),
    "missing in one": (
        lambda f: f[1].pop("output.weight"),
        "output.weight: expected this tensor in all 2 files or in none; file 2 differs",
    ),
    "another shape": (lambda f: f[1].update({"output.weight": r(5, D)}), r"file 2 of 2: expected F32 \[6, 16\]"),
    "alone and fused": (
        lambda f: [e.update({"layers.0.attention.wqkv.weight": r(32, D)}) for e in f],
        "both separate and fused",
    ),
    "rows that heads do not share": (
        lambda f: [e.update({"layers.1.attention.wqkv.weight": r(33, D)}) for e in f],
        "a multiple of 8 rows, because it has 8 equal parts",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_do_not_belong_together_are_refused(case, tmp_path):
    breaks, said = BROKEN[case]
    files = shards(2)
    breaks(files)
    with pytest.raises(UserError, match=said):
        joined = Joined(saved(files, tmp_path), N, K)
        for name in sorted(joined.names()):
            joined.read(name)


def test_heads_that_the_files_do_not_share(tmp_path):
    with pytest.raises(UserError, match="divides 8 and 3 heads, found 2"):
        Joined(saved(shards(2), tmp_path), N, 3)
