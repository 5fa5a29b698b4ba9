"""The image tokenizer in the training loop: any quantizer, with and without an adversary, on any mesh, killed and
resumed."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ar_tokenizers.image.adversary import AdversaryConfig
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.metrics import collapse, usage
from ar_tokenizers.image.objective import Objective, ObjectiveConfig
from ar_tokenizers.image.perceptual import Perceptual
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified.checkpoint import Checkpoints
from ar_unified.evaluation.report import tokenizer_charts
from ar_unified.metrics import read_metrics
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training import loop
from ar_unified.training.divergence import Diverged
from ar_unified.training.loop import NonFinite, TrainingConfig
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.tasks import TokenizerTask
from tests.training import tiny

SMALL: dict[str, Any] = dict(factor=8, patch=4, width=8, multipliers=(1, 2), blocks=(0, 1), levels=(5, 4, 3), codes=16)
ADVERSARY = AdversaryConfig(kind="patch", width=4, layers=2, start=2, warmup=2, ramp=2, r1=1.0, r1_every=2, lecam=0.05)
QUANTIZERS: dict[str, dict[str, Any]] = {
    "fsq": dict(quantizer="fsq"),
    "vq": dict(quantizer="vq"),
    "vq_ema": dict(quantizer="vq", codebook_update="ema"),
    "simvq": dict(quantizer="simvq"),
    "lfq": dict(quantizer="lfq"),
    "bsq": dict(quantizer="bsq"),
    "ibq": dict(quantizer="ibq"),
    "rq": dict(quantizer="rq", depth=2),
    "rq_ema": dict(quantizer="rq", depth=2, codebook_update="ema"),
}


# One case for each way to move codes, and one with each penalty; test-all has the others. Compiling a step with users'
# settings takes 20 s of CPU, so cases without a moving codebook have other tests' settings. Below, fsq has users'.
SOME = {("vq_ema", True): "exact", ("ibq", False): "exact", ("rq", True): "exact"}
SOME |= {("fsq", False): "exact_later", ("lfq", False): "exact_later"}


def images(step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
    """32 x 32 pixels with blocks of colour. A batch has more positions than there are codes, so no code depends on one
    position."""
    blocks = np.random.default_rng(step % 16).integers(0, 256, (8, 8, 8, 3), np.uint8)
    pixels = blocks.repeat(4, axis=1).repeat(4, axis=2)
    return {"pixels": pixels[index * 8 // count : (index + 1) * 8 // count]}


def flat(step: int, index: int = 0, count: int = 1, side: int = 16) -> dict[str, np.ndarray]:
    """side x side pixels, each image of one of eight colours. There are few latents, so few are on the border of two
    codes, where rounding decides and the losses of two meshes diverge."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3), np.uint8)
    pixels = colours[np.random.default_rng(step).integers(0, 8, 8)].repeat(side, axis=1).repeat(side, axis=2)
    return {"pixels": pixels[index * 8 // count : (index + 1) * 8 // count]}


def task(adversary: AdversaryConfig | None = None, batch: Any = images, **changes: Any) -> TokenizerTask:
    settings: dict[str, Any] = dict(ema=0.9, l1_weight=0.5)
    if adversary is not None:
        settings |= dict(adversary=adversary, perceptual="match", perceptual_weight=0.5)
    objective = ObjectiveConfig(**settings)
    config = AutoencoderConfig(**SMALL | changes)
    return TokenizerTask(Objective(config, objective, Perceptual.load(objective.perceptual)), batch, [batch(99)])


# Runs that do not diverge by rounding. This eps keeps updates from tiny gradients tiny; otherwise Adam makes full steps
# from them, and their signs are rounding errors. At four times the rate, the difference of two ibq runs grew threefold
# in ten steps before any code changed.
GENTLE = OptimizerConfig(learning_rate=5e-5, warmup_steps=2, eps=1e-3)


def train(
    folder: Path, task: TokenizerTask, shape: dict[str, int], steps: int, **options: Any
) -> tuple[list[float], Any]:
    """The loss of every step, and the parameters after the last step."""
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    settings = dict(steps=steps, optimizer=GENTLE, log_every=1, validate_every=0, checkpoint_every=0) | options
    params = tiny.run(folder, task=task, mesh=make_mesh(shape, devices), **settings)
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")], jax.device_get(params)


def test_the_loop_trains_an_image_tokenizer(tmp_path):
    made = task(quantizer="vq", codes=16)
    params = tiny.run(tmp_path, task=made, steps=4, log_every=1, validate_every=4, accumulation=2)
    *rows, last = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and last["validation/psnr"] > 0
    for title, _, metrics, _ in tokenizer_charts():  # the report draws the written rows
        assert set(metrics) <= set(rows[0]) | set(last), title
    assert 0 < rows[0]["codes/usage"] <= 1
    assert "mfu" not in rows[0]  # its FLOPs are not counted, so none are reported
    ImageTokenizer(made.objective.autoencoder, jax.device_get(params["autoencoder"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["patch", "style"])
def test_the_adversary_waits_learns_and_is_felt_in_that_order(tmp_path, kind):
    adversary = dataclasses.replace(ADVERSARY, kind=kind, start=4, warmup=2, ramp=2, adaptive=True)
    train(tmp_path, task(adversary), dict(data=1), 8)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses, weights = ([row[key] for row in rows] for key in ("discriminator_loss", "generator_weight"))
    assert losses[:2] == [0, 0] and all(loss > 0 for loss in losses[2:])
    assert weights[:4] == [0] * 4 and all(weight > 0 for weight in weights[4:])


@pytest.mark.exact_later
@pytest.mark.slow
def test_microbatches_over_a_mesh_change_nothing(tmp_path):
    made = task(dataclasses.replace(ADVERSARY, r1=0.0), flat, **QUANTIZERS["vq_ema"])
    expected, _ = train(tmp_path / "one", made, dict(data=1), 6)
    mesh, _ = train(tmp_path / "mesh", made, dict(data=2, fsdp=2), 6, accumulation=2)
    np.testing.assert_allclose(mesh, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, judged",
    [
        pytest.param(
            name,
            judged,
            id=f"{name}-{'judged' if judged else 'alone'}",
            marks=getattr(pytest.mark, SOME[name, judged])
            if (name, judged) in SOME
            else (pytest.mark.exact, pytest.mark.exhaustive),
        )
        for name in QUANTIZERS
        for judged in (False, True)
    ],
)
def test_one_device_and_eight_have_the_same_losses(tmp_path, name, judged):
    """Two runs of 200 steps give the same parameters.

    ibq moves latents to the borders between codes, where the gradient of its entropy penalty is steep. Here it has one
    latent per image, and codes of four dimensions; with 32 dimensions, its two runs diverge after about 130 steps.
    """
    adversary, batch, changes = ADVERSARY, flat, QUANTIZERS[name]
    if name == "ibq":
        adversary = dataclasses.replace(adversary, layers=1)  # two would need images of 12 pixels
        batch, changes = functools.partial(flat, side=8), changes | dict(code_dim=4)
    made = task(adversary if judged else None, batch, **changes)
    expected, params = train(tmp_path / "one", made, dict(data=1), 200)
    losses, found = train(tmp_path / "eight", made, dict(data=2, fsdp=4), 200)
    assert np.mean(expected[-16:]) < 0.98 * np.mean(expected[:16])
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    # The largest difference, relative to a parameter's change in one step.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=0.2 * GENTLE.learning_rate), found, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fsq", marks=pytest.mark.exact),
        pytest.param("rq_ema", marks=pytest.mark.exact),
        pytest.param("vq", marks=pytest.mark.exact_later),
    ],
)
def test_killed_and_resumed_bit_for_bit(tmp_path, name):
    """This includes the discriminator, its optimizer, the averages, and the statistics of the codebook."""

    class Killed(Exception):
        pass

    def mortal(step: int, *part: int) -> dict[str, np.ndarray]:
        if step == 7:
            raise Killed
        return images(step, *part)

    made = task(ADVERSARY, **QUANTIZERS[name])
    options = dict(steps=9, log_every=1, validate_every=0, checkpoint_every=3)
    tiny.run(tmp_path / "whole", task=made, **options)
    with pytest.raises(Killed):
        tiny.run(tmp_path / "torn", task=dataclasses.replace(made, batch=mortal), **options)
    assert Checkpoints(tmp_path / "torn/checkpoints", readonly=True).latest() == 6
    tiny.run(tmp_path / "torn", task=made, **options)
    whole, torn = (
        Checkpoints(tmp_path / run / "checkpoints", readonly=True).restore(9, params=None, optimizer=None)
        for run in ("whole", "torn")
    )
    assert {"average", "lecam", "steps"} <= set(whole["optimizer"]["model_state"])
    jax.tree.map(np.testing.assert_array_equal, torn, whole)
    rows = [
        [{k: v for k, v in row.items() if "second" not in k and "goodput" not in k} for row in read_metrics(path)]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "torn/metrics.jsonl")
    ]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_huge_learning_rate_ends_in_a_message_and_a_good_checkpoint(tmp_path):
    """The first steps, with warm-up, are good; then training diverges, with or without a NaN."""
    rates = OptimizerConfig(learning_rate=30.0, warmup_steps=2000, clip_norm=0.0)
    with pytest.raises((Diverged, NonFinite), match="is the last good checkpoint.*learning rate"):
        tiny.run(tmp_path, task=task(quantizer="vq"), steps=2100, optimizer=rates, log_every=50, checkpoint_every=5)
    checkpoints = Checkpoints(tmp_path / "checkpoints", readonly=True)
    stored = checkpoints.restore(checkpoints.latest(), params=None)["params"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stored))


def test_images_of_one_colour_are_called_a_collapse(tmp_path):
    lines: list[str] = []

    def grey(step: int, *part: int) -> dict[str, np.ndarray]:
        return {"pixels": np.full_like(images(step, *part)["pixels"], 77)}

    tiny.run(tmp_path, task=task(batch=grey, levels=(8, 5, 5, 5)), steps=4, log_every=1, logger=lines.append)
    (told,) = (line for line in lines if "few codes" in line)  # once, not at each of the four log lines
    assert "of 1000 codes are used" in told and "one colour" in told


def test_healthy_codebooks_are_not_called_collapsed():
    assert not collapse(usage(np.ones(1000)), 1000)
    assert not collapse(usage(np.r_[np.ones(300), np.zeros(64000 - 300)]), 64000)
    assert not collapse(usage(np.r_[np.full(15, 5), np.zeros(2545)]), 2560)  # 75 counted codes cannot show more
    told = collapse(usage(np.r_[np.full(2, 500), np.zeros(998)]), 1000, "vq")
    assert "2 of 1000 codes" in told and "quantizer=fsq" in told
    told = collapse(usage(np.r_[np.full(2, 500), np.zeros(998)]), 1000, "fsq")
    assert "few codes: 2 of 1000" in told and "collapsed" not in told and "quantizer=fsq" not in told


def test_one_image_of_the_smallest_size_trains(tmp_path):
    """Batch 1 with one code: statistics of one number have no spread to divide by."""

    def smallest(step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
        return {"pixels": images(step)["pixels"][:1, :8, :8]}

    adversary = AdversaryConfig(kind="patch", width=4, layers=1, start=0, warmup=0, ramp=1)
    losses, _ = train(tmp_path / "vq", task(adversary, smallest, **QUANTIZERS["vq"]), dict(data=1), 4)
    assert np.isfinite(losses).all()
    small = AdversaryConfig(kind="patch", width=4, layers=3, start=0, warmup=0)
    with pytest.raises(ValueError, match="at least 24 pixels a side, got 8 x 8"):
        train(tmp_path / "small", task(small, smallest), dict(data=1), 4)


def test_a_validation_reads_as_many_images_at_a_time_as_a_step(tmp_path, monkeypatch):
    """Its numbers are those of the whole batch, up to rounding."""
    made, mesh, seen = task(quantizer="vq", codes=16), make_mesh({}, jax.devices()[:1]), []
    losses = Objective.losses

    def noted(self: Objective, params: Any, state: Any, pixels: jax.Array, keys: jax.Array | None) -> Any:
        if keys is None:
            seen.append(len(pixels))
        return losses(self, params, state, pixels, keys)

    monkeypatch.setattr(Objective, "losses", noted)
    settings = TrainingConfig(steps=1, optimizer=OptimizerConfig(warmup_steps=0), accumulation=4, validate_every=1)
    params = loop.fit(made, settings, tmp_path, mesh=mesh)
    assert set(seen) == {2}, "a batch has 8 images"
    (row,) = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "validation/psnr" in row]
    whole = loop.held_out_scores(made, params, mesh)
    assert seen[-1] == 8
    for name in ("loss", "psnr", "l1", "codes/usage", "codes/perplexity", "codes/counted"):
        assert row[f"validation/{name}"] == pytest.approx(whole[name], rel=1e-5), name
