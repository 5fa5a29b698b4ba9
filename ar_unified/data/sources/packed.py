"""Files that are compressed with gzip or Zstandard, read at any place like plain files."""

from __future__ import annotations

import io
import threading
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import BinaryIO

from ar_unified import storage
from ar_unified.storage import AnyPath

ENDINGS = (".gz", ".tgz", ".zst")
_STEP = 1 << 12  # compressed bytes that are read at once; they unpack to at most 4 MiB
_SNAPSHOTS = 256  # the most copies of gzip's state that are kept, 40 KB each


def is_packed(path: AnyPath) -> bool:
    """Whether a file's ending says that it is compressed."""
    return path.suffix.lower() in ENDINGS


def unpacked(path: AnyPath) -> AnyPath:
    """The name of a file without the ending of its compression."""
    return path.with_suffix("") if is_packed(path) else path


def open_binary(path: AnyPath) -> BinaryIO:
    """Opens a file for reading; unpacks it if its ending says that it is compressed.

    Going back in a gzip file unpacks it again from the nearest earlier one of up to 256 evenly spaced places. These
    places are noted during the first reading. A Zstandard file is unpacked again from its beginning. Reading in order
    costs nothing extra.

    Raises:
        OSError: if the file is missing. Reading also raises it if the file is cut short, broken, or compressed in
            another way.
    """
    if not is_packed(path):
        return storage.open_binary(path)
    return io.BufferedReader(_Zstandard(path) if path.suffix.lower() == ".zst" else _Gzip(path), 1 << 16)  # type: ignore[return-value]


class Reader:
    """Reads bytes at any place of a file, compressed or not, from many threads."""

    def __init__(self, path: AnyPath):
        self._lock = threading.Lock()
        self._plain = None if is_packed(path) else storage.Opened(path)
        self._file = open_binary(path) if self._plain is None else None

    def read(self, at: int, size: int) -> bytes:
        """Reads `size` bytes from byte `at` on. Raises OSError as `open_binary` does."""
        if self._plain is not None:
            return self._plain.read(at, size)
        assert self._file is not None
        with self._lock:
            self._file.seek(at)
            return self._file.read(size)


class _Forward(io.RawIOBase):
    """A seekable stream over a stream that can only be read forward and restarted."""

    def __init__(self) -> None:
        self._at, self._ready = 0, memoryview(b"")  # the current place, and the unpacked bytes after it

    @abstractmethod
    def _more(self) -> bytes:
        """The next bytes; b"" at the end."""

    @abstractmethod
    def _back(self, at: int) -> int:
        """Goes to a place at or before `at`, and returns it."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, at: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_CUR:
            at += self._at
        elif whence != io.SEEK_SET:
            raise OSError("a packed file cannot be read from its end, because its size is not known")
        if at < self._at:
            self._at, self._ready = self._back(at), memoryview(b"")
        while self._at < at and (data := self._next()):
            taken = min(len(data), at - self._at)
            self._at, self._ready = self._at + taken, data[taken:]
        return self._at

    def _next(self) -> memoryview:
        self._ready = self._ready or memoryview(self._more())
        return self._ready

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        data = self._next()[: len(buffer)]
        buffer[: len(data)] = data
        self._at, self._ready = self._at + len(data), self._ready[len(data) :]
        return len(data)


class _Gzip(_Forward):
    def __init__(self, path: AnyPath):
        super().__init__()
        self._file = storage.open_binary(path)
        self._state = zlib.decompressobj(31)
        # For each place, in order: the number of unpacked bytes before it, the number of compressed bytes, and the
        # state.
        self._places = [(0, 0, self._state.copy())]
        self._apart = 1 << 22
        self._unpacked = 0  # the place where `_ready` ends

    def _back(self, at: int) -> int:
        self._unpacked, packed, state = next(place for place in reversed(self._places) if place[0] <= at)
        self._state = state.copy()
        self._file.seek(packed)
        return self._unpacked

    def _more(self) -> bytes:
        out = b""
        while not out:
            data = self._file.read(_STEP)
            if not data:
                if not self._state.eof:
                    raise OSError("the gzip data is cut short")
                return b""
            try:
                while data:
                    if self._state.eof:  # the file consists of several archives
                        self._state = zlib.decompressobj(31)
                    out += self._state.decompress(data)
                    data = self._state.unused_data.lstrip(b"\0") if self._state.eof else b""
            except zlib.error as error:
                raise OSError(f"the gzip data is broken: {error}") from error
        self._unpacked += len(out)
        if self._unpacked >= self._places[-1][0] + self._apart:
            self._places.append((self._unpacked, self._file.tell(), self._state.copy()))
            if len(self._places) > _SNAPSHOTS:
                self._places, self._apart = self._places[::2], 2 * self._apart
        return out

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()


class _Zstandard(_Forward):
    def __init__(self, path: AnyPath):
        super().__init__()
        self._path = path
        self._back(0)

    def _back(self, at: int) -> int:
        import pyarrow as pa  # only this function needs it

        self._errors = (pa.ArrowException, OSError)
        if isinstance(self._path, Path):
            self._stream = pa.input_stream(str(self._path), compression="zstd")
        else:
            self._stream = pa.CompressedInputStream(pa.PythonFile(storage.open_binary(self._path), mode="r"), "zstd")
        self._step, self._unpacked = 1 << 16, 0
        return 0

    def _more(self) -> bytes:
        try:
            data = self._stream.read(self._step)
        except self._errors as error:
            if self._step == 1:
                reason = str(error).splitlines()[0]
                raise OSError(f"the Zstandard data is broken or cut short: {reason}") from error
            # The error also loses good bytes before the break. So the file is read again, from here on byte by byte.
            stop = self._unpacked
            self._back(0)
            while self._unpacked < stop:
                self._unpacked += len(self._stream.read(min(1 << 16, stop - self._unpacked)))
            self._step = 1
            return self._more()
        self._unpacked += len(data)
        return data
