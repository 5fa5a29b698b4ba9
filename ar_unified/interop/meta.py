"""Joins the files of a checkpoint by Meta. Each file has a part of the heads and of every matrix.

The axis along which each tensor was cut, and the parts of fused matrices, come from facebookresearch/chameleon,
loader.py. Rows are in the order of the files: file r of S has heads r·N/S to (r+1)·N/S - 1 of N. Matrices (wqkv, w13)
are fused within each file. Each file has one vector of QK-norm weights for all of its heads. The vectors of all files
are joined as [S, H].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_unified.errors import UserError
from ar_unified.interop.sources import Source

# The axis along which a tensor is cut, by the end of its name. A tensor that is not listed is the same in every file.
_AXES = {
    "tok_embeddings.weight": 1, "output.weight": 0,
    "attention.wq.weight": 0, "attention.wk.weight": 0, "attention.wv.weight": 0, "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0, "feed_forward.w3.weight": 0, "feed_forward.w2.weight": 1,
}  # fmt: skip
_OF_FILES = ("q_normalization.weight", "q_normalization.bias", "k_normalization.weight", "k_normalization.bias")
_QKV, _W13 = "attention.wqkv.weight", "feed_forward.w13.weight"
_FUSED = {_QKV: ("wq", "wk", "wv"), _W13: ("w1", "w3")}


class Joined:
    """The tensors of S files as one source, under the names of the unfused matrices (wq, wk, wv; w1, w3).

    Args:
        files: the files in order.
        n_heads, n_kv_heads: numbers of heads of the whole model.

    Raises UserError if the files have different tensors, or cannot be joined.
    """

    def __init__(self, files: Sequence[Source], n_heads: int, n_kv_heads: int):
        self._files = tuple(files)
        S = len(self._files)
        if n_heads % S or n_kv_heads % S:
            raise UserError(
                f"expected a number of consolidated files that divides {n_heads} and {n_kv_heads} heads, found {S}"
            )
        self._heads = {"wq": n_heads // S, "wk": n_kv_heads // S, "wv": n_kv_heads // S}
        first = self._files[0]
        self._from: dict[str, tuple[str, int, int | None]] = {}  # the tensor in a file, and a range of its rows
        for number, file in enumerate(self._files[1:], 2):
            if wrong := sorted(first.names() ^ file.names()):
                raise UserError(f"{wrong[0]}: expected this tensor in all {S} files or in none; file {number} differs")
            for name in first.names():
                if file.shape(name) != first.shape(name) or file.dtype(name) != first.dtype(name):
                    raise UserError(
                        f"{name}: file {number} of {S}: expected {first.dtype(name)} {list(first.shape(name))} as in "
                        f"the first, found {file.dtype(name)} {list(file.shape(name))}"
                    )
        for name in sorted(first.names()):
            for new, begin, end in self._parts(name):
                if new in self._from:
                    raise UserError(f"{new}: expected this matrix once, found it both separate and fused")
                self._from[new] = (name, begin, end)

    def _parts(self, name: str) -> list[tuple[str, int, int | None]]:
        """The parts of a file's tensor, each as (name, first row, row after the last). A tensor that is not fused is
        one part, (name, 0, None)."""
        fused = next((each for each in _FUSED if name.endswith(each)), None)
        if fused is None:
            return [(name, 0, None)]
        rows = self._files[0].shape(name)[0]
        shares = [self._heads[part] for part in _FUSED[fused]] if fused == _QKV else [1, 1]
        if rows % sum(shares):
            raise UserError(
                f"{name}: expected a multiple of {sum(shares)} rows, because it has {sum(shares)} equal parts; "
                f"found {rows}"
            )
        ends = np.cumsum(shares) * (rows // sum(shares))
        begins = [0, *ends[:-1]]
        middle = fused.split(".")[1]
        return [
            (name.replace(middle, part), int(begin), int(end))
            for part, begin, end in zip(_FUSED[fused], begins, ends, strict=True)
        ]

    def names(self) -> set[str]:
        """The names of the whole tensors, each once."""
        return set(self._from)

    def dtype(self, name: str) -> str:
        """The dtype in the first file, a key of DTYPES."""
        return self._files[0].dtype(self._from[name][0])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor, joined from all files."""
        shape = self._shape(name)
        if len(self._files) > 1 and name.endswith(_OF_FILES):
            return (len(self._files), *shape)
        axis = _axis(name)
        return shape if axis is None else (*shape[:axis], shape[axis] * len(self._files), *shape[axis + 1 :])

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor's part in one file."""
        stored, begin, end = self._from[name]
        shape = self._files[0].shape(stored)
        return shape if end is None else (end - begin, *shape[1:])

    def read(self, name: str) -> np.ndarray:
        """The whole tensor. Raises UserError if files differ in a tensor that should be the same in all."""
        axis = _axis(name)
        if len(self._files) == 1:
            return self._read(0, name)
        if name.endswith(_OF_FILES):
            return np.stack([self._read(number, name) for number in range(len(self._files))])
        first = self._read(0, name)
        if axis is None:
            for number in range(1, len(self._files)):
                if self._read(number, name).tobytes() != first.tobytes():
                    raise UserError(
                        f"{name}: expected the same numbers in every file, found different ones in file {number + 1} "
                        f"of {len(self._files)}: are all files from one checkpoint?"
                    )
            return first
        out = np.empty(self.shape(name), first.dtype)
        n = first.shape[axis]
        for number in range(len(self._files)):
            part = first if number == 0 else self._read(number, name)
            out[(slice(None),) * axis + (slice(number * n, (number + 1) * n),)] = part
        return out

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows of a tensor; its parts are joined first."""
        return self.read(name)[begin:end]

    def _read(self, number: int, name: str) -> np.ndarray:
        stored, begin, end = self._from[name]
        file = self._files[number]
        return file.read(stored) if end is None else file.read_rows(stored, begin, end)


def _axis(name: str) -> int | None:
    return next((axis for end, axis in _AXES.items() if name.endswith(end)), None)


def split(name: str, array: np.ndarray, files: int) -> list[np.ndarray]:
    """The part of a tensor for each of `files` files: the inverse of `Joined.read`, except that it fuses no matrices.

    Raises ValueError if the tensor cannot be cut into this number of parts, or if the number of vectors of QK-norm
    weights does not divide the number of files.
    """
    axis = _axis(name)
    if files == 1:
        return [array]
    if name.endswith(_OF_FILES):
        rows = array.reshape(-1, array.shape[-1])
        if files % len(rows):
            raise ValueError(
                f"{name}: expected a number of vectors that divides {files}, the number of files; found {len(rows)}"
            )
        return [rows[number * len(rows) // files] for number in range(files)]
    if axis is None:
        return [array] * files
    if array.shape[axis] % files:
        raise ValueError(
            f"{name}: expected a size that is a multiple of {files}, the number of files; found {array.shape[axis]}"
        )
    return np.split(array, files, axis)
