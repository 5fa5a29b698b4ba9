"""Compares manifests and fingerprints: nested dicts of JSON values that say what an artefact is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ar_unified.errors import UserError

ABSENT = "(absent)"  # stands for the value of a missing field

Json: TypeAlias = "None | bool | int | float | str | Sequence[Json] | Mapping[str, Json]"  # a JSON value
Changes = dict[str, list[Any]]  # {dotted field: [old, new]}


class Mismatch(UserError):
    """Two records differ, although they should be equal. `field`: the dotted name of the first field that differs."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class ManifestMismatch(Mismatch):
    """Two artefacts do not have the same vocabulary."""


def manifest_hash(manifest: Mapping[str, Json]) -> str:
    """sha256 (hex) of the manifest in canonical JSON: independent of key order."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def flat(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted field, value) for each value in nested mappings. Tuples become lists, as in JSON."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def differences(old: Mapping[str, Json], new: Mapping[str, Json]) -> Changes:
    """The fields in which two records differ, in the order of `new`. Fields that exist only in `old` come last."""
    a, b = dict(flat(old)), dict(flat(new))
    pairs = {field: [a.get(field, ABSENT), b.get(field, ABSENT)] for field in (b | a)}
    return {field: [x, y] for field, (x, y) in pairs.items() if x != y}


def require_same(
    expected: Mapping[str, Json], found: Mapping[str, Json], *, expected_from: str, found_from: str
) -> None:
    """Refuses two manifests that differ.

    Args:
        expected, found: the two manifests.
        expected_from, found_from: the source of each, for the message, such as "checkpoint runs/a/model".

    Raises:
        ManifestMismatch: names both sides and the first field that differs, in the order of `expected`.
    """
    for field, (theirs, ours) in differences(found, expected).items():
        raise ManifestMismatch(
            field,
            f"manifests differ at {field!r}: {expected_from} has {ours!r}, {found_from} has {theirs!r}. The two "
            "have different tokenizers or grammars: use artefacts of one run, or make the later artefact again.",
        )
