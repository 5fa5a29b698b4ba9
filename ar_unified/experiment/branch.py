"""Makes a workdir that begins with another workdir's tokenizers and data, and with one of its checkpoints.

The other workdir is only read. Files are shared with it by hard links if the file system has them. Then a branch needs
no space, and it stays complete when the other workdir is deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ar_unified import history
from ar_unified.checkpoint import adopt, link_or_copy, steps_in
from ar_unified.errors import UserError, about
from ar_unified.experiment.changes import changeable
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.start import by_first_process
from ar_unified.manifests import Json
from ar_unified.workdir import Stage, StageMismatch, own, read_history, read_json, write_bytes, write_json

_MADE_BEFORE = ("text_tokenizer", "image_tokenizer", "data")


@by_first_process
def branch(
    experiment: Experiment, origin: Path, step: int | None, fingerprint: Callable[[], Mapping[str, Json]]
) -> None:
    """Makes the experiment's stage `model` begin with checkpoint `step` of the workdir `origin`, or with its last
    checkpoint if `step` is None.

    `fingerprint` returns the fingerprint of the stage once tokenizers and data are in place. Its differences from the
    origin's fingerprint are written into the history, after the origin's entries up to `step`. A second call for the
    same branch does nothing.

    Raises UserError like `begin_branch`, and StageMismatch if a difference concerns steps that were already taken.
    """
    origin = origin.resolve()
    own(experiment.workdir.model)
    step = _step(experiment, origin, step)
    if step is None:
        return
    there = _checkpoint_folder(origin)
    for name in _MADE_BEFORE:
        if (origin / name / "done.json").exists():
            _share(origin / name, experiment.workdir.path / name)
    may = changeable()
    stage = experiment.workdir.undecided("model", fingerprint(), may)
    told = read_history(origin / "model")
    there_then = history.as_of(read_json(_begun(origin / "model")[0]), told, step)
    refused, changed = history.compare(there_then, stage.fingerprint, stage.cost, may)
    if refused is not None:
        old, new = changed["extended"][refused]
        raise StageMismatch(
            refused,
            f"--branch {origin}: its training had {refused} = {old!r:.200}, this one has {new!r:.200}. "
            f"{may.among(stage.fields)}",
        )
    before = [entry for entry in told if (entry["step"] or 0) < step]
    differs = {field: pair for part in changed.values() for field, pair in part.items()}
    now = history.entry("branched", step, differs, **{"from": str(origin)})
    with about(f"--branch {origin}:{step}"):
        if (origin / "model" / "metrics.jsonl").exists():  # copies the whole curve; the training removes later steps
            write_bytes(stage.folder / "metrics.jsonl", (origin / "model" / "metrics.jsonl").read_bytes())
        write_json(stage.folder / "history.json", [*before, now])
        adopt(there, step, experiment.checkpoint_folder)
    stage.begin()  # written last: if the command is killed before this, it does everything again
    experiment.say(f"model: {history.told(now)}")


def begin_branch(experiment: Experiment, origin: Path, step: int | None) -> None:
    """Shares the datasets that the origin has downloaded. Process 0 does this for a branch before it opens the sources.

    Raises UserError if the origin has no such checkpoint or is this workdir, if this workdir has a model already, or if
    there is no step left to train.
    """
    if _step(experiment, origin.resolve(), step) is None:
        return
    drawn = origin.resolve() / "tfds"
    for info in sorted(drawn.glob("**/dataset_info.json")):
        _share(info.parent, experiment.workdir.path / "tfds" / info.parent.relative_to(drawn))


def _step(experiment: Experiment, origin: Path, step: int | None) -> int | None:
    """The step that the branch begins with; None if this workdir is that branch already. Raises UserError."""
    wanted, model = experiment.config.training.steps, experiment.workdir.model
    if origin == experiment.workdir.path.resolve():
        raise UserError(f"--branch {origin}: expected another workdir than --workdir, found the same")
    if _begun(model) and not Stage("model", model, {}).made_nothing():
        told = [entry for entry in read_history(model) if entry["kind"] == "branched"]
        if told and told[-1]["from"] == str(origin) and step in (None, told[-1]["step"]):
            return None
        raise UserError(f"--branch {origin}: {model} has a model already; use another --workdir")
    if not _begun(origin / "model"):
        raise UserError(f"--branch {origin}: expected a workdir whose training has begun, found no model in it")
    there = _checkpoint_folder(origin)
    if Path(there) == Path(experiment.checkpoint_folder):
        raise UserError(f"config.checkpoint_folder: expected another folder than the origin's, found the same, {there}")
    steps = steps_in(there)
    step = max(steps, default=0) if step is None else step
    if step not in steps:
        raise UserError(
            f"--branch {origin}: expected a step with a checkpoint in {there}, one of {steps}; found {step}. "
            "training.keep_every says which checkpoints are kept."
        )
    if wanted <= step:
        raise UserError(
            f"config.training.steps: expected more than the {step} that the branch begins with, found {wanted}"
        )
    return step


def _begun(folder: Path) -> list[Path]:
    """The existing record files of a stage; the valid one comes first."""
    return [path for name in ("done", "started") if (path := folder / f"{name}.json").exists()]


def _checkpoint_folder(origin: Path) -> str:
    config = read_json(origin / "config.json") if (origin / "config.json").exists() else {}
    return config.get("checkpoint_folder") or str(origin / "model" / "checkpoints")


def _share(there: Path, here: Path) -> None:
    """Shares all files of the finished folder `there` with `here`, or none of them. If `here` exists, nothing
    happens."""
    if here.exists():
        return
    unfinished = here.with_name(f".{here.name}.branch~")
    with about(f"--branch: {there}"):
        shutil.rmtree(unfinished, ignore_errors=True)
        here.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(there, unfinished, copy_function=link_or_copy)
        unfinished.rename(here)
