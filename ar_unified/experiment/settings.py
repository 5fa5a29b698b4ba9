"""Turns the keys of a config into the dataclasses that packages take. Each dataclass is made in one place.

A dataclass reports what is wrong with its values; `check` makes all of them before the first stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

from ar_tokenizers.image.adversary import AdversaryConfig
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.objective import ObjectiveConfig
from ar_tokenizers.image.tokenizer import BATCH_SIZE
from ml_collections import ConfigDict

from ar_unified.data.filters import Filters
from ar_unified.data.images import WAY, Resize
from ar_unified.data.phases import Phase, require_order
from ar_unified.errors import UserError, nearest
from ar_unified.experiment import config as configs
from ar_unified.experiment.rollouts import DrawingConfig, require_groups
from ar_unified.language.extension import extended
from ar_unified.language.grammar import Grammar
from ar_unified.language.layouts import LAYOUTS, SizeTokens
from ar_unified.language.syntax import TEXT_ALONE, ImageLayout, vocabulary_for
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from
from ar_unified.model.lora import LoraConfig
from ar_unified.model.transformer import Params, abstract_params, logical_axes
from ar_unified.rewards.reward import RewardConfig
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.request import DEFAULTS, Request
from ar_unified.training.loop import TrainingConfig
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.policy import PolicyConfig
from ar_unified.training.preference import PreferenceConfig
from ar_unified.training.rates import Rates, make_rates, trained_in
from ar_unified.training.selection import Selection, beside_adapter, select

# ---- images ---------------------------------------------------------------------------------------------------


def autoencoder(config: ConfigDict) -> AutoencoderConfig:
    """The image tokenizer's shape, from `config.image_tokenizer`."""
    return configs.pick(AutoencoderConfig, config.image_tokenizer)


def adversary(config: ConfigDict) -> AdversaryConfig:
    """The image tokenizer's discriminator and the weights of its losses, from `config.image_tokenizer.adversary`."""
    return configs.pick(AdversaryConfig, config.image_tokenizer.adversary)


def objective(config: ConfigDict) -> ObjectiveConfig:
    """All losses of the image tokenizer, from `config.image_tokenizer`."""
    return configs.pick(ObjectiveConfig, config.image_tokenizer, adversary=adversary(config))


def whole_batch(config: ConfigDict) -> bool:
    """Whether a loss of the image tokenizer depends on all images of a microbatch together. If so, the number of
    microbatches decides the result."""
    entropy = getattr(autoencoder(config).abstract_quantizer, "entropy", 0.0)
    return bool(entropy) or (
        config.image_tokenizer.adversary.kind != "none" and config.image_tokenizer.adversary.adaptive
    )


def images_at_once(config: ConfigDict) -> int:
    """The number of images that the trained image tokenizer encodes or decodes at once. Accumulation divides it, as it
    divides a training's batch, so that memory which is enough for the training is enough for what follows."""
    return max(1, BATCH_SIZE // config.image_tokenizer.accumulation)


def resize(config: ConfigDict) -> Resize:
    """The size that images get, in whole units of the layout."""
    height, width = config.data.image_size
    size = LAYOUTS[config.data.layout].size
    unit = size.unit if isinstance(size, SizeTokens) else 1  # sides are multiples of the unit
    way = {name: config.data[name] for name in WAY}
    return Resize(config.data.resize, height, width, config.image_tokenizer.factor * unit, **way)


def layout(config: ConfigDict, image: AutoencoderConfig) -> ImageLayout:
    """How images are written as ids. Raises ValueError, which names the key, for settings that do not fit together."""
    height, width = image.grid(*config.data.image_size)
    kind, aspect = config.data.layout, config.data.resize == "aspect"
    if LAYOUTS[kind].size is None:
        if aspect:
            sized = " or ".join(repr(name) for name, record in LAYOUTS.items() if record.size is not None)
            raise ValueError(
                f"layout: expected {sized} with resize 'aspect', because its images vary in size; found {kind!r}"
            )
        return ImageLayout(kind, height, width, image.codes_per_position)
    return ImageLayout(kind, *image.grid(*resize(config).largest), image.codes_per_position)


def fits(ours: ImageLayout, theirs: ImageLayout) -> bool:
    """Whether images of the layout `ours` can be written in the layout `theirs`. If images of `theirs` have a fixed
    size, those of `ours` must have the same size; otherwise those of `ours` may not be larger."""
    if not theirs.sized:
        return ours == theirs
    same = (ours.kind, ours.depth) == (theirs.kind, theirs.depth)
    return same and ours.height <= theirs.height and ours.width <= theirs.width


def language(
    config: ConfigDict, image: AutoencoderConfig | None, text_size: int, text_hash: str = "", image_hash: str = ""
) -> tuple[Vocabulary, ImageLayout]:
    """The vocabulary of two tokenizers, and how images are written in it. `image` is None for text alone.

    Raises like `layout`.
    """
    if image is None:
        return Vocabulary(text_size, 0, text_hash=text_hash), TEXT_ALONE
    how = layout(config, image)
    return vocabulary_for(how, text_size, image.codebook_size, text_hash, image_hash), how


def extension(config: ConfigDict, before: Grammar, image: AutoencoderConfig, image_hash: str = "") -> Grammar:
    """The grammar of a language model of text alone, extended by the images of this config. Raises like `layout`."""
    return extended(before, layout(config, image), image.codebook_size, image_hash)


def filters(config: ConfigDict) -> Filters:
    """What `prepare` leaves out of the training sources. Raises UserError, which names the key."""
    return configs.pick(Filters, config.data.filters)


def short_side(config: ConfigDict) -> int:
    """The short side, in pixels, of the images from which the image tokenizer's training takes crops."""
    return config.image_tokenizer.short_side or config.image_tokenizer.crop * 5 // 4


OBJECTIVES = ("likelihood", "preference", "reward")  # the objectives of the transformer


# ---- training ---------------------------------------------------------------------------------------------------


def tokenizer_training(config: ConfigDict) -> TrainingConfig:
    """The settings of the image tokenizer's training."""
    settings = config.image_tokenizer
    steps = settings.steps
    every = settings.checkpoint_every or max(1, steps // 4)
    if not settings.learning_rate > 0:
        raise ValueError(f"learning_rate: expected more than 0, found {settings.learning_rate}")
    return TrainingConfig(
        steps=steps,
        seed=config.seed,
        accumulation=settings.accumulation,
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rate,
            warmup_steps=min(settings.warmup_steps, steps // 10),
            final_fraction=settings.final_fraction,
            b1=settings.b1,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        ),
        log_every=max(1, min(100, steps // 40)),
        validate_every=every,
        preview_every=every,
        checkpoint_every=every,
        keep=1,
        keep_best=False,  # the tokenizer uses the last parameters, or their average
    )


def tokenizer_rates(config: ConfigDict) -> tuple[str, ...]:
    """The factors of the learning rate in the image tokenizer's training; its adversary may have its own learning
    rate."""
    settings = config.image_tokenizer
    rate = settings.adversary.learning_rate
    return (f"discriminator={rate / settings.learning_rate!r}",) if rate else ()


def training(config: ConfigDict) -> TrainingConfig:
    """The settings of the transformer's training."""
    settings = config.training
    return configs.pick(TrainingConfig, settings, seed=config.seed, optimizer=configs.pick(OptimizerConfig, settings))


def lora(config: ConfigDict) -> LoraConfig | None:
    """The config of the adapter that is trained; None if there is none. Raises ValueError, which begins with the
    key."""
    found = configs.pick(LoraConfig, config.lora)
    return found if found.rank else None


def preference(config: ConfigDict) -> PreferenceConfig:
    """The settings of `training.objective` "preference". Raises ValueError, which names the key."""
    return configs.pick(PreferenceConfig, config.preference)


def policy(config: ConfigDict) -> PolicyConfig:
    """The settings of the objective "reward". Raises ValueError, which names the key, if groups do not fill a batch."""
    found = configs.pick(PolicyConfig, config.reward)
    require_groups(found, config.training.batch_size // config.training.accumulation)
    return found


def rewarding(config: ConfigDict) -> RewardConfig:
    """The settings of the reward, which says how good an answer is. Raises ValueError, which names the key."""
    return configs.pick(RewardConfig, config.reward)


def drawing(config: ConfigDict) -> DrawingConfig:
    """How answers are drawn. Raises ValueError, which names the key."""
    return configs.pick(DrawingConfig, config.reward)


def selected(
    config: ConfigDict, key: str, vocabulary: Vocabulary | None = None, new: Collection[int] = ()
) -> Selection:
    """The parameters that `training.only` or `training.fresh` names. An adapter, if there is one, is added to the
    parameters of `only`.

    Args:
        vocabulary: None if there is none yet, in which case any kind of ids may be named.
        new: as for `select`.

    Raises ValueError, which begins with the key, if an entry of the key matches no parameter.
    """
    known = vocabulary or _ANY
    axes, places = logical_axes(_shapes(config, known)), config.training[key]
    if key == "only" and (adapter := lora(config)) is not None:
        axes, places = axes | _axes_of(adapter), ("lora", *places)
    try:
        return select(places, axes, known, new if vocabulary else _SOME)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def trained(config: ConfigDict, vocabulary: Vocabulary, new: Collection[int]) -> Selection:
    """The parameters of the transformer that are trained in any phase, and the adapter's, if there is one."""
    places, axes = trained_in(config.training.only, moving(config.training)), logical_axes(_shapes(config, vocabulary))
    if (adapter := lora(config)) is not None:
        places, axes = beside_adapter(places, axes, new), axes | _axes_of(adapter)
    return select(places, axes, vocabulary, new)


def _axes_of(adapter: LoraConfig) -> Params:
    return {"lora": dict.fromkeys(adapter.matrices, (None, None))}


def state_of(settings: ConfigDict) -> dict[str, list[str]]:
    """If phases train parameters other than `training.only`, {"trains": places of the parameters with optimizer state};
    otherwise {}.

    A training that has begun cannot train other parameters, because it has no optimizer moments for them.
    """
    places = trained_in(settings.only, moving(settings))
    return {} if places == tuple(settings.only) else {"trains": list(places) or ["everything"]}


def rates(config: ConfigDict) -> Rates:
    """The factor of each parameter's learning rate in each phase, from `training.rates` and the `only` of phases. Needs
    no vocabulary.

    Raises ValueError, which begins with the key, if an entry of the key matches no parameter.
    """
    part, shapes = config.training, _shapes(config, _ANY)
    axes, found = logical_axes(shapes), moving(config.training)
    try:
        selection = select(trained_in(part.only, found), axes, _ANY, _SOME)
        make_rates((), found, axes, shapes, _ANY, selection, _SOME)
    except ValueError as error:
        raise ValueError(f"phases: {error}") from error
    return make_rates(part.rates, found, axes, shapes, _ANY, selection, _SOME)


_ANY, _SOME = Vocabulary(1, 1, 1), (0,)  # a vocabulary with every kind of ids, and new ids


def _shapes(config: ConfigDict, vocabulary: Vocabulary) -> Params:
    return abstract_params(config_from(configs.plain(config.model), vocab_size=vocabulary.size))


def phases(settings: ConfigDict, mixture: Mapping[str, float]) -> list[Phase]:
    """The settings at the beginning of the training and in each of `training.phases`, with the step at which they
    begin.

    Raises UserError, which names the phase, if it does not begin between the first and the last step, or changes an
    unknown setting.
    """
    found = [Phase(0, mixture, settings.flip_pairs, settings.condition_dropout)]
    names = ("weights", "flip_pairs", "condition_dropout", "sequence_length", "batch_size", "only")
    for i, change in enumerate(configs.plain(settings.phases)):
        begin = change.pop("begin", None)
        unknown = sorted(change.keys() - set(names))
        if unknown or isinstance(begin, bool) or not isinstance(begin, float | int) or not 0 < begin < 1:
            near = nearest(unknown[0], names) if unknown else ""
            raise UserError(
                f"config.training.phases[{i}]: expected a `begin` between 0 and 1 (a share of the steps) "
                f"and any of {', '.join(names)}; found {dict(begin=begin) | change}{near}"
            )
        only = change.pop("only", [])
        if not isinstance(only, list) or not all(isinstance(place, str) for place in only):
            raise UserError(f"config.training.phases[{i}]: only: expected a tuple of texts, found {only!r:.80}")
        try:
            found.append(dataclasses.replace(found[-1], from_step=_first_step(settings, begin), **change))
        except (TypeError, ValueError) as error:
            raise UserError(f"config.training.phases[{i}]: {error}") from error
    require_order(found)
    return found


def shapes(settings: ConfigDict) -> dict[str, tuple[int, int]]:
    """The different (batch_size, sequence_length) of a training's batches, by their place in the config.

    Call it after `phases`, which checks the settings.
    """
    found: dict[tuple[int, int], str] = {}
    for i, phase in enumerate(phases(settings, {})):
        shape = (phase.batch_size or settings.batch_size, phase.sequence_length or settings.sequence_length)
        found.setdefault(shape, f"training.phases[{i - 1}]" if i else "training")
    return {place: shape for shape, place in found.items()}


def longest(settings: ConfigDict) -> tuple[int, int]:
    """(batch_size, sequence_length) of the longest rows of a training, which have room for every document."""
    return max(shapes(settings).values(), key=lambda shape: shape[1])


def _first_step(settings: ConfigDict, begin: float) -> int:
    return math.ceil(begin * settings.steps)


def moving(settings: ConfigDict) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Returns (step, places) of each phase: from this step on, only the parameters at these places are trained. It is
    made from `training.only` and the `only` of phases, and is () if no phase has `only`.

    Call it after `phases`, which checks the settings.
    """
    changes = [change for change in settings.phases if "only" in change]
    if not changes:
        return ()
    later = [(_first_step(settings, change["begin"]), tuple(change["only"])) for change in changes]
    return ((0, tuple(settings.only)), *later)


# ---- sampling ---------------------------------------------------------------------------------------------------
CHECKPOINTS = ("last", "best")  # the checkpoints that samples and evaluation may use


def token_filter(config: ConfigDict, modality: str) -> Filter:
    """How ids of a modality, "text" or "image", are drawn, from `config.sampling`."""
    return configs.pick(Filter, config.sampling[modality])


def request(config: ConfigDict, **more: str) -> Request:
    """The default values of requests, from the config."""
    said = {name: config.sampling[name] for name in DEFAULTS}
    filters = {name: token_filter(config, name) for name in ("text", "image")}
    return Request(**{"id": "config.sampling", "parts": ()} | said | filters | more)
