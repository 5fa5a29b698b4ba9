"""Writes a published language model after this project has extended it with images. The result has the published form.
In its tables, the rows of the new ids come last.

Existing ids keep their numbers. The tokenizer's file gets a name for each new id, so that transformers reads and writes
them as tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ar_tokenizers.files import write_bytes

from ar_unified.bundle import IMAGE, Bundle
from ar_unified.errors import UserError
from ar_unified.interop.own import token_name
from ar_unified.manifests import Json
from ar_unified.workdir import write_json

KEY = "extended"  # this key of published.json has the number of ids of the published table


def names_of(bundle: Bundle, first: int) -> dict[int, str]:
    """The name of each published id from `first` on."""
    border, vocabulary = bundle.border, bundle.grammar.vocabulary
    if border is None or not 0 < first <= border.size:
        raise UserError(f"{bundle.folder}: published.json: {KEY}: expected a number of ids, found {first!r:.40}")
    return {id: token_name(vocabulary, int(border.ours[id])) for id in range(first, border.size)}


def settings_of(bundle: Bundle, content: Mapping[str, Json]) -> dict[str, Json]:
    """config.json with the new number of ids."""
    assert bundle.border is not None
    return {**content, "vocab_size": bundle.border.size}


def write_tokens(bundle: Bundle, folder: Path, file: str, first: int) -> None:
    """Writes the text tokenizer's file with the new tokens, and the image tokenizer. If the file cannot hold new
    tokens, they are written to added_tokens.json, where transformers looks for them.
    """
    names, data = names_of(bundle, first), bundle.text_tokenizer.data
    if Path(file).suffix == ".json":
        data = json.dumps(_with(json.loads(data), names), ensure_ascii=False).encode()
    else:
        write_json(folder / "added_tokens.json", {name: id for id, name in names.items()})
    write_bytes(folder / file, data)
    if (image := bundle.image_tokenizer()) is not None:
        image.save(folder / IMAGE)


def _with(tokenizer: dict[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """A tokenizer.json with special tokens for these ids. Ids between the file's last token and the first of
    these ids get placeholders."""
    added = tokenizer.get("added_tokens") or []
    pieces = tokenizer["model"]["vocab"]
    known = set(pieces) if isinstance(pieces, dict) else {piece[0] for piece in pieces}
    ids = [*pieces.values()] if isinstance(pieces, dict) else [*range(len(pieces))]
    known |= {token["content"] for token in added}
    last = max([*ids, *(token["id"] for token in added)])
    between = {id: f"<unused_{id}>" for id in range(last + 1, min(names))}
    more = []
    for id, name in {**between, **names}.items():
        while name in known:
            name = f"{name[:-1]}_>"
        marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        more.append({"id": id, "content": name, **marks, "special": True})
    return {**tokenizer, "added_tokens": [*added, *more]}
