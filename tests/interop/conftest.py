"""Published folders, each written once a session."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Published = Callable[..., Path]
# They are of the reference implementations alone (make test-interop).
collect_ignore = [] if importlib.util.find_spec("torch") else ["test_parity.py", "test_published.py"]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """published(maker, *args, **settings): the folder that a maker of `published` or `formats` filled.

    twin=True: that of transformers' names, which the same call wrote.
    """
    made: dict[Any, tuple[Path, Path]] = {}

    def get(make: Callable[..., Path], *args: Any, twin: bool = False, **settings: Any) -> Path:
        key = (make.__name__, args, tuple(sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            paths = folder / "published", folder / "twin"
            has_twin = "twin" in make.__code__.co_varnames[: make.__code__.co_argcount]
            make(paths[0], *((paths[1],) if has_twin else ()), *args, **settings)
            made[key] = paths
        return made[key][twin]

    return get
