"""Compile an experiment's real programs for hardware that is not here, and say what they need and how fast they can be.

Needs a CPU, and libtpu for TPUs (`pip install ar_unified[tpu]` or `make libtpu`), but no data and no tokenizers. With
--workdir, the size of the vocabulary comes from the tokenizers there; otherwise it is the largest that the config
allows. Prints for each device the memory and what uses it, the bytes that each kind of collective sends, the FLOPs, and
an estimated time per step with its assumptions. Compiling takes seconds for a small model and minutes for a large one.
For GPUs, the program is compiled for as many CPU devices. If a program does not fit, prints the memory that the
compiler needs and the changes that would make it fit; the exit status is then 1. --search looks for the fastest
training: it compiles some choices of remat policy, rows per chip and fsdp, and plans the best one that fits. --output
writes:
  plan.json    all numbers
  index.html   the same numbers, and a chart of what uses the memory

    ar-unified plan --config pretrain:model=chameleon_7b,chips=64 --target v5p:4x4x4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tokenizer import saved_config
from ml_collections import ConfigDict

from ar_unified import interrupts
from ar_unified.bundle import Bundle
from ar_unified.cli.telling import tell_stop
from ar_unified.errors import NO, UserError, about
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.check import check
from ar_unified.experiment.text_tokenizer import load
from ar_unified.experiment.unread import unread
from ar_unified.language.record import grammar_in, text_in
from ar_unified.language.syntax import ImageLayout
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from
from ar_unified.model.own_rows import TABLES
from ar_unified.planning.page import write_page
from ar_unified.planning.plan import PlanReport, make_plan
from ar_unified.planning.programs import Run
from ar_unified.planning.report import text
from ar_unified.planning.search import search
from ar_unified.planning.targets import Target, parse_target
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.rates import trained_in
from ar_unified.training.selection import NEW
from ar_unified.workdir import write_json

COMPILING = (
    "compiling takes seconds for a small model, and 1.5 to 9 minutes for one of 7B parameters if the CPU does nothing "
    "else; Ctrl-C ends it at once"
)


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prints the plan. If it does not fit, prints what would fit, and returns 1. Raises UserError."""
    target = parse_target(arguments.target)
    use_cpu(target)
    config = configs.load(arguments.config, overrides)
    try:
        check(config, [])
        with about("config.init"):
            bundle = Bundle(config.init) if config.init else None
        for line in unread(config, lambda: bundle, overrides):
            print(f"note: {line}", flush=True)
        run = run_of(config, arguments.workdir)
        if len(shapes := settings.shapes(config.training)) > 1 and arguments.job == "train":
            said = ", ".join(f"{rows} rows of {length} tokens" for rows, length in shapes.values())
            print(
                f"batches: {said}; planned for {run.batch_size} rows of {run.sequence_length}, the largest", flush=True
            )
        print(COMPILING, flush=True)
        with interrupts.at_once(partial(tell_stop, "plan", arguments)):
            plan = _plan(run, target, arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config {arguments.config}: {error}") from error
    print(f"\n{text(plan)}")
    if arguments.output:
        save(plan, arguments.output)
    return 0 if plan["fits"] else NO


def _plan(run: Run, target: Target, arguments: argparse.Namespace) -> PlanReport:
    def say(line: str) -> None:
        print(line, flush=True)

    if arguments.search is None:
        return make_plan(run, target, arguments.job, advise=not arguments.no_advice, say=say)
    if arguments.job != "train" or arguments.search < 1:
        raise UserError(
            f"--search: expected at least 1, with --job train; found {arguments.search}, with --job {arguments.job}"
        )
    return search(run, target, arguments.search, say=say)


def save(plan: PlanReport, folder: str | Path) -> None:
    """Writes plan.json and index.html into a folder, each whole or not at all."""
    write_json(Path(folder) / "plan.json", plan)
    write_page(Path(folder) / "index.html", plan)


def use_cpu(target: Target) -> None:
    """Makes this process use only the CPU, which computes constants. For a GPU target, the process gets as many CPU
    devices as the target has chips."""
    try:
        jax.config.update("jax_platforms", "cpu")
        if not target.is_tpu:
            jax.config.update("jax_num_cpu_devices", target.chips)
    except RuntimeError:  # JAX has started already; targets.py raises if there are too few devices
        pass


def run_of(config: ConfigDict, workdir: str | Path | None = None) -> Run:
    """Everything that decides a config's programs.

    The size of the vocabulary comes from the tokenizers in the workdir. Without any, it is the largest that the config
    allows. If `training.phases` has several shapes of batches, the shape with the most tokens is planned. If several
    have equally many, the one with the longest rows is planned. Its memory is enough for the other shapes. Raises
    ValueError for settings with which no program can be made.
    """
    training, sampling = config.training, config.sampling
    batch_size, length = max(settings.shapes(training).values(), key=lambda shape: (shape[0] * shape[1], shape[1]))
    brought = config.image_tokenizer.steps or config.image_tokenizer.model
    text_alone = not brought and all(spec.get("kind") == "text" for spec in config.data.train)
    image = None if text_alone else _image_tokenizer(config, workdir)
    vocabulary, layout = _language(config, workdir, image)
    # New rows are the rows of image codes and a few more.
    only = tuple(place.replace(f"[{NEW}]", "[image]") for place in trained_in(training.only, settings.moving(training)))
    if config.lora.rank and image is not None and config.init and not Bundle(config.init).language.get("codebook_size"):
        tables = TABLES[:1] if config.model.tie_embeddings else TABLES
        only += tuple(f"{table}[image]" for table in tables)  # as in `selection.beside_adapter`
    return Run(
        model=config_from(configs.plain(config.model), vocab_size=vocabulary.size),
        vocabulary=vocabulary,
        layout=layout,
        mesh=configs.plain(config.mesh),
        batch_size=batch_size,
        sequence_length=length,
        accumulation=training.accumulation,
        loss_chunk=config.loss.chunk,
        softmax=config.loss.softmax,
        document=config.data.max_tokens,
        optimizer=configs.pick(OptimizerConfig, training),
        steps=training.steps,
        only=only,
        lora=settings.lora(config),
        preference=settings.preference(config) if training.objective == "preference" else None,
        compiler_options=tuple(training.compiler_options),
        policy=settings.policy(config) if training.objective == "reward" else None,
        drawn_contexts=settings.drawing(config).request("-").contexts if training.objective == "reward" else 1,
        requests=sampling.batch_size,
        max_length=sampling.max_length,
        contexts=settings.request(config).contexts,
        kv_dtype=sampling.kv_dtype or None,
        weights_dtype=sampling.weights_dtype or None,
        window=sampling.window,
    )


def _language(
    config: ConfigDict, workdir: str | Path | None, image: AutoencoderConfig | None
) -> tuple[Vocabulary, ImageLayout]:
    """The vocabulary of the tokenizers in the workdir or in the bundle that the training begins with, or else the
    largest vocabulary that the config allows."""
    grammar, size = None, 0
    if workdir:
        folder = Path(workdir) / "text_tokenizer"
        with about(str(folder)):
            if text := text_in(folder, "warn"):
                grammar, size = grammar_in(folder, text), text.size
    if config.init and not size:
        with about("config.init"):
            grammar = Bundle(config.init).grammar
    if grammar is not None:
        images = config.image_tokenizer.steps or config.image_tokenizer.model
        if images and image is not None and not grammar.vocabulary.codebook_size:
            with about("config.data"):
                grammar = settings.extension(config, grammar, image)
        return grammar.vocabulary, grammar.layout
    text_tokenizer = config.text_tokenizer
    size = size or (load(text_tokenizer).size if text_tokenizer.model else text_tokenizer.vocab_size)
    return settings.language(config, image, size)


def _image_tokenizer(config: ConfigDict, workdir: str | Path | None) -> AutoencoderConfig:
    """The shape of the trained image tokenizer, or of the one to be trained."""
    if workdir and (path := Path(workdir) / "image_tokenizer" / "config.json").exists():
        with about(str(path)):
            return saved_config(path.parent)
    return settings.autoencoder(config)
