"""Score an experiment's tokenizer and model on its held-out documents.

For every held-out set, the model generates images, answers, captions and the next images of stories. If the protocol
has no checker for interleaved documents, the model is asked for the next image and the next text instead. With
config.sampling.checkpoint=best, the checkpoint with the lowest validation loss is used. Writes into the workdir:
  evaluation.json   every metric and the number of its items; each further held-out set is under its name
  report.html       the numbers, curves, reconstructions and samples on one self-contained page
The tokenizer is scored first. --only tokenizer scores nothing else, and needs no model. The scores are written into
tokenizer_evaluation:
  evaluation.json   PSNR, SSIM, codebook usage and bits of every held-out set, and what these numbers depend on
  <set>.png         original, reconstruction and difference of a few images
  report.html       all of this on one page

A bundle, exported or imported, needs no workdir, and is evaluated on your own documents:
  ar-unified evaluate --from BUNDLE --data PATH --output FOLDER
--data is a file or folder of documents in any form that `validate` reads. With --config instead, the documents are
data.validation and data.tests of that experiment. FOLDER appears whole or not at all. It has evaluation.json,
report.html, tokenizer_evaluation/, and skipped.jsonl for documents that could not be read. The losses are the same as
a training with this config would measure.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ar_tokenizers.files import whole_folder
from tqdm import tqdm

from ar_unified import progress, storage
from ar_unified.cli.arguments import PROCESSES, refuse_unread, require_workdir
from ar_unified.data.images import draws_none
from ar_unified.data.skipped import SKIPPED
from ar_unified.data.sources import kind_of, open_source
from ar_unified.errors import UserError, about, in_words, saving_memory
from ar_unified.evaluation.examples import Example
from ar_unified.evaluation.generation import evaluate as score
from ar_unified.evaluation.report import write_report
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.experiment import config as configs
from ar_unified.experiment import memory, settings
from ar_unified.experiment.changes import MODEL, changeable
from ar_unified.experiment.check import check
from ar_unified.experiment.check_opened import HOLD_OUT, check_bundle, check_devices, check_held_out
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.facts import facts, seconds
from ar_unified.experiment.of_bundle import OfBundle
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.experiment.tokenizer_evaluation import evaluate_folder, evaluate_held_out, results_of
from ar_unified.experiment.tokenizer_evaluation import score as score_images
from ar_unified.manifests import Json
from ar_unified.metrics import ATTENTION, last_validation, read_metrics
from ar_unified.workdir import Workdir, write_json


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Scores what the arguments name and prints the numbers. Returns the exit status. Raises UserError."""
    if (arguments.images and not arguments.only) or (arguments.crop and not arguments.images):
        raise UserError("expected --images together with --only tokenizer, and --crop together with --images")
    if arguments.source:
        return _from_bundle(arguments, overrides)
    require_workdir(arguments)
    refuse_unread(arguments, "with a workdir, whose config has the documents", "data", "output")
    if not arguments.images:
        refuse_unread(arguments, "without --images", "links")
    stages = ["images"] if arguments.images else ["tokenizer_evaluation", *([] if arguments.only else ["evaluation"])]
    experiment = open_experiment(arguments, overrides, stages)
    if arguments.images:
        evaluate_folder(experiment, arguments.images, arguments.crop, arguments.links)
        return 0
    check_held_out(experiment, "--images DIR" if arguments.only else "")
    evaluate_held_out(experiment, required=bool(arguments.only))
    if not arguments.only:
        evaluate(experiment)
    return 0


@by_first_process
def evaluate(experiment: Experiment) -> None:
    """Runs the stage `evaluation`, after `tokenizer_evaluation`. The stage is done if both files exist and nothing
    has changed."""
    workdir = experiment.workdir
    stage = experiment.stage(
        "evaluation",
        "evaluation",
        "sampling",
        model=experiment.trained(),
        checkpoint_step=experiment.checkpoint,
        may=changeable(anew=MODEL),
    )
    if stage.aside:  # the stage also has files outside its folder
        for path in (workdir.evaluation, workdir.report):
            if path.exists():
                storage.move(path, stage.aside / path.name)
    if stage.done and workdir.evaluation.exists() and workdir.report.exists():
        return experiment.skip(stage)

    metrics, examples = _asked(experiment)
    metrics["validation"] = _validation(experiment)
    metrics["tokenizer"], sheets = results_of(experiment)
    scores = _write(
        experiment,
        metrics,
        examples,
        sheets,
        facts=facts(experiment),
        telemetry={
            "image_tokenizer": workdir.image_tokenizer / "metrics.jsonl",
            "transformer": workdir.model / "metrics.jsonl",
        },
        seconds=seconds(experiment),
    )
    experiment.finish(stage, scores)
    experiment.say(f"{workdir.evaluation}\n{workdir.report}")


def _from_bundle(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluates a bundle on all devices of this process."""
    refuse_unread(arguments, "with --from", "workdir", "only", "images", "crop", *PROCESSES)
    if not arguments.output:
        raise UserError("expected --output FOLDER with --from, for the results; found none")
    if not (arguments.data or arguments.config):
        raise UserError("expected --data PATH or --config FILE with --from, for the documents; found neither")
    if not arguments.data:
        refuse_unread(arguments, "without --data", "links")
    config = configs.of_bundle(arguments.source, arguments.config or "", overrides)
    check(config, ["evaluation"])
    sources = []
    if arguments.data:
        with about(f"--data {arguments.data}"):
            kind = kind_of(arguments.data, arguments.links)
            sources = [open_source(dict(kind=kind, path=arguments.data, links=arguments.links))]
    output = Path(arguments.output)
    try:
        with whole_folder(output) as here:
            with saving_memory(lambda: memory.advice(memory.EVALUATION_OF_BUNDLE, config)):
                _evaluate_bundle(OfBundle(config, here, sources))
    except FileExistsError as error:
        raise UserError(f"{in_words(error)}: name another --output, or remove this one") from error
    print("\n".join(str(output / path.name) for path in (Workdir(output).evaluation, Workdir(output).report)))
    return 0


def _evaluate_bundle(experiment: OfBundle) -> None:
    config, workdir = experiment.config, experiment.workdir
    check_bundle(experiment, ["data"])
    check_devices(experiment, ["evaluation"])
    check_held_out(experiment, "--data PATH")
    if experiment.warning:
        print(f"warning: {experiment.warning}")
    losses = experiment.losses()
    if losses:
        experiment.say(f"validation loss {losses['loss']:.4f}")
    drawn = not (experiment.text_only or draws_none(experiment.image_tokenizer))
    if drawn:
        sets = {name: sources for name, sources in experiment.held_out.items() if sources}
        score_images(experiment, sets, config.data.image_size, workdir.tokenizer_evaluation)
    metrics, examples = _asked(experiment)
    metrics["validation"] = losses
    metrics["tokenizer"], sheets = results_of(experiment) if drawn else ({}, {})
    _write(experiment, metrics, examples, sheets, facts=experiment.facts, parts=("images", "sampling"))
    if (left_out := workdir.data / "validation" / SKIPPED).exists() and left_out.stat().st_size:
        left_out.rename(workdir.path / SKIPPED)
    shutil.rmtree(workdir.data, ignore_errors=True)


def _asked(experiment: Experiment) -> tuple[dict[str, Json], dict[str, list[Example]]]:
    """Numbers and examples of the model's answers to the documents of every held-out set."""
    config = experiment.config
    metrics: dict[str, Json] = {}
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
    return metrics, examples


def _write(
    experiment: Experiment,
    metrics: Mapping[str, Any],
    examples: Mapping[str, Sequence[Example]],
    sheets: Mapping[str, np.ndarray],
    **more: Any,
) -> dict[str, float]:
    """Writes evaluation.json and the report. Prints the numbers of the model's answers, and returns them."""
    config, workdir = experiment.config, experiment.workdir
    write_json(workdir.evaluation, metrics)
    write_report(
        workdir.report,
        title=config.name,
        evaluation=metrics,
        examples=examples,
        sheets=sheets,
        thresholds=configs.plain(config.evaluation.thresholds),
        config=configs.plain(config),
        **more,
    )
    scores = {key: value for key, value in metrics.items() if isinstance(value, float)}
    held_out = any(experiment.held_out.values())
    nothing = "nothing was scored" + ("" if held_out else f", because nothing is held out. {HOLD_OUT}")
    experiment.say(", ".join(f"{key} {value:.3g}" for key, value in scores.items()) or nothing)
    return scores


def _validation(experiment: Experiment) -> dict[str, float]:
    """The validation losses at the evaluated step, by role and by task: the last ones that training wrote before or at
    this step.

    Shares of attention are only in metrics.jsonl, because a table of them by layer would hide the other numbers.
    """
    rows = read_metrics(experiment.workdir.model / "metrics.jsonl", until=experiment.checkpoint)
    return {key: value for key, value in last_validation(rows).items() if not key.startswith(ATTENTION)}


def _show(bar: tqdm, kind: str, done: int, of: int) -> None:
    bar.total = (bar.total or 0) + (of if done == 1 else 0)  # the first call for a kind adds the number of its items
    bar.set_postfix_str(kind, refresh=False)
    bar.update()
