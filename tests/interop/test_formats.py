"""Folders in published formats that need no torch: tables, Meta's shards, LWM's stream, and one model in both forms."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.interop import formats, interleaved, tables
from tests.interop.weights import Sizes, shards, transformer_shapes
from tests.interop.weights import interleaved as neighbours

TABLES = [tables.chameleon, tables.emu3, tables.qwen, tables.lumina_2, tables.llama, tables.gemma]


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_a_table_names_each_id_once_and_spells_no_text_with_a_special_name(make):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizer.json is read by the tokenizers package")
    table = make()
    assert len(set(table.names)) == len(table.names) <= table.size
    file = table.byte_fallback() if make is tables.gemma else table.split()
    codec = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert [codec.token_to_id(name) for name in table.names] == list(range(len(table.names)))
    text = "the ceiling, 64*64  and \u00fcber \U0001f642\n"
    ids = codec.encode(text, add_special_tokens=False).ids
    assert set(ids) <= set(table.text) and codec.decode(ids, skip_special_tokens=False) == text


def test_ids_are_in_the_published_order():
    chameleon, emu3, lumina, liquid = tables.chameleon(), tables.emu3(), tables.lumina_2(), tables.gemma(codes=64)
    assert chameleon.ids("IMGIMG") == list(range(4, 68)) and chameleon.names[4 + 10] == "IMGIMGBAZ"
    assert [chameleon.id(name) for name in ("<s>", "<pad>", "</s>", "<eoss>", "<racm3:break>")] == [0, 1, 2, 68, 69]
    assert max(chameleon.ids("")) < min(chameleon.text)
    first = emu3.id("<|endoftext|>")
    marks = ("<|extra_200|>", "<|extra_203|>", "<|image token|>", "<|visual token 000000|>")
    real = (151846, 151849, 151851, 151854)  # published ids, which follow 151643 text pieces
    assert [emu3.id(name) - first for name in marks] == [id_ - 151643 for id_ in real]
    assert emu3.text == list(range(first)) and emu3.names[9] == "*" and emu3.names[15] == "0"
    assert lumina.ids("IMGIMG")[-1] == lumina.size - 1
    assert liquid.size - 64 == len(liquid.names) and liquid.names[:4] == ("<pad>", "<eos>", "<bos>", "<unk>")


def test_the_ranks_are_all_bytes_and_what_merges_make():
    ranks = dict(line.split() for line in tables.emu3().ranks().splitlines())
    pieces = {base64.b64decode(piece): int(rank) for piece, rank in ranks.items()}
    assert sorted(pieces.values()) == list(range(len(pieces)))
    assert {bytes([byte]) for byte in range(256)} <= set(pieces) and b" the" in pieces


def test_neighbours_of_a_head_are_what_halves_were():
    rows = np.arange(2 * 8)[:, None] * np.ones((1, 3))
    turned = neighbours(rows, 2)
    assert turned[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7] and turned.shape == rows.shape
    vectors = np.arange(16).reshape(2, 8)
    assert neighbours(vectors, 2)[1].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]


def test_shards_joined_are_the_tensors():
    parts, params, _, sizes = formats.meta_shards()
    fused, _, _, _ = formats.meta_shards(fused=True)
    model = params["model"]
    lowest = int(model["ffn_dim_multiplier"] * int(2 * 4 * model["dim"] / 3))
    assert -(-lowest // model["multiple_of"]) * model["multiple_of"] == sizes.F
    whole = np.concatenate([part["layers.0.attention.wq.weight"] for part in parts])
    assert whole.shape == (sizes.N * sizes.H, sizes.D)
    for part, one in zip(parts, fused, strict=True):
        rows = [part[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk", "wv")]
        assert np.array_equal(one["layers.0.attention.wqkv.weight"], np.concatenate(rows))
    norms = [part["layers.0.attention.q_normalization.weight"] for part in parts]
    assert norms[0].shape == (sizes.H,) and not np.allclose(norms[0], norms[1])
    assert np.array_equal(parts[0]["norm.weight"], parts[3]["norm.weight"])
    assert [len(shard) for shard in shards([("a", np.zeros(4)), ("b", np.zeros(3))], {"a": 0}, 2)] == [2, 2]


def test_meta_folders_have_the_shards_and_the_tokenizers_folder(published):
    folder = published(formats.meta)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {f"models/30b/consolidated.{i:02}.safetensors" for i in range(4)}
    expected |= {"models/30b/params.json", "models/30b/consolidate_params.json"}
    expected |= {f"tokenizer/{name}" for name in ("text_tokenizer.json", "vqgan.yaml", "vqgan.safetensors")}
    assert names == expected
    one = published(formats.meta, count=1)
    assert (one / "models" / "7b" / "consolidated.safetensors").exists()
    codes = load_file(folder / "tokenizer" / "vqgan.safetensors")
    assert "decoder.up.1.upsample.conv.weight" in codes and codes["quantize.embedding.weight"].shape == (64, 16)


def _stream(path):
    import msgpack
    from flax.serialization import msgpack_restore

    with path.open("rb") as file:
        return {tuple(key): msgpack_restore(value) for key, value in msgpack.Unpacker(file)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stream_holds_every_tensor_stacked_or_by_layer(published, dtype):
    flat = formats.lwm_params()
    stacked = _stream(published(formats.lwm, dtype=dtype) / "params")
    apart = _stream(published(formats.lwm, dtype=dtype, scanned=False, prefix=False) / "params")
    assert {"/".join(key) for key in apart} == set(flat) and {key[:2] for key in stacked} == {("params", "params")}
    name = "transformer/h/{}/attention/wq/kernel"
    layers = stacked["params", "params", *name.format("scan_decoder").split("/")]
    assert layers.shape == (2, 64, 64) and str(layers.dtype) == dtype
    for i in range(2):
        assert np.array_equal(layers[i], apart[tuple(name.format(i).split("/"))])
        assert np.array_equal(layers[i], flat[name.format(i)].astype(layers.dtype))
    text = _stream(published(formats.lwm, vision=False) / "params")
    assert not any("vte" in key or "vision_head" in key for key in text)


def test_lwm_reads_each_table_where_it_is_told_and_no_later_id():
    model = interleaved.Lwm(formats.lwm_params(), formats.LWM_THETA)
    rng = np.random.default_rng(3)
    ids, vision = rng.integers(0, 66, (2, 12)), np.arange(12) % 3 == 0
    is_vision = np.broadcast_to(vision, ids.shape)
    text, codes = model.logits(ids, is_vision)
    assert text.shape == (2, 12, 320) and codes.shape == (2, 12, formats.LWM_VISION)
    later = ids.copy()
    later[:, 9:] = 1
    assert np.allclose(model.logits(later, is_vision)[0][:, :9], text[:, :9], atol=1e-12)
    other = np.abs(model.logits(ids, ~is_vision)[0] - text)
    assert other.max() > 1


def test_shapes_are_those_of_the_published_models():
    shapes = transformer_shapes(Sizes(65536, D=4096, F=11008, L=1, N=32, K=32, H=128), qk_norm="layer", groups=(32, 32))
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (32, 128)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (11008, 4096) and shapes["lm_head.weight"] == (65536, 4096)
    wide = transformer_shapes(Sizes(282926, D=5120, F=25600, L=1, N=64, K=8, H=128), qk_norm="rms")
    assert wide["model.layers.0.self_attn.o_proj.weight"] == (5120, 8192)
    assert wide["model.layers.0.self_attn.k_norm.weight"] == (128,)
