"""The one way in for a path that a person wrote."""

from __future__ import annotations

import os


def home(path: str | os.PathLike[str]) -> str:
    """The path with a leading `~` or `~name` as that home folder; every other one, and a URL, as it is.

    A shell does this for `--workdir ~/x`, but not inside a word, as in `--workdir='~/x'` or `folder.py:path=~/x`.

    Raises:
        ValueError: there is no such person here: a folder named `~name` is written `./~name`.
    """
    found = os.path.expanduser(os.fspath(path))
    if found.startswith("~"):
        person = found.partition("/")[0]
        raise ValueError(f"{path}: {person} has no home folder here; a folder of that name is ./{person}")
    return found
