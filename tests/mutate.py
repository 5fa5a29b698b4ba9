"""Makes the mistakes of tests/mutations*.py one by one, each in a copy of the tree, and runs their tests.

python tests/mutate.py [--jobs 2] [--green] [--missing] [NAME ...]

A mistake is noticed if its tests pass without it and fail with it. With --green, the tests are assumed to pass without
it, because `make test` has just shown that. --missing makes only the mistakes that are not yet known to be noticed. All
known results are written to docs/mutations.md. The exit status is 1 if a mistake was not noticed, or can no longer be
made.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import mutations, mutations_of_use  # noqa: E402
from tests.mutations import Mutation  # noqa: E402

MUTATIONS = (*mutations.MUTATIONS, *mutations_of_use.MUTATIONS)

KNOWN = ROOT / ".cache" / "mutations.json"  # results by name, with a digest of the mistake
PAGE = ROOT / "docs" / "mutations.md"
QUICK = "not slow and not interop and not newest_jax"  # as in `make test`
LONGEST = 900  # seconds; a test that takes longer counts as hanging, which also notices the mistake
HEAD = """# Mistakes that the tests notice

`make mutate` makes each of these mistakes (tests/mutations*.py) in a copy of the repository and runs the quick tests
that must notice it. Written by tests/mutate.py; "noticed by" is the first test that failed.

{noticed} of {all} are noticed.

| mistake | in | what it would do | noticed by | s | commit |
| --- | --- | --- | --- | --- | --- |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of mistakes; all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--green", action="store_true")
    parser.add_argument("--missing", action="store_true")
    options = parser.parse_args()
    unknown = set(options.names) - {each.name for each in MUTATIONS}
    if unknown:
        parser.error(f"no mistake is called {', '.join(sorted(unknown))}")
    wrong = [f"{each.name}: {problem}" for each in MUTATIONS if (problem := impossible(each))]
    chosen = [each for each in MUTATIONS if not options.names or each.name in options.names]
    if options.missing:
        chosen = [each for each in chosen if read_known().get(each.name, {}).get("result") != "noticed"]
    passing = Passing(options.green)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = {}
        going = {pool.submit(attempt, each, passing): each for each in chosen}
        for done in concurrent.futures.as_completed(going):
            each, found = going[done], done.result()
            results[each.name] = found["result"]
            print(f"{each.name}: {found['result']}  {found['by']}  {found['seconds']:.0f} s", flush=True)
            known = read_known() | {each.name: found}
            KNOWN.parent.mkdir(exist_ok=True)
            KNOWN.write_text(json.dumps(known, indent=1))
    write_page()
    wrong += [f"{name}: {result}" for name, result in results.items() if result != "noticed"]
    print("\n".join(wrong))
    return bool(wrong)


def impossible(mutation: Mutation) -> str:
    """Returns the reason why the mistake cannot be made, or ""."""
    times = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
    return "" if times == 1 else f"{mutation.file} has its line {times} times: mend tests/mutations*.py"


class Passing:
    """Which tests pass in the unchanged tree; each runs once."""

    def __init__(self, all_do: bool) -> None:
        self._all_do = all_do
        self._locks: dict[tuple[str, ...], threading.Lock] = {}
        self._found: dict[tuple[str, ...], int] = {}
        self._all = threading.Lock()

    def __call__(self, tests: tuple[str, ...]) -> bool:
        if self._all_do:
            return True
        with self._all:
            lock = self._locks.setdefault(tests, threading.Lock())
        with lock:
            if tests not in self._found:
                with tempfile.TemporaryDirectory() as folder:
                    self._found[tests] = ask(copy(Path(folder)), tests)[0]
        return self._found[tests] == 0


def attempt(mutation: Mutation, passing: Passing) -> dict[str, Any]:
    found = {"digest": digest(mutation), "commit": commit(), "by": "", "seconds": 0.0}
    if problem := impossible(mutation):
        return found | {"result": problem}
    if not passing(mutation.tests):
        return found | {"result": "its tests fail without it"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = copy(Path(folder))
        file = root / mutation.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        status, by = ask(root, mutation.tests)
    results = {0: "SURVIVED", 1: "noticed", -1: "noticed"}
    result = results.get(status, f"pytest ended with {status}: no test was asked")
    return found | {"result": result, "by": by, "seconds": round(time.monotonic() - began, 1)}


def copy(folder: Path) -> Path:
    """Copies the tree with uncommitted changes; copies share the compiled programs."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").unlink(missing_ok=True)
    (folder / ".cache").symlink_to((ROOT / ".cache").resolve())
    return folder


def ask(root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit status (-1 if it hung), and the first test that failed."""
    path = f"{root}{os.pathsep}{root / 'tokenizers'}"
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", QUICK, "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return -1, f"hangs for {LONGEST} s"
    failed = re.search(r"^(?:FAILED|ERROR) \S*?([^/\s]+\.py::\w+)", done.stdout, re.MULTILINE)
    return done.returncode, failed.group(1) if failed else ""


def digest(mutation: Mutation) -> str:
    return hashlib.sha256(repr(mutation).encode()).hexdigest()[:16]


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def read_known() -> dict[str, Any]:
    """The stored results of mistakes whose description has not changed."""
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    current = {each.name: digest(each) for each in MUTATIONS}
    return {name: found for name, found in known.items() if current.get(name) == found["digest"]}


def write_page() -> None:
    known, rows = read_known(), []
    for each in MUTATIONS:
        found = known.get(each.name)
        by = "not tried" if found is None else f"`{found['by']}`" if found["result"] == "noticed" else found["result"]
        seconds, at = (f"{found['seconds']:.0f}", found["commit"]) if found else ("", "")
        rows.append(f"| {each.name.replace('-', ' ')} | `{each.file}` | {each.why} | {by} | {seconds} | {at} |\n")
    noticed = sum(found["result"] == "noticed" for found in known.values())
    PAGE.write_text(HEAD.format(noticed=noticed, all=len(MUTATIONS)) + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
