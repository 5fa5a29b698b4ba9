"""An array in a .npy file that is read in slices, when they are needed.

The file could be mapped into memory instead, but the pages that were touched would count as memory of the process. With
10^9 documents, an epoch touches all 14 GB of the index. Here, memory holds only copies of slices, and only while they
are used.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np

_TOGETHER = 2**12  # maximum number of elements that one read spans (`blocks.RUN`)


class Stored:
    """An array of one dimension in a file. Safe to read from many threads.

    Raises ValueError if the file is incomplete, or contains something else.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("expected a .npy file of version 1.0")
            shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._begin = file.tell()
        if len(shape) != 1 or self.dtype.hasobject:
            raise ValueError(f"expected one dimension of numbers, found the shape {shape} and the dtype {self.dtype}")
        self._path, self._count = path, int(shape[0])
        if (found := path.stat().st_size) != (known := self._begin + self._count * self.dtype.itemsize):
            raise ValueError(f"expected {known} bytes, found {found}")
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):  # slices lie far apart, so reading ahead would not help
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, stretch: slice) -> np.ndarray:
        """The elements of a slice without steps, as a copy that the caller may change."""
        start, stop, step = stretch.indices(self._count)
        if step != 1:
            raise ValueError(f"expected a slice without steps, found steps of {step}")
        found = np.empty(max(0, stop - start), self.dtype)
        rest, at = found.view(np.uint8).data, self._begin + start * self.dtype.itemsize
        while rest:
            if not (count := os.preadv(self._file, [rest], at)):
                raise OSError(f"{self._path}: the file was changed: it ends before byte {at}")
            rest, at = rest[count:], at + count
        return found


def take(array: np.ndarray | Stored, indices: np.ndarray) -> np.ndarray:
    """The elements at any `indices`, int64 [k]."""
    if isinstance(array, np.ndarray):
        return array[indices]
    found = np.empty(len(indices), array.dtype)
    order = np.argsort(indices, kind="stable")
    rising = indices[order]
    for part in np.split(np.arange(len(order)), np.flatnonzero(np.diff(rising // _TOGETHER)) + 1):
        if len(part):
            first, last = rising[part[0]], rising[part[-1]]
            found[order[part]] = array[first : last + 1][rising[part] - first]
    return found
