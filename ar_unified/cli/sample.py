"""Write interleaved documents for files of requests.

Each line of a file of requests is a JSON object (ar_unified.sampling.requests lists the keys):
  {"prompt": "a red circle"}   asks for an image of a text
  {"messages": [...]}          asks for the next turn of a conversation
  {"content": [...], "mode": "text" | "image" | "interleaved" | "free", ...}   asks for anything else
It also reads text files of prompts, tables with a column of prompts (CSV, TSV, Parquet), OpenAI batch files of
/v1/chat/completions and /v1/images/generations, WebDataset shards, and the prompt files of benchmarks. Other columns of
these files are copied to the samples. Without --requests, prompts are taken from the held-out documents. Writes into
the output folder:
  samples.jsonl   one line per sample: text, and the names of its images; a bad request has a line with the reason
  images/         PNG files
  index.html      a gallery
  batch_output.jsonl, batch_errors.jsonl   for a batch file: answers in OpenAI's format (sampling.batch_output)
After an interruption, the same command continues. Many processes can share a job, and each serves a part of the
requests. Processes that start together divide the requests among themselves; others need --part K/N. The number of
processes may change. --layout also writes the images into OUTPUT/LAYOUT in the form that a benchmark reads. Without
--requests, --layout does this for the samples that are already in the output folder, even if the job is still running.
--adapter loads LoRA adapters, and each request may name one of them. If there is one and no request names any, all
requests are drawn with it.

A bundle, exported or imported, needs no workdir. It is sampled with its own settings, as its authors published them:
  ar-unified sample --from BUNDLE --requests prompts.jsonl --output out

Best of n: --n 16 --keep-best REWARD draws 16 samples for each request and chooses the one with the highest REWARD,
which is shapes, exact_answer, module:function, command:PROGRAM or scores:FILE (docs/rewards.md). It also writes:
  best.jsonl         for each request, the line of samples.jsonl that was chosen, and the rewards of all its samples
  preferences.jsonl  {"prompt", "chosen", "rejected"}: the best and the worst sample, to learn preferences from
  unrewarded.jsonl   samples that have no reward, and why
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import jax
import numpy as np

from ar_unified.cli.arguments import PROCESSES, refuse_unread, require_workdir
from ar_unified.data.images import to_png
from ar_unified.data.sources import BadItem, Source
from ar_unified.errors import UserError, about
from ar_unified.experiment import config as configs
from ar_unified.experiment.changes import MODEL, changeable
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.facts import weights_hash
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.language.document import Document, ImagePart, TextPart
from ar_unified.language.rows import write_parts
from ar_unified.manifests import Json
from ar_unified.rewards.best import NAMES, keep_best
from ar_unified.rewards.opening import open_reward
from ar_unified.rewards.reward import Reward, RewardConfig
from ar_unified.sampling import batch_output, results
from ar_unified.sampling.benchmark_folders import BENCHMARKS, export
from ar_unified.sampling.job import JobReport, run_job
from ar_unified.sampling.model import load
from ar_unified.sampling.request import DEFAULTS
from ar_unified.workdir import write_bytes, write_text

_ROWS = 64  # default number of samples that a bundle draws at once
_HELD_OUT = 12  # number of documents of each source whose beginnings become prompts


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Serves the requests, or prompts of the held-out documents; returns the exit status. Raises UserError."""
    reward = None
    if arguments.keep_best:
        with about("--keep-best"):
            reward = open_reward(RewardConfig(function=arguments.keep_best))
    if arguments.source:
        return _from_bundle(arguments, overrides, reward)
    require_workdir(arguments)
    refuse_unread(arguments, "with a workdir, which uses the keys of config.sampling", "batch_size", "max_length")
    if not arguments.requests:
        refuse_unread(arguments, "without --requests", "n", "keep_best")
        refuse_unread(
            arguments, "without --requests", "part", "links", "adapter", *(() if arguments.layout else ("output",))
        )
    stages = ["requests"] if arguments.requests or arguments.layout else ["samples"]
    experiment = open_experiment(arguments, overrides, stages)
    experiment.use_adapters(_once(arguments.adapter or ()))
    requests = [Path(path) for path in arguments.requests or ()]
    if not requests and not arguments.layout:
        sample_held_out(experiment)
        return 0
    output = Path(arguments.output or experiment.workdir.samples / (requests[0].stem if requests else ""))
    given = dict(part=arguments.part, links=arguments.links, **_counts(arguments))
    report = _run(experiment, requests, output, **given) if requests else None
    _made_of(arguments, report, output, reward, experiment.say)
    return 0


def _counts(arguments: argparse.Namespace) -> dict[str, int]:
    """How many samples a request without a number gets: --n, or the benchmark's number."""
    if arguments.n:
        return {"n": arguments.n}
    return {"n": BENCHMARKS[arguments.layout].n} if arguments.layout else {}


def _made_of(
    arguments: argparse.Namespace,
    report: JobReport | None,
    output: Path,
    reward: Reward | None,
    say: Callable[[str], object],
) -> None:
    """When a job is complete, writes what else was asked for: the best samples, or a benchmark's folder."""
    if reward is not None and report is not None and report.complete:
        say(str(keep_best(output, reward)))
        say("\n".join(str(output / name) for name in NAMES))
    if arguments.layout and (report is None or report.complete):
        say(str(export(output, arguments.layout, output / arguments.layout)))


def _from_bundle(arguments: argparse.Namespace, overrides: Sequence[str], reward: Reward | None) -> int:
    """Serves requests with a bundle and its own settings, on all devices of this process."""
    if overrides or arguments.config or arguments.workdir:
        raise UserError("--from BUNDLE needs no workdir or config: leave out --workdir, --config and config keys")
    refuse_unread(arguments, "with --from, where --part K/N shares the requests", *PROCESSES)
    for flag in ("requests", "output"):
        if not getattr(arguments, flag):
            raise UserError(f"expected --requests FILE and --output DIR with --from; found no --{flag}")
    many = jax.local_device_count() > 1
    model = load(
        arguments.source,
        {"data": -1} if many else None,
        batch_size=arguments.batch_size or _ROWS,
        max_length=arguments.max_length,
        adapters=_once(arguments.adapter or ()),
    )
    if model.warning:
        print(f"warning: {model.warning}")
    output = Path(arguments.output)
    report = run_job(
        model.engine,
        model.image_tokenizer,
        [Path(path) for path in arguments.requests],
        output,
        defaults=model.defaults | _counts(arguments),
        weights=model.weights,
        resize=model.resize,
        links=arguments.links,
        process=arguments.part or (0, 1),
        warn=lambda line: print(f"warning: {line}"),
    )
    _told(report, output, print)
    _made_of(arguments, report, output, reward, print)
    return 0


def _once(adapters: Sequence[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, folder in adapters:
        if name in found:
            raise UserError(f"--adapter {name}: expected each name once, found {found[name]} and {folder}")
        found[name] = folder
    return found


@by_first_process
def sample_held_out(experiment: Experiment) -> None:
    """Runs the stage `samples`: a gallery of what the model answers to the beginnings of held-out documents."""
    stage = experiment.stage(
        "samples",
        "sampling",
        model=experiment.trained(),
        checkpoint_step=experiment.checkpoint,
        may=changeable(anew=MODEL),
    )
    if stage.done:
        return experiment.skip(stage)
    requests = stage.folder / "requests.jsonl"
    if not requests.exists():
        sources = experiment.held_out["validation"]
        if not sources:
            experiment.say("no document is held out: the prompts are beginnings of training documents")
        most = experiment.config.sampling.max_length // 4
        rows = [row for source in sources or experiment.train for row in _rows(source, stage.folder, most)]
        write_text(requests, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if not requests.stat().st_size:
        why = "no held-out document has a prompt, or enough text to continue"
        experiment.say(f"samples: nothing is drawn, because {why}")
        return experiment.finish(stage, {"samples": 0, "errors": 0})
    report = _run(experiment, [requests], stage.folder, part=(0, 1))
    experiment.finish(stage, {"samples": report.samples, "errors": report.errors})


def _run(
    experiment: Experiment,
    requests: Sequence[Path],
    output: Path,
    part: tuple[int, int] | None = None,
    links: bool = False,
    **defaults: object,
) -> JobReport:
    sampling = experiment.config.sampling
    report = run_job(
        experiment.engine,
        experiment.image_tokenizer,
        requests,
        output,
        defaults={key: configs.plain(sampling[key]) for key in DEFAULTS} | defaults,
        weights=weights_hash(experiment),
        resize=experiment.resize,
        links=links,
        process=part or (jax.process_index(), jax.process_count()),
        warn=lambda line: experiment.say(f"warning: {line}"),
    )
    _told(report, output, experiment.say)
    return report


def _told(report: JobReport, output: Path, say: Callable[[str], object]) -> None:
    """Prints what a job has written. Raises UserError if all of its requests were refused."""
    made = [output / name for name in ("index.html", *batch_output.NAMES)] if report.complete else []
    say("\n".join([str(report), *(str(path) for path in made if path.exists())]))
    if report.complete:
        _require_samples(output)


def _require_samples(output: Path) -> None:
    """Raises UserError if all requests of the job were refused."""
    refused = []
    for row in results.read(output):
        if "error" not in row:
            return
        refused.append(row["error"])
    if refused:
        raise UserError(f"none of {len(refused)} requests could be served, see {output}; the first: {refused[0]}")


def _rows(source: Source, folder: Path, most: int) -> Iterator[dict[str, Json]]:
    """Requests from the first documents of a source: the prompt of a document with turns, the first half of any other.

    `most` is the maximum number of characters that are used if a document is one text.
    """
    documents = islice(_good(source), _HELD_OUT)
    for number, document in enumerate(documents):
        name = f"{source.name.replace('/', '-')}-{number:02d}"
        if not document.asks and len(document.parts) < 2:
            for part in document.parts:
                if isinstance(part, TextPart) and (beginning := _beginning(part.text, most)):
                    yield {"id": name, "content": [{"type": "text", "text": beginning}], "turn": False, "mode": "text"}
            continue
        paths = (Path("prompts") / f"{name}-{at}.png" for at in count())

        def save(pixels: np.ndarray, paths: Iterator[Path] = paths) -> str:
            path = next(paths)
            write_bytes(folder / path, to_png(pixels))
            return str(path)

        if document.asks:
            mode = "image" if isinstance(next(iter(document.answer), None), ImagePart) else "text"
            turns = [{"role": turn.speaker, "content": write_parts(turn.parts, save)} for turn in document.asked]
            said = {"messages": turns} if len(turns) > 1 else {"content": turns[0]["content"]}
            yield {"id": name, **said, "mode": mode}
        else:
            content = write_parts(document.parts[: -(-len(document.parts) // 2)], save)
            yield {"id": name, "content": content, "turn": False, "mode": "free"}


def _beginning(text: str, most: int) -> str:
    """About the first half of a text, cut at the end of a word if it has several; "" if the text is too short."""
    half = text[: min(len(text) // 2, most)]
    words, blank, _ = half.rpartition(" ")
    return (words if blank else half).strip()


def _good(source: Source) -> Iterator[Document]:
    for i in range(len(source)):
        try:
            yield source[i]
        except BadItem:
            continue
