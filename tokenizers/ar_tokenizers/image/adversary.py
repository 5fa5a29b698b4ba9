"""The adversary of an image tokenizer: its network, its losses and penalties, and the steps in which they are used.

Axes: B batch, H W pixels.

The autoencoder and the discriminator learn from one forward pass, as in MAGVIT (arXiv:2212.05199). Write one function
of both sets of parameters that returns both losses, and compute the gradient of each loss for its own parameters:

    (d_loss, g_loss), pull_back = jax.vjp(losses, d_params, g_params)
    d_grads, _ = pull_back((1.0, 0.0))
    _, g_grads = pull_back((0.0, 1.0))

No stop_gradient is needed, because the two gradients named `_` are not used. The first `_` is the gradient of the
discriminator's loss with respect to the autoencoder's parameters.

Every loss and penalty here is float32 [B], one number for each image, so sums over microbatches and devices add up to
the sum over the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.discriminators import Discriminator, PatchDiscriminator, StyleDiscriminator
from ar_tokenizers.image.layers import Params, fresh

LECAM_DECAY = 0.999  # decay of LeCAM's averages in MAGVIT and Open-MAGVIT2; LeCAM's own code has 0.99


CHOICES = {
    "kind": ("none", "patch", "style"),
    "loss": ("hinge", "non_saturating"),
    "dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """The settings of an adversary. Raises ValueError if the numbers make no sense."""

    kind: Literal["none", "patch", "style"] = "none"
    width: int = 64  # number of features of the finest layer; every halving doubles it, up to 8 x width
    layers: int = 3  # how often the discriminator halves the image
    loss: Literal["hinge", "non_saturating"] = "hinge"
    weight: float = 0.1  # weight of the generator's loss; the reconstruction losses have their own weights
    adaptive: bool = False  # multiply `weight` by `adaptive_weight`; VQGAN does, with weight 0.8
    start: int = 5000  # the step at which the generator first feels the adversary
    warmup: int = 2000  # the discriminator starts to learn this many steps before `start`
    ramp: int = 2000  # the weight rises to its full size in this many steps after `start`
    r1: float = 0.0  # gamma of the R1 penalty, which is gamma / 2 |gradient|^2 (MAGVIT's "cost 10" is 20 here); 0: none
    r1_every: int = 16  # R1 is computed once in this many steps, and multiplied by this number (lazy, StyleGAN2)
    lecam: float = 0.0  # weight of the LeCAM regulariser (0.05 in Open-MAGVIT2); 0: none
    learning_rate: float = 0.0  # learning rate of the discriminator; 0: the same as the autoencoder's
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters, logits and losses are float32

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"adversary: {name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("width", "layers", "r1_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"adversary: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight", "start", "warmup", "ramp", "r1", "lecam", "learning_rate"):
            if not getattr(self, name) >= 0:  # true for NaN too
                raise ValueError(f"adversary: {name} must be 0 or more, got {getattr(self, name)}")

    def _discriminator(self, rngs: nnx.Rngs) -> Discriminator:
        if self.kind == "none":
            raise ValueError('this adversary is of kind "none" and has no discriminator: ask for "patch" or "style"')
        build = PatchDiscriminator if self.kind == "patch" else StyleDiscriminator
        return build(self.width, self.layers, dtype=jnp.dtype(self.dtype), rngs=rngs)


def init(config: AdversaryConfig, key: jax.Array) -> Params:
    """Parameters: a nested dict of float32 arrays, empty for kind "none". Works under jax.jit and jax.eval_shape."""
    if config.kind == "none":
        return {}
    return nnx.to_pure_dict(nnx.state(config._discriminator(fresh(key)), nnx.Param))


def logits(config: AdversaryConfig, params: Params, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """How real each image looks, and the discriminator's activations for it.

    Args:
      pixels: float32 [B, H, W, 3] in [-1, 1]; any H x W that is large enough.

    Returns:
      logits, float32 [B, h, w] of patches or [B] of images, larger for real ones; and the activations of the layers,
      [B, h, w, F] in the config's dtype, which feature matching compares.

    Raises:
      ValueError: the images are too small for the number of layers, or the kind is "none".
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: config._discriminator(fresh())))
    nnx.replace_by_pure_dict(state, params)
    discriminator = nnx.merge(graph, state)
    require_size(config, *pixels.shape[1:3])
    return discriminator(pixels)


def require_size(config: AdversaryConfig, height: int, width: int) -> None:
    """Raises ValueError if images of this size, in pixels, are too small for the discriminator's layers."""
    least = nnx.eval_shape(lambda: config._discriminator(fresh())).least
    if min(height, width) < least:
        raise ValueError(
            f"a {config.kind} discriminator of {config.layers} layers needs images of at least {least} "
            f"pixels a side, got {height} x {width}: ask for fewer layers"
        )


# ---- losses -----------------------------------------------------------------------------------------------------


def discriminator_loss(config: AdversaryConfig, real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """The loss of the discriminator: logits [B, ...] of images and of their reconstructions -> float32 [B].

    hinge: (relu(1 - real) + relu(1 + fake)) / 2, as in VQGAN and LlamaGen. non_saturating: cross entropy, not halved
    (Goodfellow et al. 2014, arXiv:1406.2661), as in MaskGIT.
    """
    if config.loss == "hinge":
        return 0.5 * by_image(jax.nn.relu(1 - real_logits)) + 0.5 * by_image(jax.nn.relu(1 + fake_logits))
    return by_image(jax.nn.softplus(-real_logits)) + by_image(jax.nn.softplus(fake_logits))


def generator_loss(config: AdversaryConfig, fake_logits: jax.Array) -> jax.Array:
    """The loss of the autoencoder, without its weight: logits [B, ...] of reconstructions -> float32 [B].

    hinge: -fake. non_saturating: -log sigmoid(fake). Its gradient is largest where the discriminator is most certain
    that a reconstruction is fake.
    """
    return by_image(-fake_logits) if config.loss == "hinge" else by_image(jax.nn.softplus(-fake_logits))


def r1_penalty(config: AdversaryConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """gamma / 2 |d logit / d pixels|^2 of real images [B, H, W, 3] -> float32 [B], for the discriminator's loss.

    Mescheder et al. 2018, arXiv:1801.04406. An image's logit is the mean over its patches. The penalty is expensive, so
    compute it only in some steps, and multiply it by `r1_weight`.
    """

    # No image influences another's logit, so the gradient of the sum contains the gradient of each image's logit.
    def total(pixels: jax.Array) -> jax.Array:
        return jnp.sum(by_image(logits(config, params, pixels)[0]))

    return 0.5 * config.r1 * jnp.sum(jnp.square(jax.grad(total)(pixels)), axis=(1, 2, 3))


def lecam_init() -> dict[str, jax.Array]:
    """The averages before the first step: the logits of a discriminator that cannot tell real from fake."""
    return {"real": jnp.zeros((), jnp.float32), "fake": jnp.zeros((), jnp.float32)}


def lecam_penalty(
    config: AdversaryConfig, averages: Mapping[str, jax.Array], real_logits: jax.Array, fake_logits: jax.Array
) -> jax.Array:
    """lecam x (relu(real - average fake)^2 + relu(average real - fake)^2) -> float32 [B].

    Tseng et al. 2021, arXiv:2104.03310, with the relu of the authors' code. The penalty holds back a discriminator that
    becomes too sure. It is zero for a discriminator that is wrong. It uses the mean logit of each image. MAGVIT uses
    the mean of the batch, which here would depend on the size of a microbatch.
    """
    real = jax.nn.relu(by_image(real_logits) - averages["fake"])
    fake = jax.nn.relu(averages["real"] - by_image(fake_logits))
    return config.lecam * (jnp.square(real) + jnp.square(fake))


def lecam_update(
    averages: Mapping[str, jax.Array], real_sum: jax.Array, fake_sum: jax.Array, count: jax.Array | float
) -> dict[str, jax.Array]:
    """The averages after a step. real_sum, fake_sum: the sums of `by_image(logits)` over the `count` images of the
    global batch and over their reconstructions.
    """
    means = {"real": real_sum / count, "fake": fake_sum / count}
    return {name: LECAM_DECAY * averages[name] + (1 - LECAM_DECAY) * mean for name, mean in means.items()}


# ---- weights ----------------------------------------------------------------------------------------------------


def gates(config: AdversaryConfig, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns two float32 []: the weight of the generator's loss, and 1.0 if the discriminator learns, otherwise 0.0.

    The discriminator starts `warmup` steps before its loss reaches the generator. A new discriminator knows nothing
    about reconstructions, and its gradients are noise (taming-transformers#44).
    """
    step = jnp.asarray(step, jnp.float32)
    if config.kind == "none":
        return jnp.zeros_like(step), jnp.zeros_like(step)
    risen = jnp.clip((step - config.start + 1) / max(config.ramp, 1), 0, 1)
    return config.weight * risen, (step >= config.start - config.warmup).astype(jnp.float32)


def r1_weight(config: AdversaryConfig, step: jax.Array | int) -> jax.Array:
    """The weight of `r1_penalty` at this step, float32 []: `r1_every` in every `r1_every`-th step, else 0."""
    due = (jnp.asarray(step) % config.r1_every == 0) & (config.r1 > 0)
    return jnp.where(due, float(config.r1_every), 0.0)


def last_layer_gradients(
    layer: Callable[[Params], jax.Array], params: Params, reconstruction: jax.Array, adversarial: jax.Array
) -> tuple[Params, Params]:
    """The gradients of two losses for the parameters of the decoder's last layer, from one vjp of this layer alone.

    Args:
      layer: a function from its parameters to the pixels [B, H, W, 3], at a fixed input.
      reconstruction, adversarial: d loss / d pixels [B, H, W, 3] of each loss.

    Returns:
      Both gradients, trees like params. They are sums over images, so add those of all microbatches.
    """
    _, pull_back = jax.vjp(layer, params)
    return pull_back(reconstruction)[0], pull_back(adversarial)[0]


def adaptive_weight(reconstruction: Params, adversarial: Params, limit: float = 1e4) -> jax.Array:
    """The weight that VQGAN gives the generator's loss: float32 [] in [0, limit]. It makes the gradient of this loss as
    large as the gradient of the reconstruction losses. No gradient flows through the weight.

    |gradient of the reconstruction losses| / (|gradient of the generator's loss| + 1e-4), both for the last layer
    (Esser et al. 2020, arXiv:2012.09841). Multiply it by the weight from `gates`. The 1e-4 is chosen for the gradients
    of a mean over images, not of a sum.
    """
    ratio = _norm(reconstruction) / (_norm(adversarial) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, limit))


def by_image(values: jax.Array) -> jax.Array:
    """[B, ...] -> [B]: the mean over the patches, if there are any."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
