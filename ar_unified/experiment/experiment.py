"""Opens what a config and a workdir name: sources, tokenizers, grammar, model and engine.

The fingerprint of a stage has the parts of the config that decide its result. If the learning rate changes, the data
need not be made again; if the codebook changes, the old data are refused. `changes` says what may change later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import jax
from ar_tokenizers.codec import Codec
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer
from ml_collections import ConfigDict

from ar_unified import history, manifests, storage
from ar_unified.bundle import LANGUAGE, Bundle
from ar_unified.checkpoint import restore_params
from ar_unified.data.images import CodesAlone, NoImages, Resize
from ar_unified.data.items import names_images
from ar_unified.data.sources import EmptySplit, Source, open_source
from ar_unified.errors import UserError, about
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.adapter import in_base, require_base, require_not_begun_with
from ar_unified.experiment.changes import Training, changeable, repeated, require_extensible
from ar_unified.history import Changeable
from ar_unified.language.extension import new_ids, rows_of
from ar_unified.language.grammar import Grammar
from ar_unified.language.record import grammar_in, text_in
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import TransformerConfig, config_from
from ar_unified.model.transformer import abstract_params
from ar_unified.parallel import runtime
from ar_unified.parallel.mesh import decoding_axes, make_mesh
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.low_rank import Adapter, read_adapters
from ar_unified.sampling.weights import read_as, settled
from ar_unified.training import goodput
from ar_unified.workdir import Stage, StageMismatch, Workdir, read_history, read_json, write_json

STAGES = ("text_tokenizer", "image_tokenizer", "data", "model", "samples", "tokenizer_evaluation", "evaluation")


class Experiment:
    """Opens what a stage needs. If an earlier stage has not run yet, the error names it."""

    def __init__(self, config: ConfigDict, workdir: Workdir):
        self.config, self.workdir = config, workdir
        self._opened = time.perf_counter()
        self._stage: Stage | None = None
        self._adapters: dict[str, Adapter] = {}

    def say(self, line: str) -> None:
        """Prints a line, on process 0 alone."""
        runtime.say(line)

    # ---- stages ---------------------------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        *keys: str,
        together: bool = False,
        training: Training | None = None,
        may: Changeable | None = None,
        **more: object,
    ) -> Stage:
        """Opens a stage whose result is decided by `keys` of the config and by `more`.

        Writes the workdir's config.json if the stage is not done yet.

        Args:
            together: whether all processes open it, or only the process that does the stage (`start.by_first_process`).
            training: the progress of a stage of many steps, to which steps may be added.
            may: which fields may change; by default those of `changes`.
        """
        may = may or changeable()
        fingerprint = self.fingerprint(*keys, **more)
        if together and not runtime.first():
            runtime.barrier(f"stage {name}")  # process 0 has opened it
        try:
            stage = self.workdir.stage(name, fingerprint, may)
        except StageMismatch as error:
            raise self._advised(error, keys) from None
        self._stage = stage
        if stage.changed:  # never so for a reader, because the writer has recorded the change already
            self._go_on(stage, training)
        if together and runtime.first():
            runtime.barrier(f"stage {name}")
        self._opened = time.perf_counter()
        if not stage.done:
            if runtime.first():
                write_json(self.workdir.config, configs.plain(self.config))
            self.say(f"==== {name}")
        return stage

    def _advised(self, error: StageMismatch, keys: Sequence[str]) -> StageMismatch:
        """The error with advice on what to do if the change was not intended, or if the data have changed."""
        if flag := repeated(error.field, error.old, keys):
            return StageMismatch(error.field, f"{error} To go on as before, repeat {flag}", error.old)
        section = error.field.partition(".")[0]
        if section in ("sources", "probed"):
            made = [stage for stage in STAGES if (self.workdir.path / stage / "started.json").exists()]
            return StageMismatch(
                error.field,
                f"the data have changed since {self.workdir.path} was made: {error.field} was {error.old!r:.40}. "
                f"All stages depend on the data: use another --workdir, or delete {', '.join(made)} in this one",
                error.old,
            )
        return error

    def fingerprint(self, *keys: str, **more: object) -> dict[str, manifests.Json]:
        """The fingerprint of a stage: `keys` of the config, and `more`."""
        return {key: configs.plain(self.config[key]) for key in keys} | {"seed": self.config.seed} | more

    def _go_on(self, stage: Stage, training: Training | None) -> None:
        """Writes what changed into the stage's history and prints it. Raises UserError if the stage cannot go on."""
        if anew := stage.changed.get("anew"):
            stage.begin_anew()
            field, (old, new) = next(iter(anew.items()))
            self.say(
                f"{stage.name}: made again, because {field} is {new!r:.80} now (was {old!r:.80}); "
                f"the old files are in {stage.aside}"
            )
            return
        taken = max(training.checkpoints(), default=0) if training else None
        if "extended" in stage.changed:
            if training is None:
                raise AssertionError(f"stage {stage.name!r} has no steps that could be extended")
            taken = require_extensible(stage, training, self.workdir)
        entries = [history.entry(kind, taken, changed) for kind, changed in stage.changed.items()]
        stage.begin(*entries)
        for entry in entries:
            self.say(f"{stage.name}: {entry['kind']} {history.told(entry)}")

    @contextmanager
    def leaving_nothing(self) -> Iterator[None]:
        """A context for a stage's work: if the work fails before it makes anything, the stage's folder is removed."""
        self._stage = None
        try:
            yield
        except BaseException:
            if self._stage is not None and runtime.first():
                self._stage.abandon()
            raise

    def skip(self, stage: Stage) -> None:
        """Prints that a stage is done already."""
        self.say(f"==== {stage.name}: done already ({stage.folder})")

    def finish(self, stage: Stage, summary: Mapping[str, Any]) -> None:
        """Marks the stage as done. Its wall time is the sum of all attempts if the stage counts them (goodput.json),
        else the time of the last attempt.
        """
        seconds = round(max(time.perf_counter() - self._opened, goodput.wall(stage.folder / "goodput.json")), 1)
        if runtime.first():
            stage.finish({**summary, "seconds": seconds})
        self.say(f"==== {stage.name}: {seconds} s")

    # ---- data -----------------------------------------------------------------------------------------------------

    def specs(self, specs: Sequence[Mapping[str, manifests.Json]]) -> list[dict[str, Any]]:
        """Specs as plain dicts. TFDS datasets are stored in the workdir, unless the spec has a `data_dir`."""
        there = {"data_dir": str(self.workdir.path / "tfds")}
        return [(there if spec.get("kind") == "tfds" else {}) | configs.plain(spec) for spec in specs]

    def all_specs(self) -> dict[str, list[dict[str, manifests.Json]]]:
        """The sources of each set: "train", "validation", and the tests by their names."""
        sets = {"train": self.config.data.train, **self._held_out_specs()}
        return {name.removeprefix("tests."): self.specs(specs) for name, specs in sets.items()}

    def _held_out_specs(self) -> dict[str, Any]:
        data = self.config.data
        return {"validation": data.validation, **{f"tests.{name}": specs for name, specs in data.tests.items()}}

    def sources(self, key: str, specs: Sequence[Mapping[str, Any]], *, held_out: bool = False) -> list[Source]:
        """The sources of a key of config.data. Raises UserError, which names the key, if a source cannot be opened.

        With `held_out`, a source is left out if its split is empty because there are too few groups of items.
        """
        opened = []
        for i, spec in enumerate(self.specs(specs)):
            with about(f"config.data.{key}[{i}]"):
                try:
                    opened.append(open_source(spec))
                except EmptySplit as error:
                    if not held_out:
                        raise
                    self.say(f"{key}: {error}. The run continues without this source")
        return opened

    @cached_property
    def train(self) -> list[Source]:
        """The sources of config.data.train."""
        return self.sources("train", self.config.data.train)

    def mixture(self) -> dict[str, float]:
        """Weight of each training source by name."""
        specs = self.specs(self.config.data.train)
        return {source.name: spec.get("weight", 1.0) for source, spec in zip(self.train, specs, strict=True)}

    @cached_property
    def held_out(self) -> dict[str, list[Source]]:
        """Held-out sets by name; "validation" first. A set without items is left out, as in `sources`."""
        sets = self._held_out_specs()
        return {key.removeprefix("tests."): self.sources(key, specs, held_out=True) for key, specs in sets.items()}

    def fingerprints(self, *, held_out: bool = False) -> dict[str, manifests.Json]:
        """The fingerprint of each source, by its position and name."""
        sources = [*self.train, *(self.held_out["validation"] if held_out else ())]
        return {f"{i} {source.name}": dict(source.fingerprint) for i, source in enumerate(sources)}

    @cached_property
    def resize(self) -> Resize:
        """The size that images get."""
        return settings.resize(self.config)

    # ---- tokenizers and grammar: trained here, or those of the bundle that the training begins with -----------------

    @cached_property
    def bundle(self) -> Bundle | None:
        """The bundle that config.init names, if any."""
        with about("config.init"):
            return Bundle(self.config.init) if self.config.init else None

    @property
    def extends(self) -> bool:
        """Whether config.init names a language model of text alone that will learn images."""
        if self.bundle is None or self.bundle.language.get("codebook_size"):
            return False
        return bool(self.config.image_tokenizer.model or self.config.image_tokenizer.steps)

    @cached_property
    def brought(self) -> ImageTokenizer | None:
        """The image tokenizer of config.init or config.image_tokenizer.model, which is not trained here."""
        if self.bundle is not None and not self.extends:
            return self.bundle.image_tokenizer()
        if folder := self.config.image_tokenizer.model:
            with about("config.image_tokenizer.model"):
                return ImageTokenizer.load(folder)
        return None

    @cached_property
    def autoencoder(self) -> AutoencoderConfig:
        """The shape of the image tokenizer."""
        return settings.autoencoder(self.config)

    @cached_property
    def text_tokenizer(self) -> Codec:
        """The workdir's text tokenizer. Raises UserError if there is none yet."""
        folder = self.workdir.text_tokenizer
        with about("the workdir's text tokenizer"):
            found = text_in(folder, self.config.text_tokenizer.lossy)
        self.require(found is not None, folder, "tokenizer")
        assert found is not None
        return found

    @cached_property
    def text_only(self) -> bool:
        """Whether the experiment has no images: no image tokenizer exists or is trained, and no source needs one.

        Raises UserError if a source may have images but there is no tokenizer for them.
        """
        settings = self.config.image_tokenizer
        if settings.steps or settings.model or (self.workdir.image_tokenizer / "config.json").exists():
            return False
        done = self.workdir.model / "done.json"
        if done.exists() and (manifest := read_json(done)["fingerprint"].get("manifest")):
            return not manifest["image_hash"]  # the workdir records the decision; the sources may no longer exist
        if self.bundle is not None and self.bundle.has_images:
            return False
        sources = [*self.train, *(source for those in self.held_out.values() for source in those)]
        if found := [source.name for source in sources if names_images(source)]:
            raise UserError(
                f"config.image_tokenizer.steps is 0 and no model is given, but {', '.join(found)} may have images: "
                "raise the steps, give config.image_tokenizer.model, or use sources of text alone (kind='text')"
            )
        return True

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer | NoImages:
        """The workdir's image tokenizer, or a stand-in for text alone. Raises UserError if there is none yet."""
        if self.text_only:
            record = self.workdir.text_tokenizer / LANGUAGE  # exists if the model's images may be only codes
            codes = read_json(record)["codebook_size"] if record.exists() else 0
            return CodesAlone(codes) if codes else NoImages()
        path = self.workdir.image_tokenizer / "config.json"
        self.require(path.exists(), path, "tokenizer")
        with about("the workdir's image tokenizer"):
            return ImageTokenizer.load(self.workdir.image_tokenizer)

    @cached_property
    def grammar(self) -> Grammar:
        """The grammar of both tokenizers, or of the bundle in config.init, which may be extended by images."""
        text, image = self.text_tokenizer, self.image_tokenizer
        if (brought := grammar_in(self.workdir.text_tokenizer, text)) is not None:
            if brought.vocabulary.codebook_size or isinstance(image, NoImages):
                return brought
            with about("config.data"):
                return settings.extension(self.config, brought, image.config, image.hash)
        shape = None if isinstance(image, NoImages) else image.config
        with about("config.data"):
            vocabulary, layout = settings.language(self.config, shape, text.size, text.hash, image.hash)
            return Grammar(vocabulary, layout, text)

    @cached_property
    def before(self) -> Vocabulary | None:
        """The vocabulary of the language model that is extended; None if no model is extended."""
        brought = grammar_in(self.workdir.text_tokenizer, self.text_tokenizer)
        extends = brought is not None and self.grammar.vocabulary.codebook_size > brought.vocabulary.codebook_size
        return brought.vocabulary if extends and brought is not None else None

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Ids that the language model did not have before."""
        return () if self.before is None else new_ids(self.before, self.grammar.vocabulary)

    # ---- model ----------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> TransformerConfig:
        """The transformer's config, with the vocabulary size that follows from the tokenizers."""
        return config_from(configs.plain(self.config.model), vocab_size=self.grammar.vocabulary.size)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of a training over all devices. Raises UserError if it does not fit them."""
        with about("config.mesh"):
            return make_mesh(configs.plain(self.config.mesh))

    def filter(self, modality: str) -> Filter:
        """How ids of a modality, "text" or "image", are drawn if a request does not say how."""
        return settings.token_filter(self.config, modality)

    @property
    def checkpoint_folder(self) -> str:
        """The folder of the transformer's checkpoints."""
        return self.config.checkpoint_folder or storage.address(self.workdir.model / "checkpoints")

    @cached_property
    def decoding_mesh(self) -> jax.sharding.Mesh | None:
        """This process's own devices, split as `decoding_axes` of the config's mesh says; None for a single device."""
        devices = jax.local_devices()
        if len(devices) == 1:
            return None
        with about(f"sampling on this process's {len(devices)} devices"):
            return make_mesh(decoding_axes(self.config.mesh), devices)

    @cached_property
    def params(self) -> Any:
        """The trained transformer's parameters as they were trained, without the optimizer's state."""
        mesh = self.decoding_mesh
        return self._restored(None if mesh is None else abstract_params(self.model, mesh))  # None: one device

    @property
    def params_without_adapter(self) -> Any:
        """The parameters of an extended language model, with its trained rows and without its adapter."""
        mesh = self.decoding_mesh
        return self._read(None if mesh is None else abstract_params(self.model, mesh), adapted=False)

    def _restored(self, target: Any) -> Any:
        return self._read(target, adapted=True)

    def _read(self, target: Any, *, adapted: bool) -> Any:
        folder = self.workdir.model
        self.require((folder / "done.json").exists(), folder / "done.json", "train")
        step = None if self.config.sampling.checkpoint == "last" else self.checkpoint
        lora = settings.lora(self.config)
        stored = None if lora is not None else target
        found = restore_params(self.checkpoint_folder, stored, step=step, manifest=self.grammar.manifest())
        if lora is None:
            return found
        selection = settings.trained(self.config, self.grammar.vocabulary, self.new_ids)
        rows = None if self.before is None else rows_of(self.before, self.grammar.vocabulary)
        return in_base(self.base(), self.model, lora, selection, found, target, rows, adapted)

    def base(self) -> Bundle:
        """The bundle that the adapter was trained on. Raises UserError."""
        if self.bundle is None:
            raise UserError("config.init: expected the bundle that the adapter was trained on, found none")
        require_base(self.bundle, self.trained().get("init"))
        return self.bundle

    def use_adapters(self, folders: Mapping[str, str]) -> None:
        """Sets the adapters, by name, that requests may use. Call it before `engine`. Raises UserError."""
        self._adapters = read_adapters(folders, self.model)
        if self._adapters:
            require_not_begun_with(self._adapters, self.trained().get("init"))

    @cached_property
    def engine(self) -> Engine:
        """The sampler with the weights of the trained model. Raises UserError."""
        sampling, weights_dtype = self.config.sampling, self.config.sampling.weights_dtype or None
        # This does not use `params`, because a float32 copy would then stay in memory.
        restored = self._restored(read_as(self.model, self.decoding_mesh))
        with about("config.sampling"):
            params = settled(self.model, restored, self.decoding_mesh, weights_dtype)
            return Engine(
                self.model,
                params,
                self.grammar,
                batch_size=sampling.batch_size,
                max_length=sampling.max_length,
                kv_dtype=sampling.kv_dtype or None,
                weights_dtype=weights_dtype,
                window=sampling.window,
                mesh=self.decoding_mesh,
                softmax=self.config.loss.softmax,
                adapters=self._adapters,
            )

    def _trained(self) -> dict[str, Any]:
        """The fingerprint and the summary of the finished model stage."""
        path = self.workdir.model / "done.json"
        self.require(path.exists(), path, "train")
        return read_json(path)

    def trained(self) -> dict[str, Any]:
        """Everything that decided the trained model: the fingerprint of its stage, and later changes."""
        fingerprint = self._trained()["fingerprint"]
        told = [entry for entry in read_history(self.workdir.model) if entry["kind"] in history.DECIDING]
        way = [{key: entry[key] for key in ("kind", "step", "changed")} for entry in told]
        return fingerprint | ({"history": way} if way else {})

    @property
    def checkpoint(self) -> int:
        """The step of the model that samples and evaluations use: the last, or the best on held-out documents."""
        wanted, summary = self.config.sampling.checkpoint, self._trained()["summary"]
        if wanted == "last":
            return summary["steps"]
        if wanted != "best":
            raise UserError(f"config.sampling.checkpoint: expected 'last' or 'best', found {wanted!r}")
        if "best_step" not in summary:
            raise UserError(
                "config.sampling.checkpoint: expected 'last', found 'best', but this training kept no best step: a "
                "training keeps one if it has held-out documents and training.keep_best=True"
            )
        return summary["best_step"]

    def require(self, found: bool, path: Any, verb: str) -> None:
        """Raises UserError unless `found`. `verb` is the command that makes `path`."""
        if not found:
            raise UserError(f"{path} is not there yet; run `ar-unified {verb}` (or `run`) with this workdir first")
