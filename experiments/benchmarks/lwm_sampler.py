"""LWM's sampler as published, timed for sampling_vs_transformers.py. It is the only JAX peer, and has its own
interpreter.

That benchmark runs it (`--lwm PYTHON`) with an interpreter that has packages as old as LWM: jax 0.4.29, flax 0.8.4,
transformers 4.40, and on its path the repositories LargeWorldModel/LWM f45d2b7, haoliuhl/tux 61c11e1 and
haoliuhl/ringattention 6305e2f. (tux imports wandb and gcsfs, which sampling never uses; they may be empty modules.)
Each line that is read asks for a run; the answer is a line [wall seconds, CPU seconds].

The model has random weights, and the benchmark's sizes as far as LWM allows. But it has as many KV heads as query
heads, a separate vocabulary and head for codes, and 257 tokens per image: no line ends, and the last token is forced.
Guidance and top-k are the benchmark's. The sampler is jitted as a whole, as in LWM's vision_generation.py; that script
samples one prompt at a time, this one a batch.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

NEW, WIDTH, TEXT, CODES = 257, 32, 2000, 4096


def sampler(batch: int, scale: float, top_k: int):
    """A function that takes a seed and draws `batch` images, ids [batch, 257]."""
    from lwm.vision_llama import FlaxVideoLLaMAForCausalLM, VideoLLaMAConfig
    from transformers import GenerationConfig

    config = VideoLLaMAConfig(
        vision_vocab_size=CODES + 256, vocab_size=TEXT, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=8, max_sequence_length=512, sample_mode="vision", mesh_dim="1,-1,1,1",
    )  # fmt: skip
    mesh = VideoLLaMAConfig.get_jax_mesh("1,-1,1,1")
    model = FlaxVideoLLaMAForCausalLM(config, input_shape=(1, WIDTH), seed=0, _do_init=False)
    with mesh:
        params = jax.jit(lambda key: model.init_weights(key, (1, WIDTH)))(jax.random.key(0))
    # Half of the rows are prompts, half are "<s><vision>", padded on the left.
    ids = np.random.default_rng(0).integers(2, TEXT, (2 * batch, WIDTH), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[batch:, :-2] = 0
    settings = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, temperature=1.0, do_sample=True, top_k=top_k
    )

    @jax.jit
    def generate(params, key):
        return model.generate_vision(
            ids, jnp.full(batch, scale, jnp.float32), attention_mask=mask, vision_masks=np.zeros(ids.shape, bool),
            params=params, prng_key=key, generation_config=settings,
        ).sequences[:batch, WIDTH:]  # fmt: skip

    def draw(seed: int) -> np.ndarray:
        with mesh:
            return np.asarray(generate(params, jax.random.PRNGKey(seed)))

    return draw


def main() -> None:
    """For each line that it reads, does one run and prints its seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--top-k", type=int, default=2048)
    args = parser.parse_args()
    draw, seed = sampler(args.batch, args.scale, args.top_k), 0
    while input():
        wall, cpu = time.perf_counter(), time.process_time()
        out = draw(seed)
        seed += 1
        assert out.shape == (args.batch, NEW) and (out[:, :-1] < CODES + 256).all()
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


if __name__ == "__main__":
    main()
