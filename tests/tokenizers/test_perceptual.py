"""Perceptual distances equal those of the packages with the same names; other files are refused."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ar_tokenizers.image import convert_perceptual, lpips, resnet
from ar_tokenizers.image.perceptual import Perceptual, ms_ssim
from safetensors.numpy import save_file


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    smooth = np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)
    for axis in (1, 2):
        smooth = np.sum([np.roll(smooth, k, axis) for k in range(3)], axis=0) / 2
    return smooth.clip(-1, 1)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a size that keeps activations alive. Heads and variances are positive, like trained ones."""
    noise = np.random.default_rng(seed)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("running_var") or name.startswith("lin") or (len(shape) == 1 and name.endswith("weight")):
            return noise.uniform(0.5, 1.5, shape)
        if len(shape) == 1:
            return noise.normal(0, 0.1, shape)
        return noise.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)

    return {name: one(name, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def lpips_arrays():
    return random_weights(lpips.SHAPES)


@pytest.fixture(scope="module")
def lpips_file(lpips_arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(lpips_arrays, path)
    return path


# ---- MS-SSIM ----------------------------------------------------------------------------------------------------


def test_ms_ssim_is_one_for_equal_images_and_falls_with_the_error():
    x = random_images(2, 48, 64)
    noise = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    similarity = jax.jit(ms_ssim)
    np.testing.assert_allclose(similarity(x, x), 1, atol=1e-5)
    values = np.stack([similarity(x, x + scale * noise) for scale in (0.05, 0.2, 0.8)])
    assert (np.diff(values, axis=0) < -0.01).all() and (values > 0).all()
    np.testing.assert_allclose(similarity(x, x + 0.2 * noise), similarity(x + 0.2 * noise, x), rtol=1e-5)


def similarity(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the windows of one image, by colour: contrast times structure, and SSIM."""
    window = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(window, window)[..., None] / window.sum() ** 2
    mean = lambda x: (window * x).sum((0, 1))  # noqa: E731
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = mean(x), mean(y)
            contrast = (2 * mean((x - mx) * (y - my)) + 9e-4) / (mean((x - mx) ** 2) + mean((y - my) ** 2) + 9e-4)
            values.append((contrast, contrast * (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)))
    contrast, ssim = np.mean(values, 0)
    return contrast, ssim


def test_ms_ssim_is_by_its_definition():
    a = random_images(1, 24, 22)
    b = a + np.random.default_rng(1).normal(0, 0.3, a.shape).astype(np.float32)
    x, y = ((p[0].astype(np.float64) + 1) / 2 for p in (a, b))
    np.testing.assert_allclose(ms_ssim(a[:, :21], b[:, :21])[0], similarity(x[:21], y[:21])[1].mean(), rtol=1e-4)
    halves = [p.reshape(12, 2, 11, 2, 3).mean((1, 3)) for p in (x, y)]
    w1, w2 = np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)  # two scales fit, of the published five
    expected = similarity(x, y)[0] ** w1 * similarity(*halves)[1] ** w2
    np.testing.assert_allclose(ms_ssim(a, b)[0], expected.mean(), rtol=1e-4)


def test_ms_ssim_teaches_from_the_first_step_and_refuses_what_is_too_small():
    perceptual = Perceptual.load("ms_ssim")
    x = random_images(2, 24, 32)
    for start in (np.zeros_like(x), -x):  # a flat reconstruction, and an inverted one
        slope = jax.jit(jax.grad(lambda y: perceptual.distance(jnp.asarray(x), y).sum()))(jnp.asarray(start))
        assert np.isfinite(slope).all()
        assert start.any() or float(jnp.vdot(slope, x)) < 0  # the gradient leads towards the image
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 32"):
        ms_ssim(x[:, :10], x[:, :10])


# ---- without weights --------------------------------------------------------------------------------------------


def test_feature_matching_weighs_layers_alike_and_images_apart():
    match = Perceptual.load("match")
    a = [jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 2, 2, 16), jnp.bfloat16)]
    b = [a[0].at[0].set(1.0), a[1].at[1].set(-3.0)]
    x = jnp.zeros((2, 32, 32, 3))
    np.testing.assert_allclose(match.distance(x, x, a, b), [0.5, 1.5])
    with pytest.raises(ValueError, match="got 0 and 0 layers"):
        match.distance(x, x)
    np.testing.assert_array_equal(Perceptual.load("none").distance(x, x), [0, 0])


# ---- pretrained networks ----------------------------------------------------------------------------------------


def torch_of(pixels: np.ndarray):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[interop]'")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).double()


def torch_lpips(arrays, a, b):
    """The lpips package's arithmetic, in float64."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[interop]'")
    weights = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[None, :, None, None]
    xs, total, index = [(x - shift) / scale for x in (torch_of(a), torch_of(b))], torch.zeros(1, 1), 0
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        if stage:
            xs, index = [torch.nn.functional.max_pool2d(x, 2) for x in xs], index + 1
        for _ in range(count):
            kernel, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
            xs, index = [torch.relu(torch.nn.functional.conv2d(x, kernel, bias, padding=1)) for x in xs], index + 2
        units = [x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + 1e-10) for x in xs]
        total = total + torch.nn.functional.conv2d(
            (units[0] - units[1]) ** 2, weights[f"lin{stage}.model.1.weight"]
        ).mean((2, 3))
    return total[:, 0].numpy()


@pytest.mark.interop
def test_lpips_is_the_packages(lpips_arrays, lpips_file):
    perceptual, a, b = Perceptual.load("lpips", lpips_file), random_images(2, 16, 33), random_images(2, 16, 33, seed=1)
    found = jax.jit(lambda p, a, b: p.distance(a, b))(perceptual, a, b)
    np.testing.assert_allclose(found, torch_lpips(lpips_arrays, a, b), rtol=1e-5)


def test_weights_are_arguments_and_features_that_vanish_have_a_gradient(lpips_file):
    perceptual = Perceptual.load("lpips", lpips_file, "bfloat16")
    assert perceptual.hash == hashlib.sha256(lpips_file.read_bytes()).hexdigest()
    assert perceptual.name == f"LPIPS-VGG16 ({perceptual.hash[:12]})"
    white = jnp.ones((1, 16, 16, 3))
    lowered = jax.jit(lambda p, a, b: p.distance(a, b)).lower(perceptual, white, white).as_text()
    assert len(lowered) < 1_000_000  # the 59 MB of weights are not constants of the program
    faint = jnp.array([0.0, 1e-30])  # their squares are 0
    assert np.isfinite(jax.jacobian(lpips._unit)(faint)).all()
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 15 x 16"):
        perceptual.distance(white[:, :15], white[:, :15])


def torch_resnet(arrays, x):
    """torchvision's resnet50 in evaluation mode, after MaskBit's preparation, in float64."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[interop]'")
    functional = torch.nn.functional
    w = {name: torch.from_numpy(array).double() for name, array in arrays.items()}

    def conv(x, name, norm, stride=1, padding=0):
        x = functional.conv2d(x, w[f"{name}.weight"], stride=stride, padding=padding)
        statistics = w[f"{norm}.running_mean"], w[f"{norm}.running_var"]
        return functional.batch_norm(x, *statistics, w[f"{norm}.weight"], w[f"{norm}.bias"], eps=1e-5)

    x = functional.interpolate(torch_of(x) / 2 + 0.5, size=(224, 224), mode="bilinear", antialias=True)
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    x = (x - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    x = functional.max_pool2d(torch.relu(conv(x, "conv1", "bn1", 2, 3)), 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = torch.relu(conv(x, f"{at}.conv1", f"{at}.bn1"))
            y = torch.relu(conv(y, f"{at}.conv2", f"{at}.bn2", stride, 1))
            y = conv(y, f"{at}.conv3", f"{at}.bn3")
            if block == 0:
                x = conv(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x = torch.relu(x + y)
    return functional.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"]).numpy()


@pytest.mark.interop
@pytest.mark.slow
def test_resnet_logits_are_torchvisions(tmp_path):
    arrays = random_weights(resnet.SHAPES)
    for name in arrays:  # residual branches add little, as in a trained network, or activations explode
        if name.endswith("bn3.weight"):
            arrays[name] *= 0.3
    path = tmp_path / "resnet50.npz"
    np.savez(path, **arrays)
    perceptual, a, b = Perceptual.load("features", path), random_images(1, 40, 64), random_images(1, 300, 300)
    for x in (a, b):  # enlarged and reduced
        found, expected = jax.jit(resnet.logits)(perceptual.params, x), torch_resnet(arrays, x)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    other = random_images(1, 40, 64, seed=1)
    expected = np.square(torch_resnet(arrays, a) - torch_resnet(arrays, other)).mean(1)
    np.testing.assert_allclose(perceptual.distance(a, other), expected, rtol=1e-3)


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.interop
def test_torchs_files_become_ours(lpips_arrays, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[interop]'")
    state = {name: torch.from_numpy(array) for name, array in lpips_arrays.items()}
    vgg = {name: value for name, value in state.items() if not name.startswith("lin")}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(4, 4)}, tmp_path / "vgg16.pth")
    torch.save({name: value for name, value in state.items() if name.startswith("lin")}, tmp_path / "heads.pth")
    output = tmp_path / "lpips.safetensors"
    given = ["--vgg", str(tmp_path / "vgg16.pth"), "--lpips", str(tmp_path / "heads.pth"), "--output", str(output)]
    convert_perceptual.main(given)
    perceptual = Perceptual.load("lpips", output)
    assert perceptual.hash in capsys.readouterr().out
    np.testing.assert_array_equal(perceptual.params["lin2"], lpips_arrays["lin2.model.1.weight"].ravel())
    kernel = lpips_arrays["features.5.weight"]
    np.testing.assert_array_equal(perceptual.params["features.5"]["kernel"][1, 2, 3, 4], kernel[4, 3, 1, 2])

    output.unlink()
    torch.save({"model": vgg}, tmp_path / "vgg16.pth")
    with pytest.raises(SystemExit, match="not a state dict"):
        convert_perceptual.main(given)
    with pytest.raises(SystemExit):
        convert_perceptual.main(given[2:])
    assert "--vgg with --lpips" in capsys.readouterr().err and not output.exists()


def test_wrong_files_are_refused_by_name(lpips_arrays, lpips_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        Perceptual.load("lpips", tmp_path / "none.safetensors")
    (tmp_path / "vgg16.pth").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="vgg16.pth .*convert_perceptual converts .pth"):
        Perceptual.load("lpips", tmp_path / "vgg16.pth")
    (tmp_path / "cut.safetensors").write_bytes(lpips_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.safetensors cannot be read"):
        Perceptual.load("lpips", tmp_path / "cut.safetensors")
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Perceptual.load("lpips", tmp_path / "pickled.npz")
    wrong = dict(lpips_arrays)
    wrong["surplus"] = wrong.pop("lin3.model.1.weight")
    wrong["features.0.bias"] = np.zeros(3, np.float32)
    np.savez(tmp_path / "wrong.npz", **wrong)
    with pytest.raises(ValueError) as caught:
        Perceptual.load("lpips", tmp_path / "wrong.npz")
    for part in ("1 missing, such as lin3.model.1.weight", "surplus", r"features.0.bias is (3,), not (64,)"):
        assert part in str(caught.value)
    for kind, path, message in (
        ("lpips", "", "needs a weight file"),
        ("ms_ssim", lpips_file, "has no weights"),
        ("vgg", "", "perceptual distance: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Perceptual.load(kind, path)
