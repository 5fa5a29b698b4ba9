"""Tokenizers of taming's family that no installable package computes, transcribed to numpy and float64.

They are written from their description and from reading showlab/Show-o (models/modeling_magvitv2.py), baaivision/Emu3.5
(src/vision_tokenizer), deepseek-ai/Janus (janus/models/vq_model.py) and LargeWorldModel/LWM (lwm/vqgan.py). They share
no code with ours: pictures are [B, F, H, W], and names are the published ones. `Weights` draws an array when a network
first uses it, so the networks also define the names and shapes in a file.
"""

from __future__ import annotations

import numpy as np

from tests.tokenizers.movq_transcription import Weights as Weights
from tests.tokenizers.movq_transcription import attention, conv, group_norm, residual, silu


def halved(weights, name, x):
    return conv(weights, name, x, x.shape[1], (3, 3), (2, 2), [(0, 1), (0, 1)])


def doubled(weights, name, x):
    return conv(weights, name, x.repeat(2, axis=2).repeat(2, axis=3), x.shape[1], (3, 3))


def ending(weights, at, x, out):
    return conv(weights, f"{at}.conv_out", silu(group_norm(weights, f"{at}.norm_out", x)), out, (3, 3))


def stack(weights, at, names, x, width, blocks, attended):
    """The residual blocks of a level. A file calls them `names`, and the attention after each of them "attn"."""
    for block in range(blocks):
        x = residual(weights, f"{at}.{names}.{block}", x, width)
        if attended:
            x = attention(weights, f"{at}.attn.{block}", x)
    return x


def middle(weights, names, x):
    first, between, last = names
    x = attention(weights, between, residual(weights, first, x, x.shape[1]))
    return residual(weights, last, x, x.shape[1])


def in_middle(at):
    return f"{at}.mid.block_1", f"{at}.mid.attn_1", f"{at}.mid.block_2"


# ---- Show-o and Emu3.5's IBQ -------------------------------------------------------------------------------------


def taming_encoder(weights, x, *, ch, ch_mult, blocks, attended, z):
    """[B, 3, H, W] -> [B, z, h, w]. blocks: per level. attended: levels that have attention."""
    x = conv(weights, "encoder.conv_in", x, ch, (3, 3))
    for level, multiplier in enumerate(ch_mult):
        at = f"encoder.down.{level}"
        x = stack(weights, at, "block", x, ch * multiplier, blocks[level], level in attended)
        if level + 1 < len(ch_mult):
            x = halved(weights, f"{at}.downsample.conv", x)
    return ending(weights, "encoder", middle(weights, in_middle("encoder"), x), z)


def taming_decoder(weights, z, *, ch, ch_mult, blocks, attended):
    """[B, z, h, w] -> [B, 3, H, W]. blocks: the number per level, without an additional one."""
    x = conv(weights, "decoder.conv_in", z, ch * ch_mult[-1], (3, 3))
    x = middle(weights, in_middle("decoder"), x)
    for level in reversed(range(len(ch_mult))):
        at = f"decoder.up.{level}"
        x = stack(weights, at, "block", x, ch * ch_mult[level], blocks[level], level in attended)
        if level:
            x = doubled(weights, f"{at}.upsample.conv", x)
    return ending(weights, "decoder", x, 3)


def showo_latents(weights, x, *, ch, ch_mult, blocks, bits):
    x = taming_encoder(weights, x, ch=ch, ch_mult=ch_mult, blocks=blocks, attended=(), z=bits)
    return conv(weights, "encoder.quant_conv", x, bits, (1, 1))


def showo_codes(z):
    """[B, bits, h, w] -> [B, h, w]: the first number is the highest digit."""
    power = 2 ** np.arange(z.shape[1])[::-1]
    return ((z > 0) * power[:, None, None]).sum(1)


def showo_pixels(weights, codes, *, ch, ch_mult, blocks, bits):
    table = np.array([[1.0 if digit == "1" else -1.0 for digit in f"{code:0{bits}b}"] for code in range(2**bits)])
    z = table[codes].transpose(0, 3, 1, 2)
    z = conv(weights, "decoder.post_quant_conv", z, bits, (1, 1))
    weights["quantize.embedding"] = table.astype(np.float32)
    weights["quantize.power_vals"] = np.array([2**digit for digit in reversed(range(bits))], np.int64)
    return taming_decoder(weights, z, ch=ch, ch_mult=ch_mult, blocks=blocks, attended=())


def ibq_latents(weights, x, *, ch, ch_mult, blocks, attended, z, dim):
    x = taming_encoder(weights, x, ch=ch, ch_mult=ch_mult, blocks=blocks, attended=attended, z=z)
    return conv(weights, "quant_conv", x, dim, (1, 1))


def ibq_pixels(weights, codes, *, ch, ch_mult, blocks, attended, z):
    found = weights["quantize.embedding.weight"].astype(np.float64)[codes].transpose(0, 3, 1, 2)
    return taming_decoder(weights, conv(weights, "post_quant_conv", found, z, (1, 1)), ch=ch, ch_mult=ch_mult,
                          blocks=[count + 1 for count in blocks], attended=attended)  # fmt: skip


# ---- Janus -------------------------------------------------------------------------------------------------------


def janus_latents(weights, x, *, ch, ch_mult, blocks, z, dim):
    x = conv(weights, "encoder.conv_in", x, ch, (3, 3))
    for level, multiplier in enumerate(ch_mult):
        at, last = f"encoder.conv_blocks.{level}", level + 1 == len(ch_mult)
        x = stack(weights, at, "res", x, ch * multiplier, blocks, last)
        x = x if last else halved(weights, f"{at}.downsample.conv", x)
    x = middle(weights, [f"encoder.mid.{index}" for index in range(3)], x)
    return conv(weights, "quant_conv", ending(weights, "encoder", x, z), dim, (1, 1))


def janus_pixels(weights, codes, *, ch, ch_mult, blocks, z):
    table = weights["quantize.embedding.weight"].astype(np.float64)
    found = (table / np.linalg.norm(table, axis=1, keepdims=True))[codes].transpose(0, 3, 1, 2)
    x = conv(weights, "post_quant_conv", found, z, (1, 1))
    x = conv(weights, "decoder.conv_in", x, ch * ch_mult[-1], (3, 3))
    x = middle(weights, [f"decoder.mid.{index}" for index in range(3)], x)
    for index, multiplier in enumerate(reversed(ch_mult)):  # in the order of the file: the coarsest first
        at, last = f"decoder.conv_blocks.{index}", index + 1 == len(ch_mult)
        x = stack(weights, at, "res", x, ch * multiplier, blocks + 1, index == 0)
        x = x if last else doubled(weights, f"{at}.upsample.conv", x)
    weights["quantize.codebook_used"] = np.arange(65536).astype(np.float32)
    return ending(weights, "decoder", x, 3)


# ---- LWM ---------------------------------------------------------------------------------------------------------


class FlaxWeights(Weights):
    """Like Weights, for kernels with the output as last axis."""

    def of(self, name, *shape):
        if name not in self:
            mean, scale = float(name.endswith("scale")), 0.3 if len(shape) == 1 else np.prod(shape[:-1]) ** -0.5
            self[name] = self.draw.normal(mean, scale, shape).astype(np.float32)
        return super().of(name, *shape)


def lwm_conv(weights, name, x, out, side, stride=1, padding=None):
    """x [B, H, W, F] and a kernel [side, side, F, out]; "SAME" unless told."""
    kernel = weights.of(f"{name}/kernel", side, side, x.shape[-1], out)
    padding = padding or [(side // 2, side // 2)] * 2
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    h, w = ((size - side) // stride + 1 for size in x.shape[1:3])
    total = 0
    for i in range(side):
        for j in range(side):
            total = total + x[:, i : i + h * stride : stride, j : j + w * stride : stride][:, :h, :w] @ kernel[i, j]
    return total + weights.of(f"{name}/bias", out)


def lwm_norm(weights, name, x):
    b, h, w, f = x.shape
    grouped = x.reshape(b, h * w, 32, f // 32)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return y * weights.of(f"{name}/scale", f) + weights.of(f"{name}/bias", f)


def lwm_block(weights, name, x, out):
    y = lwm_conv(weights, f"{name}/Conv_0", silu(lwm_norm(weights, f"{name}/GroupNorm_0", x)), out, 3)
    y = lwm_conv(weights, f"{name}/Conv_1", silu(lwm_norm(weights, f"{name}/GroupNorm_1", y)), out, 3)
    return y + (x if x.shape[-1] == out else lwm_conv(weights, f"{name}/Conv_2", x, out, 1))


def lwm_middle(weights, name, x):
    for index in range(2):
        x = lwm_block(weights, f"{name}/MidBlock_0/ResnetBlock_{index}", x, x.shape[-1])
    return x


def lwm_latents(weights, x, *, ch, ch_mult, blocks, z, dim):
    """[B, H, W, 3] -> [B, h, w, dim]."""
    x = lwm_conv(weights, "encoder/Conv_0", x, ch, 3)
    for level, multiplier in enumerate(ch_mult):
        at = f"encoder/DownsamplingBlock_{level}"
        for block in range(blocks):
            x = lwm_block(weights, f"{at}/ResnetBlock_{block}", x, ch * multiplier)
        if level + 1 < len(ch_mult):
            x = lwm_conv(weights, f"{at}/Downsample_0/Conv_0", x, x.shape[-1], 3, 2, [(0, 1), (0, 1)])
    x = silu(lwm_norm(weights, "encoder/GroupNorm_0", lwm_middle(weights, "encoder", x)))
    return lwm_conv(weights, "quant_conv", lwm_conv(weights, "encoder/Conv_1", x, z, 3), dim, 1)


def lwm_pixels(weights, codes, *, ch, ch_mult, blocks, z):
    """-> [B, H, W, 3], before it is clipped."""
    found = weights["quantize/embeddings"].astype(np.float64)[codes]
    x = lwm_conv(weights, "post_quant_conv", found, z, 1)
    x = lwm_middle(weights, "decoder", lwm_conv(weights, "decoder/Conv_0", x, ch * ch_mult[-1], 3))
    for index, multiplier in enumerate(
        reversed(ch_mult)
    ):  # blocks are numbered in the order of their creation, coarse to fine
        at = f"decoder/UpsamplingBlock_{index}"
        for block in range(blocks + 1):
            x = lwm_block(weights, f"{at}/ResnetBlock_{block}", x, ch * multiplier)
        if index + 1 < len(ch_mult):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = lwm_conv(weights, f"{at}/Upsample_0/Conv_0", x, x.shape[-1], 3)
    x = silu(lwm_norm(weights, "decoder/GroupNorm_0", x))
    return lwm_conv(weights, "decoder/Conv_1", x, 3, 3)


# ---- codes -------------------------------------------------------------------------------------------------------


def nearest(table, latents, rule):
    """latents [..., C] -> codes [...], and the relative distance between the first and the second.

    rule: "euclidean", "cosine" or "dot".
    """
    table, x = table.astype(np.float64), latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    if rule == "cosine":
        table, x = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (table, x))
    far = -x @ table.T if rule == "dot" else ((x[:, None] - table) ** 2).sum(-1)
    first, second = np.sort(far, axis=1)[:, :2].T
    shape = latents.shape[:-1]
    return far.argmin(1).reshape(shape), ((second - first) / np.abs(first)).reshape(shape)
