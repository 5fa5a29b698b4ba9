"""The gallery in docs/results.md: results of runs, written from records of the runs and never by hand.

    python experiments/benchmarks/gallery.py record WORKDIR --name NAME  # a finished run becomes docs/results/NAME.json
    python experiments/benchmarks/gallery.py write                       # all records become the table and its pictures

`record` reads files that the stages wrote: evaluation.json, the times of stages and trainings, config.json, and the
first sampled images. It writes the record and a picture, and changes nothing in the workdir. Commit, machine and
versions come from the run's report.html. --note adds a sentence.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ar_unified.errors import UserError
from ar_unified.evaluation.facts import environment, summary
from ar_unified.evaluation.report import NAMES
from ar_unified.workdir import read_json, write_bytes, write_json, write_text

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- runs: written by experiments/benchmarks/gallery.py -->\n", "<!-- end of runs -->"
ENVIRONMENT = ("devices", "jax", "python", "system", "written", "revision")
SIDE, COLUMNS, ROWS = 96, 8, 2  # of a picture: pixels per image, images per row, rows


def record(workdir: Path, name: str, note: str, docs: Path = DOCS) -> Path:
    """Writes the record of a finished run, and a picture if images were sampled; returns the record's file.

    Raises:
        UserError: if the workdir has no evaluation.json.
    """
    evaluation = workdir / "evaluation.json"
    if not evaluation.exists():
        raise UserError(f"{evaluation}: no such file; record a run that `ar-unified evaluate` has scored")
    config = read_json(workdir / "config.json")
    scores = read_json(evaluation)
    found = {
        "name": name,
        "experiment": config.get("name", ""),
        "summary": summary(config),
        "metrics": {key: value for key, value in scores.items() if key in NAMES and isinstance(value, int | float)},
        "seconds": _seconds(workdir),
        "environment": _environment(workdir),
        "note": note,
    }
    images = sorted((workdir / "samples").rglob("*.png"))[: COLUMNS * ROWS]
    if images:
        write_bytes(docs / "results" / f"{name}.png", _sheet(images))
    write_json(docs / "results" / f"{name}.json", found)
    return docs / "results" / f"{name}.json"


def _environment(workdir: Path) -> dict[str, str]:
    """The environment of `evaluate` from its report, or this process's environment if there is no report."""
    report = workdir / "report.html"
    if not report.exists():
        return environment()
    last = report.read_text(encoding="utf-8").rpartition(">environment<")[2]
    said = {name: html.unescape(value) for name, value in re.findall(r"<dt>(\w+)</dt><dd>(.*?)</dd>", last)}
    return {name: said[name] for name in ENVIRONMENT if name in said}


def _seconds(workdir: Path) -> dict[str, float]:
    """Wall time of both trainings over all attempts, without the time between attempts."""
    found = {}
    for stage in ("image_tokenizer", "model"):
        path = workdir / stage / "goodput.json"
        if path.exists():
            attempts = [attempt["seconds"] for attempt in json.loads(path.read_text(encoding="utf-8"))]
            found[stage] = round(sum(sum(seconds.values()) - seconds.get("down", 0.0) for seconds in attempts), 1)
    return found


def _sheet(images: Sequence[Path]) -> bytes:
    """A PNG of images side by side, each within a square."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (min(len(images), COLUMNS) * (SIDE + 4), rows * (SIDE + 4)), "white")
    for i, path in enumerate(images):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = SIDE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
        sheet.paste(image, (i % COLUMNS * (SIDE + 4), i // COLUMNS * (SIDE + 4)))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def table(records: Sequence[dict[str, Any]], folder: Path) -> str:
    """The Markdown of all records: a table, then each run with its picture."""
    lines = ["| run | data | images | training | scores | training took | machine | commit, date |", "| --- " * 8 + "|"]
    pictures = []
    for each in records:
        said, machine = each["summary"], each["environment"]
        scores = "; ".join(f"{NAMES[key]} {value:.3g}" for key, value in each["metrics"].items())
        took = "; ".join(
            f"{name.replace('_', ' ')} {seconds / 60:.1f} min" for name, seconds in each["seconds"].items()
        )
        cells = (
            f"`{each['name']}`",
            *(said.get(key, "") for key in ("data", "images", "training")),
            scores,
            took,
            f"{machine['devices']}, jax {machine['jax']}",
            f"{machine.get('revision', 'no revision')}, {machine['written'][:10]}",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        drawn = (folder / f"{each['name']}.png").exists()
        if drawn or each["note"]:
            words = ["the first images that were sampled."] * drawn + [each["note"]] * bool(each["note"])
            pictures += ["", f"`{each['name']}`: {' '.join(words)}"]
        if drawn:
            pictures += ["", f"![The first images that the run {each['name']} sampled](results/{each['name']}.png)"]
    return "\n".join(["", *lines, *pictures, ""]) + "\n"


def write(docs: Path = DOCS) -> None:
    """Writes all records between the marks of docs/results.md."""
    page = docs / "results.md"
    before, mark, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    if not mark or END not in rest:
        raise UserError(f"{page}: expected the marks {BEGIN.strip()} and {END}, found none")
    records = [read_json(path) for path in sorted((docs / "results").glob("*.json"))]
    made = table(records, docs / "results") if records else "\nNo run has been recorded yet.\n\n"
    write_text(page, before + BEGIN + made + END + rest.partition(END)[2])


def main(argv: Sequence[str] | None = None) -> None:
    """Records a run, or writes the gallery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="make a record of a finished run")
    recording.add_argument("workdir", type=Path)
    recording.add_argument("--name", required=True, help="the name of the record")
    recording.add_argument("--note", default="", help="a sentence for the page")
    verbs.add_parser("write", help="write docs/results.md")
    given = parser.parse_args(argv)
    try:
        if given.verb == "record":
            print(record(given.workdir, given.name, given.note))
        else:
            write()
    except UserError as error:
        raise SystemExit(f"gallery.py: {error}") from None


if __name__ == "__main__":
    main()
