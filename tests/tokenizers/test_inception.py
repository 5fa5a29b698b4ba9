"""FID: the features equal those of pytorch-fid's network, and the distance is Frechet's."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.linalg
from ar_tokenizers.image import convert_perceptual, inception
from ar_tokenizers.image.weights import read_weights


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(seed)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) > 1:
            return noise.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        positive = name.endswith(("running_var", "bn.weight"))
        return noise.uniform(0.7, 1.3, shape) if positive else noise.normal(0, 0.1, shape)

    return {name: one(name, shape).astype(np.float32) for name, shape in inception.SHAPES.items()}


# ---- the network ------------------------------------------------------------------------------------------------


def torch_pool3(state, pixels):
    """pytorch-fid's forward pass in evaluation mode, in float64, written out."""
    import torch
    from torch.nn import functional

    def unit(x, name, **options):
        x = functional.conv2d(x, state[f"{name}.conv.weight"].double(), **options)
        mean, var, weight, bias = (
            state[f"{name}.bn.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu(functional.batch_norm(x, mean, var, weight, bias, eps=0.001))

    def average(x):
        return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def a(x, at):
        b5 = unit(unit(x, f"{at}.branch5x5_1"), f"{at}.branch5x5_2", padding=2)
        b3 = unit(unit(x, f"{at}.branch3x3dbl_1"), f"{at}.branch3x3dbl_2", padding=1)
        b3 = unit(b3, f"{at}.branch3x3dbl_3", padding=1)
        return torch.cat([unit(x, f"{at}.branch1x1"), b5, b3, unit(average(x), f"{at}.branch_pool")], 1)

    def b(x, at):
        dbl = unit(unit(x, f"{at}.branch3x3dbl_1"), f"{at}.branch3x3dbl_2", padding=1)
        dbl = unit(dbl, f"{at}.branch3x3dbl_3", stride=2)
        return torch.cat([unit(x, f"{at}.branch3x3", stride=2), dbl, functional.max_pool2d(x, 3, 2)], 1)

    def c(x, at):
        b7 = unit(unit(x, f"{at}.branch7x7_1"), f"{at}.branch7x7_2", padding=(0, 3))
        b7 = unit(b7, f"{at}.branch7x7_3", padding=(3, 0))
        dbl = unit(unit(x, f"{at}.branch7x7dbl_1"), f"{at}.branch7x7dbl_2", padding=(3, 0))
        dbl = unit(unit(dbl, f"{at}.branch7x7dbl_3", padding=(0, 3)), f"{at}.branch7x7dbl_4", padding=(3, 0))
        dbl = unit(dbl, f"{at}.branch7x7dbl_5", padding=(0, 3))
        return torch.cat([unit(x, f"{at}.branch1x1"), b7, dbl, unit(average(x), f"{at}.branch_pool")], 1)

    def d(x, at):
        b3 = unit(unit(x, f"{at}.branch3x3_1"), f"{at}.branch3x3_2", stride=2)
        b7 = unit(unit(x, f"{at}.branch7x7x3_1"), f"{at}.branch7x7x3_2", padding=(0, 3))
        b7 = unit(unit(b7, f"{at}.branch7x7x3_3", padding=(3, 0)), f"{at}.branch7x7x3_4", stride=2)
        return torch.cat([b3, b7, functional.max_pool2d(x, 3, 2)], 1)

    def e(x, at, pool):
        b3 = unit(x, f"{at}.branch3x3_1")
        b3 = [unit(b3, f"{at}.branch3x3_2a", padding=(0, 1)), unit(b3, f"{at}.branch3x3_2b", padding=(1, 0))]
        dbl = unit(unit(x, f"{at}.branch3x3dbl_1"), f"{at}.branch3x3dbl_2", padding=1)
        dbl = [unit(dbl, f"{at}.branch3x3dbl_3a", padding=(0, 1)), unit(dbl, f"{at}.branch3x3dbl_3b", padding=(1, 0))]
        return torch.cat([unit(x, f"{at}.branch1x1"), *b3, *dbl, unit(pool(x), f"{at}.branch_pool")], 1)

    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).double() / 255
    x = 2 * functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
    x = unit(unit(unit(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
    x = unit(unit(functional.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = functional.max_pool2d(x, 3, 2)
    x = b(a(a(a(x, "Mixed_5b"), "Mixed_5c"), "Mixed_5d"), "Mixed_6a")
    x = d(c(c(c(c(x, "Mixed_6b"), "Mixed_6c"), "Mixed_6d"), "Mixed_6e"), "Mixed_7a")
    x = e(e(x, "Mixed_7b", average), "Mixed_7c", lambda x: functional.max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3)).numpy()


@pytest.mark.interop
@pytest.mark.slow
def test_pool3_is_pytorch_fids(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[interop]'")
    state = {name: torch.from_numpy(array) for name, array in random_weights().items()}
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0), "fc.weight": torch.zeros(1008, 2048)}
    torch.save(state | counters, tmp_path / "inception.pth")
    output = tmp_path / "inception.safetensors"
    convert_perceptual.main(["--inception", str(tmp_path / "inception.pth"), "--output", str(output)])
    params = inception.arrange(read_weights(output, inception.SHAPES)[0])
    noise = np.random.default_rng(1)
    for shape in ((2, 64, 48, 3), (1, 310, 400, 3)):  # enlarged and reduced
        pixels = noise.integers(0, 256, shape, np.uint8)
        found, expected = jax.jit(inception.pool3)(params, pixels), torch_pool3(state, pixels)
        assert found.shape == (len(pixels), 2048) and np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_network_has_the_size_of_the_published_one():
    learned = {name: shape for name, shape in inception.SHAPES.items() if "running" not in name}
    assert sum(np.prod(shape) for shape in learned.values()) == 21_785_568  # InceptionV3 without its classifier
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\], got float32 \[1, 8, 8, 3\]"):
        inception.pool3({}, np.zeros((1, 8, 8, 3), np.float32))


# ---- the distance -----------------------------------------------------------------------------------------------


def gaussian(seed: int, features: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(images, features)) @ np.diag(np.linspace(0.1, 2, features)) + seed
    return x.mean(0), np.cov(x, rowvar=False)


def test_distance_of_gaussians_with_a_common_basis_is_that_of_their_deviations():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    a, b = np.linspace(0, 3, 16), np.linspace(2, 0.5, 16)
    cov = lambda deviation: (basis * deviation**2) @ basis.T  # noqa: E731
    found = inception.frechet_distance(np.zeros(16), cov(a), np.full(16, 0.5), cov(b))
    np.testing.assert_allclose(found, 16 * 0.25 + np.square(a - b).sum(), rtol=1e-7)


def test_distance_is_symmetric_and_zero_for_equals_also_with_few_images():
    few, many = gaussian(0, 32, 8), gaussian(1, 32, 500)  # the first covariance has rank 7
    there, back = inception.frechet_distance(*few, *many), inception.frechet_distance(*many, *few)
    np.testing.assert_allclose(there, back, rtol=1e-6)
    for each in (few, many):
        np.testing.assert_allclose(inception.frechet_distance(*each, *each), 0, atol=1e-6 * np.trace(each[1]))


def test_distance_is_that_of_the_matrix_root():
    (m1, c1), (m2, c2) = gaussian(0, 24, 300), gaussian(3, 24, 300)
    expected = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    np.testing.assert_allclose(inception.frechet_distance(m1, c1, m2, c2), expected, rtol=1e-9)


def test_distance_refuses_what_has_none():
    mean, cov = gaussian(0, 4, 20)
    with pytest.raises(ValueError, match=r"with the same F, got \[\[4\], \[4, 4\], \[4\], \[3, 3\]\]"):
        inception.frechet_distance(mean, cov, mean, cov[:3, :3])
    with pytest.raises(ValueError, match="not finite"):
        inception.frechet_distance(mean, cov, mean, cov * np.nan)
