"""Write interleaved documents for a file of requests.

Each line of the requests is a JSON object: {"prompt": "a red circle"} asks for a picture of a text; {"content": [...],
"mode": "text" | "image" | "free", ...} for anything else (ar_unified.sampling.requests says what a line may hold).
Without --requests, prompts are taken from the held-out documents. Leaves in the output folder:
  samples.jsonl   one line per sample: text, and the names of its pictures; a bad request is a line that says why
  images/         PNG files
  index.html      a gallery
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ar_unified.cli import config as configs
from ar_unified.cli.experiment import Experiment, add_experiment_arguments, by_first_process, open_experiment
from ar_unified.data.images import to_png
from ar_unified.data.sources import BadItem, Source
from ar_unified.document import Document, ImagePart, TextPart
from ar_unified.sampling.job import run_job
from ar_unified.workdir import write_bytes, write_text

_HELD_OUT = 12  # documents of each source whose beginnings become prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    parser.add_argument("--requests", metavar="FILE", help="JSONL; default: prompts from the held-out documents")
    parser.add_argument("--output", metavar="DIR", help="default: samples/ in the workdir")


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    experiment = open_experiment(arguments, overrides)
    if not arguments.requests:
        sample_held_out(experiment)
        return 0
    output = arguments.output or experiment.workdir.samples / Path(arguments.requests).stem

    @by_first_process
    def answer(experiment: Experiment) -> None:
        _run(experiment, Path(arguments.requests), Path(output))

    answer(experiment)
    return 0


@by_first_process
def sample_held_out(experiment: Experiment) -> None:
    """Stage samples: a gallery of what the model answers to the beginnings of held-out documents."""
    stage = experiment.stage("samples", "sampling", model=experiment.trained())
    if stage.done:
        return experiment.skip(stage)
    requests = stage.folder / "requests.jsonl"
    if not requests.exists():
        rows = [row for source in experiment.held_out["validation"] for row in _rows(source, stage.folder)]
        write_text(requests, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    experiment.finish(stage, _run(experiment, requests, stage.folder))


def _run(experiment: Experiment, requests: Path, output: Path) -> dict[str, Any]:
    sampling = experiment.config.sampling
    report = run_job(
        experiment.engine,
        experiment.image_tokenizer,
        requests,
        output,
        defaults={"guidance": sampling.guidance, **{m: configs.plain(sampling[m]) for m in ("text", "image")}},
        weights=experiment.weights,
        resize=experiment.resize,
    )
    experiment.say(f"{report}\n{output / 'index.html'}")
    return {"samples": report.samples, "errors": report.errors}


def _rows(source: Source, folder: Path) -> Iterator[dict[str, Any]]:
    """Requests from the first documents of a source: the prompt of those with a turn, the first half of the others."""
    documents = islice(_good(source), _HELD_OUT)
    for number, document in enumerate(documents):
        turn = document.prompt is not None
        border = document.prompt if document.prompt is not None else -(-len(document.parts) // 2)
        if not turn and len(document.parts) < 2:
            continue
        name = f"{source.name.replace('/', '-')}-{number:02d}"
        content: list[dict[str, str]] = []
        for at, part in enumerate(document.parts[:border]):
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, ImagePart):
                path = Path("prompts") / f"{name}-{at}.png"
                write_bytes(folder / path, to_png(part.pixels))
                content.append({"type": "image", "image": str(path)})
        answers_picture = isinstance(document.parts[border], ImagePart)
        mode = ("image" if answers_picture else "text") if turn else "free"
        yield {"id": name, "content": content, "turn": turn, "mode": mode}


def _good(source: Source) -> Iterator[Document]:
    for i in range(len(source)):
        try:
            yield source[i]
        except BadItem:
            continue
