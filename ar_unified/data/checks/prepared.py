"""Looks at the token shards that `prepare` wrote, and reports what it found. Changes nothing."""

from __future__ import annotations

from pathlib import Path

from ar_unified.data.checks.validate import Found, Validation
from ar_unified.data.checks.view import View
from ar_unified.data.images import ImageCodec
from ar_unified.data.items import BadItem
from ar_unified.data.prepare import load_manifest
from ar_unified.data.shards import Shards, read_skipped, shard_path
from ar_unified.language.document import TASKS
from ar_unified.language.grammar import Grammar
from ar_unified.manifests import require_same

_AT_ONCE = 1000


def parts(folder: Path) -> dict[str, Path]:
    """Returns the prepared folders by name: `folder` itself, or the folders inside it ("train", "validation"); {} if
    there are none."""
    if (folder / "manifest.json").exists() and (folder / "plan.json").exists():
        return {folder.name: folder}
    inner = sorted(path.parent for path in folder.glob("*/plan.json") if (path.parent / "manifest.json").exists())
    return {path.name: path for path in inner}


def look(
    folders: dict[str, Path],
    grammar: Grammar | None = None,
    image_tokenizer: ImageCodec | None = None,
    *,
    sequence_length: int | None = None,
    show: int = 3,
    first: int | None = None,
) -> Validation:
    """Reports counts, lengths and left-out items of each source in prepared folders.

    Args:
        folders: the folders by name, from `parts`.
        grammar: with it, documents are shown as pieces of text instead of numbers.
        image_tokenizer: together with a grammar, shows the images of documents.
        sequence_length: length of rows, in tokens; None means the length of the longest document that was allowed.
        show: how many documents of each source are shown.
        first: how many documents of each source are read to count tokens by role; None means all.

    Raises:
        ManifestMismatch: if the data was prepared with another vocabulary than the grammar's.
    """
    view, sources, longest = View(grammar, image_tokenizer), [], 1
    for part, folder in folders.items():
        manifest = load_manifest(folder)
        longest = max(longest, int(manifest["settings"]["max_tokens"]))
        if grammar is not None:
            where = dict(expected_from="the tokenizers", found_from=str(folder))
            require_same(grammar.manifest(), manifest["vocabulary"], **where)
        for name, report in manifest["report"].items():
            found = Found(name, report["items"], part, looked=report["items"])
            shards = Shards(folder / name, report["shards"])
            _count(found, shards, folder / name, report["shards"])
            for at in range(0, min(len(shards), first or len(shards)), _AT_ONCE):
                for document in shards.read(range(at, min(at + _AT_ONCE, len(shards), first or len(shards)))):
                    found.count(document.roles)
            for i, document in enumerate(shards.read(range(min(show, len(shards))))):
                origin = f"item {shards.item(i)} of {name}, document {i}"
                found.shown.append(view.read(document, origin, TASKS[int(shards.index["task"][i])]))
            sources.append(found)
    return Validation(sources, sequence_length=sequence_length or longest)


def _count(found: Found, shards: Shards, folder: Path, count: int) -> None:
    """Adds to `found` the counts of the index and the items that were left out."""
    index = shards.index
    for i, task in enumerate(TASKS):
        if documents := int((index["task"] == i).sum()):
            found.tasks[task] = documents
    found.text_bytes, found.images = index["text_bytes"].tolist(), index["images"].tolist()
    found.tokens = index["length"].tolist()
    for number in range(count):
        rows = read_skipped(shard_path(folder, number))
        found.bad += [BadItem(row["kind"], row["origin"], row["reason"]) for row in rows]
