"""Advice for work that ran out of memory: the settings with which this work needs less."""

from __future__ import annotations

import jax
from ar_tokenizers.image.tokenizer import BATCH_SIZE
from ml_collections import ConfigDict

from ar_unified.errors import MORE_MEMORY
from ar_unified.experiment import settings
from ar_unified.model.remat import POLICIES

_REPEAT = "This changes the results by rounding at most: repeat the command with it"
_GO_ON = f"{_REPEAT}, and the work continues"
OF_BUNDLE = f"Try a smaller --batch-size. {_GO_ON}"  # for samples and scores of a bundle, which have no config

# Work that is no stage: requests and documents of a person, and the evaluation of a bundle.
REQUESTS, EVALUATION_OF_BUNDLE = "requests", "evaluation of a bundle"

_DECIDING = {
    "text_tokenizer": ["text_tokenizer.max_bytes"],
    "image_tokenizer": ["image_tokenizer.batch_size", "image_tokenizer.width", "data.image_size"],
    "model": ["training.batch_size", "training.sequence_length"],
    "samples": ["sampling.max_length"],
    "tokenizer_evaluation": ["data.image_size"],
    "evaluation": ["sampling.max_length"],
}


def advice(work: str, config: ConfigDict) -> str:
    """Sentences that name the keys which help.

    Args:
        work: a stage, REQUESTS or EVALUATION_OF_BUNDLE. No key helps any other work.
    """
    same, deciding = _same(work, config), [*_DECIDING.get(work, ())]
    if work == "image_tokenizer" and config.image_tokenizer.crop:
        deciding.append("image_tokenizer.crop")
    end = _REPEAT if work == EVALUATION_OF_BUNDLE else _GO_ON
    told = [f"Try {' or '.join(same)}, as --config.KEY=VALUE. {end}"] if same else []
    if deciding:
        beginning = "Smaller values of these keys help, too, but" if same else "Smaller values of these keys help, but"
        told.append(f"{beginning} change the result and need another --workdir: {', '.join(deciding)}")
    return ". ".join(told) or MORE_MEMORY


def _same(work: str, config: ConfigDict) -> list[str]:
    """What changes nothing but rounding, as far as it is not at its limit yet."""
    found: list[str] = []
    several = jax.device_count() > 1
    by_reward = work == "model" and config.training.objective == "reward"
    if by_reward or work in ("samples", "evaluation", REQUESTS, EVALUATION_OF_BUNDLE):
        if (now := config.sampling.batch_size) > 1:
            found.append(f"a smaller sampling.batch_size (now {now})")
        if several and not by_reward:
            found.append("a larger mesh.tensor")
    if work == "model":
        order = [*POLICIES]
        if order.index(config.model.remat) < order.index("full"):
            found.append("model.remat=full")
        if config.training.preview_every:
            found.append("training.preview_every=0")
    if work in ("model", EVALUATION_OF_BUNDLE):
        found += _raised("training", config, config.training.batch_size // _ways(config))
        if config.loss.chunk > 128:
            found.append(f"a smaller loss.chunk (now {config.loss.chunk})")
        if several:
            found.append("a larger mesh.fsdp")
    if work == "image_tokenizer" and not settings.whole_batch(config):
        found += _raised("image_tokenizer", config, config.image_tokenizer.batch_size // _ways(config))
    coded = config.image_tokenizer.steps or config.image_tokenizer.model or config.init
    if coded and work in ("data", "samples", "tokenizer_evaluation", "evaluation", REQUESTS, EVALUATION_OF_BUNDLE):
        found += _raised("image_tokenizer", config, BATCH_SIZE)  # `settings.images_at_once`
    return found


def _ways(config: ConfigDict) -> int:
    """The number of devices that have different rows of a microbatch, so it has at least as many rows."""
    return max(1, jax.device_count() // (max(1, config.mesh.tensor) * max(1, config.mesh.context)))


def _raised(section: str, config: ConfigDict, most: int) -> list[str]:
    now = config[section].accumulation
    return [f"a larger {section}.accumulation (now {now})"] if now < most else []
