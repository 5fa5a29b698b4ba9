"""Writes a job's samples in the file layouts that benchmarks of text-to-image models read.

    geneval         00000/metadata.jsonl, 00000/samples/0000.png        djghosh13/geneval, evaluate_images.py
    dpg             ID.png, a request's images as one 2 x 2 grid        TencentQQGYLab/ELLA, compute_dpg_bench.py
    t2i_compbench   samples/PROMPT_000000.png                           Karine-Huang/T2I-CompBench, BLIP_vqa.py
    mjhq            CATEGORY/ID.png                                     MJHQ-30K, whose FID compares folders
    folder          ID_00_00.png and metadata.jsonl                     Hugging Face's `imagefolder`; FID on any set

Layout `folder` uses all images of a sample; the other layouts use only the first image. Where possible, the files are
hard links to the job's own files, which take no space. A running job can be exported, and exported again when it has
more samples, because an image always gets the same name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ar_unified.errors import UserError
from ar_unified.manifests import Json
from ar_unified.sampling.results import read, shards
from ar_unified.workdir import write_bytes, write_text

_NAME_BYTES = 255  # the most bytes that a file's name can have on common file systems


class ExportError(UserError):
    """The requests lack what a benchmark needs."""


@dataclass(frozen=True)
class _Asked:
    """A request of a job. `id` is the request's id, or its name if the id cannot be a file's name; `line` is its line
    number. `images` maps the number of each finished sample that has an image to the sample's first image.
    """

    id: str
    line: int
    n: int
    prompt: str
    meta: Mapping[str, Json]
    images: dict[int, Path] = field(default_factory=dict)


@dataclass
class ExportReport:
    """What was exported.

    Attributes:
        images: how many images were written to `folder`.
        left_out: by id, the reason why a request was left out.
    """

    folder: Path
    images: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.images} images, {len(self.left_out)} requests left out"]
        lines += [f"  {id}: {why}" for id, why in list(self.left_out.items())[:5]]
        return "\n".join(lines + ["  ..."] * (len(self.left_out) > 5))


def export(job: str | Path, benchmark: str, folder: str | Path) -> ExportReport:
    """Writes what `benchmark` reads into `folder`, from the samples in the folder of a job.

    Raises ExportError for an unknown benchmark, or if requests lack what it needs (the message says what), and
    OSError.
    """
    if benchmark not in BENCHMARKS:
        raise ExportError(f"layout: expected one of {', '.join(BENCHMARKS)}, found {benchmark!r}")
    if not shards(job):
        raise ExportError(f"{job}: expected the folder of a job, with its samples.jsonl; found none")
    report = ExportReport(Path(folder))
    report.folder.mkdir(parents=True, exist_ok=True)
    BENCHMARKS[benchmark].write(Path(job), report)
    return report


def _asked(job: Path, report: ExportReport) -> Iterator[_Asked]:
    """Yields the requests that have an image, in order, and adds the others to `report.left_out`."""
    requests: dict[int, _Asked] = {}
    for row in read(job):
        prompt = " ".join(part["text"] for part in row["prompt"] if part["type"] == "text")
        asked = _Asked(row.get("name", row["id"]), row["line"], row["n"], prompt, row.get("meta", {}))
        asked = requests.setdefault(row["line"], asked)
        if "error" in row:
            report.left_out[asked.id] = row["error"]
            continue
        images = [part["image"] for part in row["segments"] if part["type"] == "image"]
        if images:
            asked.images[row["sample"]] = job / images[0]
    for _, asked in sorted(requests.items()):
        if asked.images:
            yield asked
        else:
            report.left_out.setdefault(asked.id, "none of the request's samples has an image")


def _put(source: Path, target: Path, report: ExportReport) -> None:
    """Puts the file under another name: as a link if the file system has links, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    report.images += 1
    if target.exists() and os.path.samefile(source, target):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_bytes(target, source.read_bytes())


# ---- the benchmarks ---------------------------------------------------------------------------------------------


def _geneval(job: Path, report: ExportReport) -> None:
    """Folder 00000 is for the first line of evaluation_metadata.jsonl, and so on. Each folder's metadata.jsonl repeats
    its line.
    """
    for asked in _asked(job, report):
        missing = {"tag", "include", "prompt"} - asked.meta.keys()
        if missing:
            raise ExportError(
                f"request {asked.id}: geneval needs {', '.join(sorted(missing))} in its meta: "
                "give evaluation_metadata.jsonl as the requests, or its lines as meta"
            )
        folder = report.folder / f"{asked.line - 1:05d}"
        write_text(folder / "metadata.jsonl", json.dumps(asked.meta) + "\n")
        for sample, image in asked.images.items():
            _put(image, folder / "samples" / f"{sample:04d}.png", report)


def _dpg(job: Path, report: ExportReport) -> None:
    """Writes a grid for each complete request, two images per row, all of one size (the evaluator's --resolution)."""
    for asked in _asked(job, report):
        if len(asked.images) < asked.n:
            report.left_out[asked.id] = f"{len(asked.images)} of {asked.n} samples have an image so far"
            continue
        if asked.n > 4 or "." in asked.id:
            raise ExportError(
                f"request {asked.id}: dpg takes at most 4 samples and an id without dots, found n={asked.n} and this id"
            )
        images = [Image.open(asked.images[i]) for i in range(asked.n)]
        if len({image.size for image in images}) > 1 or images[0].width != images[0].height:
            raise ExportError(f"request {asked.id}: dpg takes square images that have the same size: set image_size")
        side = images[0].width
        grid = Image.new("RGB", (side * min(asked.n, 2), side * (1 + (asked.n > 2))))
        for i, image in enumerate(images):
            grid.paste(image, (i % 2 * side, i // 2 * side))
        # The grid is first written outside the folder, because the folder may contain only complete images.
        unfinished = report.folder.with_name(f".{report.folder.name}.{asked.id}.png")
        grid.save(unfinished)
        os.replace(unfinished, report.folder / f"{asked.id}.png")
        report.images += asked.n


def _t2i_compbench(job: Path, report: ExportReport) -> None:
    """The evaluator reads the prompt from a file's name, up to the first "_", and orders images by the number after the
    last "_"."""
    for asked in _asked(job, report):
        name = f"{asked.prompt}_000000.png"
        if re.search(r"[_/\0]", asked.prompt) or len(name.encode()) > _NAME_BYTES:
            report.left_out[asked.id] = "its prompt cannot be a file's name: it has a _ or /, or is too long"
            continue
        for sample, image in asked.images.items():
            number = (asked.line - 1) * asked.n + sample
            _put(image, report.folder / "samples" / f"{asked.prompt}_{number:06d}.png", report)


def _mjhq(job: Path, report: ExportReport) -> None:
    for asked in _asked(job, report):
        category = asked.meta.get("category")
        if not isinstance(category, str) or not re.fullmatch(r"\w[\w -]*", category):
            raise ExportError(
                f"request {asked.id}: mjhq needs a category in its meta, found {category!r:.40}: "
                "give meta_data.json as the requests"
            )
        _put(asked.images[min(asked.images)], report.folder / category / f"{asked.id}.png", report)


def _folder(job: Path, report: ExportReport) -> None:
    lines: dict[tuple[int, int], list[dict[str, Json]]] = {}
    for row in read(job):
        if "error" in row:
            report.left_out[row["id"]] = row["error"]
            continue
        text = " ".join(part["text"] for part in row["prompt"] if part["type"] == "text")
        images = [job / part["image"] for part in row["segments"] if part["type"] == "image"]
        if not images:
            report.left_out[row["id"]] = f"sample {row['sample']} has no image"
        facts = {"text": text, "id": row["id"], "sample": row["sample"], "seed": row["seed"]}
        names = [f"{row.get('name', row['id'])}_{image.name}" for image in images]
        lines[row["line"], row["sample"]] = [{"file_name": name} | facts for name in names]
        for name, image in zip(names, images, strict=True):
            _put(image, report.folder / name, report)
    ordered = [line for _, lines in sorted(lines.items()) for line in lines]
    write_text(
        report.folder / "metadata.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered)
    )


@dataclass(frozen=True)
class Benchmark:
    """`n`: how many samples of each request the benchmark needs. `write`: the function (job, report) that writes the
    files.
    """

    n: int
    write: Callable[[Path, ExportReport], None]


BENCHMARKS = {
    "geneval": Benchmark(4, _geneval),
    "dpg": Benchmark(4, _dpg),
    "t2i_compbench": Benchmark(10, _t2i_compbench),
    "mjhq": Benchmark(1, _mjhq),
    "folder": Benchmark(1, _folder),
}
