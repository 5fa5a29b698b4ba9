"""The version, which is defined only in pyproject.toml."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path


def version() -> str:
    """The version of the installed package, or, in a clone that is not installed, the version in its pyproject.toml."""
    try:
        return metadata.version("ar_unified")
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
