"""Random weights for models of published shapes. Every tensor is drawn by its name, so their order does not matter.

Matrices have variance 1 / fan-in; embedding and head have three times that standard deviation (logits of std about 3).
Norm weights are 1 +- 0.3 and differ between heads, because equal rows would hide a wrong order of heads, and unit
weights would hide a missing norm.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Tensors = dict[str, np.ndarray]


def draw(name: str, shape: tuple[int, ...], seed: int = 0, *, centre: float = 1.0, spread: float = 3.0) -> np.ndarray:
    """A random float32 tensor for a published name, in torch's [out, in, ...] order.

    centre: the mean of norm weights; 0 for Gemma's, which multiply by 1 + w. spread: the std of embedding and head. If
    both are one table, it must be less than what layers add, or a model repeats its last id for ever.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    last, normed = name.split(".")[-1], "norm" in name.split(".")[-2] if "." in name else False
    if last == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if last in ("bias", "running_mean"):
        return rng.normal(0, 0.1, shape).astype(np.float32)
    if len(shape) == 1 or (normed and len(shape) == 2):
        return (centre + rng.uniform(-0.3, 0.3, shape)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    table = any(word in name for word in ("embed_tokens", "lm_head"))
    return rng.normal(0, (spread if table else 1) * fan_in**-0.5, shape).astype(np.float32)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer: D width, F width of the MLP, L layers, N query heads, K KV heads, H head width, V ids."""

    V: int
    D: int = 64
    F: int = 128
    L: int = 2
    N: int = 4
    K: int = 2
    H: int = 16


def transformer_shapes(
    sizes: Sizes, *, qk_norm: str = "", groups: tuple[int, int] = (0, 0), tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes under transformers' names.

    Args:
        qk_norm: "": none; "rms": weights [H] (Qwen3, Emu3.5); "layer": weights and biases [groups, H] (Chameleon).
        groups: the numbers of groups of the query's and of the key's weights, with "layer".
    """
    D, N, K, H = sizes.D, sizes.N, sizes.K, sizes.H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (sizes.V, D)
    for i in range(sizes.L):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (n * H, D) for name, n in (("q", N), ("k", K), ("v", K))}
        shapes[f"{at}self_attn.o_proj.weight"] = (D, N * H)
        shapes |= {f"{at}mlp.{name}_proj.weight": (sizes.F, D) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (D, sizes.F)
        for name, rows in zip("qk", groups, strict=True):
            if qk_norm == "rms":
                shapes[f"{at}self_attn.{name}_norm.weight"] = (H,)
            elif qk_norm == "layer":
                shapes |= {f"{at}self_attn.{name}_norm.{kind}": (rows, H) for kind in ("weight", "bias")}
    return shapes


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, *, centre: float = 1.0, spread: float = 3.0) -> Tensors:
    """Draws every tensor of `shapes` with `draw`."""
    return {name: draw(name, shape, seed, centre=centre, spread=spread) for name, shape in shapes.items()}


def taming_shapes(
    *,
    base: int = 32,
    multipliers: tuple[int, ...] = (1, 2),
    blocks: int = 1,
    z: int = 16,
    codes: int = 64,
    embed: int = 16,
) -> dict[str, tuple[int, ...]]:
    """Shapes of a VQGAN of taming-transformers like Meta's vqgan.ckpt: encoder, decoder, attention only in the
    middle."""
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (codes, embed)}

    def conv(name: str, out: int, of: int, side: int = 3) -> None:
        shapes.update({f"{name}.weight": (out, of, side, side), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{kind}": (width,) for kind in ("weight", "bias")})

    def residual(name: str, out: int, of: int) -> None:
        norm(f"{name}.norm1", of)
        conv(f"{name}.conv1", out, of)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if out != of:
            conv(f"{name}.nin_shortcut", out, of, 1)

    def middle(name: str, width: int) -> None:
        for i in (1, 2):
            residual(f"{name}.block_{i}", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)

    widths, last = [base * m for m in multipliers], len(multipliers) - 1
    conv("encoder.conv_in", base, 3)
    width = base
    for i, out in enumerate(widths):
        for j in range(blocks):
            residual(f"encoder.down.{i}.block.{j}", out, width)
            width = out
        if i != last:
            conv(f"encoder.down.{i}.downsample.conv", out, out)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", z, width)
    conv("quant_conv", embed, z, 1)
    conv("post_quant_conv", z, embed, 1)
    conv("decoder.conv_in", width, z)
    middle("decoder.mid", width)
    for i in reversed(range(len(widths))):
        for j in range(blocks + 1):
            residual(f"decoder.up.{i}.block.{j}", widths[i], width)
            width = widths[i]
        if i:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", 3, width)
    return shapes


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Converts weights [heads H, ...] or [heads, H] from transformers' RoPE, which rotates dimensions i and i + H/2
    together, to Meta's and LWM's, which rotates 2i and 2i + 1 together."""
    shape = rows.shape
    halves = rows.reshape(heads, 2, -1, *(() if shape[0] == heads else shape[1:]))
    return halves.swapaxes(1, 2).reshape(shape)


def shards(tensors: Iterable[tuple[str, np.ndarray]], axes: Mapping[str, int], count: int) -> list[Tensors]:
    """Divides tensors along the axis that `axes` gives for the end of their name. Other tensors are in every shard."""
    out: list[Tensors] = [{} for _ in range(count)]
    for name, tensor in tensors:
        cut = [axis for end, axis in axes.items() if name.endswith(end)]
        parts = np.split(tensor, count, axis=cut[0]) if cut else [tensor] * count
        for shard, part in zip(out, parts, strict=True):
            shard[name] = np.ascontiguousarray(part)
    return out
