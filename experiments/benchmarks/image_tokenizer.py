"""The vqgan backbone compared with Hugging Face's `ChameleonVQVAE` on torch: images of 256 pixels to codes, and back.

Both sides have the same random float32 weights: base 64, two blocks per level, attention in the middle, multipliers 1 2
2 4 (f8) or 1 1 2 2 4 (f16), 4,096 codes of 64 dimensions. `encode` includes the quantizer; both find the nearest code
by Euclidean distance. transformers has no decoder of this network, so taming-transformers' decoder is written in torch
below. Each side has its own process. Runs alternate after a warm-up, and the results are compared.

    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmarks/image_tokenizer.py --output FILE.json

The results, and what they taught: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.manifests import Json

SIDE, CODES, DIM = 256, 4096, 64
SHAPES = {"f8": "vqgan_f8_16m", "f16": "vqgan_f16_16m"}


def inputs(shape: str, task: str, batch: int) -> np.ndarray:
    """Images float32 [B, 256, 256, 3] in [-1, 1], or codes int32 [B, h, w]."""
    draw = np.random.default_rng(1)
    if task == "encode":
        return draw.uniform(-1, 1, (batch, SIDE, SIDE, 3)).astype(np.float32)
    side = SIDE // int(shape[1:])
    return draw.integers(0, CODES, (batch, side, side), dtype=np.int32)


def weights(shape: str) -> tuple[Any, dict[str, Json], np.ndarray]:
    """Our config, parameters that keep the size of activations, and the codebook [K, C]."""
    import jax
    from ar_tokenizers.image.autoencoder import init
    from ar_tokenizers.image.config import config_from

    config = config_from(SHAPES[shape], quantizer="vq", codes=CODES, code_dim=DIM)
    draw = np.random.default_rng(0)

    def leaf(like: Any) -> np.ndarray:
        scale = 0.2 if like.ndim == 1 else np.prod(like.shape[:-1]) ** -0.5
        return draw.normal(like.ndim == 1, scale, like.shape).astype(np.float32)

    params = jax.tree.map(leaf, jax.eval_shape(functools.partial(init, config), jax.random.key(0)))
    return config, params, draw.normal(size=(CODES, DIM)).astype(np.float32)


# ---- ours --------------------------------------------------------------------------------------------------------


def ours(shape: str, task: str, batch: int) -> Callable[[], np.ndarray]:
    """A function that does `task` with our network and returns codes or pixels."""
    import jax
    import jax.numpy as jnp
    from ar_tokenizers.image.autoencoder import Autoencoder

    config, params, codebook = weights(shape)
    params, codebook, x = jax.device_put((params, codebook, inputs(shape, task, batch)))

    @jax.jit
    def encode(params: Any, codebook: jax.Array, x: jax.Array) -> jax.Array:
        z = Autoencoder.bind(config, params).encoder(x)
        distances = jnp.sum(jnp.square(codebook), axis=-1) - 2 * z @ codebook.T
        return jnp.argmin(distances, axis=-1)

    @jax.jit
    def decode(params: Any, codebook: jax.Array, x: jax.Array) -> jax.Array:
        return Autoencoder.bind(config, params).decoder(codebook[x])

    function = encode if task == "encode" else decode
    return lambda: np.asarray(function(params, codebook, x))


# ---- theirs ------------------------------------------------------------------------------------------------------


def make_decoder(multipliers: tuple[int, ...]) -> Any:
    """The decoder of taming-transformers (model.py), built from transformers' blocks, with the original names."""
    import torch
    from torch import nn
    from transformers.models.chameleon import modeling_chameleon as parts

    settings = type("Settings", (), {"dropout": 0.0})()

    class Upsample(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = functools.partial(parts.ChameleonVQVAEEncoderResnetBlock, settings)
            width = 64 * multipliers[-1]
            self.conv_in = nn.Conv2d(DIM, width, 3, padding=1)
            self.mid = nn.Module()
            self.mid.block_1, self.mid.block_2 = block(width, width), block(width, width)
            self.mid.attn_1 = parts.ChameleonVQVAEEncoderAttnBlock(width)
            levels: list[nn.Module] = []
            for index in reversed(range(len(multipliers))):
                level, out = nn.Module(), 64 * multipliers[index]
                level.block = nn.ModuleList([block(width, out), block(out, out), block(out, out)])
                if index:
                    level.upsample = Upsample(out)
                levels.insert(0, level)
                width = out
            self.up = nn.ModuleList(levels)
            self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
            self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
            for index in reversed(range(len(self.up))):
                for block in self.up[index].block:
                    x = block(x)
                if index:
                    x = self.up[index].upsample(x)
            x = self.norm_out(x)
            return self.conv_out(x * torch.sigmoid(x))

    return Decoder()


def theirs(shape: str, task: str, batch: int) -> Callable[[], np.ndarray]:
    """The same as `ours` with torch."""
    import torch
    from ar_tokenizers.image.taming import to_taming
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    config, params, codebook = weights(shape)
    peer = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=DIM, num_embeddings=CODES, latent_channels=config.z_channels, base_channels=config.width,
            channel_multiplier=list(config.multipliers), num_res_blocks=2, resolution=SIDE,
        )
    )  # fmt: skip
    peer.decoder = make_decoder(config.multipliers)
    named = to_taming(config, params | {"quantizer": {"codebook": codebook}})
    peer.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in named.items()})
    peer.eval()
    x = torch.from_numpy(inputs(shape, task, batch))
    x = x.permute(0, 3, 1, 2).contiguous() if task == "encode" else x.long()

    def encode() -> np.ndarray:
        with torch.inference_mode():
            codes = peer.encode(x).image_tokens
        return codes.reshape(batch, *[SIDE // config.factor] * 2).numpy()

    def decode() -> np.ndarray:
        with torch.inference_mode():
            z = peer.quantize.embedding(x).permute(0, 3, 1, 2).contiguous()
            return peer.decoder(peer.post_quant_conv(z)).permute(0, 2, 3, 1).numpy()

    return encode if task == "encode" else decode


# ---- in turns ----------------------------------------------------------------------------------------------------


def serve(pipe: Any, side: str, case: tuple[str, str, int]) -> None:
    """A side's process. For each word that it receives, it does one run and sends (wall seconds, CPU seconds,
    result)."""
    if side == "ours":
        from ar_tokenizers.host import keep_memory

        keep_memory()
    run = (ours if side == "ours" else theirs)(*case)
    while pipe.recv() is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        out = run()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu, out))


def compare(case: tuple[str, str, int], repeats: int) -> dict[str, Any]:
    """(wall, CPU) seconds of every run of both sides, in turns, and the difference between their results."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in ("ours", "theirs"):
        pipes[side], end = context.Pipe()
        processes.append(context.Process(target=serve, args=(end, side, case), daemon=True))
        processes[-1].start()
    times: dict[str, Any] = {"ours": [], "theirs": []}
    results = {}
    for repeat in range(repeats + 1):
        for side, pipe in pipes.items():
            pipe.send("run")
            wall, cpu, results[side] = pipe.recv()
            if repeat:
                times[side].append((wall, cpu))
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    if case[1] == "encode":
        agreement = float((results["ours"] == results["theirs"]).mean())
        assert agreement > 0.99, f"{case}: only {agreement:.2%} of the codes agree"
        return times | {"codes_that_agree": agreement}
    off = float(np.abs(results["ours"] - results["theirs"]).max())
    assert off < 1e-3, f"{case}: pixels differ by up to {off}"
    return times | {"largest_difference": off}


def main() -> None:
    """Prints the ratios. Writes raw times if --output is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=tuple(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=(1, 8))
    parser.add_argument("--tasks", nargs="*", choices=("encode", "decode"), default=("encode", "decode"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs = {}
    for shape in args.shapes:
        for task in args.tasks:
            for batch in args.batches:
                name = f"{task} {shape} b={batch}"
                runs[name] = found = compare((shape, task, batch), args.repeats)
                wall, cpu = (
                    [statistics.median(run[i] for run in found[side]) for side in ("ours", "theirs")] for i in (0, 1)
                )
                print(
                    f"{name:18} ours {wall[0]:7.3f} s ({cpu[0]:.3f} CPU)  theirs / ours {wall[1] / wall[0]:.2f} "
                    f"({cpu[1] / cpu[0]:.2f} CPU)  {list(found.items())[-1]}",
                    flush=True,
                )
                if args.output:
                    args.output.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
