"""ResNet-50, in torchvision's layout. MAGVIT and MaskBit compare its logits.

Axes: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ar_tokenizers.image.weights import Params, Shapes, conv, conv_params, conv_shapes, max_pool

_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks and features of each stage


def _convs() -> dict[str, tuple[str, int, int, int]]:
    """Name of each convolution -> (name of its batch norm, features in, features out, side of the kernel)."""
    convs = {"conv1": ("bn1", 3, 64, 7)}
    fan_in = 64
    for stage, (blocks, width) in enumerate(_STAGES, 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            convs[f"{at}.conv1"] = (f"{at}.bn1", fan_in, width, 1)
            convs[f"{at}.conv2"] = (f"{at}.bn2", width, width, 3)
            convs[f"{at}.conv3"] = (f"{at}.bn3", width, 4 * width, 1)
            if block == 0:
                convs[f"{at}.downsample.0"] = (f"{at}.downsample.1", fan_in, 4 * width, 1)
            fan_in = 4 * width
    return convs


def _shapes() -> Shapes:
    shapes: Shapes = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    for name, (norm, fan_in, fan_out, side) in _convs().items():
        shapes |= conv_shapes(name, fan_in, fan_out, (side, side), norm)
    return shapes


SHAPES = _shapes()  # the arrays of torchvision's resnet50


def arrange(arrays: Mapping[str, np.ndarray]) -> Params:
    """Converts the arrays of SHAPES, as they are in a file, to the parameters of `logits`."""
    convs = {name: conv_params(arrays, name, norm) for name, (norm, *_) in _convs().items()}
    return convs | {"fc": {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}}


def logits(params: Params, pixels: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """float32 [B, H, W, 3] in [-1, 1] -> the 1000 logits of torchvision's ResNet-50, float32 [B, 1000].

    The mean squared difference of logits is the perceptual loss of MAGVIT (arXiv:2212.05199) and MaskBit
    (arXiv:2409.16211). Images are prepared as in MaskBit: resized to 224 x 224 pixels, bilinear and antialiased, and
    normalised with ImageNet's mean and deviation. The stride of a bottleneck block is in its 3 x 3 convolution, as in
    torchvision.
    """
    mean, deviation = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
    x = pixels.astype(jnp.float32) * 0.5 + 0.5
    x = jax.image.resize(x, (len(x), 224, 224, 3), "bilinear", precision=jax.lax.Precision.HIGHEST)
    x = jax.nn.relu(conv(params["conv1"], ((x - mean) / deviation).astype(dtype), 2, 3))
    x = max_pool(x, 3, 2, 1)
    for stage, (blocks, _) in enumerate(_STAGES, 1):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = jax.nn.relu(conv(params[f"{at}.conv1"], x))
            y = conv(params[f"{at}.conv3"], jax.nn.relu(conv(params[f"{at}.conv2"], y, stride, 1)))
            x = conv(params[f"{at}.downsample.0"], x, stride, 0) if block == 0 else x
            x = jax.nn.relu(x + y)
    pooled = x.astype(jnp.float32).mean((1, 2))
    return jnp.dot(pooled, params["fc"]["kernel"], precision="highest") + params["fc"]["bias"]
