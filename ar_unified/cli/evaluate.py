"""Score an experiment's tokenizer and model on its held-out documents.

Asks the model for images, answers, captions and next images of stories, for every held-out set. For interleaved
documents without a checker in the protocol, it asks for the next image and text. With config.sampling.checkpoint=best,
the model is that of the lowest validation loss. Leaves in the workdir:
  evaluation.json   every metric, with how many items it is from; each further held-out set under its name
  report.html       the numbers, curves, reconstructions and samples on one self-contained page
The tokenizer is scored first and by itself: --only tokenizer needs no model, and leaves in tokenizer_evaluation
  evaluation.json   PSNR, SSIM, codebook usage, bits, and what they depend on, of every held-out set
  <set>.png         original, reconstruction and difference of a few images; report.html: all of it on one page
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from ar_unified import progress, storage
from ar_unified.cli.arguments import refuse_unread
from ar_unified.errors import UserError
from ar_unified.evaluation.generation import Example
from ar_unified.evaluation.generation import evaluate as score
from ar_unified.evaluation.report import write_report
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.changes import MODEL, changeable
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.facts import facts, seconds
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.experiment.tokenizer_evaluation import evaluate_folder, evaluate_held_out, results_of
from ar_unified.metrics import ATTENTION, last_validation, read_metrics
from ar_unified.workdir import write_json


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Scores what the arguments name and prints the numbers; returns the exit status. Raises UserError."""
    if (arguments.images and not arguments.only) or (arguments.crop and not arguments.images):
        raise UserError("expected --images together with --only tokenizer, and --crop together with --images")
    if not arguments.images:
        refuse_unread(arguments, "without --images", "links")
    stages = ["images"] if arguments.images else ["tokenizer_evaluation", *([] if arguments.only else ["evaluation"])]
    experiment = open_experiment(arguments, overrides, stages)
    if arguments.images:
        evaluate_folder(experiment, arguments.images, arguments.crop, arguments.links)
        return 0
    evaluate_held_out(experiment)
    if not arguments.only:
        evaluate(experiment)
    return 0


@by_first_process
def evaluate(experiment: Experiment) -> None:
    """Stage evaluation, after tokenizer_evaluation: done when both files are there and nothing has changed."""
    config, workdir = experiment.config, experiment.workdir
    stage = experiment.stage(
        "evaluation",
        "evaluation",
        "sampling",
        model=experiment.trained(),
        checkpoint_step=experiment.checkpoint,
        may=changeable(anew=MODEL),
    )
    if stage.aside:  # with what belonged to it
        for path in (workdir.evaluation, workdir.report):
            if path.exists():
                storage.move(path, stage.aside / path.name)
    if stage.done and workdir.evaluation.exists() and workdir.report.exists():
        return experiment.skip(stage)

    metrics: dict[str, Any] = {}
    examples: dict[str, list[Example]] = {}
    for name, sources in experiment.held_out.items():
        if not sources:
            continue
        with progress.bar(0, "answers", f"evaluate {name}") as bar:
            found, kept = score(
                experiment.engine,
                experiment.image_tokenizer,
                experiment.grammar,
                PROTOCOLS[config.evaluation.protocol],
                sources,
                limit=config.evaluation.limit,
                seed=config.seed,
                drawn=settings.request(config),
                fit=experiment.resize,
                progress=partial(_show, bar),
            )
        if "note" in found:
            experiment.say(f"evaluate {name}: {found['note']}")
        examples["" if name == "validation" else name] = kept
        metrics |= found if name == "validation" else {name: found}
    if config.evaluation.protocol == "easy_vqa":
        metrics["vqa_accuracy"] = metrics.get("image_to_text_exact")
    metrics["validation"] = _validation(experiment)
    metrics["tokenizer"], sheets = results_of(experiment)

    write_json(workdir.evaluation, metrics)
    write_report(
        workdir.report,
        title=config.name,
        evaluation=metrics,
        examples=examples,
        sheets=sheets,
        telemetry={
            "image_tokenizer": workdir.image_tokenizer / "metrics.jsonl",
            "transformer": workdir.model / "metrics.jsonl",
        },
        thresholds=configs.plain(config.evaluation.thresholds),
        config=configs.plain(config),
        facts=facts(experiment),
        seconds=seconds(experiment),
    )
    scores = {key: value for key, value in metrics.items() if isinstance(value, float)}
    experiment.say(", ".join(f"{key} {value:.3g}" for key, value in scores.items()) or "nothing was scored")
    experiment.finish(stage, scores)
    experiment.say(f"{workdir.evaluation}\n{workdir.report}")


def _validation(experiment: Experiment) -> dict[str, float]:
    """The last losses on held-out documents that training wrote up to the step that is used, by role and by task.

    Shares of attention stay in metrics.jsonl: a table of them by layer would hide the rest.
    """
    rows = read_metrics(experiment.workdir.model / "metrics.jsonl", until=experiment.checkpoint)
    return {key: value for key, value in last_validation(rows).items() if not key.startswith(ATTENTION)}


def _show(bar: tqdm, kind: str, done: int, of: int) -> None:
    bar.total = (bar.total or 0) + (of if done == 1 else 0)  # kinds come one after the other
    bar.set_postfix_str(kind, refresh=False)
    bar.update()
