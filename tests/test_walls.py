"""Which package may import which, and how long a file may be. Move code that this test refuses to a layer that both
sides may import."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from tests.sources import PACKAGES, ROOT, files, imports, modules, tree

# The layers, from the lowest up. A room (a module or a package) imports from itself and from lower layers, never from
# its own layer. A module belongs to the longest name here that matches.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "both tokenizers, which anybody may take without this framework",
        ("ar_tokenizers",),
    ),
    (
        "words for errors, paths, what a folder is, progress, signals, bytes as text, any pixels as RGB, the version: "
        "they know nothing of what is trained",
        ("errors", "paths", "recognised", "progress", "interrupts", "data.encoding", "data.colours", "version"),
    ),
    (
        "records that say what an artefact is, compared; tensors into files; folders of an object store",
        ("manifests", "tensors", "storage"),
    ),
    (
        "what a sequence may say, what has changed, what was measured, how devices compute: each on its own",
        ("language", "history", "metrics", "kernels", "parallel"),
    ),
    (
        "what becomes of the pixels of an image file",
        ("data.colours", "data.resampling"),
    ),
    (
        "stages on disk; images and files that stay in their folder, for datasets and requests; a batch's fields",
        ("workdir", "data.images", "data.files", "data.batch"),
    ),
    (
        "the size that an image gets: likewise",
        ("data.sizes",),
    ),
    (
        "weights on disk with the vocabulary's manifest; documents as batches; the network",
        ("checkpoint", "data", "model"),
    ),
    (
        "a model as one folder",
        ("bundle",),
    ),
    (
        "other people's checkpoints into such a folder, and back",
        ("interop",),
    ),
    (
        "how a model comes to be and how it is used: neither needs the other, and a server needs one alone",
        ("training", "sampling"),
    ),
    (
        "what a model is worth (it samples), what a run would cost (it compiles both)",
        ("evaluation", "planning"),
    ),
    (
        "how good an answer is: checkers of the evaluation, and whatever else a person names",
        ("rewards",),
    ),
    (
        "a config and a workdir, and the things they name",
        ("experiment",),
    ),
    (
        "arguments in, one call, words out",
        ("cli",),
    ),
)
ROOMS = {room: level for level, (_, rooms) in enumerate(LAYERS) for room in rooms}

LINES, FUNCTION_LINES = 450, 80
LONG_FUNCTIONS = {
    "ar_unified/training/loop.py: fit",  # allowed, because it is read from top to bottom
}


def room(module: str) -> str:
    name = module.removeprefix("ar_unified.")
    fitting = [each for each in ROOMS if name == each or name.startswith(f"{each}.")]
    return max(fitting, key=len, default="")


def test_every_module_is_in_a_room_and_every_room_is_there() -> None:
    assert not [name for name in modules() if name != "ar_unified" and not room(name)], "say in LAYERS where it belongs"
    assert not ROOMS.keys() - {room(name) for name in modules()}, "LAYERS names a room that is gone"


def test_imports_run_downward() -> None:
    upward = []
    for name, path in modules().items():
        for other, _, _ in imports(path):
            here, there = room(name), room(other)
            if name != "ar_unified" and here != there and (not there or ROOMS[there] >= ROOMS[here]):
                upward.append(f"{name} imports {other}")
    assert not upward


def test_training_sampling_and_datasets_never_import_each_other() -> None:
    """Nor do they indirectly: sampling loads no optimizer and no TFDS, and training loads no engine."""
    graph = {name: {other for other, _, _ in imports(path)} for name, path in modules().items()}
    for here, there in itertools.permutations(("sampling", "training", "data"), 2):
        reached = reachable(graph, {name for name in graph if room(name) == here})
        assert not [name for name in reached if room(name) == there]


def reachable(graph: Mapping[str, set[str]], found: set[str]) -> set[str]:
    new = {other for name in found for other in graph[name]} - found
    return reachable(graph, found | new) if new else found


def test_no_modules_import_each_other() -> None:
    graph = {name: {other for other, _, _ in imports(path) if other != name} for name, path in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_tokenizers_know_nothing_of_the_framework() -> None:
    for path in files("tokenizers/ar_tokenizers"):
        assert not [module for module, _, _ in imports(path) if module.startswith("ar_unified")], path


def test_a_kernel_is_seen_through_its_folder() -> None:
    """kernels/<op>/ has one public function, and its modules are imported only inside the folder."""
    for name, path in modules().items():
        for other, _, _ in imports(path):
            inside = other.startswith("ar_unified.kernels.") and other.count(".") > 2
            assert not inside or name.startswith(other.rpartition(".")[0]), f"{name} imports {other}"


def test_what_is_private_stays_in_its_module() -> None:
    """A name with an underscore is never imported, and is used only in its own module."""
    reached = []
    for path in files("ar_unified", "tokenizers", "experiments", "examples"):
        made = {"_replace", "_asdict", "_make", "_fields", "_exit"}  # methods of named tuples, and os._exit
        used = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                made.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                (used if isinstance(node.ctx, ast.Load) else made).add(node.attr)
        reached += [f"{path.relative_to(ROOT)}: {name}" for name in used - made]
        reached += [
            f"{path.relative_to(ROOT)}: {name} of {module}" for module, name, _ in imports(path) if name[:1] == "_"
        ]
    assert not reached


def test_the_command_line_has_a_module_for_each_verb() -> None:
    from ar_unified.cli.arguments import module_of
    from ar_unified.cli.main import VERBS

    found = {path.stem for path in (PACKAGES["ar_unified"] / "cli").glob("*.py")}
    assert found == {"__init__", "main", "arguments", "telling", *map(module_of, VERBS)}


def test_a_file_is_read_in_one_sitting() -> None:
    long, functions = [], set()
    for path in files("ar_unified", "tokenizers", "tests", "experiments", "examples"):
        name = str(path.relative_to(ROOT))
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > LINES:
            long.append(f"{name}: {n} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES:
                functions.add(f"{name}: {node.name}")
    assert not long
    assert functions == LONG_FUNCTIONS, f"more than {FUNCTION_LINES} lines, or no longer so"
