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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ar_unified.data.images import NoImages, Resize
from ar_unified.data.items import has_pictures
from ar_unified.data.sources import EmptySplit, Source, open_source
from ar_unified.errors import UserError
from ar_unified.grammar import TEXT_ALONE, Grammar, fixed_grid, sized_rows
from ar_unified.model.config import TransformerConfig, config_from, parameter_count
from ar_unified.model.transformer import init, logical_axes
from ar_unified.parallel import rules, runtime
from ar_unified.parallel.mesh import make_mesh
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
            with experiment.leaving_nothing():
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
        self._stage: Stage | None = None

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
        self._stage = stage
        if together and runtime.first():
            runtime.barrier(f"stage {name}")
        self._opened = time.perf_counter()
        if not stage.done:
            self.say(f"==== {name}")
        return stage

    @contextmanager
    def leaving_nothing(self) -> Iterator[None]:
        """Around the work of a stage: one that fails before it has made anything leaves no folder."""
        self._stage = None
        try:
            yield
        except BaseException:
            if self._stage is not None and runtime.first():
                self._stage.abandon()
            raise

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
        return [(there if spec.get("kind") == "tfds" else {}) | configs.plain(spec) for spec in specs]

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
        """Held-out sets by name; "validation" first. A part that has nothing, for want of groups, is left out."""
        specs = {"validation": self.config.data.validation, **self.config.data.tests}
        found: dict[str, list[Source]] = {}
        for name, those in specs.items():
            found[name] = []
            for spec in those:
                try:
                    found[name] += self.sources([spec])
                except EmptySplit as error:
                    self.say(f"{name}: {error}. It goes on without it")
        return found

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
    def text_only(self) -> bool:
        """Whether there are no pictures: no image tokenizer is trained or there, and no source has need of one.

        Raises UserError where a source may have pictures, and none to code them.
        """
        if self.config.image_tokenizer.steps or (self.workdir.image_tokenizer / "config.json").exists():
            return False
        sources = [*self.train, *(source for those in self.held_out.values() for source in those)]
        if pictured := [source.name for source in sources if has_pictures(source)]:
            raise UserError(
                f"config.image_tokenizer.steps is 0 and none was brought, but {', '.join(pictured)} may have pictures: "
                "raise the steps, or bring text alone as sources of kind='text'"
            )
        return True

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer | NoImages:
        if self.text_only:
            return NoImages()
        path = self.workdir.image_tokenizer / "config.json"
        self._require(path.exists(), path, "tokenizer")
        return ImageTokenizer.load(self.workdir.image_tokenizer)

    @cached_property
    def grammar(self) -> Grammar:
        """The vocabulary that binds the two tokenizers, and how pictures are written in it."""
        text, image = self.text_tokenizer, self.image_tokenizer
        if isinstance(image, NoImages):
            return Grammar(Vocabulary(text.size, 0, text_hash=text.hash), TEXT_ALONE, text)
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
        """This process's own devices, heads split as the config's mesh says and rows over all the others; None for one.

        Each process serves requests of its own. The axes fsdp and context, which save memory in training, would make
        every step of decoding wait for weights; the devices they name split rows.
        """
        devices = jax.local_devices()
        if len(devices) == 1:
            return None
        try:
            return make_mesh({"data": -1, "tensor": self.config.mesh.tensor}, devices)
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
            "vocabulary": f"{vocabulary.text_size} text pieces"
            + (f" + {vocabulary.codebook_size} image codes" if vocabulary.codebook_size else ", no pictures"),
        }

    def _require(self, found: bool, path: Any, verb: str) -> None:
        if not found:
            raise UserError(f"{path} is not there yet; run `ar-unified {verb}` (or `run`) first")
