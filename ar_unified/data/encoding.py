"""Text files are UTF-8, with or without a byte order mark. All other encodings are refused.

The same rule applies to rows, corpora, prompts and members of archives. The mark is skipped at the beginning of a file,
and nowhere else. UTF-16 and UTF-32 are recognised by their marks, or by the zero bytes in Latin text. Single-byte
encodings cannot be distinguished, so the error shows the bytes decoded as Windows-1252. A zero byte is an error too. No
encoding is ever guessed.
"""

from __future__ import annotations

import codecs
from typing import BinaryIO

HEAD = 1024  # bytes of a file that are looked at

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32 (little endian)",  # tested before UTF-16, because this mark begins with UTF-16's
    codecs.BOM_UTF32_BE: "UTF-32 (big endian)",
    codecs.BOM_UTF16_LE: "UTF-16 (little endian)",
    codecs.BOM_UTF16_BE: "UTF-16 (big endian)",
}
# Whether bytes 0, 1, 2 and 3 of every four bytes are mostly zero, if the text is Latin.
_ZEROS = {
    (False, True, True, True): "UTF-32 (little endian)",
    (True, True, True, False): "UTF-32 (big endian)",
    (False, True, False, True): "UTF-16 (little endian)",
    (True, False, True, False): "UTF-16 (big endian)",
}
_CONTENTS = {
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` brings the file",
    b"\x1f\x8b": "gzip data; unpack it",
    b"\x28\xb5\x2f\xfd": "Zstandard data; unpack it",
    b"\xfd7zXZ\0": "xz data; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"%PDF-": "a PDF",
}


class EncodingError(ValueError):
    """Bytes that are not UTF-8. The message says what was expected, what was found, and what to do."""


def no_content(data: bytes) -> str:
    """A description of bytes that are a Git LFS pointer, packed data or a PDF; "" for all others."""
    return next((name for magic, name in _CONTENTS.items() if data.startswith(magic)), "")


def foreign(head: bytes) -> str:
    """The encoding or format that a file's first `HEAD` bytes show; "" if they show none, as with UTF-8."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    if found := no_content(head):
        return found
    head = head[:HEAD]
    if len(head) < 8 or 0 not in head:
        return ""
    mostly = [2 * head[i::4].count(0) > len(head[i::4]) for i in range(4)]
    return _ZEROS.get((mostly[0], mostly[1], mostly[2], mostly[3]), "")


def begin(file: BinaryIO) -> int:
    """Moves a newly opened file to the byte where its text begins, and returns the place. Raises EncodingError,
    OSError."""
    head = file.read(HEAD)
    _refuse(head)
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    file.seek(start)
    return start


def unmarked(data: bytes) -> bytes:
    """The bytes of a whole file, or its first bytes, without a byte order mark. Raises EncodingError."""
    _refuse(data)
    return data.removeprefix(codecs.BOM_UTF8)


def text(data: bytes, at: int | None = None) -> str:
    """Decodes UTF-8. `at` is the place of the first byte in its file, for the message. Raises EncodingError."""
    where, at = ("", 0) if at is None else (" of the file", at)
    try:
        found = data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(data)
        byte, near = data[error.start], data[max(error.start - 12, 0) : error.start + 12]
        seen = near.decode("cp1252", "replace").strip()
        raise EncodingError(
            f"expected UTF-8, found {byte:#04x} at byte {at + error.start}{where}; "
            f"in Windows-1252 this place would read {seen!r}: if that is right, save the text as UTF-8"
        ) from error
    if "\0" in found:
        _refuse(data)
        zero = at + data.index(0)
        raise EncodingError(f"expected text in UTF-8, found a zero byte at byte {zero}{where}: is it text at all?")
    return found


def _refuse(head: bytes) -> None:
    if name := foreign(head):
        hint = ": save it as UTF-8" if name.startswith("UTF") else ""
        raise EncodingError(f"expected text in UTF-8, found {name}{hint}")
