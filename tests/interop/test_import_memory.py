"""Small versions of the files that experiments/benchmarks/import_memory.py makes at real size."""

from __future__ import annotations

import json
import sys

import numpy as np
from safetensors.numpy import save_file

from ar_unified.interop.sources import open_source
from ar_unified.model.config import TransformerConfig
from experiments.benchmarks.import_memory import generate, measure

CONFIG = TransformerConfig(
    vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=64, qk_norm="layernorm"
)


def beside(folder, prefix=""):
    folder.mkdir()
    tensors = {"model.vqmodel.quant_conv.weight": np.ones((2, 2), np.float32)}
    tensors |= {f"{prefix}model.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "vq_config": {"a": 1}}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_made_model_has_the_presets_shapes_in_several_files(tmp_path):
    size = generate(tmp_path / "made", CONFIG, "chameleon", beside(tmp_path / "small"), 20_000)
    source = open_source(tmp_path / "made")
    assert source.shape("model.layers.1.mlp.up_proj.weight") == (64, 32)
    assert source.shape("model.layers.0.self_attn.q_norm.weight") == (4, 8)
    assert source.shape("lm_head.weight") == (96, 32) and source.dtype("lm_head.weight") == "BF16"
    assert source.read("model.vqmodel.quant_conv.weight").tolist() == [[1, 1], [1, 1]]
    assert 0.8 < np.std(source.read("lm_head.weight").astype(np.float32)) * 32**0.5 < 1.2
    files = list((tmp_path / "made").glob("model-*.safetensors"))
    assert len(files) > 2 and 0 < sum(file.stat().st_size for file in files) - size < 10_000
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["hidden_size"] == 32 and config["vq_config"] == {"a": 1}
    assert (tmp_path / "made" / "tokenizer.json").exists()


def test_emu3s_names_are_the_ports(tmp_path):
    generate(tmp_path / "made", CONFIG, "emu3", beside(tmp_path / "small", "text_model."), 1 << 20)
    names = open_source(tmp_path / "made").names()
    assert {"text_model.lm_head.weight", "text_model.model.norm.weight", "model.vqmodel.quant_conv.weight"} < names
    assert open_source(tmp_path / "made").shape("text_model.model.layers.0.mlp.up_proj.weight") == (64, 32)


def test_a_processs_memory_is_its_own(tmp_path):
    status, small, _ = measure([sys.executable, "-c", "raise SystemExit(3)"], {})
    assert status == 3
    _, large, _ = measure([sys.executable, "-c", "a = b'x' * (100 << 20)"], {})
    assert 90 << 20 < large - small < 120 << 20
