"""Batch sampling of images and text on the CPU, compared with Hugging Face transformers on torch and with LWM's
sampler.

Ours and transformers have the same model with random float32 weights: a small Emu3 (d=256, 4 layers, 8 heads over 2 KV
heads, FFN 704, 2,009 text and control ids, 4,096 image codes, untied), in transformers as Emu3ForConditionalGeneration.
Each side has its own process; they run in turns after a warm-up that also compiles, and results are medians. An image
has 16 x 16 codes, 274 tokens with line ends, end of image and end of document. Guidance is 3, top-k 2048, temperature
1. Every output is checked against the grammar. Only tokens are made, no pixels.

    hf        `generate` as in the documentation of Emu3 in transformers: a `prefix_allowed_tokens_fn` that returns
              lists and asks a tokenizer (here a small one), `negative_prompt_ids`, guidance_scale=3, top_k=2048
    tuned     the same, but its function knows its position and returns tensors
    loop      a loop over their forward pass: both contexts in one batch, a head for only the image codes, and forced
              tokens that are not drawn
    lwm       LWM's sampler as published, with --lwm; lwm_sampler.py says how its model differs
    ours      Engine.generate

Text is greedy, with 64 prompt tokens and 128 new tokens. The peers are `generate`; `loop`, the simplest loop over their
forward pass; and `compiled`, the same loop with a static cache and torch.compile. All our tokens were equal to those of
`generate`.

    OMP_NUM_THREADS=1 nice -n -5 taskset -c 1 python experiments/benchmarks/sampling_vs_transformers.py \
        --lwm PYTHON --output FILE.json

The results: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# An environment variable, because each side has its own process. A test sets it.
SIDE = int(os.environ.get("AR_UNIFIED_BENCHMARK_SIDE", "16"))
TEXT, CODES = 2000, 4096
NEW = (SIDE + 1) * SIDE + 2  # codes and line ends, <eoi>, <eos>
SCALE, TOP_K = 3.0, 2048
PROMPT, NEW_TEXT = 64, 128
IMAGES, TEXTS = ("hf", "tuned", "loop"), ("generate", "loop", "compiled")


class Ids:
    """A stand-in text tokenizer: a text is a list of numbers."""

    size = TEXT

    def encode(self, text: str) -> list[int]:
        """Words that are numbers, as these numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        """Ids as words that are numbers."""
        return " ".join(str(int(id)) for id in ids)


def model() -> tuple[Any, Any, Any]:
    """Config, parameters and grammar of our model."""
    import jax

    from ar_unified.language.grammar import Grammar
    from ar_unified.language.syntax import sized_rows
    from ar_unified.language.vocabulary import Vocabulary
    from ar_unified.model.config import TransformerConfig
    from ar_unified.model.transformer import init

    grammar = Grammar(Vocabulary(TEXT, CODES, size_tokens=SIDE), sized_rows(SIDE, SIDE), Ids())
    config = TransformerConfig(
        vocab_size=grammar.vocabulary.size, d_model=256, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=32, d_mlp=704
    )
    params = init(config, jax.random.key(0))
    # Logits as large as trained ones, so that temperature, top-k and greedy choices matter.
    return config, params | {"head": 5 * params["head"]}, grammar


def prompts(batch: int) -> np.ndarray:
    """int32 [batch, 24]: texts of one length, which the peers need."""
    return np.random.default_rng(0).integers(0, TEXT, (batch, 24), dtype=np.int32)


# ---- ours --------------------------------------------------------------------------------------------------------


def our_images(batch: int, prompt: np.ndarray) -> Callable[[], np.ndarray]:
    """A function that draws one image for each prompt: ids [batch, NEW]."""
    from ar_unified.language.document import TextPart
    from ar_unified.sampling.decoding import Filter
    from ar_unified.sampling.engine import Engine
    from ar_unified.sampling.request import Request

    config, params, grammar = model()
    engine = Engine(config, params, grammar, batch_size=batch, max_length=312)
    run = 0

    def draw() -> np.ndarray:
        nonlocal run
        run += 1
        asked = [
            Request(str(i), (TextPart(Ids().decode(row)),), mode="image", seed=1000 * run + i, guidance=SCALE,
                    image_size=(SIDE, SIDE), image=Filter(1.0, TOP_K))
            for i, row in enumerate(prompt)
        ]  # fmt: skip
        samples = list(engine.generate(asked))
        assert len(samples) == batch and not any(sample.error for sample in samples)
        return np.stack([sample.tokens[3:] for sample in samples])

    return draw


def our_texts(batch: int, prompt: np.ndarray) -> Callable[[], np.ndarray]:
    """A function that continues each prompt: ids [batch, NEW_TEXT]."""
    from ar_unified.sampling.decoding import Filter
    from ar_unified.sampling.engine import Engine
    from ar_unified.sampling.request import Request, TokensPart

    config, params, grammar = model()
    engine = Engine(config, params, grammar, batch_size=batch, max_length=PROMPT + NEW_TEXT)
    v = grammar.vocabulary
    params["head"] = params["head"].at[TEXT:].set(0)  # a text never ends before its budget

    def draw() -> np.ndarray:
        asked = [
            Request(str(i), (TokensPart((v.bos, *map(int, row[1:]))),), turn=False, mode="text", text=Filter(0.0))
            for i, row in enumerate(prompt)
        ]
        found = {int(sample.request.id): sample.tokens for sample in engine.generate(asked)}
        return np.stack([found[i] for i in range(batch)])

    return draw


# ---- the peers ---------------------------------------------------------------------------------------------------


def make_peer(state: dict[str, np.ndarray], vocab: int, v: dict[str, int]) -> Any:
    """Emu3ForConditionalGeneration with our weights. Its image tokenizer is small, random and never used."""
    import torch
    import transformers

    names = {"<|extra_200|>": v["eol"], "<image>": v["pad"]}
    names |= {f"<|visual token {i:06d}|>": v["image"] + i for i in range(CODES)}
    text = dict(
        vocab_size=vocab, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=4096,
        bos_token_id=v["bos"], eos_token_id=v["eos"], pad_token_id=v["pad"],
    )  # fmt: skip
    vq = dict(codebook_size=CODES, base_channels=32, channel_multiplier=(1,), num_res_blocks=1, hidden_size=32)
    config = transformers.Emu3Config(text_config=text, vq_config=vq, vocabulary_map=names)
    config._attn_implementation = "sdpa"
    peer = transformers.Emu3ForConditionalGeneration(config)
    named = {name.replace("model.", "model.text_model.", 1): torch.from_numpy(x) for name, x in state.items()}
    missing = peer.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys and all(name.startswith("model.vqmodel") for name in missing.missing_keys)
    return peer.eval()


def special_tokens(v: dict[str, int]) -> Any:
    """A transformers tokenizer that knows the special tokens around an image, with our ids."""
    import transformers

    import tokenizers

    ids = {"<|extra_200|>": v["eol"], "<unk>": v["pad"]}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    fast.add_special_tokens(["<|extra_200|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast)


def peer_images(peer: Any, prompt: np.ndarray, v: dict[str, int]) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that draw images with transformers, by their names in the table."""
    import torch

    batch = len(prompt)
    header = [v["boi"], v["side"] + SIDE - 1, v["side"] + SIDE - 1]

    def ids(texts: np.ndarray) -> Any:
        begin, end = [[v["bos"]]] * batch, [[v["eot"], *header]] * batch
        return torch.from_numpy(np.concatenate([begin, texts, end], axis=1)).long()

    own, other = ids(prompt), ids(prompt[:, :0])
    tokenizer, codes = special_tokens(v), peer.model.vocabulary_mapping.image_tokens
    assert codes == list(range(v["image"], v["image"] + CODES))
    assert tokenizer.encode("<|extra_200|>") == [v["eol"]]

    def documented(_: int, tokens: Any) -> Any:
        """Does what the documentation's function does in each call: makes its tensors, asks the tokenizer for the line
        end, searches for the beginning of the image, and returns the codes as a list."""
        boi, eoi, eos, pad = (torch.tensor([v[name]]) for name in ("boi", "eoi", "eos", "pad"))
        eol = tokenizer.encode("<|extra_200|>", return_tensors="pt")[0]
        begin = torch.nonzero(tokens == boi, as_tuple=True)[0][0]
        drawn = tokens.shape[0] - begin - len(header)  # tokens of the image so far
        if drawn == (SIDE + 1) * SIDE:
            return (eoi,)
        if drawn == (SIDE + 1) * SIDE + 1:
            return (eos,)
        if drawn > (SIDE + 1) * SIDE + 1:
            return (pad,)
        return (eol,) if (drawn + 1) % (SIDE + 1) == 0 else codes

    image = torch.tensor(codes)
    one = {name: torch.tensor([v[name]]) for name in ("eol", "eoi", "eos")}
    forced = {i * (SIDE + 1) - 1: "eol" for i in range(1, SIDE + 1)}
    forced |= {NEW - 2: "eoi", NEW - 1: "eos"}

    def tuned(_: int, tokens: Any) -> Any:
        name = forced.get(tokens.shape[0] - own.shape[1])
        return image if name is None else one[name]

    def generate(function: Callable) -> np.ndarray:
        with torch.inference_mode():
            out = peer.generate(
                own, attention_mask=torch.ones_like(own), prefix_allowed_tokens_fn=function, do_sample=True,
                guidance_scale=SCALE, negative_prompt_ids=other, negative_prompt_attention_mask=torch.ones_like(other),
                top_k=TOP_K, temperature=1.0, max_new_tokens=NEW,
            )  # fmt: skip
        return out[:, own.shape[1] :].numpy()

    def loop() -> np.ndarray:
        head = peer.lm_head.weight[v["image"] : v["image"] + CODES]
        pad = own.shape[1] - other.shape[1]
        with torch.inference_mode():
            tokens = torch.cat([own, torch.nn.functional.pad(other, (pad, 0), value=v["pad"])])
            mask = torch.ones(2 * batch, own.shape[1] + NEW, dtype=torch.long)
            mask[batch:, :pad] = 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            length, cache, out = own.shape[1], None, []
            for i in range(NEW):
                width = tokens.shape[1]
                result = peer.model.text_model(
                    input_ids=tokens, past_key_values=cache, use_cache=True, attention_mask=mask[:, :length],
                    position_ids=positions[:, length - width : length],
                )  # fmt: skip
                cache = result.past_key_values
                if name := forced.get(i):
                    token = one[name].expand(batch)
                else:
                    logits = result.last_hidden_state[:, -1] @ head.T
                    logits = logits[batch:] + SCALE * (logits[:batch] - logits[batch:])
                    top, where = torch.topk(logits, TOP_K)
                    token = where.gather(1, torch.multinomial(top.softmax(-1), 1))[:, 0] + v["image"]
                out.append(token)
                tokens, length = token.repeat(2)[:, None], length + 1
        return torch.stack(out, 1).numpy()

    return {"hf": lambda: generate(documented), "tuned": lambda: generate(tuned), "loop": loop}


def peer_texts(peer: Any, prompt: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that continue texts with transformers, by their names in the table."""
    import torch
    import transformers

    ids = torch.from_numpy(prompt).long()

    def generate() -> np.ndarray:
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            out = peer.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TEXT, min_new_tokens=NEW_TEXT
            )
        return out[:, ids.shape[1] :].numpy()

    def greedy(forward: Callable, cache: Any) -> np.ndarray:
        with torch.inference_mode():
            out, last = [], ids
            for _ in range(NEW_TEXT):
                result = (peer if cache is None or last is ids else forward)(
                    input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache, last = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
                out.append(last)
        return torch.cat(out, 1).numpy()

    compiled = torch.compile(peer)

    def static() -> Any:
        return transformers.StaticCache(config=peer.config.text_config, max_cache_len=PROMPT + NEW_TEXT)

    return {
        "generate": generate,
        "loop": lambda: greedy(peer, None),
        "compiled": lambda: greedy(compiled, static()),
    }


# ---- in turns ----------------------------------------------------------------------------------------------------


def serve(pipe: Any, side: str, task: str, prompt: np.ndarray, state: Any, vocab: int, v: dict[str, int]) -> None:
    """A side's process. For each name that it receives, it does the run of this name and sends (wall seconds, CPU
    seconds, tokens).
    """
    if side == "ours":
        from ar_tokenizers.host import keep_memory

        keep_memory()
        runs = {"ours": (our_images if task == "images" else our_texts)(len(prompt), prompt)}
    else:
        peer = make_peer(state, vocab, v)
        runs = peer_images(peer, prompt, v) if task == "images" else peer_texts(peer, prompt)
    while (name := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        out = runs[name]()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu, out))


class Lwm:
    """The process of lwm_sampler.py. It has those methods of a pipe's end that `compare` calls."""

    def __init__(self, python: str, batch: int):
        script = str(Path(__file__).with_name("lwm_sampler.py"))
        command = [python, script, "--batch", str(batch), "--scale", str(SCALE), "--top-k", str(TOP_K)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, name: str | None) -> None:
        """Asks for a run; None ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name or ''}\n")
        self._process.stdin.flush()

    def recv(self) -> tuple[float, float, None]:
        """Waits for the answer: (wall seconds, CPU seconds, None)."""
        assert self._process.stdout is not None
        wall, cpu = json.loads(self._process.stdout.readline())
        return wall, cpu, None

    def join(self) -> None:
        """Waits until the process has ended."""
        self._process.wait()


def compare(
    task: str, batch: int, repeats: int, state: Any, vocab: int, v: dict[str, int], lwm: str | None
) -> tuple[dict[str, list], float | None]:
    """(wall, CPU) seconds of every run of every mode, in turns. For texts also the share of our tokens that are equal
    to those of `generate`."""
    prompt = prompts(batch) if task == "images" else np.random.default_rng(1).integers(0, TEXT, (batch, PROMPT))
    names = ["ours", *(IMAGES if task == "images" else TEXTS)]
    if task == "texts":
        prompt[:, 0] = v["bos"]
        # Only text pieces are drawn: by ours because the request says so, by theirs because no other id is ever the
        # best.
        state = state | {"lm_head.weight": np.where(np.arange(vocab)[:, None] < TEXT, state["lm_head.weight"], 0)}
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    processes: list[Any] = []
    for side in ("ours", "theirs"):
        pipes[side], end = context.Pipe()
        args = (end, side, task, prompt, state if side == "theirs" else None, vocab, v)
        processes.append(context.Process(target=serve, args=args, daemon=True))
        processes[-1].start()
    if lwm and task == "images":
        names.append("lwm")
        pipes["lwm"] = Lwm(lwm, batch)
        processes.append(pipes["lwm"])
    times: dict[str, list] = {name: [] for name in names}
    outs: dict[str, np.ndarray] = {}
    for repeat in range(repeats + 1):
        for name in names:
            pipe = pipes[name if name in pipes else "theirs"]
            pipe.send(name)
            wall, cpu, out = pipe.recv()
            outs[name] = out
            if task == "images" and name != "lwm":
                check(out, v)
            if repeat:
                times[name].append((wall, cpu))
            print(f"  {task} b={batch} {name}: {wall:.2f} s, CPU {cpu:.2f}", file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return times, float((outs["ours"] == outs["generate"])[:, :-1].mean()) if task == "texts" else None


def check(out: np.ndarray, v: dict[str, int]) -> None:
    """Raises AssertionError unless every row is an image."""
    body = out[:, : SIDE * (SIDE + 1)].reshape(len(out), SIDE, SIDE + 1)
    codes = body[:, :, :SIDE]
    assert out.shape[1] == NEW and (body[:, :, SIDE] == v["eol"]).all()
    assert ((codes >= v["image"]) & (codes < v["image"] + CODES)).all()
    assert (out[:, -2] == v["eoi"]).all() and (out[:, -1] == v["eos"]).all()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the ratios, and writes raw times if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", nargs="*", type=int, default=(1, 16), help="batches")
    parser.add_argument("--texts", nargs="*", type=int, default=(1, 16, 64), help="batches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lwm", metavar="PYTHON", help="an interpreter that imports LWM; see lwm_sampler.py")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)

    import jax

    from experiments.benchmarks.cpu_vs_transformers import llama_state

    config, params, grammar = model()
    vocabulary = grammar.vocabulary
    v = {name: vocabulary.control(name) for name in ("pad", "bos", "eos", "eot", "boi", "eoi", "eol")}
    v |= {"side": vocabulary.size_offset, "image": vocabulary.image_offset}
    state = llama_state(config, params)
    versions = {name: importlib.metadata.version(name) for name in ("jaxlib", "torch", "transformers")}
    results: dict[str, Any] = {"model": dataclasses.asdict(config), "versions": versions, "runs": {}, "same_tokens": {}}
    print(versions, jax.devices()[0].platform, flush=True)
    for task, batches in (("images", args.images), ("texts", args.texts)):
        for batch in batches:
            times, same = compare(task, batch, args.repeats, state, vocabulary.size, v, args.lwm)
            results["runs"][f"{task} b={batch}"] = times
            medians = {
                name: [statistics.median(run[i] for run in runs) for i in (0, 1)] for name, runs in times.items()
            }
            ours = medians["ours"]
            per = batch * 60 if task == "images" else batch * NEW_TEXT
            unit = "images/min" if task == "images" else "tok/s"
            cells = [
                f"{name} {per / wall:,.1f} {unit} {wall / ours[0]:.2f} ({cpu / ours[1]:.2f})"
                for name, (wall, cpu) in medians.items()
            ]
            if same is not None:
                results["same_tokens"][f"{task} b={batch}"] = same
                cells.append(f"{same:.4f} of the tokens are the same")
            print(f"{task} b={batch}: " + " | ".join(cells), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
