"""Splits of a data set by name and by percent: "train", "train[:95%]", "[95%:]".

All rows about one image form a group, which is never divided (see `group`). Groups are sorted by their hashes, and a
part takes a share of them in this order: of n groups, "[:95%]" has the first 0.95 n, rounded, and "[95%:]" has the
others. So two parts that share a border are disjoint, and together they are the whole. The parts do not depend on the
order of the rows. With two groups or more, neither side of a border is empty; a single group is on the larger side. A
part between two borders, such as "[90%:95%]", may be empty if there are few groups.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Mapping

import numpy as np

from ar_unified.errors import UserError

_MANY = 1 << 20  # with so many groups, a border by hash and a border by count differ by at most about 0.1 %
_END = 1 << 64


class EmptySplit(UserError):
    """A split is empty: there is only one group, and it is on the other side of the border."""


class Split:
    """One split. It finds its borders from the rows.

    If it is a part (`by_part`), `has` must be called twice with every row. The calls before `settle` count the groups,
    and the calls after it return the answers.

    Attributes:
        names: the names of all splits in the rows.

    Raises:
        UserError: if `split` does not have the form above.
    """

    def __init__(self, split: str):
        self.split = split
        self.name, *self._shares = parse_split(split)
        self.by_part = self._shares != [0.0, 1.0]
        self.names: set[str] = set()
        self._low, self._high = 0, _END
        self._own, self._others = _Groups(), _Groups()
        self._counting = self.by_part

    def has(self, row: Mapping[str, object], data: bytes, *, own: bool = True) -> bool:
        """Whether a row is in the split. Before `settle`, this is True for every row that is counted.

        data: the row's bytes in its file.
        own: False for a row of another source. It is only counted, so that both sources have the same borders.
        """
        name = row.get("split", "train")
        self.names.add(str(name))
        if self.name and name != self.name:
            return False
        if not self.by_part:
            return True
        found = group(row, data)
        if self._counting:
            (self._own if own else self._others).add(found)
        return self._counting or self._low <= found < self._high

    def settle(self) -> None:
        """Sets the borders, after all rows have been counted."""
        own = self._own.settled()
        both = _Groups(self._own, self._others) if self._others else self._own
        self._low, self._high = (_border(share, own, both.settled()) for share in self._shares)
        self._counting = False

    def fingerprint(self) -> dict[str, object]:
        """JSON values that change when the borders do; {} for a split that is not a part."""
        return {"borders": [f"{self._low:x}", f"{self._high:x}"]} if self.by_part else {}

    def empty(self, where: object, what: str) -> UserError:
        """The error for an empty split. what: the word for an item, "row" or "text"."""
        if self.by_part and len(self._own.settled()) == 1:
            return EmptySplit(
                f"{where}: nothing is in split {self.split!r}, because all {what}s share one image or text, and "
                f"such {what}s stay in one split: add {what}s with other images or texts, or leave this split out"
            )
        names = ", ".join(sorted(self.names)) or "none"
        return UserError(f"{where}: no {what} is in split {self.split!r}; the {what}s' splits are: {names}")


class _Groups:
    """The hashes of groups, each once. A group takes 8 bytes, and at most _MANY groups are kept."""

    def __init__(self, *of: _Groups):
        self._sorted = np.unique(np.concatenate([np.zeros(0, np.uint64), *(groups.settled() for groups in of)]))
        self._new = array("Q")

    def __bool__(self) -> bool:
        return bool(len(self._sorted) or self._new)

    def add(self, hash: int) -> None:
        if len(self._sorted) < _MANY:
            self._new.append(hash)
            if len(self._new) >= _MANY:
                self.settled()

    def settled(self) -> np.ndarray:
        """All hashes, uint64 [n], ascending."""
        if self._new:
            self._sorted = np.unique(np.concatenate([self._sorted, np.frombuffer(self._new, np.uint64)]))
            self._new = array("Q")
        return self._sorted


def _border(share: float, own: np.ndarray, all_: np.ndarray) -> int:
    """The hash at which a part with `share` of all groups ends.

    The groups of all sources of a folder decide the border together, so all sources have the same border, and no image
    is on both sides. If one side would have no groups of this source, only this source's own groups decide.
    """
    if share <= 0 or share >= 1:
        return _END if share >= 1 else 0
    border = _by_count(share, all_)
    below = int(np.searchsorted(own, np.uint64(min(border, _END - 1))))
    return border if 0 < below < len(own) else _by_count(share, own)


def _by_count(share: float, groups: np.ndarray) -> int:
    n = len(groups)
    if n >= _MANY:
        return int(share * _END)
    rank = math.floor(share * n + 0.5)
    if n > 1:
        rank = min(max(rank, 1), n - 1)
    return int(groups[rank]) if rank < n else _END


def parse_split(split: str) -> tuple[str, float, float]:
    """The name ("" means any), and the borders low and high of the part, from 0 to 1. Raises UserError."""
    percent = r"(\d+(?:\.\d+)?)%"
    match = re.fullmatch(rf"([^\[\]%]*)(?:\[(?:{percent})?:(?:{percent})?\])?", split)
    if not match:
        raise UserError(f'split: expected "name", "name[:95%]" or "[95%:]", found {split!r}')
    name, low, high = match.groups()
    return name, float(low or 0) / 100, float(high or 100) / 100


def group(row: Mapping[str, object], data: bytes) -> int:
    """The hash, 0..2**64-1, that all rows of one group share. It is made from the first of these that the row has: its
    (first) image, its id, the prompt of a preference pair, or the bytes of the row."""
    segments = row.get("segments")
    inner = [s["image"] for s in segments if isinstance(s, dict) and "image" in s] if isinstance(segments, list) else []
    key = row.get("image") or next(iter(inner), None) or row.get("id")
    if key is None and "chosen" in row:
        key = json.dumps(row.get("prompt") or row.get("messages"))
    digest = hashlib.blake2b(str(key).encode(errors="replace") if key else data, digest_size=8).digest()
    return int.from_bytes(digest, "big")
