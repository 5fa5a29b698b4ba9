"""Opens what a config names (the bundle, the devices, the sources) and checks that the config fits it.

`check` judges what the config alone shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax

from ar_unified.data.images import draws_none
from ar_unified.data.items import Source, has_images
from ar_unified.data.packing import Mixture
from ar_unified.data.prepare import folder_name, same_names
from ar_unified.errors import about, nearest
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.adapter import first_adapter, require_rows
from ar_unified.experiment.check import MEAN
from ar_unified.experiment.experiment import STAGES, Experiment
from ar_unified.experiment.problems import Problems
from ar_unified.kernels import backend, device
from ar_unified.language.grammar import Grammar
from ar_unified.manifests import require_same
from ar_unified.model import config as model_config
from ar_unified.model.transformer import abstract_params, logical_axes
from ar_unified.parallel import rules, zigzag
from ar_unified.sampling.engine import ways_of
from ar_unified.training.selection import NEW

HOLD_OUT = (
    "To hold images or documents out, name them in config.data.validation (recipes for a folder of images take "
    "validation=DIR)"
)
# For objectives that use images, or likelihoods of images, from the model that the training begins with.
_NO_ROWS = (
    "has no rows for images yet, so the images that it draws and its likelihoods of images are random. Train the new "
    "rows first (experiments/from_llm.py), export, and begin with that bundle"
)

# ---- what a training begins with ---------------------------------------------------------------------


def check_bundle(experiment: Experiment, stages: Collection[str] = STAGES) -> None:
    """Raises UserError with every key of the config that differs from the bundle in `config.init`. Also raises it if a
    stage needs to decode images, but the image tokenizer comes from elsewhere and has no decoder.
    """
    if not {"text_tokenizer", "image_tokenizer", "data", "model"} & set(stages):
        return
    config, bundle, problems = experiment.config, experiment.bundle, Problems()
    image = experiment.brought if bundle is not None or "image_tokenizer" in stages else None
    drawing = {"samples", "tokenizer_evaluation", "evaluation"} & set(stages)
    if image is not None and drawing and (why := draws_none(image)):
        key = "init" if bundle is not None else "image_tokenizer.model"
        problems.say(key, f"{why}. `ar-unified prepare` and `ar-unified train` do not need one")
    if bundle is None:
        return problems.end()
    text = bundle.text_tokenizer
    theirs = {"model": model_config.decisive(bundle.config)}
    if image is not None:
        theirs["image_tokenizer"] = configs.plain(dataclasses.asdict(image.config))
    elif config.image_tokenizer.steps and not experiment.extends:
        problems.say(
            "image_tokenizer.steps", "expected 0, because the bundle in config.init has image codes, but no tokenizer"
        )
    if experiment.extends and config.training.objective != "likelihood":
        problems.say("training.objective", f"expected likelihood, because {bundle.folder} {_NO_ROWS}")
    if not experiment.extends:
        for place in (*config.training.only, *config.training.fresh, *config.training.rates):
            if f"[{NEW}]" in place:
                problems.say(
                    "training", f"{place!r}: no ids are new, because the bundle in config.init is not extended"
                )
        if config.training.code_embedding_init == "mean":
            problems.say("training.code_embedding_init", f"{MEAN}: the bundle in config.init is not extended")
    for section, fields in theirs.items():
        for name, value in fields.items():
            if name in config[section] and (found := configs.plain(config[section][name])) != value:
                problems.say(
                    f"{section}.{name}", f"expected {value!r}, as the bundle in config.init has; found {found!r}"
                )
    for section, bundled in (("text_tokenizer", True), ("image_tokenizer", bundle.has_images)):
        if config[section].model and bundled:
            problems.say(f"{section}.model", "expected none, because the bundle in config.init has one")
    if text.losses and config.text_tokenizer.lossy == "refuse":
        problems.say(
            "text_tokenizer.lossy", f"expected 'warn', because the bundle's text tokenizer loses text: {text.losses[0]}"
        )
    problems.end()
    first = first_adapter(config, bundle) if "model" in stages else None
    if first is not None and not experiment.extends:
        require_rows(first, bundle.grammar, settings.trained(config, bundle.grammar.vocabulary, ()))
    if experiment.extends:
        with about("config.init"):
            before = bundle.grammar
        with about("config.data"):
            settings.extension(config, before, experiment.autoencoder)
        return
    if image is None:
        return  # the rest compares how images are written
    with about("config.data"):
        vocabulary, layout = settings.language(config, image.config, text.size, text.hash, image.hash)
    if settings.fits(layout, bundle.grammar.layout):
        return
    vocabulary = dataclasses.replace(vocabulary, rest=bundle.grammar.vocabulary.rest)  # the config has no key for this
    ours = Grammar(vocabulary, layout, text).manifest()
    where = dict(expected_from=f"config.init={bundle.folder}", found_from="this config")
    require_same(bundle.language, ours, **where)


# ---- the devices that are here ----------------------------------------------------------------------------------


def check_devices(experiment: Experiment, stages: Collection[str] = STAGES) -> None:
    """Raises UserError with everything that does not fit on the mesh. Call it when all processes have joined."""
    config, problems = experiment.config, Problems()
    if {"image_tokenizer", "model"} & set(stages):
        with problems.of("mesh"):
            mesh = experiment.mesh
    if not problems.lines and "image_tokenizer" in stages and config.image_tokenizer.steps > 0:
        tokenizer = config.image_tokenizer
        with problems.of("image_tokenizer.batch_size"):
            rules.batch_spec(mesh, (tokenizer.batch_size // tokenizer.accumulation, 1, 1, 3), "a microbatch")
    if not problems.lines and "model" in stages:
        _check_mesh(experiment, mesh, problems)
    if {"samples", "evaluation", "requests"} & set(stages):
        decoding = None
        with problems.of("mesh.tensor"):
            decoding = experiment.decoding_mesh
        with problems.of("sampling", ["batch_size"]):
            ways_of(config.sampling.batch_size, decoding)
    problems.end()


def _check_mesh(experiment: Experiment, mesh: jax.sharding.Mesh, problems: Problems) -> None:
    config, part = experiment.config, experiment.config.training
    model = model_config.config_from(configs.plain(config.model), vocab_size=128)
    for place, (batch_size, length) in settings.shapes(part).items():
        with problems.of(f"{place}.batch_size"):
            rules.batch_spec(mesh, (batch_size // part.accumulation, 1, 1), "a microbatch")
        with problems.of(f"{place}.sequence_length"):
            zigzag.require_pieces(length, mesh.shape["context"])
    with problems.of("mesh"):
        shapes = abstract_params(dataclasses.replace(model, n_layers=1))
        rules.specs(mesh, logical_axes(shapes), shapes)
    here = device.current()
    platforms = {"tpu": here.platform == "tpu", "hopper": here.is_hopper}
    if not platforms.get(model.attention, True):
        problems.say("model.attention", f"expected 'auto' or 'xla' on this {here.kind}, found {model.attention!r}")
    elif model.attention != "auto":
        with problems.of("model.attention"):
            for batch_size, length in settings.shapes(part).values():
                rows = (batch_size // part.accumulation, length)
                query, key = (
                    jax.ShapeDtypeStruct((*rows, heads, model.head_dim), model.dtype)
                    for heads in (model.n_heads, model.n_kv_heads)
                )
                backend.choose("ar_unified.kernels.attention", model.attention, query, key)


# ---- the sources ------------------------------------------------------------------------------------------------


def check_sources(experiment: Experiment, stages: Collection[str] = STAGES) -> None:
    """Opens every source that the stages use. Raises UserError for a wrong source, and for sources that do not fit
    together.
    """
    config, problems = experiment.config, Problems()
    _check_names({"train": experiment.train, **experiment.held_out}, problems)
    if not experiment.train and {"text_tokenizer", "image_tokenizer", "data", "model"} & set(stages):
        problems.say("data.train", "expected a source, found none")
    else:
        _check_mixture(experiment, problems)
    if "model" in stages:  # others do not need the bundle
        images = config.image_tokenizer.steps or config.image_tokenizer.model
        images = images or (experiment.bundle is not None and experiment.bundle.has_images)
        if images and any(map(has_images, experiment.train)):
            _check_room(experiment, problems, stages)
    problems.end()


def check_held_out(experiment: Experiment, instead: str = "") -> None:
    """Opens only the held-out sources. Raises UserError if one is wrong, or if there are none. `instead`: what else the
    command may be given."""
    problems = Problems()
    _check_names(experiment.held_out, problems)
    if not any(experiment.held_out.values()):
        expected = "expected documents to evaluate on, found none, and none in config.data.tests: nothing is held out"
        problems.say("data.validation", f"{expected}. {HOLD_OUT}" + (f", or give {instead}" if instead else ""))
    problems.end()


def _check_names(sets: Mapping[str, Sequence[Source]], problems: Problems) -> None:
    for line in same_names({part: dict(enumerate(sources)) for part, sources in sets.items()}):
        problems.add("data", line)


def _check_mixture(experiment: Experiment, problems: Problems) -> None:
    names = [folder_name(source.name) for source in experiment.train]
    for i, phase in enumerate(settings.phases(experiment.config.training, experiment.mixture())):
        where = f"training.phases[{i - 1}].weights" if i else "data.train"
        weights = {folder_name(name): weight for name, weight in dict(phase.weights or {}).items()}
        for name in weights.keys() - set(names):
            problems.say(where, f"expected sources {', '.join(names)}; found {name!r}{nearest(name, names)}")
        if names:
            with problems.of(where):
                Mixture([1] * len(names), [weights.get(name, 0.0) for name in names])


def _check_room(experiment: Experiment, problems: Problems, stages: Collection[str]) -> None:
    """Checks whether one image fits into the maximum tokens of a document, and of a sample."""
    config = experiment.config
    image = experiment.autoencoder
    height, width = image.grid(*config.data.image_size)
    block = settings.layout(config, image).block(height, width)
    for key, least, what in (
        ("data.max_tokens", block + 2, "a document with <bos> and <eos>"),
        ("sampling.max_length", block + 3, "<bos>, <eot> and <eos>"),
    ):
        if key.startswith("data") or {"samples", "evaluation"} & set(stages):
            if configs.at(config, key) < least:
                problems.say(
                    key,
                    f"expected at least {least}, for an image of {height} x {width} codes and {what}; "
                    f"found {configs.at(config, key)}",
                )
