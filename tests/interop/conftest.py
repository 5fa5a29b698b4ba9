"""Published folders, each written once per session."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Published = Callable[..., Path]
_NEEDS_TORCH = re.compile(r"^(torch = )?pytest\.importorskip\(\"torch\"", re.MULTILINE)
# Files that only test reference implementations (make test-interop) are not collected without torch.
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not importlib.util.find_spec("torch") and _NEEDS_TORCH.search(path.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """published(maker, *args, **settings): the folder that a maker in `published` or `formats` filled.

    twin=True: the folder with transformers' names, which the same call wrote.
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
