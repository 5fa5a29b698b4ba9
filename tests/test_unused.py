"""Nothing is public only for tests: names that no module, verb or experiment uses are removed or made private."""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Iterator

from tests.sources import PACKAGES, files, imports, modules, tree

# Names that are called although this repository never names them, and their callers.
CALLED = {
    "ar_unified.cli.*: main": "cli.main imports the module of a verb by its name",
    "ar_unified.kernels.*: forward": "kernels.backend imports the module of a device by its name",
    "ar_unified.kernels.*: backward": "likewise",
    "ar_unified.kernels.*: prepare": "likewise",
    "ar_unified.kernels.*: recomputed": "likewise",
    "ar_unified.kernels.*: unsupported": "likewise",
    "ar_unified.sampling.adapters.*: Engine*": "an evaluation harness is given the class",
    "ar_unified.language.rows: document_to_json": "who writes documents as rows for the readers of data/",
    "ar_tokenizers.image.space_to_depth: receptive_radius": "who decodes in windows asks what overlap to take",
}


def defined(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module makes."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def uses() -> Iterator[tuple[str, str]]:
    """(module, name) of every use, in our packages and experiments, outside the statement that makes the name."""
    names = {path: name for name, path in modules().items()}
    for path in files("ar_unified", "tokenizers", "experiments", "examples"):
        here, opened, taken = names.get(path, ""), dict[str, str](), dict[str, tuple[str, str]]()
        for module, name, called in imports(path):
            if name:
                taken[called] = (module, name)
            else:
                opened[called] = module
        handed, reached = set[str](), set[str]()  # the modules used as values, and the attributes of any value
        for statement in tree(path).body:
            mine, parts = defined(statement), list(ast.walk(statement))
            asked = {id(node.value) for node in parts if isinstance(node, ast.Attribute)}
            for node in parts:
                if isinstance(node, ast.Attribute):
                    reached.add(node.attr)
                    if (of := opened.get(ast.unparse(node.value))) is not None:
                        yield of, node.attr
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    if node.id in taken:
                        yield taken[node.id]
                    elif node.id in opened and id(node) not in asked:
                        handed.add(opened[node.id])
                    elif node.id not in mine:
                        yield here, node.id
        yield from ((module, name) for module in handed for name in reached)


def test_nothing_public_is_for_tests_alone() -> None:
    passed_on: dict[tuple[str, str], tuple[str, str]] = {}  # names that a package takes from one of its modules
    for name, path in modules().items():
        if path.name == "__init__.py":
            passed_on |= {(name, called): (module, of) for module, of, called in imports(path) if of}
    used = set()
    for use in uses():
        while use not in used:
            used.add(use)
            use = passed_on.get(use, use)
    unused = [
        f"{module}: {name}"
        for module, path in modules().items()
        for statement in tree(path).body
        for name in defined(statement)
        if not name.startswith("_") and (module, name) not in used
    ]
    assert len(used) > 1000, "is this test blind?"
    assert not [each for each in unused if not any(fnmatch.fnmatch(each, pattern) for pattern in CALLED)]
    assert not [pattern for pattern in CALLED if not fnmatch.filter(unused, pattern)], "used by now, or gone"


def test_no_package_has_a_folder_of_its_own_name() -> None:
    """`tokenizers/` is a source root: with an __init__ it would hide the package `tokenizers` of PyPI."""
    assert not (PACKAGES["ar_tokenizers"].parent / "__init__.py").exists()
