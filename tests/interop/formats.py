"""Tiny random models in formats that transformers does not write: Meta's, LWM's, Lumina-mGPT's, Emu3.5's, Liquid's.

This module needs no torch. If a class of transformers can compute the model, its maker also writes a `twin`: the same
weights with the names and shapes that this class reads. The class is then the oracle of the parity tests. LWM's oracle
is `interleaved`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.interop import tables
from tests.interop.tables import Table, write_json
from tests.interop.weights import Sizes, Tensors, draw, drawn, interleaved, shards, taming_shapes, transformer_shapes

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
VQ = {"base": 32, "multipliers": (1, 2), "blocks": 1, "z": 16, "codes": 64, "embed": 16}
LWM_THETA = 1e4  # RoPE's theta is not in LWM's files, so an import needs it as an argument
LWM_VISION = 64 + 16  # ids of its second table: 64 codes, end of frame 64, end of clip 65, unused ids


def save(folder: Path, tensors: Tensors, dtype: str = "float32", name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cast = {key: np.ascontiguousarray(tensor).astype(DTYPES[dtype]) for key, tensor in tensors.items()}
    save_file(cast, folder / name, metadata={"format": "pt"})


def _config(kind: str, model_type: str, table: Table, sizes: Sizes, dtype: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [kind], "model_type": model_type, "vocab_size": table.size, "hidden_size": sizes.D,
        "intermediate_size": sizes.F, "num_hidden_layers": sizes.L, "num_attention_heads": sizes.N,
        "num_key_value_heads": sizes.K, "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "torch_dtype": dtype,
    } | more  # fmt: skip


def _chameleon_config(kind: str, table: Table, sizes: Sizes, dtype: str, **more: Any) -> dict[str, Any]:
    named = {"bos_token_id": 1, "eos_token_id": 2, "vocabulary_map": table.vocabulary, "rope_theta": 10000.0}
    vq = {
        "embed_dim": 16, "num_embeddings": 64, "latent_channels": 16, "resolution": 16, "base_channels": 32,
        "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": None, "attn_type": "vanilla",
    }  # fmt: skip
    return _config(kind, "chameleon", table, sizes, dtype, vq_config=vq, **named, swin_norm=False) | more


def chameleon_twin(twin: Path, tensors: Tensors, table: Table, sizes: Sizes, **more: Any) -> None:
    """The tensors that ChameleonForConditionalGeneration reads: a row of QK-norm for each head, and an image
    encoder."""
    heads = {"q_norm": sizes.N, "k_norm": sizes.K}
    out: Tensors = {}
    for name, tensor in tensors.items():
        count = next((n for norm, n in heads.items() if norm in name), 0)
        out[name] = np.repeat(tensor, count // len(tensor), axis=0) if count else tensor
    encoder = {f"model.vqmodel.{name}": tensor for name, tensor in vqgan().items() if not name.startswith("decoder.")}
    save(twin, out | encoder)
    kind = "ChameleonForConditionalGeneration"
    write_json(twin, config=_chameleon_config(kind, table, sizes, "float32", **{"model_parallel_size": 1} | more))


# ---- Meta's Chameleon ------------------------------------------------------------------------------------------------

META_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "self_attn.q_norm": "attention.q_normalization",
    "self_attn.k_norm": "attention.k_normalization", "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "tok_embeddings", "lm_head": "output",
    "model.norm": "norm", "model.layers": "layers",
}  # fmt: skip
META_CUTS = {
    "tok_embeddings.weight": 1, "output.weight": 0, "wq.weight": 0, "wk.weight": 0, "wv.weight": 0, "wo.weight": 1,
    "w1.weight": 0, "w3.weight": 0, "w2.weight": 1, "q_normalization.weight": 0, "q_normalization.bias": 0,
    "k_normalization.weight": 0, "k_normalization.bias": 0,
}  # fmt: skip


def _as_meta(tensors: Tensors, sizes: Sizes) -> Tensors:
    """Converts transformers' names and RoPE of halves to Meta's names and RoPE of neighbours. Rows of QK-norm stay
    [groups, H]."""
    out = {}
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, sizes.N if "q_proj" in name else sizes.K)
        elif "q_norm" in name or "k_norm" in name:
            tensor = interleaved(tensor, len(tensor))
        for theirs, metas in META_NAMES.items():
            name = name.replace(theirs, metas)
        out[name] = tensor
    return out


def vqgan(seed: int = 0) -> Tensors:
    """Chameleon's VQGAN with taming's names, encoder and decoder. The codebook has the scale of random latents."""
    tensors = drawn(taming_shapes(**VQ), seed)  # type: ignore[arg-type]
    tensors["quantize.embedding.weight"] = draw("quantize.latents", (64, 16), seed) * 4.0
    return tensors


def chameleon_tokenizer(folder: Path, seed: int = 0) -> Path:
    """Meta's `tokenizer` folder, which Lumina-mGPT and Anole also use, with the .ckpt already converted."""
    folder.mkdir(parents=True, exist_ok=True)
    table = tables.chameleon(placeholder="<reserved08707>")
    write_json(folder, text_tokenizer=table.byte_level())
    save(folder, vqgan(seed), name="vqgan.safetensors")
    (folder / "vqgan.yaml").write_text(
        "model:\n  params:\n    embed_dim: 16\n    n_embed: 64\n    ddconfig:\n      double_z: false\n"
        "      z_channels: 16\n      resolution: 16\n      in_channels: 3\n      out_ch: 3\n      ch: 32\n"
        "      ch_mult: [1, 2]\n      num_res_blocks: 1\n      attn_resolutions: []\n      dropout: 0.0\n"
    )
    return folder


def ibq(folder: Path, seed: int = 0) -> Path:
    """Emu3.5's vision tokenizer: like `vqgan` but with another rule for codes, with its config.yaml and the .ckpt
    already converted."""
    save(folder, vqgan(seed))
    (folder / "config.yaml").write_text(
        "embed_dim: 16\nn_embed: 64\nbeta: 0.25\nddconfig:\n  double_z: false\n  z_channels: 16\n  resolution: 16\n"
        "  in_channels: 3\n  out_ch: 3\n  ch: 32\n  ch_mult: [1, 2]\n  num_res_blocks: 1\n  attn_resolutions: []\n"
        "  dropout: 0.0\n"
    )
    return folder


def meta_shards(
    *, swin: bool = False, count: int = 4, fused: bool = False, seed: int = 0
) -> tuple[list[Tensors], dict[str, Any], Tensors, Sizes]:
    """Meta's shards in float32, params.json, and the same model with transformers' names and QK-norm rows [count, H].

    fused: wq, wk and wv are one matrix wqkv, and w1 and w3 are w13, in each shard separately.
    """
    table = tables.chameleon(placeholder="<reserved08707>")
    sizes = Sizes(table.size, N=8, K=4, H=8, F=176)
    tensors = drawn(transformer_shapes(sizes, qk_norm="layer", groups=(count, count)), seed)
    parts = shards(_as_meta(tensors, sizes).items(), META_CUTS, count)
    for part in parts:
        part["rope.freqs"] = (1.0 / 10000.0 ** (np.arange(0, 8, 2) / 8)).astype(np.float32)
        for name in list(part):
            if "_normalization" in name:
                part[name] = part[name][0]
        for i in range(sizes.L if fused else 0):
            at = f"layers.{i}."
            for whole, pieces in (("attention.wqkv", ("wq", "wk", "wv")), ("feed_forward.w13", ("w1", "w3"))):
                names = [f"{at}{whole.split('.')[0]}.{piece}.weight" for piece in pieces]
                part[f"{at}{whole}.weight"] = np.concatenate([part.pop(name) for name in names])
    params = {
        "model": {
            "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "ffn_dim_multiplier": 1.0,
            "norm_eps": 1e-5, "rope_theta": 10000.0, "qk_normalization": True, "swin_norm": swin,
            "vocab_size": table.size,
        }
    }  # fmt: skip
    return parts, params, tensors, sizes


def meta(
    folder: Path,
    twin: Path | None = None,
    *,
    swin: bool = False,
    count: int = 4,
    fused: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Meta's layout with converted .pth files: tokenizer/ and models/30b/, or models/7b/ with one file.

    twin: a ChameleonForConditionalGeneration in which each shard's QK-norm vectors are repeated for its heads.
    """
    parts, params, tensors, sizes = meta_shards(swin=swin, count=count, fused=fused, seed=seed)
    chameleon_tokenizer(folder / "tokenizer", seed)
    models = folder / "models" / ("7b" if count == 1 else "30b")
    for i, part in enumerate(parts):
        save(models, part, dtype, "consolidated.safetensors" if count == 1 else f"consolidated.{i:02}.safetensors")
    write_json(models, params=params, consolidate_params=params)
    if twin is not None:
        chameleon_twin(twin, tensors, tables.chameleon(), sizes, swin_norm=swin)
    return folder


# ---- Lumina-mGPT, Emu3.5, Liquid -------------------------------------------------------------------------------------


def lumina_1(
    folder: Path,
    twin: Path | None = None,
    *,
    groups: int = 2,
    tokenizer: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Lumina-mGPT 1: Chameleon's names and QK-norm [model_parallel_size, H], without tokenizer and VQGAN.

    tokenizer: put Meta's `tokenizer` folder beside the weights. twin: Chameleon's class with the rows repeated for the
    heads.
    """
    if tokenizer:
        chameleon_tokenizer(folder / "tokenizer", seed)
    table = tables.chameleon()
    return _lumina(folder, twin, table, groups, dtype, seed, "ChameleonXLLMXForConditionalGeneration")


def lumina_2(folder: Path, twin: Path | None = None, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Lumina-mGPT 2.0: Chameleon's transformer with Qwen's text tokenizer; its MoVQGAN is a separate file.

    twin: as in `lumina_1`; its image encoder is Chameleon's and is not used.
    """
    table = tables.lumina_2()
    _lumina(folder, twin, table, 1, dtype, seed, "ChameleonXLLMXForConditionalGeneration")
    write_json(
        folder,
        tokenizer=table.split({"type": "NFC"}),
        tokenizer_config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": None},
    )
    return folder


def _lumina(folder: Path, twin: Path | None, table: Table, groups: int, dtype: str, seed: int, kind: str) -> Path:
    sizes = Sizes(table.size)
    tensors = drawn(transformer_shapes(sizes, qk_norm="layer", groups=(groups, groups)), seed)
    save(folder, tensors, dtype)
    more = {"model_parallel_size": groups, "mask_image_logits": False, "dropout": 0.05}
    write_json(folder, config=_chameleon_config(kind, table, sizes, dtype, **more))
    if twin is not None:
        chameleon_twin(twin, tensors, table, sizes)
    return folder


def emu3_5(folder: Path, twin: Path | None = None, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Emu3.5: model_type is "Emu3" as in Emu3, but head_dim and QK-norm differ; tiktoken files.

    twin: Qwen3ForCausalLM, which has the same names.
    """
    table = tables.emu3()
    sizes = Sizes(table.size, H=24)
    tensors = drawn(transformer_shapes(sizes, qk_norm="rms"), seed)
    save(folder, tensors, dtype)
    ids = {"pad_token_id": "<|endoftext|>", "bos_token_id": "<|extra_203|>", "eos_token_id": "<|extra_204|>"}
    named = {key: table.id(name) for key, name in ids.items()}
    more = named | {"head_dim": 24, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_dropout": 0.0}
    write_json(folder, config=_config("Emu3ForCausalLM", "Emu3", table, sizes, dtype, **more))
    first = table.id("<|image token|>")
    (folder / "emu3.tiktoken").write_text(table.ranks())
    (folder / "emu3_vision_tokens.txt").write_text("".join(f"{name}\n" for name in table.names[first:]))
    if twin is not None:
        save(twin, tensors)
        write_json(twin, config=_config("Qwen3ForCausalLM", "qwen3", table, sizes, "float32", **more))
    return folder


def liquid(folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Liquid: Gemma with image ids after its own ids, and one table for head and embedding. GemmaForCausalLM reads it
    unchanged."""
    table = tables.gemma(codes=64)
    sizes = Sizes(table.size, H=24)
    tensors = drawn(transformer_shapes(sizes, tied=True), seed, centre=0.0, spread=0.4)
    save(folder, tensors, dtype)
    more = {"head_dim": 24, "hidden_act": "gelu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True}
    more |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = _config("GemmaForCausalLM", "gemma", table, sizes, dtype, **more)
    del config["tie_word_embeddings"]  # the published file lacks this key; the class has it as default
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder, config=config, tokenizer=table.byte_fallback(), tokenizer_config=marks)
    return folder


# ---- LWM -------------------------------------------------------------------------------------------------------------


def lwm_params(*, vision: bool = True, seed: int = 0) -> Tensors:
    """LWM's tensors in float32 by path, with separate layers: kernels [in, out], RoPE of neighbours, as many KV heads
    as query heads."""
    sizes = Sizes(320, K=4)
    tensors = drawn(transformer_shapes(sizes), seed)
    parts = {
        "self_attn.q_proj": "attention/wq", "self_attn.k_proj": "attention/wk", "self_attn.v_proj": "attention/wv",
        "self_attn.o_proj": "attention/wo", "mlp.gate_proj": "feed_forward/w1", "mlp.up_proj": "feed_forward/w3",
        "mlp.down_proj": "feed_forward/w2", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers.": "transformer/h/", "model.norm": "transformer/ln_f",
    }  # fmt: skip
    out: Tensors = {"transformer/wte/embedding": tensors.pop("model.embed_tokens.weight")}
    out["lm_head/kernel"] = tensors.pop("lm_head.weight").T
    if vision:
        out["transformer/vte/embedding"] = draw("vte.embed_tokens.weight", (LWM_VISION, sizes.D), seed)
        out["vision_head/kernel"] = draw("vision.lm_head.weight", (LWM_VISION, sizes.D), seed).T
    for name, tensor in tensors.items():
        tensor = interleaved(tensor, sizes.N) if "q_proj" in name or "k_proj" in name else tensor
        for theirs, lwms in parts.items():
            name = name.replace(theirs, lwms)
        out[name.replace(".weight", "/kernel").replace(".", "/")] = tensor.T if tensor.ndim == 2 else tensor
    return {name: np.ascontiguousarray(tensor) for name, tensor in out.items()}


def lwm(
    folder: Path,
    *,
    vision: bool = True,
    scanned: bool = True,
    prefix: bool = True,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """LWM's `params`, a msgpack stream of (path, flax's bytes of one array), and tokenizer.model.

    scanned: layers are stacked along the first axis under scan_decoder; otherwise each has its number. prefix: paths
    begin with ("params", "params"), as in complete training states.
    """
    import msgpack
    from flax.serialization import to_bytes

    flat = lwm_params(vision=vision, seed=seed)
    if scanned:
        layers: dict[str, list[np.ndarray]] = {}
        for name in sorted(name for name in flat if name.startswith("transformer/h/")):
            _, _, _, rest = name.split("/", 3)
            layers.setdefault(f"transformer/h/scan_decoder/{rest}", []).append(flat.pop(name))
        flat |= {name: np.stack(parts) for name, parts in layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    packer = msgpack.Packer()
    with (folder / "params").open("wb") as file:
        for name, tensor in flat.items():
            path = (("params", "params") if prefix else ()) + tuple(name.split("/"))
            file.write(packer.pack((path, to_bytes(tensor.astype(DTYPES[dtype])))))
    (folder / "tokenizer.model").write_bytes(tables.sentencepiece_model(320))
    return folder
