"""A config and a workdir, and the things they name: what every verb opens first.

Stages are fingerprinted by the parts of the config that decide their result, so that a changed learning rate does not
make the data again, and a changed codebook is refused instead of mixed in.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ar_tokenizers.text import TextTokenizer
from ml_collections import ConfigDict

from ar_unified.checkpoint import restore_params
from ar_unified.cli import config as configs
from ar_unified.data.images import Resize
from ar_unified.data.sources import Source, open_source
from ar_unified.grammar import Grammar, fixed_grid, sized_rows
from ar_unified.model.config import TransformerConfig, config_from, parameter_count
from ar_unified.model.transformer import init, logical_axes
from ar_unified.parallel import rules, runtime
from ar_unified.parallel.mesh import decoding_axes, make_mesh
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.training.loop import Preempted
from ar_unified.vocabulary import Vocabulary
from ar_unified.workdir import Stage, Workdir, read_json, write_json

_ALONE = 14 * 86400.0  # seconds that others wait for a stage of process 0: as long as it lives
STAGES = ("text_tokenizer", "image_tokenizer", "data", "model", "samples", "tokenizer_evaluation", "evaluation")


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --workdir, the overrides that every verb takes, and how several processes find each other."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:arg]",
        help="the experiment file; `:arg` is handed to it, as in experiments/folder.py:path=DIR",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where stages leave their results")
    many = parser.add_argument_group(
        "many processes",
        "The same command on every host. SLURM, Open MPI, GKE and TPU VMs say themselves who is who; elsewhere:",
    )
    many.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, the same for all")
    many.add_argument("--processes", type=int, metavar="N", help="how many; 1: alone, whatever the environment says")
    many.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    many.add_argument(
        "--start-timeout", type=int, default=300, metavar="SECONDS", help="until all must have come (300)"
    )
    many.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="until the others stop when one has died or hangs (100)",
    )
    parser.epilog = "Any --config.KEY=VALUE changes one key, as in --config.training.steps=100."


def open_experiment(arguments: argparse.Namespace, overrides: Sequence[str]) -> Experiment:
    """The experiment of a command line, with the other processes of its job; leaves its config in the workdir."""
    config = configs.load(arguments.config, overrides)
    try:
        runtime.start(
            arguments.coordinator,
            arguments.processes,
            arguments.process,
            logs=Path(arguments.workdir) / "logs",
            start_timeout=arguments.start_timeout,
            heartbeat_timeout=arguments.heartbeat_timeout,
        )
    except ValueError as error:
        raise SystemExit(f"ar-unified: {error}") from error
    first = runtime.first()
    experiment = Experiment(config, Workdir(arguments.workdir, reader=not first))
    workdir, plain = experiment.workdir, configs.plain(config)
    if first:
        write_json(workdir.config, plain)
    runtime.barrier("config")
    if not first:
        workdir.await_file(workdir.config, json.loads(json.dumps(plain)))
    return experiment


def by_first_process(stage: Callable[..., None]) -> Callable[..., None]:
    """A stage (of an experiment) that process 0 does alone; the others wait, and then read what it left."""

    @functools.wraps(stage)
    def wrapped(experiment: Experiment, *more: Any) -> None:
        if runtime.first():
            stage(experiment, *more)
        runtime.barrier(stage.__name__, timeout=_ALONE)
        if runtime.preempted():
            experiment.say("SIGTERM: stopped between two stages")
            raise Preempted

    return wrapped


class Experiment:
    """Opens what a stage needs; a stage that has not run yet is named by the error."""

    def __init__(self, config: ConfigDict, workdir: Workdir):
        self.config, self.workdir = config, workdir
        self._opened = time.perf_counter()

    def say(self, line: str) -> None:
        runtime.say(line)

    # ---- stages ---------------------------------------------------------------------------------------------------

    def stage(self, name: str, *keys: str, together: bool = False, **more: Any) -> Stage:
        """The stage's guard, with `keys` of the config and `more` as what decides its result.

        together: all processes open it; else the one that does the stage (`by_first_process`).
        """
        fingerprint = {key: configs.plain(self.config[key]) for key in keys} | {"seed": self.config.seed} | more
        if together and not runtime.first():
            runtime.barrier(f"stage {name}")  # process 0 has opened it
        stage = self.workdir.stage(name, fingerprint)
        if together and runtime.first():
            runtime.barrier(f"stage {name}")
        self._opened = time.perf_counter()
        if not stage.done:
            self.say(f"==== {name}")
        return stage

    def skip(self, stage: Stage) -> None:
        self.say(f"==== {stage.name}: done already ({stage.folder})")

    def finish(self, stage: Stage, summary: Mapping[str, Any]) -> None:
        """Marks the stage as done; its wall time is that of the attempt that finished it."""
        seconds = round(time.perf_counter() - self._opened, 1)
        if runtime.first():
            stage.finish({**summary, "seconds": seconds})
        self.say(f"==== {stage.name}: {seconds} s")

    def seconds(self) -> dict[str, float]:
        """Wall time of the finished stages, in order."""
        records = {name: self.workdir.path / name / "done.json" for name in STAGES}
        return {name: read_json(path)["summary"]["seconds"] for name, path in records.items() if path.exists()}

    # ---- data -----------------------------------------------------------------------------------------------------

    def specs(self, specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Specs as plain dicts; named datasets live in the workdir unless the spec says where."""
        there = {"data_dir": str(self.workdir.path / "tfds")}
        return [(there if spec["kind"] == "tfds" else {}) | configs.plain(spec) for spec in specs]

    def sources(self, specs: Sequence[Mapping[str, Any]]) -> list[Source]:
        return [open_source(spec) for spec in self.specs(specs)]

    @cached_property
    def train(self) -> list[Source]:
        return self.sources(self.config.data.train)

    def mixture(self) -> dict[str, float]:
        """Weight of each training source by name."""
        specs = self.specs(self.config.data.train)
        return {source.name: spec.get("weight", 1.0) for source, spec in zip(self.train, specs, strict=True)}

    @cached_property
    def held_out(self) -> dict[str, list[Source]]:
        """Held-out sets by name; "validation" first."""
        specs = {"validation": self.config.data.validation, **self.config.data.tests}
        return {name: self.sources(tuple(spec)) for name, spec in specs.items()}

    def fingerprints(self, *, held_out: bool = False) -> dict[str, Any]:
        """What the sources hold, by name."""
        sources = [*self.train, *(self.held_out["validation"] if held_out else ())]
        return {f"{i} {source.name}": dict(source.fingerprint) for i, source in enumerate(sources)}

    @cached_property
    def resize(self) -> Resize:
        height, width = self.config.data.image_size
        return Resize(self.config.data.resize, height, width, self.config.image_tokenizer.factor)

    # ---- tokenizers and grammar -----------------------------------------------------------------------------------

    @cached_property
    def autoencoder(self) -> AutoencoderConfig:
        image = configs.pick(AutoencoderConfig, self.config.image_tokenizer)
        if self.config.data.layout == "rows" and image.codes_per_position > 1:
            raise SystemExit(
                f"ar-unified: config.data.layout: expected 'grid' with {image.codes_per_position} codes a position "
                f"({image.quantizer}), found 'rows', whose pictures could end inside a position"
            )
        return image

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        path = self.workdir.text_tokenizer / "text.model"
        self._require(path.exists(), path, "tokenizer")
        return TextTokenizer.load(path, lossy=self.config.text_tokenizer.lossy)

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        path = self.workdir.image_tokenizer / "config.json"
        self._require(path.exists(), path, "tokenizer")
        return ImageTokenizer.load(self.workdir.image_tokenizer)

    @cached_property
    def grammar(self) -> Grammar:
        """The vocabulary that binds the two tokenizers, and how pictures are written in it."""
        text, image = self.text_tokenizer, self.image_tokenizer
        height, width = image.config.grid(*self.config.data.image_size)
        rows = self.config.data.layout == "rows"
        # "aspect" keeps the area, so a side may be up to twice that of the square.
        layout = sized_rows(2 * height, 2 * width) if rows else fixed_grid(height, width)
        vocabulary = Vocabulary(
            text.size, image.codebook_size, max(layout.height, layout.width) if rows else 0, text.hash, image.hash
        )
        return Grammar(vocabulary, layout, text)

    # ---- model ----------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> TransformerConfig:
        return config_from(configs.plain(self.config.model), vocab_size=self.grammar.vocabulary.size)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return make_mesh(configs.plain(self.config.mesh))

    def filter(self, modality: str) -> Filter:
        return Filter(**configs.plain(self.config.sampling[modality]))

    @property
    def checkpoint_folder(self) -> str:
        """Of the transformer."""
        return self.config.checkpoint_folder or str(self.workdir.model / "checkpoints")

    @cached_property
    def decoding_mesh(self) -> jax.sharding.Mesh | None:
        """This process's own devices, split as `decoding_axes` of the config's mesh says; None for one."""
        devices = jax.local_devices()
        if len(devices) == 1:
            return None
        try:
            return make_mesh(decoding_axes(self.config.mesh), devices)
        except ValueError as error:
            raise SystemExit(f"ar-unified: sampling on this process's {len(devices)} devices: {error}") from None

    @cached_property
    def params(self) -> Any:
        """The trained transformer's parameters, where decoding wants them, without the optimizer's state."""
        folder, mesh = self.workdir.model, self.decoding_mesh
        self._require((folder / "done.json").exists(), folder / "done.json", "train")
        target = None  # one device
        if mesh is not None:
            shapes = jax.eval_shape(functools.partial(init, self.model), jax.random.key(0))
            placement = rules.shardings(mesh, logical_axes(shapes), shapes)
            target = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placement
            )
        return restore_params(self.checkpoint_folder, target, manifest=self.grammar.manifest())

    @cached_property
    def engine(self) -> Engine:
        sampling = self.config.sampling
        try:
            return Engine(
                self.model,
                self.params,
                self.grammar,
                batch_size=sampling.batch_size,
                max_length=sampling.max_length,
                kv_dtype=sampling.kv_dtype or None,
                mesh=self.decoding_mesh,
            )
        except ValueError as error:
            raise SystemExit(f"ar-unified: config.sampling: {error}") from None

    def trained(self) -> dict[str, Any]:
        """What decided the trained model: the fingerprint of its stage."""
        path = self.workdir.model / "done.json"
        self._require(path.exists(), path, "train")
        return read_json(path)["fingerprint"]

    @property
    def weights(self) -> str:
        """Names the trained weights."""
        return hashlib.sha256(json.dumps(self.trained(), sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, str]:
        """Short things worth saying at the head of a report."""
        vocabulary = self.grammar.vocabulary
        return {
            "model": f"{parameter_count(self.model) / 1e6:.2f}M parameters in {self.model.n_layers} layers",
            "vocabulary": f"{vocabulary.text_size} text pieces + {vocabulary.codebook_size} image codes",
        }

    def _require(self, found: bool, path: Any, verb: str) -> None:
        if not found:
            raise SystemExit(f"ar-unified: {path} is not there yet; run `ar-unified {verb}` (or `run`) first.")
