"""Which keys of a config may change once a run has begun in a workdir, and what a change does to a stage.

Every key that is not named here decides the result of the stages that read it. If such a key changes, these stages are
refused. Put a new key into COST or EXTENDS only if the comment there is true of this key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ar_unified.errors import UserError
from ar_unified.history import Changeable
from ar_unified.manifests import ABSENT, Json
from ar_unified.workdir import Stage, StageMismatch, Workdir

# These keys affect only memory, speed, rounding, and what is logged, shown and kept.
COST = (
    "mesh",
    "text_tokenizer.model",  # where the file is; only its content decides the result, and the fingerprint has its hash
    "text_tokenizer.lossy",
    "image_tokenizer.model",  # likewise
    "image_tokenizer.checkpoint_every",
    "model.scan_layers",
    "model.remat",
    "model.attention",
    "model.context",
    "loss.chunk",
    "training.accumulation",
    "training.log_every",
    "training.validate_every",
    "training.preview_every",
    "training.checkpoint_every",
    "training.keep",
    "training.keep_every",
    "training.keep_best",
    "training.attention_share",
    "training.compiler_options",
    "sampling.batch_size",
    "sampling.window",
)
# These keys decide the learning rate and the phase of a step. A change affects only later steps.
EXTENDS = (
    "image_tokenizer.steps",
    "image_tokenizer.learning_rate",
    "image_tokenizer.warmup_steps",
    "image_tokenizer.final_fraction",
    "training.steps",
    "training.learning_rate",
    "training.schedule",
    "training.warmup_steps",
    "training.decay",
    "training.decay_fraction",
    "training.final_fraction",
    "training.restarts",
    "training.phases",
    "training.rates",
)
# Fields of fingerprints whose keys have other names.
_KEYS = {
    "limit": "evaluation.limit",
    "probe_steps": "evaluation.tokenizer_probe_steps",
    "image_size": "data.image_size",
}
# Keys that older workdirs lack. A run in such a workdir goes on if the key has this value.
LATER: dict[str, Json] = {
    "data.resample": "lanczos",
    "data.decoding": "full",
    "image_tokenizer.recolour": 0.0,
    "loss.mean": "joint",
    "training.objective": "likelihood",
    "training.rates": [],
    "sampling.prompt_suffix": "",
}


MODEL = ("model", "checkpoint_step")  # fields in the fingerprints of stages that use the trained model


def changeable(*, whole_batch: bool = False, anew: Sequence[str] = ()) -> Changeable:
    """What may change in a stage without making it invalid.

    Args:
        whole_batch: whether a loss of the image tokenizer depends on all images of a microbatch together. If so, the
            number of microbatches decides the result.
        anew: fields of the fingerprint that say what the stage is made from; if one changes, the stage is made again.
            Only for a stage from which nothing else is made.
    """
    parts = () if whole_batch else ("image_tokenizer.accumulation",)
    return Changeable((*COST, *parts), EXTENDS, tuple(anew), LATER)


@dataclass(frozen=True)
class Training:
    """A stage of many steps.

    Attributes:
        key: the config key of the total number of steps.
        wanted: the key's value.
        checkpoints: the steps of its checkpoints, ascending.
        folder: the folder of the checkpoints.
        before: a stage that is made from this one, but is not made again automatically; "" if there is none.
    """

    key: str
    wanted: int
    checkpoints: Callable[[], list[int]]
    folder: str
    before: str = ""


def require_extensible(stage: Stage, training: Training, workdir: Workdir) -> int:
    """Returns how many steps a stage with a changed schedule has taken. Raises UserError if it cannot go on with the
    new schedule."""
    fields = stage.changed["extended"]
    changed = ", ".join(f"{field} = {new!r:.80} (was {old!r:.80})" for field, (old, new) in fields.items())
    where = f"stage {stage.name!r}: {stage.folder}"
    if training.before and any(
        (workdir.path / training.before / f"{record}.json").exists() for record in ("started", "done")
    ):
        flags = " ".join(said(field, old) for field, (old, _) in fields.items() if old != ABSENT)
        before = f"To go on as before, repeat {flags}; otherwise use" if flags else "Use"
        raise StageMismatch(
            next(iter(fields)),
            f"{where} cannot go on with {changed}: {workdir.path / training.before} was made from this stage "
            f"before the change. {before} another --workdir, or delete {training.before} (and what was made from it) "
            "first.",
        )
    steps = training.checkpoints()
    taken = max(steps, default=0)
    if stage.done and not taken:
        raise UserError(
            f"{where} cannot go on with {changed}: there is no checkpoint in {training.folder}. "
            f"Use another --workdir, or delete {stage.folder} to make it again."
        )
    least = taken + 1 if stage.done else taken
    if training.wanted < least:
        state = f"is finished with {taken} steps" if stage.done else f"has taken {taken} steps"
        raise StageMismatch(
            next(iter(fields)),
            f"{where} {state}, and the config now has {changed}: expected config.{training.key} of at least {least} "
            f"to go on with this change, found {training.wanted}. Raise it" + _elsewhere(stage, workdir) + ".",
        )
    return taken


def advised(error: StageMismatch, keys: Sequence[str], workdir: Workdir, stages: Sequence[str]) -> StageMismatch:
    """The error with advice on what to do if the change was not intended, or if the data have changed.

    Args:
        keys: the sections of the config that decide the stage.
        stages: the names of all stages.
    """
    if flag := repeated(error.field, error.old, keys):
        return StageMismatch(error.field, f"{error} To go on as before, repeat {flag}", error.old)
    section = error.field.partition(".")[0]
    if section in ("sources", "probed"):
        made = [stage for stage in stages if (workdir.path / stage / "started.json").exists()]
        return StageMismatch(
            error.field,
            f"the data have changed since {workdir.path} was made: {error.field} was {error.old!r:.40}. "
            f"All stages depend on the data: use another --workdir, or delete {', '.join(made)} in this one",
            error.old,
        )
    return error


def said(field: str, value: Any) -> str:
    """A setting as it is written on the command line: --config.data.image_size=(32,32)."""
    shown = f"({','.join(map(str, value))})" if isinstance(value, list | tuple) else str(value)
    return f"--config.{field}={shown}"


def repeated(field: str, old: Any, sections: Sequence[str]) -> str:
    """The flag that gives a field of a fingerprint its recorded value; "" if the field is no setting of the config, or
    had no value.

    `sections`: the sections of the config that are in the fingerprint.
    """
    known = field in _KEYS or field.partition(".")[0] in (*sections, "lora")
    if not known or field == "lora.init" or old == ABSENT:  # of lora.init's file, the record has a hash
        return ""
    return said(_KEYS.get(field, field), old)


def _elsewhere(stage: Stage, workdir: Workdir) -> str:
    if stage.name != "model":
        return ", or use another --workdir"
    return (
        ", or leave this training as it is and go on from one of its checkpoints in another workdir: "
        f"ar-unified train --branch {workdir.path}:STEP --workdir NEW"
    )
