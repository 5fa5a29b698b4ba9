"""The files that a path with braces or wildcards names: shards/{000..063}.tar, data/train-*.parquet, a folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ar_unified.data.files import Folder, Found, require_file
from ar_unified.errors import UserError

TABLES, TARS = (".parquet", ".arrow"), (".tar",)  # how such files end
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST = 1_000_000  # names that braces may stand for


def shards(path: str | Path, endings: Sequence[str], *, links: bool = False) -> tuple[Path, list[Found]]:
    """The folder that all are in, and the files below it, in the order of braces, else of their names.

    Args:
        path: one file; a folder, whose files with one of `endings` are meant, however deep (`files.Folder`); or a name
            with {000..063} or {a,b}, each of which must be there, or with wildcards.

    Raises:
        UserError: there are none, or one that braces name is missing.
    """
    path = str(path)
    if os.path.isdir(path):
        found = Folder(path, links).search(lambda name: name.lower().endswith(tuple(endings)))
        if not found:
            raise UserError(f"{path}: expected files named *{', *'.join(endings)} in it, found none")
        return Path(path), found
    names = braces(path)
    if len(names) == 1 and glob.has_magic(path) and not os.path.exists(path):
        names = sorted(glob.glob(path, recursive=True))
        if not names:
            raise UserError(f"{path}: no file of this name")
    for name in names:
        require_file(name)
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names]))
    return root, [Found(os.path.relpath(os.path.abspath(name), root), os.path.getsize(name)) for name in names]


def braces(name: str) -> list[str]:
    """What a name with {000..063} or {a,b} stands for, the last braces counting fastest. Raises UserError: too many."""
    match = _BRACES.search(name)
    if not match:
        return [name]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < _MOST:
            raise UserError(f"{name}: expected {{000..063}}, from a smaller number to a larger one, found {match[0]}")
        width = len(numbers[1]) if len(numbers[1]) == len(numbers[2]) or numbers[1].startswith("0") else 0
        inner = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in match[1]:
        inner = match[1].split(",")
    else:
        return [name]
    rest = braces(name[match.end() :])
    if len(inner) * len(rest) > _MOST:
        raise UserError(f"{name}: expected braces that stand for at most {_MOST} names")
    return [name[: match.start()] + each + end for each in inner for end in rest]
