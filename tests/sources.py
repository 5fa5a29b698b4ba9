"""The project's Python files for the tests of its architecture: parsed, never imported."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"ar_unified": ROOT / "ar_unified", "ar_tokenizers": ROOT / "tokenizers" / "ar_tokenizers"}


def files(*folders: str) -> list[Path]:
    """Every Python file under these folders of the repository, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def modules() -> dict[str, Path]:
    """Our modules by name; a package is its __init__.py."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, str, str]]:
    """(module of ours, name in it or "", name here) of every import in a file, also in functions or only for types.

    `from ar_unified.data import images as images` imports a module: ("ar_unified.data.images", "", "images").
    """
    known = modules()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name in known:
                    yield each.name, "", each.asname or each.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for each in node.names:
                here = each.asname or each.name
                if f"{node.module}.{each.name}" in known:
                    yield f"{node.module}.{each.name}", "", here
                elif node.module in known:
                    yield node.module, each.name, here
