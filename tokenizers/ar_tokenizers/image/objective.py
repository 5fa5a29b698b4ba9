"""The losses of an image tokenizer: reconstruction, its quantizer, perceptual distance, and an adversary.

Axes: B batch, H W pixels, K codebook size.

The parameters are {"autoencoder": ..., "discriminator": ...}, the second only with an adversary. The losses have the
same names. Each loss trains the parameters of the same name, and both come from one forward pass. The model state
contains everything that no gradient changes: the number of steps, averaged weights, statistics of the codebook,
averages of the discriminator's logits, and the weights of the pretrained network of a perceptual loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ar_tokenizers.image import adversary as adversaries
from ar_tokenizers.image import autoencoder as autoencoders
from ar_tokenizers.image.adversary import AdversaryConfig
from ar_tokenizers.image.autoencoder import Autoencoder, Reconstruction, to_float
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.perceptual import Perceptual
from ar_tokenizers.trees import Metrics, Params


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The weights of the losses, and how parameters are averaged. Raises ValueError if the numbers make no sense."""

    l1_weight: float = 0.0  # weight of the mean absolute error of pixels in [-1, 1]
    l2_weight: float = 1.0  # weight of the mean squared error
    tolerance: float = 0.0  # pixel errors up to this size add no loss, so no code is used for faint tints
    perceptual: str = "none"  # none | ms_ssim | match | lpips | features (perceptual.Kind)
    perceptual_weight: float = 1.0
    adversary: AdversaryConfig = AdversaryConfig()
    ema: float = 0.0  # decay of the parameters' average that the tokenizer gets, e.g. 0.9999; 0: the last parameters

    def __post_init__(self) -> None:
        for name in ("l1_weight", "l2_weight", "tolerance", "perceptual_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective: {name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"objective: ema must be in [0, 1), got {self.ema}")
        if not self.l1_weight + self.l2_weight > 0:
            raise ValueError("objective: l1_weight and l2_weight are both 0, so nothing would train the colours")
        if self.perceptual == "match" and self.adversary.kind == "none":
            raise ValueError(
                "objective: perceptual 'match' compares the adversary's activations, but there is no adversary: "
                "set adversary.kind, or choose another perceptual"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """An autoencoder, its losses, and the network of its perceptual loss.

    Raises ValueError if `perceptual` is not of the kind that the config asks for.
    """

    autoencoder: AutoencoderConfig
    config: ObjectiveConfig = ObjectiveConfig()
    perceptual: Perceptual = Perceptual.load("none")

    def __post_init__(self) -> None:
        if self.perceptual.kind != self.config.perceptual:
            raise ValueError(
                f"objective: the config asks for perceptual {self.config.perceptual!r}, got {self.perceptual.kind!r}"
            )

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, by "autoencoder" and "discriminator"."""
        params = {"autoencoder": autoencoders.init(self.autoencoder, key)}
        if self.config.adversary.kind != "none":
            params["discriminator"] = adversaries.init(self.config.adversary, jax.random.fold_in(key, 1))
        return params

    def init_state(self, params: Params) -> Params:
        """The model state before the first step."""
        quantizer = self.autoencoder.abstract_quantizer
        model_state: Params = {"steps": jnp.zeros((), jnp.int32)}
        if statistics := quantizer.init_state(params["autoencoder"].get("quantizer", {})):
            model_state["quantizer"] = statistics
        if self.config.ema:
            model_state["average"] = params["autoencoder"]
        if self.config.adversary.lecam:
            model_state["lecam"] = adversaries.lecam_init()
        if self.perceptual.params:  # as part of the state, the weights are no constants in the compiled step
            model_state["perceptual"] = self.perceptual.params
        return model_state

    def inference_params(self, params: Params, model_state: Params) -> Params:
        """The same tree as `params`, with averaged weights if there are any."""
        return {**params, "autoencoder": model_state.get("average", params["autoencoder"])}

    def losses(
        self, params: Params, model_state: Params, pixels: jax.Array, keys: jax.Array | None
    ) -> tuple[dict[str, jax.Array], Metrics, Params]:
        """The losses to minimise for a batch.

        Args:
          pixels: [B, H, W, 3], uint8, or float32 in [-1, 1].
          keys: PRNG keys [B], one for each image; None for held-out images, whose loss does not include the adversary.

        Returns:
          (losses, metrics, sums). losses: each float32 [], summed over the images, under the name of the parameters
          that it trains. metrics: (sum, count) over the images, and `code_counts`, how often each code was used, int32
          [K]. sums: what `update_state` needs.
        """
        config, target = self.config, to_float(pixels)
        made = Autoencoder.bind(self.autoencoder, params["autoencoder"])(target, keys)
        count = float(target.shape[0])

        def similar(fake: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            """The weighted sum of the losses that compare a reconstruction with its image, and each of these losses by
            name: float32 [B]."""
            error = fake - target
            parts = mean_errors(error)
            # The metrics count all errors; the loss counts only errors beyond the tolerance.
            counted = (
                mean_errors(error - jnp.clip(error, -config.tolerance, config.tolerance)) if config.tolerance else parts
            )
            loss = config.l1_weight * counted["l1"] + config.l2_weight * counted["mse"]
            if self.perceptual.kind not in ("none", "match"):
                perceptual = dataclasses.replace(self.perceptual, params=model_state.get("perceptual", {}))
                parts["perceptual"] = perceptual.distance(target, fake)
                loss += config.perceptual_weight * parts["perceptual"]
            return loss, parts

        loss, parts = similar(made.pixels)
        loss += made.quantizer_loss
        seen = jnp.mean(jnp.square(jnp.clip(made.pixels, -1, 1) - target), axis=(1, 2, 3))
        parts["psnr"] = 10 * jnp.log10(4 / jnp.maximum(seen, 4e-10))  # at most 100 dB, as in metrics.psnr
        parts["quantizer_loss"] = jnp.broadcast_to(made.quantizer_loss, loss.shape)
        parts["loss"] = loss  # without the adversary, because its loss is not comparable over time
        losses, sums = {"autoencoder": jnp.sum(loss)}, {"quantizer": made.quantizer_sums}
        if "discriminator" in params:
            losses["discriminator"] = jnp.zeros(())
        if "discriminator" in params and keys is not None:
            judged = self._judged(params, model_state, target, made, lambda fake: similar(fake)[0])
            losses["autoencoder"] += jnp.sum(judged.generator)
            losses["discriminator"] += jnp.sum(judged.discriminator)
            parts |= judged.parts
            sums["adversary"] = {"real": jnp.sum(judged.parts["logits/real"]), "count": jnp.float32(count)} | {
                "fake": jnp.sum(judged.parts["logits/fake"])
            }
        metrics: Metrics = {name: (jnp.sum(part), count) for name, part in parts.items()}
        metrics["code_counts"] = jnp.zeros(self.autoencoder.codebook_size, jnp.int32).at[made.codes.ravel()].add(1)
        return losses, jax.lax.stop_gradient(metrics), jax.lax.stop_gradient(sums)

    def _judged(
        self,
        params: Params,
        model_state: Params,
        target: jax.Array,
        made: Reconstruction,
        similar: Callable[[jax.Array], jax.Array],
    ) -> Judged:
        """The adversary's losses for a batch. Before the first step in which the discriminator learns, nothing is
        computed and all results are 0."""
        config, matching = self.config.adversary, self.config.perceptual_weight * (self.config.perceptual == "match")
        weight, learning = adversaries.gates(config, model_state["steps"])

        def generator(discriminator: Params, fake: jax.Array) -> tuple[jax.Array, Any]:
            logits, features = adversaries.logits(config, discriminator, fake)
            return adversaries.generator_loss(config, logits), (logits, features)

        def judge(discriminator: Params, fake: jax.Array) -> Judged:
            real_logits, real_features = adversaries.logits(config, discriminator, target)
            fooled, (fake_logits, fake_features) = generator(discriminator, fake)
            share = weight
            if config.adaptive:
                still = jax.lax.stop_gradient((discriminator, fake))
                by_pixels = jax.grad(lambda fake: jnp.mean(similar(fake)))(still[1])
                by_adversary = jax.grad(lambda fake: jnp.mean(generator(still[0], fake)[0]))(still[1])
                share *= self._balance(params["autoencoder"], made.codes, by_pixels, by_adversary)
            loss = adversaries.discriminator_loss(config, real_logits, fake_logits)
            parts = {
                "generator_loss": fooled,
                "discriminator_loss": loss,
                "generator_weight": jnp.broadcast_to(share, fooled.shape),
                "logits/real": adversaries.by_image(real_logits),
                "logits/fake": adversaries.by_image(fake_logits),
            }
            if config.lecam:
                loss += adversaries.lecam_penalty(config, model_state["lecam"], real_logits, fake_logits)
            if config.r1:
                due = adversaries.r1_weight(config, model_state["steps"])
                parts["r1"] = jax.lax.cond(
                    due > 0,
                    lambda discriminator: due * adversaries.r1_penalty(config, discriminator, target),
                    lambda discriminator: jnp.zeros(len(target)),
                    discriminator,
                )
                loss += parts["r1"]
            total = share * fooled
            if matching:
                parts["perceptual"] = self.perceptual.distance(target, fake, real_features, fake_features)
                total += jnp.where(weight > 0, matching, 0.0) * parts["perceptual"]
            return Judged(total, loss, jax.lax.stop_gradient(parts))

        def nothing(discriminator: Params, fake: jax.Array) -> Judged:
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(judge, discriminator, fake))

        return jax.lax.cond(learning > 0, judge, nothing, params["discriminator"], made.pixels)

    def _balance(self, params: Params, codes: jax.Array, by_pixels: jax.Array, by_adversary: jax.Array) -> jax.Array:
        """VQGAN's adaptive weight, computed from the gradients of both losses with respect to the pixels."""

        def last_layer(head: Params) -> jax.Array:
            decoder = {**params["decoder"], "head": head}
            return Autoencoder.bind(self.autoencoder, {**params, "decoder": decoder}).decode(codes)

        head = params["decoder"]["head"]
        return adversaries.adaptive_weight(*adversaries.last_layer_gradients(last_layer, head, by_pixels, by_adversary))

    def update_state(self, params: Params, model_state: Params, sums: Mapping[str, Any]) -> tuple[Params, Params]:
        """(params, model_state) after an optimizer step. sums: what `losses` returned for the step's whole batch."""
        model_state = {**model_state, "steps": model_state["steps"] + 1}
        model = dict(params["autoencoder"])
        if "quantizer" in model_state:
            quantizer = self.autoencoder.abstract_quantizer
            model["quantizer"], model_state["quantizer"] = quantizer.update_state(
                model["quantizer"], model_state["quantizer"], sums["quantizer"]
            )
        if "average" in model_state:
            # TensorFlow's ramp: early in training, only about the last tenth of the steps is averaged, so that the
            # average forgets the first weights.
            steps = model_state["steps"].astype(jnp.float32)
            decay = jnp.minimum(self.config.ema, steps / (steps + 9))
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, model_state["average"], model)
            if "quantizer" in model_state:  # not averaged, because a restarted code has an unrelated new vector
                average["quantizer"] = model["quantizer"]
            model_state["average"] = average
        if "lecam" in model_state:
            found = sums["adversary"]
            model_state["lecam"] = jax.tree.map(
                lambda new, old: jnp.where(
                    adversaries.gates(self.config.adversary, model_state["steps"] - 1)[1] > 0, new, old
                ),
                adversaries.lecam_update(model_state["lecam"], found["real"], found["fake"], found["count"]),
                model_state["lecam"],
            )
        return {**params, "autoencoder": model}, model_state


def mean_errors(error: jax.Array) -> dict[str, jax.Array]:
    """Mean absolute and mean squared error of each image: [B, H, W, 3] -> float32 [B] by name."""
    return {"l1": jnp.mean(jnp.abs(error), axis=(1, 2, 3)), "mse": jnp.mean(jnp.square(error), axis=(1, 2, 3))}


class Judged(NamedTuple):
    """A discriminator's results for images and their reconstructions, one entry for each image."""

    generator: jax.Array  # float32 [B], weighted
    discriminator: jax.Array  # float32 [B]
    parts: dict[str, jax.Array]  # float32 [B] by name, for the log
