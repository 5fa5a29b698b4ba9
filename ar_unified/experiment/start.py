"""Opens and checks the experiment of a verb, together with the other processes of its job, and decides which process
does a stage."""

from __future__ import annotations

import argparse
import functools
import signal
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from ar_unified import storage
from ar_unified.experiment import config as configs
from ar_unified.experiment.check import check
from ar_unified.experiment.check_opened import check_bundle, check_devices, check_sources
from ar_unified.experiment.check_trained import check_trained
from ar_unified.experiment.experiment import STAGES, Experiment
from ar_unified.experiment.unread import unread
from ar_unified.interrupts import Preempted
from ar_unified.parallel import runtime
from ar_unified.workdir import Workdir, write_json


def open_experiment(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    stages: Collection[str] = STAGES,
    before_sources: Callable[[Experiment], object] | None = None,
) -> Experiment:
    """Opens the experiment of a command line, together with the other processes of its job, and checks it for the work
    to do.

    `stages` are the STAGES that will run, or "requests", "images" or "export" for work without sources.
    `before_sources` is called on process 0 before it opens the sources, which may mean downloading a dataset.
    """
    if arguments.config is None:  # only verbs that do not need --config
        config = configs.recorded(Path(arguments.workdir) / "config.json", overrides)
    else:
        config = configs.load(arguments.config, overrides)
    check(config, stages)
    for key in ("init", "image_tokenizer.model", "image_tokenizer.perceptual_file", "text_tokenizer.model"):
        storage.refuse(functools.reduce(lambda section, name: section[name], key.split("."), config), f"config.{key}")
    logs = Path(arguments.workdir) / "logs"
    runtime.start(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        logs=logs,
        start_timeout=arguments.start_timeout,
        heartbeat_timeout=arguments.heartbeat_timeout,
    )
    first = runtime.first()
    experiment = Experiment(config, Workdir(arguments.workdir, reader=not first))
    if jax.process_count() > 1:  # all processes must have the same config, and see the same folder
        asked = configs.plain(config)
        if first:
            write_json(logs / "asked.json", asked)
        runtime.barrier("config")
        if not first:
            experiment.workdir.await_file(logs / "asked.json", asked)
    check_bundle(experiment, stages)
    for line in unread(config, lambda: experiment.bundle, overrides):
        experiment.say(f"note: {line}")
    check_devices(experiment, stages)
    check_trained(experiment, stages)
    if first and before_sources is not None:
        before_sources(experiment)
    if first and not {"requests", "images", "export"} & set(stages):
        check_sources(experiment, stages)
    runtime.barrier("checked", timeout=runtime.ALONE)  # process 0 may have built a dataset
    return experiment


def by_first_process(stage: Callable[..., None]) -> Callable[..., None]:
    """Makes a stage (of an experiment) run only on process 0; the others wait, and then read what it has written."""

    @functools.wraps(stage)
    def wrapped(experiment: Experiment, *more: Any, **options: object) -> None:
        if runtime.first():
            with experiment.leaving_nothing():
                stage(experiment, *more, **options)
        runtime.barrier(stage.__name__, timeout=runtime.ALONE)
        if runtime.preempted():
            experiment.say("SIGTERM: stopped between two stages; the same command continues from there")
            raise Preempted(signal.SIGTERM)

    return wrapped
