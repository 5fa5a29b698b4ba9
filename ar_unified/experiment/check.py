"""Checks whether a config can be run, before the first stage, and names every problem that can be known then.

Most rules are elsewhere. The module that defines a choice lists what is allowed, and a dataclass checks the numbers in
its fields. RANGES has the ranges of numbers that no dataclass checks. This module collects all problems, and names the
key to change at the beginning of each.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import get_args

from ar_tokenizers.codec import Lossy
from ar_tokenizers.image import adversary, inception, lpips, perceptual
from ar_tokenizers.image import config as image_config
from ar_tokenizers.image.quantizers import NAMES
from ar_tokenizers.image.quantizers.base import GRADIENTS
from ar_tokenizers.image.quantizers.codebook import UPDATES
from ar_tokenizers.image.quantizers.fsq import ACTIVATIONS
from ar_tokenizers.image.quantizers.vq import SPACES
from ar_tokenizers.image.weights import check_file
from ar_tokenizers.text import ModelType
from ml_collections import ConfigDict

from ar_unified.data.filters import DUPLICATES
from ar_unified.data.images import RESIZES, Decoding
from ar_unified.data.resampling import Resample, require
from ar_unified.errors import nearest, outside
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.check_reward import check_reward
from ar_unified.experiment.experiment import STAGES
from ar_unified.experiment.problems import Problems
from ar_unified.language.layouts import WITH_IMAGES
from ar_unified.language.syntax import SOFTMAXES
from ar_unified.model import config as model_config
from ar_unified.model.code_vectors import CODE_EMBEDDING_INITS
from ar_unified.model.lora import BASE_DTYPES
from ar_unified.sampling.engine import KV_DTYPES
from ar_unified.sampling.pace import WINDOWS
from ar_unified.sampling.request import CONTEXTS
from ar_unified.sampling.weights import WEIGHT_DTYPES
from ar_unified.training import optimizer
from ar_unified.training.tasks import wrong_weights

CHOICES: dict[str, Collection[str]] = {
    "data.resize": RESIZES,
    "data.resample": get_args(Resample),
    "data.decoding": get_args(Decoding),
    "data.layout": WITH_IMAGES,
    "data.filters.duplicates": DUPLICATES,
    "text_tokenizer.model_type": get_args(ModelType),
    "text_tokenizer.lossy": get_args(Lossy),
    **{f"image_tokenizer.{name}": known for name, known in image_config.CHOICES.items()},
    "image_tokenizer.quantizer": NAMES,
    "image_tokenizer.activation": ACTIVATIONS,
    "image_tokenizer.codebook_update": UPDATES,
    "image_tokenizer.gradient": GRADIENTS,
    "image_tokenizer.space": SPACES,
    "image_tokenizer.perceptual": get_args(perceptual.Kind),
    **{f"image_tokenizer.adversary.{name}": known for name, known in adversary.CHOICES.items()},
    **{f"model.{name}": known for name, known in model_config.CHOICES.items()},
    "loss.softmax": SOFTMAXES,
    "loss.mean": SOFTMAXES,
    "training.objective": settings.OBJECTIVES,
    "training.optimizer": optimizer.CHOICES["optimizer"],
    "training.schedule": optimizer.CHOICES["schedule"],
    "training.decay": optimizer.CHOICES["decay"],
    "training.code_embedding_init": CODE_EMBEDDING_INITS,
    "lora.base_dtype": BASE_DTYPES,
    "sampling.kv_dtype": [name or "" for name in KV_DTYPES],
    "sampling.weights_dtype": [name or "" for name in WEIGHT_DTYPES],
    "sampling.window": WINDOWS,
    "sampling.context": CONTEXTS,
    "sampling.checkpoint": settings.CHECKPOINTS,
    "evaluation.protocol": PROTOCOLS,
}

_COUNT, _NOT_NEGATIVE, _SHARE = "[1, inf)", "[0, inf)", "[0, 1]"
RANGES: dict[str, dict[str, str]] = {  # allowed values by section, for keys that no dataclass checks
    "": {"seed": "[0, 4294967295]"},  # the same as for the seed of a request
    "data": {"max_tokens": _COUNT},
    "text_tokenizer": {"vocab_size": _COUNT, "max_bytes": _COUNT, "temperature": _COUNT},
    "image_tokenizer": {
        "recolour": _SHARE,
        **dict.fromkeys(("batch_size", "accumulation", "depth"), _COUNT),
        **dict.fromkeys(
            ("steps", "warmup_steps", "checkpoint_every", "crop", "short_side", "code_dim", "beta", "temporal_blocks"),
            _NOT_NEGATIVE,
        ),
    },
    "loss": {"prompt": _NOT_NEGATIVE, "z_loss": _NOT_NEGATIVE, "chunk": _COUNT},
    "training": {"batch_size": _COUNT, "sequence_length": _COUNT, "flip_pairs": _SHARE, "condition_dropout": _SHARE},
    "sampling": {"batch_size": _COUNT, "max_length": "[2, inf)"},
    "evaluation": {"limit": _COUNT, "tokenizer_probe_steps": _NOT_NEGATIVE},
}


def check(config: ConfigDict, stages: Collection[str] = STAGES) -> None:
    """Raises UserError with every problem that the config alone shows. Opens no files except weights.

    Args:
        stages: which of STAGES will run; also "requests" and "images", for a person's own requests and images. Each
            single setting is always checked. Whether settings of two stages fit together, and whether files exist, is
            checked only for stages that run.
    """
    problems = Problems()
    for key, known in CHOICES.items():
        found = configs.at(config, key)
        if found not in known:
            expected = ", ".join(name or '""' for name in known)
            problems.say(key, f"expected one of {expected}; found {found!r}{nearest(found, known)}")
    for section, intervals in RANGES.items():
        for line in outside(configs.at(config, section), **intervals):
            problems.add(section, line, intervals)
    with problems.of("data.filters", [*config.data.filters.keys()]):
        settings.filters(config)
    if {"image_tokenizer", "data"} & {*stages}:
        with problems.of("data.resample"):
            require(config.data.resample)
    _check_weights(config, problems)
    _check_images(config, problems, stages)
    _check_model(config, problems)
    _check_lora(config, problems, stages)
    _check_training(config, problems, stages)
    _check_preference(config, problems, stages)
    check_reward(config, problems, stages)
    _check_sampling(config, problems, stages)
    _check_files(config, problems, stages)
    if "validation" in config.data.tests:
        problems.say("data.tests.validation", "expected another name, because config.data.validation has this name")
    problems.end()


def _check_weights(config: ConfigDict, problems: Problems) -> None:
    """Checks the shares of the training sources."""
    shared = any("image_weight" in spec for spec in config.data.train)
    for i, spec in enumerate(config.data.train):
        for key in ("weight", "image_weight"):
            value = spec.get(key, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                problems.say(f"data.train[{i}].{key}", f"expected a number, 0 or more; found {value!r}")
        if shared and "image_weight" not in spec and spec.get("kind") != "text":
            problems.say(
                f"data.train[{i}].image_weight",
                "expected a number, because another source has one; found none (0 trains the image tokenizer without "
                "this source)",
            )


def _check_images(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    tokenizer, image = config.image_tokenizer, None
    names = [*tokenizer.keys()]
    if not problems.found_in("image_tokenizer"):
        with problems.of("image_tokenizer", names):
            image = settings.autoencoder(config)
    if not problems.found_in("image_tokenizer.adversary"):
        inner = len(problems.lines)
        with problems.of("image_tokenizer.adversary", [*tokenizer.adversary.keys()]):
            settings.adversary(config)
        if inner == len(problems.lines):
            with problems.of("image_tokenizer", names):
                settings.objective(config)
    if tokenizer.steps > 0 and not problems.found_in("image_tokenizer"):
        with problems.of("image_tokenizer", names):
            settings.tokenizer_training(config)
        _check_accumulation("image_tokenizer", config, problems)
    sides = config.data.image_size
    if len(sides) != 2 or min(sides) < 1:
        problems.say("data.image_size", f"expected a height and a width in pixels, found {configs.plain(sides)}")
        return
    if image is None:
        return
    with problems.of("data.image_size"):
        image.grid(*sides)
    if not problems.found_in("data"):
        with problems.of("data", [*config.data.keys()]):
            settings.layout(config, image)
    if tokenizer.steps > 0 and not problems.found_in("image_tokenizer", "data"):
        _check_crops(config, problems, stages)


def _check_crops(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    """Checks the crops that the image tokenizer is trained on."""
    tokenizer = config.image_tokenizer
    image = settings.autoencoder(config)
    sides = (tokenizer.crop,) * 2 if tokenizer.crop else tuple(config.data.image_size)
    if tokenizer.crop:
        with problems.of("image_tokenizer.crop"):
            image.grid(*sides)
        if settings.short_side(config) < tokenizer.crop:
            least = f"expected at least {tokenizer.crop}, which is config.image_tokenizer.crop"
            problems.say("image_tokenizer.short_side", f"{least}; found {tokenizer.short_side}")
    if tokenizer.adversary.kind != "none":
        with problems.of("image_tokenizer.adversary"):
            adversary.require_size(settings.adversary(config), *sides)
    with problems.of("image_tokenizer.perceptual"):
        file = tokenizer.perceptual_file if "image_tokenizer" in stages else ""
        if file or "image_tokenizer" in stages or tokenizer.perceptual not in perceptual.NETWORKS:
            perceptual.require_fitting(tokenizer.perceptual, file, min(sides))


def _check_accumulation(section: str, config: ConfigDict, problems: Problems) -> None:
    part = config[section]
    if part.batch_size % part.accumulation:
        problems.say(
            f"{section}.accumulation", f"expected a divisor of batch_size, {part.batch_size}; found {part.accumulation}"
        )


def _check_model(config: ConfigDict, problems: Problems) -> None:
    if not problems.found_in("model"):
        with problems.of("model", [*config.model.keys()]):
            model_config.config_from(configs.plain(config.model), vocab_size=128)


def _check_lora(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    if not problems.found_in("lora"):
        with problems.of("lora", [*config.lora.keys()]):
            settings.lora(config)
    if config.lora.rank and "model" in stages and not config.init:
        problems.say(
            "lora.rank",
            f"expected 0 without config.init, because an adapter needs a base model; found {config.lora.rank}",
        )
    if config.lora.init and not config.lora.rank:
        problems.say("lora.rank", f"expected the rank of the adapter in lora.init, {config.lora.init}; found 0")


def _check_training(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    part = config.training
    names = [*part.keys()]
    for line in wrong_weights(config.loss.roles, config.loss.tasks):
        problems.add(
            "loss", line.replace("role_weights", "roles", 1).replace("task_weights", "tasks", 1), ["roles", "tasks"]
        )
    if not problems.found_in("training"):
        with problems.of("training", names):
            made = settings.training(config)
            optimizer.learning_rate(made.optimizer, made.steps)
        with problems.of("training", names):
            settings.phases(part, {})
        if not problems.found_in("training.accumulation"):
            _check_accumulation("training", config, problems)
        if not problems.found_in("training"):
            _check_shapes(config, problems)
        for key in ("only", "fresh") if not problems.found_in("model", "lora") else ():
            with problems.of("training", names):
                settings.selected(config, key)
        if not problems.found_in("model", "training"):
            with problems.of("training", names):
                settings.rates(config)
        if part.code_embedding_init == "mean" and not config.init:
            problems.say("training.code_embedding_init", f"{MEAN}: there is no config.init")
        if part.fresh and not config.init:
            problems.say(
                "training.fresh", "expected none without config.init, because then all parameters begin at random"
            )
    packs = "model" in stages and part.objective == "likelihood"  # with the objective "reward", a row has one answer
    if packs and (length := _longest(config, problems)) < config.data.max_tokens:
        problems.say(
            "training.sequence_length",
            f"expected at least config.data.max_tokens, {config.data.max_tokens}, for the longest document; "
            f"found {length}",
        )


def _check_shapes(config: ConfigDict, problems: Problems) -> None:
    """Checks the batches of phases. Call it when the rest of the section is right."""
    part = config.training
    for place, (rows, _) in settings.shapes(part).items():
        if place == "training":
            continue
        if rows % part.accumulation:
            problems.say(
                f"{place}.batch_size", f"expected a multiple of accumulation, {part.accumulation}; found {rows}"
            )
        if part.objective == "reward":
            problems.say(
                place,
                "expected no sequence_length or batch_size with training.objective 'reward', whose rows are samples",
            )


def _longest(config: ConfigDict, problems: Problems) -> int:
    """The number of tokens in the longest rows of all phases, or only of the first phase if the section has
    problems."""
    part = config.training
    return part.sequence_length if problems.found_in("training") else settings.longest(part)[1]


MEAN = "expected random or codebook, because mean is only for extending a language model of text alone"


def _check_preference(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    found = None
    with problems.of("preference", [*config.preference.keys()]):
        found = settings.preference(config)
    if config.training.objective != "preference" or "model" not in stages:
        return
    if not config.init:
        problems.say("init", "expected the bundle to tune, because training.objective is 'preference'; found none")
    if config.loss.mean != "joint":
        why = "expected joint with training.objective 'preference', whose loss is a mean over pairs"
        problems.say("loss.mean", f"{why}; found {config.loss.mean!r}")
    if config.training.fresh and found is not None and found.uses_reference:
        why = "expected none with a reference model, which has no values for parameters that begin at random"
        problems.say("training.fresh", why)
    most = 2 * config.data.max_tokens
    if config.data.max_tokens <= (length := _longest(config, problems)) < most:
        problems.say(
            "training.sequence_length",
            f"expected at least {most}, for both answers of a pair, each of at most config.data.max_tokens with its "
            f"prompt; found {length}",
        )


def _check_sampling(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    if problems.found_in("sampling"):
        return
    more = {}
    named = config.sampling.negative_prompt
    if config.sampling.context == "negative_prompt" and not named:  # each of a person's own requests may have one
        if {"samples", "evaluation"} & set(stages) and "requests" not in stages:
            problems.say(
                "sampling.context",
                "'negative_prompt' needs a negative prompt for each request, and held-out documents have none; set "
                "config.sampling.negative_prompt for all of them",
            )
        more = {"negative_prompt": "-"}
    if config.sampling.checkpoint == "best" and "model" in stages and not config.training.keep_best:
        problems.say("sampling.checkpoint", "expected 'last' if config.training.keep_best is False, found 'best'")
    with problems.of("sampling", [*config.sampling.keys()]):
        settings.request(config, **more).check()


def _check_files(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    model = config.text_tokenizer.model
    if "text_tokenizer" in stages and model and not Path(model).is_file():
        problems.say("text_tokenizer.model", f"{model}: no such file")
    if "tokenizer_evaluation" in stages or "images" in stages:
        for key, shapes in (("lpips_file", lpips.SHAPES), ("inception_file", inception.SHAPES)):
            if config.evaluation[key]:
                with problems.of(f"evaluation.{key}"):
                    check_file(config.evaluation[key], shapes)
