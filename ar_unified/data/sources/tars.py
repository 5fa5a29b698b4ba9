"""Documents from tar files whose members are grouped by name: the WebDataset convention."""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import json
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from ar_unified import storage
from ar_unified.data import encoding, images
from ar_unified.data.files import LARGEST, FileError, hidden
from ar_unified.data.items import BadItem
from ar_unified.data.sources import packed
from ar_unified.data.sources.columns import Columns
from ar_unified.data.sources.records import Record, RecordSource, together
from ar_unified.data.sources.shard_names import TARS, named, shards
from ar_unified.data.sources.splits import EmptySplit, parse_split
from ar_unified.errors import UserError
from ar_unified.language.rows import ANSWERS
from ar_unified.storage import AnyPath

_TEXTS = ("txt", "text", "caption", "cls", "id", "question", "answer")
_KINDS = 1 << 15
_TOGETHER = 16  # the most samples that are read at once
_LONGEST_HEADER = 1 << 20  # bytes; a longer header of a member is refused


class Tars(RecordSource):
    """The samples in tar files. A sample is a run of members whose paths are equal up to the first dot of their names.

    000.jpg and 000.txt are a captioned image. 001.0.jpg, 001.1.jpg and 001.txt are a text with two images, in the order
    of the members. A .json member is an object. Its keys are treated as members (caption, question, messages, ...). The
    argument `keys` may name a key by a path below `json`, such as "json/caption". A member's name is the part of its
    path after this first dot, in lower case. If several have the same ending (0.jpg, 1.jpg), `jpg` is the list of them.

    Opening reads all headers once. Nothing is written to disk, so a member's name can do no harm. An index in memory,
    18 bytes for each member and 16 for each sample, lets any sample be read directly. Tars may be compressed (.tar.gz,
    .tgz, .tar.zst: `packed`). They are unpacked in memory, once for opening and once for reading in order; going back
    costs more.

    A sample is a bad item if it has a link or a device, a name that leads out of the tar, or the same member twice. The
    end of a tar that is cut short is a bad item, too.

    Args:
        path: a tar, a folder of tars, or a name with braces or wildcards (`shards`), such as "shards/{000..063}.tar".
        keys: maps a document part to a member; see `columns` of `Columns`.
        split: None, or a part of the samples in their order, such as "[:95%]" or "[95%:]".

    Raises:
        UserError: if there is no such file, if no file is a tar, or if no sample is in `split`.
    """

    def __init__(
        self,
        path: str | AnyPath,
        *,
        keys: Mapping[str, str] | None = None,
        links: bool = False,
        split: str | None = None,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        name, low, high = parse_split(split or "")
        if name not in ("", "train"):
            raise UserError(
                f"{path}: expected a part such as [:95%], because tars have no named splits; found {split!r}"
            )
        root, found = shards(path, TARS, links=links)
        label = label or named(path, root)
        super().__init__(Columns(keys, "keys"), None, label, reversible=reversible, limits=limits)
        self._paths = [root / entry.name for entry in found]
        # For every sample: its tar, its first member, and the bytes of that member's headers (a long name has three
        # headers). For every member: where its data begins, its size, its kind.
        self._shard, self._member, self._headers = array("i"), array("q"), array("i")
        self._at, self._size, self._kind = array("q"), array("q"), array("H")
        self._kinds: dict[str, int] = {}  # maps a member's name, such as "jpg", to its number
        self._problems: dict[int, tuple[str, str]] = {}  # samples that are bad items: kind and reason
        self._digest = hashlib.sha256()
        for number, entry in enumerate(found):
            if entry.error:
                self._begin(number, (entry.error.kind, entry.error.reason))
            else:
                self._index(number)
        self._member.append(len(self._at))
        samples = len(self._shard)
        if len(self._problems) == samples == len(found):
            raise UserError(f"{path}: no tar can be read: {'; '.join(reason for _, reason in self._problems.values())}")
        self._low, self._high = round(low * samples), round(high * samples)
        if self._low >= self._high:
            reason = f"nothing is in split {split!r}, because there are only {samples} samples"
            raise (EmptySplit if samples else UserError)(f"{path}: {reason}")
        # A larger number would not be faster, because samples are read one by one and none is decoded meanwhile.
        self.together = min(together(sum(self._size) / max(samples, 1)), _TOGETHER)
        some_packed = any(map(packed.is_packed, self._paths))  # each open packed tar uses 10 MB
        self._open = functools.lru_cache(maxsize=4 if some_packed else 64)(_Opened)
        # Names are kept, because reading a name again goes back in a packed tar.
        self._name = functools.lru_cache(maxsize=1 << 12)(self._name_of)
        self.fingerprint: dict[str, object] = {
            "kind": "webdataset",
            "items": len(self),
            "split": split,
            "sha256": self._digest.hexdigest(),
            **({"keys": dict(keys)} if keys else {}),
        }

    def __len__(self) -> int:
        return self._high - self._low

    def _sample(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i}: {self.name} has {len(self)} items")
        return i + self._low

    def origin(self, i: int) -> str:
        """The tar, and the sample's name in it, or its number (from 1) if it has no name."""
        sample = self._sample(i)
        path = self._paths[self._shard[sample]]
        return f"{path}:{self._name(sample) or sample - bisect.bisect_left(self._shard, self._shard[sample]) + 1}"

    def _name_of(self, sample: int) -> str:
        """The name that a sample's members share, up to the dot. It is read from the headers of the first member; "" if
        there is no such member or name.
        """
        if self._member[sample] == self._member[sample + 1]:
            return ""
        at, size = self._at[self._member[sample]], self._headers[sample]
        headers = self._open(self._paths[self._shard[sample]]).read(at - size, size)
        try:
            if size == 512:
                info = tarfile.TarInfo.frombuf(headers, "utf-8", "surrogateescape")
            else:
                with tarfile.open(fileobj=io.BytesIO(headers), mode="r:", errors="surrogateescape") as tar:
                    info = tar.next() or tarfile.TarInfo()
        except (tarfile.TarError, ValueError, OverflowError):  # the tar was changed
            return ""
        return _parted(info.name)[0].encode(errors="surrogateescape").decode(errors="replace")

    def read(self, indices: Sequence[int], pictures: bool = True) -> list[Record | BadItem]:
        """Samples as records, in the order of `indices`; a BadItem takes the place of a sample that cannot be read."""
        found: list[Record | BadItem] = []
        for i in indices:
            try:
                found.append(self._record(self._sample(i), pictures))
            except BadItem as bad:
                found.append(bad)
            except (encoding.EncodingError, FileError, ValueError, RecursionError, OSError) as error:
                found.append(BadItem(_kind_of(error), self.origin(i), str(error)))
        return found

    def _record(self, sample: int, pictures: bool) -> Record:
        if sample in self._problems:
            kind, reason = self._problems[sample]
            raise BadItem(kind, self.origin(sample - self._low), reason)
        kinds = list(self._kinds)
        file = self._open(self._paths[self._shard[sample]])
        record: dict[str, Any] = {"__key__": self._name(sample)}
        shown: list[Any] = []
        for member in range(self._member[sample], self._member[sample + 1]):
            kind, size = kinds[self._kind[member]], self._size[member]
            last = kind.rpartition(".")[2]
            if f".{last}" in images.SUFFIXES:
                shown.append(file.read(self._at[member], size) if pictures else b"")
                record[kind] = shown[-1]
                if kind != last:
                    record[last] = [*record.get(last, []), shown[-1]]
            elif last in (*_TEXTS, "json"):
                if size > LARGEST:
                    raise FileError("too_large", f"expected at most {LARGEST} bytes in .{kind}, found {size}")
                text = encoding.text(encoding.unmarked(file.read(self._at[member], size)))
                record[kind] = json.loads(text) if last == "json" else text
        merged = {key: value for key, value in _mapping(record.get("json")).items() if key not in record}
        paired = _paired(record, shown) if self.columns.given is None else {}
        pictured = {"images": shown} if shown and self.columns.given is None else {}
        if pictured or paired:
            merged = {key: value for key, value in merged.items() if key.lower() not in ("image", "images", *_SUFFIXES)}
            record = {key: value for key, value in record.items() if key.rpartition(".")[2] not in _SUFFIXES}
        return record | merged | pictured | paired

    # ---- the index ------------------------------------------------------------------------------------------------

    def _begin(self, shard: int, problem: tuple[str, str] | None = None) -> None:
        if problem:
            self._problems[len(self._shard)] = problem
        self._shard.append(shard)
        self._member.append(len(self._at))
        self._headers.append(0)

    def _index(self, shard: int) -> None:
        """Reads the headers of one tar."""
        path, before, seen = self._paths[shard], None, set[str]()
        try:
            for info in _members(path):
                name, kind = _parted(info.name)
                parts = [part for part in info.name.split("/") if part not in (".", "..")]
                if info.isdir() or any(map(hidden, parts)):
                    continue
                self._digest.update(f"{info.name} {info.size} {info.chksum}\n".encode(errors="surrogateescape"))
                if name != before:
                    self._begin(shard)
                    before, seen = name, set()
                if reason := _refused(info):
                    self._problems.setdefault(len(self._shard) - 1, reason)
                elif kind in seen:
                    reason = ("bad_row", f"expected one member {kind!r}, found two: are two samples called {name!r}?")
                    self._problems.setdefault(len(self._shard) - 1, reason)
                elif len(self._kinds) >= _KINDS and kind not in self._kinds:
                    reason = ("bad_row", f"expected at most {_KINDS} different endings of members' names, such as .jpg")
                    self._problems.setdefault(len(self._shard) - 1, reason)
                    continue
                seen.add(kind)
                if len(self._at) == self._member[-1]:
                    self._headers[-1] = info.offset_data - info.offset
                self._at.append(info.offset_data)
                self._size.append(info.size)
                self._kind.append(self._kinds.setdefault(kind, len(self._kinds)))
        except _Cut as error:
            if error.sample and before is not None:  # the last sample is incomplete
                self._problems[len(self._shard) - 1] = ("unreadable_file", str(error))
            else:
                self._begin(shard, ("unreadable_file", str(error)))
        except OSError as error:
            self._begin(shard, ("unreadable_file", error.strerror or str(error)))


_SUFFIXES = tuple(suffix[1:] for suffix in images.SUFFIXES)


class _Cut(Exception):
    """A file is not a tar, or is a tar that is cut short. `sample`: whether the tar ends within a member."""

    def __init__(self, reason: str, sample: bool = False):
        super().__init__(reason)
        self.sample = sample


class _Opened(packed.Reader):
    """An open tar, compressed or not. Raises FileError for a member that does not fit into memory."""

    def read(self, at: int, size: int) -> bytes:
        if size > LARGEST:
            raise FileError("too_large", f"expected at most {LARGEST} bytes, found {size}")
        return super().read(at, size)


class _Headers:
    """A tar file of which only headers are read. A header that would fill the memory is refused."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"expected headers of at most {_LONGEST_HEADER} bytes, found {size}")
        return self._file.read(size)


def _members(path: AnyPath) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Raises _Cut if the file is not a tar, or if the end of the tar is missing or broken."""
    whole = None if packed.is_packed(path) else storage.size_of(path)
    with packed.open_binary(path) as file:
        if other := encoding.no_content(_begin(file)):
            raise _Cut(f"expected a tar, found {other}")
        file.seek(0)
        stream = _Headers(file)
        try:
            with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # otherwise all of them stay in memory
                    yield info
                    if info.isreg() and not _is_there(stream, info.offset_data + info.size, whole):
                        raise _Cut(f"the tar is cut short: it ends in the middle of {info.name!r}", sample=True)
                end = tar.offset
            stream.seek(end)
            after = stream.read(512)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise _Cut(f"expected a tar: {error}") from error
        if after != bytes(512):
            raise _Cut(
                f"expected a member or the end of the tar at byte {end}, found neither: the tar is cut short or broken"
            )


def _begin(file: BinaryIO) -> bytes:
    try:
        return file.read(encoding.HEAD)
    except OSError as error:
        raise _Cut(f"expected a tar that can be read: {error}") from error


def _is_there(stream: _Headers, end: int, whole: int | None) -> bool:
    """Whether a tar has at least `end` bytes. whole: its number of bytes, if known."""
    if whole is not None:
        return end <= whole
    try:
        stream.seek(max(end - 1, 0))
        return bool(stream.read(1))
    except OSError:
        return False


def _parted(name: str) -> tuple[str, str]:
    """Splits a path into the sample's name and the member's name: "a/001.0.JPG" into "a/001" and "0.jpg"."""
    folder, _, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), kind.lower()


def _refused(info: tarfile.TarInfo) -> tuple[str, str] | None:
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "path_escapes", f"expected a name inside the tar, found {info.name!r}"
    if not info.isreg() or info.issparse():
        return "unreadable_file", f"expected a whole file, found a link, a device or a sparse file: {info.name!r}"
    try:
        info.name.encode()
    except UnicodeEncodeError:
        return "bad_utf8", f"expected a name in UTF-8, found {info.name!r}"
    return None


def _paired(record: Mapping[str, object], shown: list[Any]) -> dict[str, object]:
    """Groups members such as chosen.png, rejected.0.txt and prompt.txt by the part of the pair to which they belong,
    and keeps their order. Images of answers are removed from `shown`, the images of the sample."""
    found: dict[str, list[Any]] = {}
    for kind, value in record.items():
        of, _, last = kind.partition(".")
        if last and (of in ANSWERS or (of == "prompt" and not isinstance(value, bytes))):
            found.setdefault(of, []).append(value)
    if not found.keys() >= {*ANSWERS}:
        return {}
    for value in (each for of in ANSWERS for each in found[of] if isinstance(each, bytes)):
        del shown[next(i for i, each in enumerate(shown) if each is value)]
    return {of: values[0] if len(values) == 1 else values for of, values in found.items()}


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _kind_of(error: Exception) -> str:
    if isinstance(error, FileError):
        return error.kind
    if isinstance(error, encoding.EncodingError):
        return "bad_utf8"
    return "unreadable_file" if isinstance(error, OSError) else "bad_json"
