"""Reads and makes the content of language.json, which bundles and workdirs have. This content is a grammar's manifest
and, if there are published ids, the border between them and ours. The text tokenizer's file is in the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ar_tokenizers.codec import Codec, Lossy, find
from ar_tokenizers.reading import codec

from ar_unified.language.border import Border, MappedCodec
from ar_unified.language.grammar import Grammar
from ar_unified.manifests import Json

FILE = "language.json"
_BORDER, _LOSSES = "border", "text_losses"


def record_of(grammar: Grammar) -> dict[str, Json]:
    """The content of language.json, as JSON values. The text tokenizer's losses are only for people to read."""
    out, text = grammar.manifest(), grammar.text_codec
    if isinstance(text, MappedCodec):
        out[_BORDER] = text.border.manifest()
    if losses := getattr(text, "losses", ()):
        out[_LOSSES] = [str(loss) for loss in losses]
    return out


def manifest_of(record: Mapping[str, Json]) -> dict[str, Json]:
    """The grammar's manifest from the content of language.json."""
    return {name: value for name, value in record.items() if name not in (_BORDER, _LOSSES)}


def text_codec(record: Mapping[str, Json], file: str, data: bytes, lossy: Lossy = "refuse") -> Codec:
    """The text tokenizer from language.json and its own file. Raises ValueError if the two do not match."""
    if _BORDER not in record:
        return codec(file, data, lossy=lossy)
    border, size = Border.from_manifest(record[_BORDER]), record.get("text_size")
    if border.size != (used := record.get("used")):
        raise ValueError(f"border: expected {used!r} ids, as `used` says; found {border.size}")
    if type(size) is not int:
        raise ValueError(f"text_size: expected a whole number, found {size!r:.40}")
    return MappedCodec.of(file, data, border, size, lossy)


def text_in(folder: Path, lossy: Lossy = "refuse") -> Codec | None:
    """The text tokenizer of a folder, which may also have a language.json. Raises ValueError like `text_codec`."""
    path, record = find(folder), folder / FILE
    if path is None:
        return None
    try:
        return text_codec(_read(record) if record.exists() else {}, path.name, path.read_bytes(), lossy)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def grammar_in(folder: Path, text: Codec) -> Grammar | None:
    """The grammar from a folder's language.json and text tokenizer; None if the folder has no grammar."""
    return Grammar.from_manifest(manifest_of(_read(path)), text) if (path := folder / FILE).exists() else None


def _read(path: Path) -> dict[str, Json]:
    found: dict[str, Json] = json.loads(path.read_bytes())
    return found
