"""Resolves every path that a person wrote, and every name of an experiment that comes with the package."""

from __future__ import annotations

import os
from pathlib import Path

# The folder of experiments is inside the package in a wheel, and next to it in a clone of the repository.
_SHIPPED = [Path(__file__).parent / "experiments", Path(__file__).parents[1] / "experiments"]


def home(path: str | os.PathLike[str]) -> str:
    """The path, with a leading `~` or `~name` replaced by that home folder. Other paths and URLs do not change.

    A shell does this for `--workdir ~/x`, but not inside a word, as in `--workdir='~/x'` or `folder.py:path=~/x`.

    Raises:
        ValueError: if this machine has no such user. A folder named `~name` must be written as `./~name`.
    """
    found = os.path.expanduser(os.fspath(path))
    if found.startswith("~"):
        person = found.partition("/")[0]
        raise ValueError(
            f"{path}: {person} is not a user's home folder here; if you mean a folder of that name, write ./{person}"
        )
    return found


def experiment_file(given: str) -> str:
    """Resolves `given` to "FILE[:arg]", where FILE is an existing file or an experiment that comes with the package.

    An experiment of the package is found from any current folder by its name: "shapes", "folder:path=DIR" or
    "image_tokenizers/ibq:path=DIR". "experiments/shapes.py" works too, if there is no such file. An existing file of
    the user always comes first.

    Raises:
        ValueError: if a single word is neither a file nor the name of an experiment. The message lists the names.
    """
    path, colon, arg = home(given).partition(":")
    if Path(path).is_file():  # not a folder: `photos` may be the data of the experiment `photos`
        return path + colon + arg
    name = path.removeprefix("experiments/").removesuffix(".py")
    for folder in _SHIPPED:
        if name in (found := _experiments(folder)):
            return f"{found[name]}{colon}{arg}"
    if path == name and "/" not in name:
        known = sorted({name for folder in _SHIPPED for name in _experiments(folder)})
        raise ValueError(f"{path}: expected a file, or one of {', '.join(known)}; found neither")
    return path + colon + arg


def _experiments(folder: Path) -> dict[str, Path]:
    """The experiments in a folder, by name. Scripts that make data, launch jobs or measure are left out."""
    files = [*folder.glob("*.py"), *folder.glob("image_tokenizers/*.py"), *folder.glob("published/*.py")]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
