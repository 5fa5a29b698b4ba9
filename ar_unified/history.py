"""Changes of settings while a stage is made: which fields of its fingerprint may change, and the file that records the
changes.

`history.json` in a stage's folder is a list, oldest first, of {"when": UTC, "step": steps taken then, "kind": one of
the kinds below, "changed": {field: [old, new]}}:
    cost       the result is the same as without the change
    extended   the steps after `step` use other settings than the steps before it
    branched   the stage started from checkpoint `step` of another workdir, which "from" names
    anew       an input of the stage has changed, so it was made again; "aside" names the folder with the old result
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ar_unified.manifests import ABSENT, Changes, Json, differences, flat

DECIDING = ("extended", "branched")  # the kinds that are needed to reproduce a result


@dataclass(frozen=True)
class Changeable:
    """The fields that may have other values than at the start of the stage. All other fields determine its result.

    A field is a dotted name, such as "training.steps". The name of a section means all fields in it.

    Attributes:
        cost: fields that affect time, memory and what is logged, but not the result.
        extends: fields that affect only the steps after the change.
        anew: fields that describe the stage's inputs. If one changes, the stage is made again. This is safe because
            nothing else is made from the stage.
        later: fields that older records lack, each with the value that means the same as a missing field.
    """

    cost: Sequence[str] = ()
    extends: Sequence[str] = ()
    anew: Sequence[str] = ()
    later: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    def among(self, fields: Sequence[str]) -> str:
        """A sentence that says which of `fields` may change; "" if none may."""
        parts = []
        for words, names in (("at any time", self.cost), ("for the steps to come", self.extends)):
            if found := [name for name in names if any(_within(field, (name,)) for field in fields)]:
                parts.append(f"{', '.join(found)} {words}")
        return f"What may change here: {'; '.join(parts)}." if parts else ""


def divide(
    fingerprint: Mapping[str, Json], cost: Sequence[str], path: str = ""
) -> tuple[dict[str, Json], dict[str, Json]]:
    """Splits a fingerprint into the part that determines the result, and a flat dict {field: value} of the fields that
    affect only cost.
    """
    kept: dict[str, Json] = {}
    only_cost: dict[str, Json] = {}
    for key, value in fingerprint.items():
        field = f"{path}.{key}" if path else key
        if _within(field, cost):
            only_cost |= dict(flat(value, field))
        elif isinstance(value, dict) and value:
            inner, found = divide(value, cost, field)
            only_cost |= found
            if inner:
                kept[key] = inner
        else:
            kept[key] = value
    return kept, only_cost


def compare(
    found: Mapping[str, Any], fingerprint: Mapping[str, Any], cost: Mapping[str, Any], may: Changeable
) -> tuple[str | None, dict[str, Changes]]:
    """Compares a record ({"fingerprint", "cost"}) with the settings that a stage has now.

    Returns:
        The first field whose difference is not allowed (None if all are), and the differences by kind. If an input of
        the stage differs, all differences have the kind "anew".
    """
    # Records of earlier versions have the fields that affect only cost in their fingerprint.
    theirs, their_cost = divide(found["fingerprint"], may.cost)
    their_cost |= found.get("cost", {})
    changes = differences(theirs, fingerprint)
    for name, value in may.later.items():
        if changes.get(name) in ([ABSENT, value], [value, ABSENT]):
            del changes[name]
    if any(_within(field, may.anew) for field in changes):
        return None, {"anew": changes}
    refused = next((field for field in changes if not _within(field, may.extends)), None)
    cheap = {name: [their_cost[name], new] for name, new in cost.items() if their_cost.get(name, new) != new}
    kinds = {"extended": changes, "cost": cheap}
    return refused, {kind: fields for kind, fields in kinds.items() if fields}


def as_of(found: Mapping[str, Any], told: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """Returns a record as it was before `step`. `told` is its history, whose changes from this step on are undone."""
    fingerprint, cost = copy.deepcopy(found["fingerprint"]), dict(found.get("cost", {}))
    for late in reversed([entry for entry in told if (entry["step"] or 0) >= step]):
        for field, (old, _) in late["changed"].items():
            *path, name = field.split(".")
            part = cost if field in cost else functools.reduce(operator.getitem, path, fingerprint)
            part[field if part is cost else name] = old
    return {"fingerprint": fingerprint, "cost": cost}


def entry(kind: str, step: int | None, changed: Changes, **more: Any) -> dict[str, object]:
    """An entry of a history, with the present time."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"when": when, "step": step, "kind": kind, **more, "changed": changed}


def same(a: Mapping[str, Json], b: Mapping[str, Json]) -> bool:
    """Whether two entries record the same change. This happens if an attempt was killed and started again."""
    return {**a, "when": ""} == {**b, "when": ""}


def told(found: Mapping[str, Any]) -> str:
    """An entry in a few words, such as "at step 24: training.steps 24 -> 48"."""
    changes = ", ".join(f"{field} {old!s:.60} -> {new!s:.60}" for field, (old, new) in found["changed"].items())
    where = f"at step {found['step']}" if found["step"] is not None else ""
    whence = f"branched from {found['from']}" if "from" in found else ""
    beside = " (this does not change the result)" if found["kind"] == "cost" else ""
    return ": ".join(filter(None, (" ".join(filter(None, (where, whence))), changes + beside)))


def _within(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


NOTHING = Changeable()
