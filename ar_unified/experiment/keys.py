"""Checks the keys that a person gives on the command line: whether the config has them, and whether their values can be
read.
"""

from __future__ import annotations

import re
from typing import Any

from ml_collections import ConfigDict

from ar_unified.errors import UserError, nearest

WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", ConfigDict: "a dict"}


def require_known(config: ConfigDict, key: str) -> None:
    """Raises UserError if the config does not have the key that an override names."""
    part: Any = config
    for name in re.findall(r"[^.\[\]]+", key):
        if isinstance(part, tuple) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
            continue
        if not isinstance(part, ConfigDict) or name not in part:
            known = [*_keys(config), *(_keys(part, key[: key.rindex("]") + 2]) if "]" in key else ())]
            near = nearest(key, known)
            if not near and (same := [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]):
                near = f"; did you mean {same[0]!r}?"
            raise UserError(f"config.{key}: there is no such key{near}")
        part = part[name]


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all keys, sections included."""
    found = []
    for name, value in config.items():
        found.append(prefix + name)
        found += _keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else []
    return found


def of_override(config: ConfigDict, error: str) -> str:
    """Rewords ml_collections' message about a value that it cannot read."""
    match = re.match(r"flag --config\.(\S+?)=(.*?): ", error, re.DOTALL)
    if match is None:
        return f"--config: {error}"
    part: Any = config
    for name in re.findall(r"[^.\[\]]+", match[1]):
        part = part[int(name) if name.isdecimal() else name]
    return f"config.{match[1]}: expected {WORDS.get(type(part), type(part).__name__)}, found {match[2]!r}"
