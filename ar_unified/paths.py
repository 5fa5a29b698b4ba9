"""The one way in for a path that a person wrote, and for the name of an experiment that comes with the package."""

from __future__ import annotations

import os
from pathlib import Path

# In a wheel beside the modules; in a clone of the repository beside the package.
_SHIPPED = [Path(__file__).parent / "experiments", Path(__file__).parents[1] / "experiments"]


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


def experiment_file(given: str) -> str:
    """The "FILE[:arg]" that is meant by `given`: a file as it stands, or an experiment that comes with the package.

    "shapes", "folder:path=DIR" and "image_tokenizers/ibq:path=DIR" name such an experiment wherever the command runs.
    So does "experiments/shapes.py" where no such file is there. A file of the person's own always comes first.

    Raises:
        ValueError: a single word that is neither a file nor the name of an experiment; the message has the names.
    """
    path, colon, arg = home(given).partition(":")
    if Path(path).is_file():  # a folder `photos` is what the experiment `photos` may be about
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
    """Experiments below a folder, by name. Scripts that make data, launch jobs or measure are left out."""
    files = [*folder.glob("*.py"), *folder.glob("image_tokenizers/*.py"), *folder.glob("published/*.py")]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
