"""Compile an experiment's real programs for hardware that is not here: what they need and how fast they can be.

Needs a CPU, and libtpu for TPUs (`pip install ar_unified[tpu]` or `make libtpu`); no data, tokenizers or workdir.
Prints per device: memory by what holds it against what there is, collectives by kind with the bytes they send, FLOPs,
and an estimate of the time of a step with what it assumes. A program that does not fit is refused (exit status 1) with
the compiler's number and with what would make it fit. With --output:
  plan.json    all numbers
  index.html   the same with a picture of where memory goes

    ar-unified plan --config experiments/pretrain.py:model=chameleon_7b,chips=64 --target v5p:4x4x4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
from ar_tokenizers.image.autoencoder import AutoencoderConfig
from ml_collections import ConfigDict

from ar_unified.cli import config as configs
from ar_unified.cli.text_tokenizer import load
from ar_unified.grammar import TEXT_ALONE, fixed_grid, sized_rows
from ar_unified.model.config import config_from
from ar_unified.planning.page import write_page
from ar_unified.planning.plan import Plan, make_plan
from ar_unified.planning.programs import Run
from ar_unified.planning.report import text
from ar_unified.planning.targets import Target, TargetError, parse_target
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.vocabulary import Vocabulary
from ar_unified.workdir import write_json


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    try:
        target = parse_target(arguments.target)
        use_cpu(target)
        run = run_of(configs.load(arguments.config, overrides))
        plan = make_plan(
            run, target, arguments.job, advise=not arguments.no_advice, say=lambda line: print(line, flush=True)
        )
    except (TargetError, ValueError) as error:
        raise SystemExit(f"ar-unified plan: {error}") from error
    print(f"\n{text(plan)}")
    if arguments.output:
        save(plan, arguments.output)
    return 0 if plan["fits"] else 1


def save(plan: Plan, folder: str | Path) -> None:
    write_json(Path(folder) / "plan.json", plan)
    write_page(Path(folder) / "index.html", plan)


def use_cpu(target: Target) -> None:
    """This process computes nothing but constants, on the CPU; enough CPU devices to stand in for a GPU target."""
    try:
        jax.config.update("jax_platforms", "cpu")
        if not target.is_tpu:
            jax.config.update("jax_num_cpu_devices", target.chips)
    except RuntimeError:  # JAX runs already; targets.py says so if there are too few devices
        pass


def run_of(config: ConfigDict) -> Run:
    """What a config's programs are made of. The vocabulary is as large as its tokenizers may become."""
    training, sampling = config.training, config.sampling
    image = configs.pick(AutoencoderConfig, config.image_tokenizer)
    rows = config.data.layout == "rows"
    height, width = image.grid(*config.data.image_size)
    layout = sized_rows(2 * height, 2 * width) if rows else fixed_grid(height, width)
    side = max(layout.height, layout.width) if rows else 0
    brought = config.text_tokenizer.model
    text_size = load(config.text_tokenizer).size if brought else config.text_tokenizer.vocab_size
    vocabulary = Vocabulary(text_size, image.codebook_size, side)
    if not config.image_tokenizer.steps and all(spec.get("kind") == "text" for spec in config.data.train):
        vocabulary, layout = Vocabulary(text_size, 0), TEXT_ALONE
    return Run(
        model=config_from(configs.plain(config.model), vocab_size=vocabulary.size),
        vocabulary=vocabulary,
        layout=layout,
        mesh=configs.plain(config.mesh),
        batch_size=training.batch_size,
        row_length=training.row_length,
        accumulation=training.accumulation,
        loss_chunk=config.loss.chunk,
        document=config.data.max_tokens,
        optimizer=configs.pick(OptimizerConfig, training),
        steps=training.steps,
        requests=sampling.batch_size,
        max_length=sampling.max_length,
        contexts=1 if sampling.guidance == 1 else 2,
    )
