"""Finds the files that a path with braces or wildcards names: shards/{000..063}.tar, data/train-*.parquet, a folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ar_unified import storage
from ar_unified.data.files import Bucket, Found, folder_at, require_file
from ar_unified.errors import UserError
from ar_unified.storage import AnyPath, Remote

TABLES, TARS = (".parquet", ".arrow"), (".tar", ".tar.gz", ".tgz", ".tar.zst")  # endings of tables and tars
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST = 1_000_000  # the most names that braces may stand for


def shards(path: str | AnyPath, endings: Sequence[str], *, links: bool = False) -> tuple[AnyPath, list[Found]]:
    """Returns the common folder and the files below it, in the order of the braces if there are braces, else sorted by
    name.

    Args:
        path: one file; a folder, which means all files below it with one of `endings` (`files.Folder`); a name with
            {000..063} or {a,b}, where all files must exist; or a name with wildcards. It may be on disk or in a store.

    Raises:
        UserError: if there are no files, or if a file that the braces name is missing.
    """
    if isinstance(place := storage.path(path), Remote):
        return _in_store(place, endings)
    path = str(path)
    if os.path.isdir(path):
        found = folder_at(path, links).search(lambda name: name.lower().endswith(tuple(endings)))
        if not found:
            raise UserError(f"{path}: expected files named *{', *'.join(endings)} in it, found none")
        return Path(path), found
    names = braces(path)
    if len(names) == 1 and glob.has_magic(path) and not os.path.exists(path):
        names = sorted(glob.glob(path, recursive=True))
        if not names:
            raise UserError(f"{path}: no file matches this name")
    for name in names:
        require_file(name)
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names]))
    return root, [Found(os.path.relpath(os.path.abspath(name), root), os.path.getsize(name)) for name in names]


def named(path: str | AnyPath, root: AnyPath) -> str:
    """A name for a source, made from the path that a person gave and the folder that `shards` found."""
    given = storage.path(path)
    return given.stem if given.is_file() else root.resolve().name


def _in_store(path: Remote, endings: Sequence[str]) -> tuple[Remote, list[Found]]:
    """`shards` for a store: one listing of the common folder finds all names."""
    names = braces(str(path))
    if len(names) == 1 and not glob.has_magic(str(path)):
        if (found := storage.facts(str(path))) is not None:
            return path.parent, [Found(path.name, found.size)]
        listed = Bucket(path).search(lambda name: name.lower().endswith(tuple(endings)))
        if not listed:
            raise UserError(f"{path}: expected files named *{', *'.join(endings)} in it, found none")
        return path, listed
    fixed = [name[: match.start()] if (match := re.search(r"[*?[]", name)) else name for name in names]
    root = Remote(_above(fixed))
    there = {item.name: item for item in Bucket(root).search(lambda _: True)}
    tops = [name.removeprefix(f"{root}/") for name in names]
    if len(names) == 1 and glob.has_magic(str(path)):
        pattern = re.compile(_regex(tops[0]))
        tops = [name for name in there if pattern.fullmatch(name)]
        if not tops:
            raise UserError(f"{path}: no file matches this name")
    if missing := next((name for name in tops if name not in there), None):
        raise UserError(f"{root}/{missing}: no such file")
    inner = _above([f"{root}/{name}" for name in tops])
    return Remote(inner), [replace(there[name], name=f"{root}/{name}".removeprefix(f"{inner}/")) for name in tops]


def _above(names: Sequence[str]) -> str:
    """The innermost folder that contains all of these URLs."""
    parts = [name.rpartition("/")[0].split("/") for name in names]
    same = [each[0] for each in zip(*parts, strict=False) if len(set(each)) == 1]
    first = next((i for i, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), len(same))
    return "/".join(same[:first])


def _regex(pattern: str) -> str:
    """Turns wildcards into a regular expression, as `glob` does: * and ? match within a folder, ** any number of
    folders.
    """
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] == "[" and (end := pattern.find("]", i + 2)) > 0:
            inner = pattern[i + 1 : end].replace("\\", "\\\\")
            out, i = f"{out}[{'^' + inner[1:] if inner[0] == '!' else inner}]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return out


def braces(name: str) -> list[str]:
    """All names that a name with {000..063} or {a,b} stands for; the last braces change fastest. Raises UserError if
    there are too many."""
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
