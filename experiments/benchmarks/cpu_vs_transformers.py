"""Our training step and greedy decoding on the CPU, compared with Hugging Face transformers on torch.

Both sides have one Llama-shaped model with the same weights and tokens. Each has its own process, and they run in
turns; results are medians. Training: loss, gradients and AdamW (theirs is fused, with bfloat16 by autocast). Decoding:
greedy, 64 prompt tokens and 64 new tokens; `generate` is theirs, `loop` is the simplest loop over their forward pass
with its cache. The losses of both sides and the share of equal greedy tokens are printed too.

    python experiments/benchmarks/cpu_vs_transformers.py --size 25m
    OMP_NUM_THREADS=1 taskset -c 1 python experiments/benchmarks/cpu_vs_transformers.py --size demo

The results, and what made ours faster: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ar_tokenizers.host import keep_memory

from ar_unified.model.cache import init_cache
from ar_unified.model.config import TransformerConfig, config_from
from ar_unified.model.decoded import unstacked
from ar_unified.model.loss import weighted_loss
from ar_unified.model.transformer import Transformer, init
from ar_unified.parallel.compiler import compiler_options
from ar_unified.parallel.mesh import make_mesh

SIZES = {  # preset, vocabulary, (batch, length) in training
    "25m": ("25m", 16384, (8, 512)),
    "demo": ("2m", 1792, (16, 256)),
    "trial": ("debug", 256, (2, 16)),
}
LEARNING_RATE = dict(learning_rate=3e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


def our_train_step(config: TransformerConfig, params, tokens: np.ndarray, chunk: int) -> Callable[[], float]:
    """A function that does one AdamW step on `tokens` [B, T] and returns the loss before the step."""
    optimizer = optax.adamw(**LEARNING_RATE)
    B, T = tokens.shape
    batch = dict(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(np.roll(tokens, -1, axis=1)),
        weights=jnp.ones((B, T)).at[:, -1].set(0.0),
        positions=jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        doc_start=jnp.zeros((B, T), jnp.int32),
    )

    def loss_of(params, batch):
        model = Transformer.bind(config, params)
        hidden = model(batch["tokens"], batch["positions"], batch["doc_start"])
        loss, *_ = weighted_loss(hidden, model.head(), batch["targets"], batch["weights"], chunk=chunk)
        return loss / batch["weights"].sum()

    mesh = make_mesh(dict(data=-1), jax.devices()[:1])

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=compiler_options(mesh, (), config.dtype))
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    carry = [jax.tree.map(jnp.array, params), optimizer.init(params)]

    def run() -> float:
        carry[0], carry[1], loss = step(carry[0], carry[1], batch)
        return float(loss)

    return run


def our_decode(config: TransformerConfig, params, prompts: np.ndarray, new: int) -> Callable[[], np.ndarray]:
    """A function that continues `prompts` [B, P] greedily: [B, new]. Its parameters have the form that samplers use."""
    params = jax.jit(functools.partial(unstacked, config))(params)

    @jax.jit
    def decode(params, prompts):
        B, P = prompts.shape
        model = Transformer.bind(config, params)
        cache = init_cache(config, B, P + new)
        hidden, cache = model.extend(prompts, cache, jnp.zeros(B, jnp.int32))
        token = model.logits(hidden[:, -1]).argmax(-1).astype(jnp.int32)

        def body(i, carry):
            token, cache, out = carry
            out = out.at[:, i].set(token)
            hidden, cache = model.extend(token[:, None], cache, jnp.full(B, P + i, jnp.int32))
            return model.logits(hidden[:, 0]).argmax(-1).astype(jnp.int32), cache, out

        carry = jax.lax.fori_loop(0, new - 1, body, (token, cache, jnp.zeros((B, new), jnp.int32)))
        return carry[2].at[:, new - 1].set(carry[0])

    prompts_on_device = jnp.asarray(prompts)
    return lambda: np.asarray(decode(params, prompts_on_device))


def llama_state(config: TransformerConfig, params) -> dict[str, np.ndarray]:
    """The parameters with the names and layout of transformers' Llama, where weights are [out, in]."""
    state = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]}
    state["lm_head.weight"] = params["embedding" if config.tie_embeddings else "head"]
    for i in range(config.n_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        layer = {"input_layernorm": p["attention"]["norm"], "post_attention_layernorm": p["mlp"]["norm"]}
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            layer[f"self_attn.{theirs}"] = p["attention"][ours].reshape(config.d_model, -1).T
        layer["self_attn.o_proj"] = p["attention"]["output"].reshape(-1, config.d_model).T
        for name in ("gate", "up", "down"):
            layer[f"mlp.{name}_proj"] = p["mlp"][name].T
        state |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return {name: np.array(value) for name, value in state.items()}


def make_peer(config: TransformerConfig, params):
    """transformers' Llama with the same weights, float32, sdpa attention."""
    import torch
    import transformers

    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings, max_position_embeddings=4096,
            attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    peer.load_state_dict({name: torch.from_numpy(value) for name, value in llama_state(config, params).items()})
    return peer


def peer_train_step(peer, tokens: np.ndarray, dtype: str) -> Callable[[], float]:
    """A function that does one of their training steps and returns the loss."""
    import torch

    optimizer = torch.optim.AdamW(
        peer.parameters(),
        lr=LEARNING_RATE["learning_rate"],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        fused=True,
    )
    ids = torch.from_numpy(tokens).long()

    def run() -> float:
        peer.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = peer(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def peer_decodes(peer, prompts: np.ndarray, new: int, dtype: str) -> dict[str, Callable[[], np.ndarray]]:
    """transformers' `generate`, and the simplest loop over its forward pass."""
    import copy

    import torch

    peer = copy.deepcopy(peer).to(getattr(torch, dtype)).eval()
    ids = torch.from_numpy(prompts).long()

    def generate() -> np.ndarray:
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            out = peer.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new)
        return out[:, ids.shape[1] :].numpy()

    def loop() -> np.ndarray:
        with torch.inference_mode():
            out, cache, last = [], None, ids
            for _ in range(new):
                result = peer(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, last = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
                out.append(last)
        return torch.cat(out, 1).numpy()

    return {"generate": generate, "loop": loop}


def serve_peer(pipe, config: TransformerConfig, params, what: str, tokens: np.ndarray, new: int) -> None:
    """The peer's process. For each name that it receives, it does the run of this name and sends (wall seconds, CPU
    seconds, result).
    """
    peer = make_peer(config, params)
    runs: Mapping[str, Callable]
    if what == "train":
        runs = {"transformers": peer_train_step(peer, tokens, config.dtype)}
    else:
        runs = peer_decodes(peer, tokens, new, config.dtype)
    while (name := pipe.recv()) is not None:
        pipe.send(timed(runs[name]))


def timed(run: Callable) -> tuple[float, float, Any]:
    """(seconds of wall time, seconds of CPU time, the result) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def compare(ours: Callable, peers: tuple[str, ...], repeats: int, *peer_args) -> tuple[dict, dict]:
    """Runs ours and each peer in turns after a warm-up. Returns the medians of (wall, CPU) seconds, and all results.

    The peer has its own process, so that the allocator and the threads of one side do not disturb the other.
    """
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=serve_peer, args=(end, *peer_args), daemon=True)
    if peers:
        process.start()

    def ask(name: str) -> tuple[float, float, Any]:
        pipe.send(name)
        return pipe.recv()

    runs: dict[str, Callable] = {"ours": lambda: timed(ours)}
    runs |= {name: functools.partial(ask, name) for name in peers}
    times: dict[str, list] = {name: [run()] for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run())
    if peers:
        pipe.send(None)
        process.join()
    medians = {
        name: tuple(statistics.median(row[i] for row in rows[1:]) for i in (0, 1)) for name, rows in times.items()
    }
    return medians, {name: [row[2] for row in rows] for name, rows in times.items()}


def report(title: str, medians: dict[str, tuple[float, float]], tokens: int) -> None:
    """One line: tokens per second, and each side's wall (CPU) time divided by ours."""
    wall, cpu = medians["ours"]
    cells = [f"{name} {tokens / w:,.0f} tok/s {w / wall:.2f} ({c / cpu:.2f})" for name, (w, c) in medians.items()]
    print(f"{title:28s}" + " | ".join(cells), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of ratios for each requested size and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--what", nargs="+", choices=("train", "decode"), default=("train", "decode"))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16), help="prompts that are decoded at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per chunk of the loss")
    parser.add_argument("--alone", action="store_true", help="measure only ours, without the peer")
    args = parser.parse_args(arguments)

    preset, vocab, (B, T) = SIZES[args.size]
    keep_memory()
    base = config_from(preset, vocab, qk_norm="none")
    params = init(base, jax.random.key(0))
    # Weights as large as trained ones. At init the top two logits are too close to compare greedy tokens.
    params = params | {"embedding": 5 * params["embedding"]}
    numpy_params = jax.tree.map(np.asarray, params)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, vocab, (B, T), dtype=np.int32)
    millions = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    print(f"{preset}, {millions:.1f}M parameters: tokens a second, and wall (CPU) time divided by ours")

    for dtype in args.dtypes:
        config = config_from(preset, vocab, qk_norm="none", dtype=dtype)
        peers: tuple[str, ...]
        ours: Callable
        if "train" in args.what:
            peers = () if args.alone else ("transformers",)
            ours = our_train_step(config, params, rows, args.chunk)
            medians, losses = compare(ours, peers, args.repeats, config, numpy_params, "train", rows, 0)
            report(f"train {dtype} B={B} T={T}", medians, B * T)
            print("    losses " + "; ".join(f"{n} " + " ".join(f"{x:.4f}" for x in xs) for n, xs in losses.items()))
        for batch in args.batches if "decode" in args.what else ():
            peers = () if args.alone else ("generate", "loop")
            prompts = rng.integers(0, vocab, (batch, 64), dtype=np.int32)
            ours = our_decode(config, params, prompts, 64)
            medians, outs = compare(ours, peers, args.repeats, config, numpy_params, "decode", prompts, 64)
            report(f"decode {dtype} b={batch}", medians, batch * 64)
            if peers:
                print(f"    same greedy tokens: {np.mean(outs['ours'][0] == outs['loop'][0]):.3f}", flush=True)


if __name__ == "__main__":
    main()
