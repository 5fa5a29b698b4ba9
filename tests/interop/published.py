"""Tiny random models in the published formats, written by transformers itself: needs torch.

Each maker fills a folder like one of the hub (weights, config, tokenizer, processor) and returns it. Ids come from
`tables`, weights from `weights`. Systems without a class in transformers are in `formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.interop import tables
from tests.interop.tables import Table, write_json
from tests.interop.weights import draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PIXELS = 16  # side of the pictures for Chameleon's fixed grid of 8 x 8 codes
SHARD = "100KB"  # largest file of a sharded folder

_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


def fill(model: torch.nn.Module, seed: int = 0, **drawing: float) -> torch.nn.Module:
    """Fills every saved parameter and buffer with random numbers by its name, as `draw` does; counters stay."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(draw(name, tuple(tensor.shape), seed, **drawing)))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def _save(model: Any, folder: Path, dtype: str, sharded: bool) -> Path:
    model.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=SHARD if sharded else "1GB")
    return folder


def pictures(side: int = PIXELS, count: int = 2, seed: int = 5) -> np.ndarray:
    """float32 [count, 3, side, side] in -1..1: smooth, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (count, 3, 4, 4)).repeat(-(-side // 4), axis=2).repeat(-(-side // 4), axis=3)
    return np.clip(coarse[..., :side, :side] + rng.normal(0, 0.1, (count, 3, side, side)), -1, 1).astype(np.float32)


def _scale_codes(embedding: torch.nn.Embedding, latents: torch.Tensor, seed: int) -> None:
    """Gives the codebook the latents' mean and spread in each channel of [..., C], so that no code is far from all
    pictures."""
    flat = latents.reshape(-1, latents.shape[-1])
    noise = np.random.default_rng([seed, 77]).normal(0, 1, tuple(embedding.weight.shape)).astype(np.float32)
    with torch.no_grad():
        embedding.weight.copy_(flat.mean(0) + flat.std(0) * torch.from_numpy(noise))


# ---- Chameleon, Anole ------------------------------------------------------------------------------------------------


def chameleon(
    folder: Path,
    *,
    swin: bool = False,
    dtype: str = "float32",
    sharded: bool = False,
    equal_heads: bool = False,
    seed: int = 0,
) -> Path:
    """ChameleonForConditionalGeneration with its image encoder and 64 codes; a picture of 16 x 16 pixels has 8 x 8
    codes.

    equal_heads: QK-norm weights are one repeated vector, as a third party found in the 7B. Otherwise each head has its
    own.
    """
    table = tables.chameleon()
    config = transformers.ChameleonConfig(
        **_SIZES, vocab_size=table.size, rms_norm_eps=1e-5, rope_parameters=_rope(1e4), swin_norm=swin,
        model_parallel_size=1, vocabulary_map=table.vocabulary, tie_word_embeddings=False,
        vq_config={
            "embed_dim": 16, "num_embeddings": 64, "latent_channels": 16, "resolution": PIXELS, "base_channels": 32,
            "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": None, "attn_type": "vanilla",
        },
    )  # fmt: skip
    model: Any = fill(transformers.ChameleonForConditionalGeneration(config), seed)
    with torch.no_grad():
        if equal_heads:
            for layer in model.model.layers:
                for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                    norm.weight.copy_(norm.weight[:1].expand_as(norm.weight))
                    norm.bias.copy_(norm.bias[:1].expand_as(norm.bias))
        vq = model.model.vqmodel
        latents = vq.quant_conv(vq.encoder(torch.from_numpy(pictures(count=8))))
        _scale_codes(vq.quantize.embedding, latents.permute(0, 2, 3, 1), seed)
    _save(model, folder, dtype, sharded)
    chameleon_text(folder, table)
    write_json(
        folder,
        preprocessor_config={
            "image_processor_type": "ChameleonImageProcessor", "processor_class": "ChameleonProcessor", "resample": 1,
            "size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}, "do_resize": True,
            "do_center_crop": True, "do_rescale": True, "rescale_factor": 0.0078, "do_normalize": True,
            "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0], "do_convert_rgb": True,
        },
        processor_config={"image_seq_length": 64, "image_token": "<image>", "processor_class": "ChameleonProcessor"},
    )  # fmt: skip
    return folder


def chameleon_text(folder: Path, table: Table) -> None:
    """The tokenizer's files as transformers' conversion writes them."""
    write_json(
        folder,
        tokenizer=table.byte_level(),
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
            "unk_token": "<unk>", "sep_token": "<reserved08706>", "model_max_length": 4096,
            "clean_up_tokenization_spaces": False, "image_token": "<image>", "boi_token": "<racm3:break>",
            "eoi_token": "<eoss>",
        },
    )  # fmt: skip


# ---- Emu3 ------------------------------------------------------------------------------------------------------------


def _emu3_vision(levels: int) -> dict[str, Any]:
    return {
        "codebook_size": 64, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "num_res_blocks": 1,
        "channel_multiplier": [1] * (levels - 1) + [2], "attn_resolutions": [levels - 1], "hidden_size": 64,
        "num_attention_heads": 1,
    }  # fmt: skip


def _emu3_text(table: Table, longest: int) -> dict[str, Any]:
    """The text part of config.json. longest: the number of positions, which differs between Chat and Gen."""
    ids = {"pad_token_id": "<|endoftext|>", "bos_token_id": "<|extra_203|>", "eos_token_id": "<|extra_204|>"}
    return (
        _SIZES
        | {key: table.id(name) for key, name in ids.items()}
        | {"vocab_size": table.size, "rms_norm_eps": 1e-5, "rope_parameters": _rope(1e6), "attention_dropout": 0.1}
        | {"max_position_embeddings": longest}
    )


def _fill_emu3_vision(vq: Any, seed: int) -> None:
    """Fits the codebook of `vq`, which has its other weights already, to its encoder's latents of pictures."""
    side = 8 * vq.spatial_scale_factor
    with torch.no_grad():
        frames = torch.from_numpy(pictures(side, 4))[:, None].repeat(1, vq.config.temporal_downsample_factor, 1, 1, 1)
        latents = vq.quant_conv(vq.encoder(frames).permute(0, 2, 1, 3, 4))
        _scale_codes(vq.quantize.embedding, latents.permute(0, 2, 3, 4, 1), seed)


def emu3(folder: Path, *, levels: int = 4, dtype: str = "float32", sharded: bool = False, seed: int = 0) -> Path:
    """Emu3ForConditionalGeneration: transformers' port of Chat with its vision tokenizer; 2 ** (levels - 1) pixels per
    code."""
    table = tables.emu3(placeholder="<image>")
    config = transformers.Emu3Config(
        text_config=_emu3_text(table, 131072), vq_config=_emu3_vision(levels), vocabulary_map=table.vocabulary
    )
    model: Any = fill(transformers.Emu3ForConditionalGeneration(config), seed)
    _fill_emu3_vision(model.model.vqmodel, seed)
    _save(model, folder, dtype, sharded)
    write_json(
        folder,
        tokenizer=table.byte_level(),
        tokenizer_config={
            "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": "<|extra_203|>",
            "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {
                "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
                "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
            },
        },
        preprocessor_config=_EMU3_PIXELS | {"processor_class": "Emu3Processor", "spatial_factor": 2 ** (levels - 1)},
    )  # fmt: skip
    return folder


_EMU3_PIXELS = {
    "image_processor_type": "Emu3ImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True, "do_pad": True, "min_pixels": 32 * 32, "max_pixels": 64 * 64,
}  # fmt: skip


def emu3_original(folder: Path, *, dtype: str = "float32", sharded: bool = False, seed: int = 0) -> Path:
    """Emu3-Gen with the names of its own repository, which are Llama's, and its tiktoken files, without a vision
    tokenizer.

    Emu3ForCausalLM writes it, because it has the same names.
    """
    table = tables.emu3()
    model = fill(transformers.Emu3ForCausalLM(transformers.Emu3TextConfig(**_emu3_text(table, 9216))), seed)
    _save(model, folder, dtype, sharded)
    emu3_text(folder, table)
    config = _old_spelling(folder) | {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], "image_area": 518400}
    write_json(
        folder,
        config=config | {"img_token_id": table.id("<|image token|>"), "boi_token_id": table.id("<|image start|>")},
        generation_config={key: config[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    return folder


def emu3_text(folder: Path, table: Table) -> None:
    """emu3.tiktoken and the file of vision tokens, one per line."""
    first = table.id("<|image token|>")
    (folder / "emu3.tiktoken").write_text(table.ranks())
    (folder / "emu3_vision_tokens.txt").write_text("".join(f"{name}\n" for name in table.names[first:]))


def _old_spelling(folder: Path) -> dict[str, Any]:
    """config.json as versions before 5 write it: rope_theta at the top, torch_dtype."""
    import json

    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    return config


ORIGINAL_VISION = (  # transformers' parts of names -> those of BAAI/Emu3-VisionTokenizer, for the encoder and decoder
    (".down_block.down.", ".down."), (".up_block.up.", ".up."), (".middle_block.", ".mid."),
    (".q_proj.", ".q."), (".k_proj.", ".k."), (".v_proj.", ".v."), (".out_proj.", ".proj_out."),
)  # fmt: skip


def _original_vision(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in the original's form: attention layers contain their norm, and their projections are 1 x 1
    convolutions."""
    import re

    out = {}
    for name, tensor in tensors.items():
        if ".attn" in name and "norm" not in name and name.endswith("weight"):
            tensor = tensor[:, :, None, None]
        for ours, theirs in ORIGINAL_VISION:
            name = name.replace(ours, theirs)
        name = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", name)
        name = name.replace(".mid.attn_norm.", ".mid.attn_1.norm.")
        out[name] = tensor.contiguous()
    return out


def emu3_vision(folder: Path, *, levels: int = 4, original: bool = False, seed: int = 0) -> Path:
    """Only Emu3VQVAE. original: with the names of BAAI/Emu3-VisionTokenizer, as read in its code."""
    vq: Any = fill(transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**_emu3_vision(levels))), seed)
    _fill_emu3_vision(vq, seed)
    _save(vq, folder, "float32", False)
    write_json(folder, preprocessor_config=_EMU3_PIXELS | {"spatial_factor": 2 ** (levels - 1)})
    if original:
        path = folder / "model.safetensors"
        save_file(_original_vision(load_file(path)), path, metadata={"format": "pt"})
        vision = _emu3_vision(levels)
        write_json(
            folder,
            config={
                "model_type": "Emu3VisionVQ", "architectures": ["Emu3VisionVQModel"], "torch_dtype": "float32",
                "codebook_size": 64, "embed_dim": 4, "z_channels": 4, "double_z": False, "in_channels": 3,
                "out_channels": 3, "temporal_downsample_factor": 4, "ch": 32, "ch_mult": vision["channel_multiplier"],
                "num_res_blocks": 1, "attn_resolutions": vision["attn_resolutions"], "dropout": 0.0,
            },
        )  # fmt: skip
    return folder


# ---- plain language models -------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _llama(table: Table, **more: Any) -> Any:
    named = {"bos_token_id": table.id("<|begin_of_text|>"), "eos_token_id": table.id("<|end_of_text|>")}
    rope = _rope(5e5) | more.pop("rope", {})
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **_SIZES, **named, vocab_size=table.size, rms_norm_eps=1e-5, rope_parameters=rope, **more
        )
    )


def _qwen2(table: Table, tied: bool = False) -> Any:
    config = transformers.Qwen2Config(
        **_SIZES, vocab_size=table.size, rms_norm_eps=1e-6, rope_parameters=_rope(1e6), tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=table.id("<|endoftext|>"),
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def simplear(folder: Path, *, dtype: str = "float32", seed: int = 0, named: bool = True) -> Path:
    """SimpARForCausalLM, which is Qwen2's class. named: tokenizer.json has SimpleAR's names; otherwise they are in a
    file beside it, as SimpleAR's own (slow, pure Python) loader writes them."""
    table = tables.simplear()
    _save(fill(_qwen2(table, tied=True), seed, spread=1.0), folder, dtype, False)
    file = table.split({"type": "NFC"})
    if not named:
        own = [token for token in file["added_tokens"] if token["id"] >= table.id("<|t2i|>")]
        file["added_tokens"] = [token for token in file["added_tokens"] if token not in own]
        file["model"]["vocab"] = {name: id for name, id in table.vocabulary.items() if id < table.id("<|t2i|>")}
        write_json(folder, added_tokens={token["content"]: token["id"] for token in own})
    write_json(folder, tokenizer=file, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    return folder


def tar(folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Tar, which has Qwen2's class. Its codes are tokens of the text tokenizer, which does not mark them as special."""
    table = tables.tar()
    _save(fill(_qwen2(table), seed), folder, dtype, False)
    file = table.split({"type": "NFC"})
    for token in file["added_tokens"]:
        token["special"] = token["content"].startswith(("<|", "<im"))
    write_json(folder, tokenizer=file, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    return folder


def _qwen3(table: Table) -> Any:
    config = transformers.Qwen3Config(
        **_SIZES, vocab_size=table.size, head_dim=24, rms_norm_eps=1e-6, rope_parameters=_rope(1e6),
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=table.id("<|endoftext|>"),
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def _gemma(table: Table) -> Any:
    config = transformers.GemmaConfig(
        **_SIZES, vocab_size=table.size, head_dim=24, rms_norm_eps=1e-6, rope_parameters=_rope(1e4), hidden_act="gelu",
        hidden_activation=None, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config)


CAUSAL: dict[str, tuple[Callable[[], Table], Callable[[Table], Any]]] = {
    "llama": (tables.llama, lambda table: _llama(table, tie_word_embeddings=False)),
    "llama_tied": (tables.llama, lambda table: _llama(table, tie_word_embeddings=True)),
    "llama3": (tables.llama, lambda table: _llama(table, tie_word_embeddings=False, rope=LLAMA3)),
    "qwen2": (tables.qwen, _qwen2),
    "qwen3": (tables.qwen, _qwen3),
    "gemma": (tables.gemma, _gemma),
}


def causal(folder: Path, kind: str, *, dtype: str = "float32", sharded: bool = False, seed: int = 0) -> Path:
    """A text-only language model of `CAUSAL`, with its tokenizer."""
    make_table, make = CAUSAL[kind]
    table = make_table()
    drawing = {"gemma": {"centre": 0.0, "spread": 0.4}, "llama_tied": {"spread": 1.0}}.get(kind, {})
    _save(fill(make(table), seed, **drawing), folder, dtype, sharded)
    if kind == "gemma":
        marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        write_json(folder, tokenizer=table.byte_fallback())
    elif kind.startswith("qwen"):
        marks = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        write_json(folder, tokenizer=table.split({"type": "NFC"}))
    else:
        marks = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        write_json(folder, tokenizer=table.split())
    write_json(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"} | marks)
    return folder


def meta_pickles(folder: Path, parts: Sequence[dict[str, np.ndarray]], dtype: str = "float32") -> list[Path]:
    """Writes consolidated.NN.pth (torch's zip with a pickle) for each shard, or consolidated.pth for a single one."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        folder / ("consolidated.pth" if len(parts) == 1 else f"consolidated.{i:02}.pth") for i in range(len(parts))
    ]
    for path, part in zip(paths, parts, strict=True):
        torch.save({name: torch.from_numpy(tensor).to(DTYPES[dtype]) for name, tensor in part.items()}, path)
    return paths
