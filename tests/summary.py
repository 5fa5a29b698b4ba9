"""Summarises several runs of pytest: counts for each run, and the tests that were skipped in all of them.

python tests/summary.py [--only-hardware] [--record FILE] RUN.xml ...     from pytest's --junitxml
python tests/summary.py --last FILE                                       what --record has written

A test that is skipped in one run and passes in another counts as run. A skip for missing hardware says "hardware" in
its reason, and a skip for a missing compiler names it, because not every package index has the vendor's compiler.
Stored results of reference implementations are outside the repository, so "not beside this repository" is a valid
reason if that folder is absent. With --only-hardware, any other skip gives exit status 1; a failure always does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import xml.etree.ElementTree as tree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Words of valid reasons. The last one is valid only if the folder that it names is absent.
FAULTLESS = ("hardware", "libtpu") + (() if (ROOT.parent / "shared").exists() else ("not beside this repository",))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--only-hardware", action="store_true")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--last", type=Path)
    options = parser.parse_args()
    if options.last:
        print(last(options.last))
        return 0
    counts, skipped = read(options.runs)
    for name, found in counts.items():
        print(f"{name}: " + ", ".join(f"{number:g} {what}" for what, number in found.items()))
    print(f"skipped everywhere: {len(skipped)}")
    for test, reason in sorted(skipped.items()):
        print(f"  {test}: {reason}")
    if options.record:
        record(options.record, counts, skipped)
        print(last(options.record))
    unfit = [test for test, reason in skipped.items() if not any(word in reason for word in FAULTLESS)]
    if options.only_hardware and unfit:
        print(f"{len(unfit)} of them not for want of hardware: give CI what they need")
    failed = any(found.get("failure") or found.get("error") for found in counts.values())
    return int(failed or bool(options.only_hardware and unfit))


def read(runs: list[Path]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """For each run, the number of tests by outcome and the minutes; for each test that never ran, why it was
    skipped."""
    counts: dict[str, dict[str, float]] = {}
    ran, skipped = set(), {}
    for path in runs:
        suite = tree.parse(path).getroot().find("testsuite")
        assert suite is not None
        outcomes = Counter[str]()
        for case in suite.iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
            outcome = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
            outcomes[outcome] += 1
            if outcome == "skipped":
                skipped[test] = kinds["skipped"].get("message", "")
            else:
                ran.add(test)
        minutes = {"minutes": round(float(suite.get("time", 0)) / 60, 1)}
        counts[path.stem] = dict(sorted(outcomes.items())) | minutes
    return counts, {test: reason for test, reason in skipped.items() if test not in ran}


def record(file: Path, counts: dict[str, dict[str, float]], skipped: dict[str, str]) -> None:
    """Records that all tests ran: when, for which commit, and with what result."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    what = {"date": today, "commit": commit, "runs": counts, "skipped": skipped}
    file.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


def last(file: Path) -> str:
    if not file.is_file():
        return f"make test-all: no run is recorded in {file}"
    found = json.loads(file.read_text(encoding="utf-8"))
    runs = found["runs"].values()
    passed, bad = (
        sum(run.get(kind, 0) for run in runs for kind in kinds) for kinds in (["passed"], ["failure", "error"])
    )
    return (
        f"make test-all last ran on {found['date']} at {found['commit']}: {passed:g} passed, {bad:g} failed, "
        f"{len(found['skipped'])} skipped everywhere, {sum(run['minutes'] for run in runs):.0f} minutes"
    )


if __name__ == "__main__":
    sys.exit(main())
