"""MoVQGAN and Emu3's vision tokenizer transcribed to numpy and float64, in all dimensions.

Written from reading ai-forever/MoVQGAN (movq_modules.py, vqvae_blocks.py) and baaivision/Emu3
(modeling_emu3visionvq.py), because neither can be installed here. Tests compare ours with it. It shares no code with
ours: pictures are four frames [B, F, T, H, W], convolutions over time run over all of them, and names are the published
ones.

`Weights` draws an array when it is first used, so the networks below define the names and shapes in a file.
"""

from __future__ import annotations

import numpy as np

GROUPS = 32


class Weights(dict):
    """Published name -> float32 array (int64: a count), drawn so that activations keep their size."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)

    def of(self, name: str, *shape: int) -> np.ndarray:
        if name not in self:
            if name.endswith("num_batches_tracked"):
                self[name] = np.array(self.draw.integers(2**25, 2**40))
            elif name.endswith("running_var"):
                self[name] = self.draw.uniform(0.02, 2, shape).astype(np.float32)
            elif len(shape) == 1:
                mean = 1 if "norm" in name and name.endswith("weight") else 0
                self[name] = self.draw.normal(mean, 0.3, shape).astype(np.float32)
            else:
                self[name] = self.draw.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)
        assert self[name].shape == shape, name
        return self[name].astype(np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def conv(weights, name, x, out, window, stride=None, padding=None):
    """Convolves x [B, F, ...], with a window and a pair of paddings for each of the last axes -> [B, out, ...]."""
    axes = x.ndim - 2
    stride = stride or (1,) * axes
    padding = padding or [((side - 1) // 2, side // 2) for side in window]
    x = np.pad(x, [(0, 0), (0, 0), *padding])
    kernel = weights.of(f"{name}.weight", out, x.shape[1], *window)
    steps = [(size - side) // by + 1 for size, side, by in zip(x.shape[2:], window, stride, strict=True)]
    total: np.ndarray = np.zeros(())
    for offset in np.ndindex(*window):
        places = [
            slice(first, first + by * (count - 1) + 1, by)
            for first, by, count in zip(offset, stride, steps, strict=True)
        ]
        seen = x[(slice(None), slice(None), *places)]
        total = total + np.tensordot(kernel[(slice(None), slice(None), *offset)], seen, (1, 1))  # [out, B, ...]
    return np.moveaxis(total, 0, 1) + weights.of(f"{name}.bias", out).reshape(-1, *[1] * axes)


def group_norm(weights, name, x):
    b, f = x.shape[:2]
    grouped = x.reshape(b, GROUPS, -1)
    mean, variance = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return y * weights.of(f"{name}.weight", f)[:, None, None] + weights.of(f"{name}.bias", f)[:, None, None]


def norm(weights, name, x, zq):
    if zq is None:
        return group_norm(weights, name, x)
    times = x.shape[2] // zq.shape[2]
    zq = zq.repeat(times, axis=2).repeat(times, axis=3)
    y = group_norm(weights, f"{name}.norm_layer", x)
    gain, shift = (conv(weights, f"{name}.{part}", zq, x.shape[1], (1, 1)) for part in ("conv_y", "conv_b"))
    return y * gain + shift


def residual(weights, name, x, out, zq=None):
    y = conv(weights, f"{name}.conv1", silu(norm(weights, f"{name}.norm1", x, zq)), out, (3, 3))
    y = conv(weights, f"{name}.conv2", silu(norm(weights, f"{name}.norm2", y, zq)), out, (3, 3))
    return y + (x if x.shape[1] == out else conv(weights, f"{name}.nin_shortcut", x, out, (1, 1)))


def attention(weights, name, x, zq=None):
    b, f, h, w = x.shape
    y = norm(weights, f"{name}.norm", x, zq)
    q, k, v = (conv(weights, f"{name}.{part}", y, f, (1, 1)).reshape(b, f, h * w) for part in "qkv")
    scores = np.einsum("bfq,bfs->bqs", q, k) / np.sqrt(f)
    p = np.exp(scores - scores.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    return x + conv(weights, f"{name}.proj_out", np.einsum("bqs,bfs->bfq", p, v).reshape(x.shape), f, (1, 1))


def middle(weights, name, x, zq=None):
    x = residual(weights, f"{name}.block_1", x, x.shape[1], zq)
    return residual(weights, f"{name}.block_2", attention(weights, f"{name}.attn_1", x, zq), x.shape[1], zq)


def encoder(weights, x, *, ch, ch_mult, blocks, attended, z):
    """[B, 3, H, W] -> [B, z, h, w]; attended: the levels that have attention."""
    x = conv(weights, "encoder.conv_in", x, ch, (3, 3))
    for level, multiplier in enumerate(ch_mult):
        at = f"encoder.down.{level}"
        for block in range(blocks):
            x = residual(weights, f"{at}.block.{block}", x, ch * multiplier)
            if level in attended:
                x = attention(weights, f"{at}.attn.{block}", x)
        if level + 1 < len(ch_mult):
            x = conv(weights, f"{at}.downsample.conv", x, x.shape[1], (3, 3), (2, 2), [(0, 1), (0, 1)])
    x = silu(group_norm(weights, "encoder.norm_out", middle(weights, "encoder.mid", x)))
    return conv(weights, "encoder.conv_out", x, z, (3, 3))


def decoder(weights, z, zq, *, ch, ch_mult, blocks, attended):
    """[B, z, h, w] and the code vectors [B, C, h, w] -> [B, 3, H, W]."""
    x = conv(weights, "decoder.conv_in", z, ch * ch_mult[-1], (3, 3))
    x = middle(weights, "decoder.mid", x, zq)
    for level in reversed(range(len(ch_mult))):
        at = f"decoder.up.{level}"
        for block in range(blocks + 1):
            x = residual(weights, f"{at}.block.{block}", x, ch * ch_mult[level], zq)
            if level in attended:
                x = attention(weights, f"{at}.attn.{block}", x, zq)
        if level:
            x = conv(weights, f"{at}.upsample.conv", x.repeat(2, axis=2).repeat(2, axis=3), x.shape[1], (3, 3))
    return conv(weights, "decoder.conv_out", silu(norm(weights, "decoder.norm_out", x, zq)), 3, (3, 3))


# ---- in time ----------------------------------------------------------------------------------------------------


def causal(weights, name, x, out, window, stride=(1, 1, 1)):
    """Pads two zero frames before the first, and in space so that the size stays the same."""
    over = [side - by for side, by in zip(window, stride, strict=True)][1:]
    padding = [(2, 0), *[((more + 1) // 2, more // 2) for more in over]]
    return conv(weights, f"{name}.conv", x, out, window, stride, padding)


def batch_norm(weights, name, x):
    f = x.shape[1]
    parts = ("running_mean", "running_var", "weight", "bias")
    mean, variance, scale, shift = (weights.of(f"{name}.{part}", f).reshape(-1, 1, 1, 1) for part in parts)
    weights.of(f"{name}.num_batches_tracked")
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def stack_in_time(weights, name, x, blocks):
    for block in range(blocks):
        at, y = f"{name}.{block}", x
        for half in (1, 2):
            y = silu(batch_norm(weights, f"{at}.norm{half}", y))
            y = causal(weights, f"{at}.conv{half}", y, x.shape[1], (3, 3, 3))
        x = x + y
    return x


def frames(x, count):
    """[B x count, F, H, W] -> [B, F, count, H, W]."""
    return x.reshape(-1, count, *x.shape[1:]).transpose(0, 2, 1, 3, 4)


def flat(x):
    """The inverse of `frames`."""
    return x.transpose(0, 2, 1, 3, 4).reshape(-1, x.shape[1], *x.shape[3:])


# ---- both tokenizers --------------------------------------------------------------------------------------------


def latents(weights, pixels, *, dim, in_time, **shape):
    """pixels [B, 3, H, W] -> the latents for which codes are found, [B, h, w, dim]."""
    z, blocks = shape["z"], shape["blocks"]
    if not in_time:
        found = conv(weights, "quant_conv", encoder(weights, pixels, **shape), dim, (1, 1))
        return found.transpose(0, 2, 3, 1)
    x = frames(encoder(weights, pixels.repeat(4, axis=0), **shape), 4)
    for index in range(2):
        x = silu(causal(weights, f"encoder.time_conv.{index}.conv", x, z, (4, 3, 3), (2, 1, 1)))
    x = causal(weights, "quant_conv", stack_in_time(weights, "encoder.time_res_stack", x, blocks), dim, (3, 1, 1))
    assert x.shape[2] == 1
    return x[:, :, 0].transpose(0, 2, 3, 1)


def codes(table, found):
    """Latents [..., C], codes' vectors [K, C] -> the nearest codes [...], and their relative lead over the second
    nearest."""
    distances = np.square(found[..., None, :] - np.float64(table)).sum(-1)
    two = np.sort(distances, -1)[..., :2]
    return distances.argmin(-1), (two[..., 1] - two[..., 0]) / two[..., 1]


def pixels(weights, table, chosen, *, in_time, z, **shape):
    """Codes [B, h, w] -> [B, 3, H, W]."""
    zq = np.asarray(table, np.float64)[chosen].transpose(0, 3, 1, 2)
    if not in_time:
        return decoder(weights, conv(weights, "post_quant_conv", zq, z, (1, 1)), zq, **shape)
    zq = zq[:, :, None]
    x = np.concatenate([causal(weights, "post_quant_conv", zq, z, (3, 1, 1)), zq])
    x = stack_in_time(weights, "decoder.time_res_stack", x, shape["blocks"])
    for index in range(2):
        x = silu(causal(weights, f"decoder.time_conv.{index}.conv", x.repeat(2, axis=2), z, (3, 3, 3)))
    z_frames, zq_frames = np.split(x, 2)
    return frames(decoder(weights, flat(z_frames), flat(zq_frames), **shape), 4)[:, :, 0]
