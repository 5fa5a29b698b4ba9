"""The oracles themselves: their files have the published keys and load completely, and no greedy step has a near
tie."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch", reason="the reference implementations need torch (make test-interop)")
transformers = pytest.importorskip("transformers", reason="the reference implementations are transformers'")

from safetensors.numpy import load_file  # noqa: E402

from tests.interop import formats, interleaved, reference, tables  # noqa: E402
from tests.interop import published as make  # noqa: E402
from tests.interop.weights import interleaved as neighbours  # noqa: E402

KEYS = Path(__file__).parents[3] / "shared" / "reference" / "published_keys"

# maker, its settings, and the class that loads it if config.json does not say
MODELS = [
    pytest.param(make.chameleon, (), {}, None, id="chameleon"),
    pytest.param(make.chameleon, (), {"swin": True}, None, id="chameleon-swin"),
    pytest.param(make.emu3, (), {}, None, id="emu3"),
    pytest.param(make.emu3_original, (), {}, "Emu3ForCausalLM", id="emu3-original"),
    pytest.param(make.emu3_original, (), {}, "LlamaForCausalLM", id="emu3-as-llama"),
    *[pytest.param(make.causal, (kind,), {}, None, id=kind) for kind in make.CAUSAL],
    pytest.param(formats.liquid, (), {}, None, id="liquid"),
    pytest.param(formats.meta, (), {"twin": True}, None, id="meta"),
    pytest.param(formats.lumina_1, (), {"twin": True}, None, id="lumina_1"),
    pytest.param(formats.lumina_2, (), {"twin": True}, None, id="lumina_2"),
    pytest.param(formats.emu3_5, (), {"twin": True}, None, id="emu3_5"),
]


def ids_for(size: int, rows: int = 2, length: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, (rows, length))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("maker", "args", "settings", "kind"), MODELS)
def test_it_loads_whole_and_answers(published, maker, args, settings, kind):
    model = reference.load(published(maker, *args, **settings), kind)
    size = model.model.lm_head.weight.shape[0]
    ids = ids_for(size)
    logits = model.logits(ids)
    assert logits.shape == (*ids.shape, size) and np.isfinite(logits).all() and logits.std() > 0.2
    assert np.abs(logits).max() < 100  # a masked column would have a huge negative logit
    expected = np.mean([math.log(np.exp(row.astype(np.float64)).sum()) - row[id_] for row, id_ in pairs(logits, ids)])
    assert model.loss(ids) == pytest.approx(expected, abs=1e-5)


def pairs(logits, ids):
    return [(logits[b, t], ids[b, t + 1]) for b in range(len(ids)) for t in range(ids.shape[1] - 1)]


@pytest.mark.parametrize(
    ("name", "maker", "args", "settings"),
    [
        ("chameleon_pre", make.chameleon, (), {}),
        ("chameleon_swin", make.chameleon, (), {"swin": True}),
        ("emu3", make.emu3, (), {"levels": 2}),
        ("llama", make.causal, ("llama",), {}),
        ("gemma", make.causal, ("gemma",), {}),
        ("qwen2", make.causal, ("qwen2",), {}),
        ("qwen3", make.causal, ("qwen3",), {}),
    ],
)
def test_the_files_have_the_published_keys(published, name, maker, args, settings):
    path = KEYS / f"{name}.keys.json"
    if not path.exists():
        pytest.skip("the key lists of the reference models are not beside this repository")
    tensors = tensors_of(published(maker, *args, **settings))
    expected = json.loads(path.read_text())
    saved = {key: shape for key, (shape, dtype) in expected.items() if "num_batches_tracked" not in key}
    found = {key: tensor.shape for key, tensor in tensors.items() if "num_batches_tracked" not in key}
    assert set(found) == set(saved)
    assert {key: len(shape) for key, shape in found.items()} == {key: len(shape) for key, shape in saved.items()}


def test_shards_and_bfloat16_are_the_same_tensors(published):
    whole = tensors_of(published(make.chameleon))
    folder = published(make.chameleon, sharded=True, dtype="bfloat16")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parts = tensors_of(folder)
    assert len(set(index.values())) > 3 and set(index) == set(parts) == set(whole)
    for name, tensor in parts.items():
        assert str(tensor.dtype) == "bfloat16" and np.array_equal(tensor, whole[name].astype(tensor.dtype)), name


def test_no_two_heads_have_the_same_norm(published):
    tensors = tensors_of(published(make.chameleon))
    rows = tensors["model.layers.0.self_attn.q_norm.weight"]
    assert rows.shape == (4, 16) and len(np.unique(rows, axis=0)) == 4
    assert rows.min() > 0.7 and rows.max() < 1.3 and np.ptp(rows) > 0.3
    equal = tensors_of(published(make.chameleon, equal_heads=True))["model.layers.0.self_attn.q_norm.weight"]
    assert len(np.unique(equal, axis=0)) == 1


def test_greedy_is_decided_at_every_step(published):
    """First only text ids are allowed, then only codes. These are the two modes of a sampler."""
    table, model = tables.chameleon(), reference.load(published(make.chameleon))
    prompts = [[0, *ids] for ids in np.random.default_rng(0).choice(table.text, (8, 6)).tolist()]
    for ids in (table.text, table.ids("IMGIMG")):
        only = functools.partial(lambda ids, _: ids, ids)
        prompt, drawn = reference.settled(functools.partial(model.greedy, allowed=only), prompts)
        assert len(drawn.ids) == 64 and drawn.gap > reference.GAP and set(drawn.ids.tolist()) <= set(ids)
        assert len(set(drawn.ids.tolist())) > 8
        again = model.logits(np.array([[*prompt, *drawn.ids]]))[0, len(prompt) - 1 : -1]
        assert np.array_equal(np.asarray(ids)[again[:, ids].argmax(-1)], drawn.ids)


def test_guidance_mixes_the_contexts(published):
    table, model = tables.chameleon(), reference.load(published(make.chameleon))
    codes, boi = table.ids("IMGIMG"), table.id("<racm3:break>")
    prompts = [[0, *table.text[3:9], boi], [0, boi]]
    alone = model.greedy(prompts[0], lambda _: codes, 8)
    assert np.array_equal(model.guided(prompts, [1.0, 0.0], lambda _: codes, 8).ids, alone.ids)
    guided = model.guided(prompts, [3.0, -2.0], lambda _: codes, 8)
    rows = [model.logits(np.array([prompt]))[0, -1, codes] for prompt in prompts]
    assert guided.ids[0] == codes[int((3.0 * rows[0] - 2.0 * rows[1]).argmax())]
    assert not np.array_equal(guided.ids, alone.ids)


def test_fine_tuning_falls_and_leaves_the_image_encoder(published):
    model = reference.load(published(make.chameleon))
    ids = ids_for(model.model.lm_head.weight.shape[0], 4, 32)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    losses = model.fine_tune([ids] * reference.STEPS)
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    moved = {n for n, p in model.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "vqmodel" not in n}


def test_cross_entropy_at_an_odd_width():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (2, 5, 1006)).astype(np.float32), rng.integers(0, 1006, (2, 5))
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(reference.cross_entropy(logits, targets), expected, atol=2e-6)


# ---- image encoders --------------------------------------------------------------------------------------------------


def test_chameleons_codes_are_many_and_its_placeholders_become_them(published):
    model = reference.load(published(make.chameleon)).model
    pixels = torch.from_numpy(make.pictures(count=4))
    with torch.inference_mode():
        codes = model.model.vqmodel.encode(pixels).image_tokens.reshape(4, 64)
        ids = model.model.get_image_tokens(pixels).reshape(4, 64)
    assert len(codes.unique()) > 16
    names = tables.chameleon().names
    assert [names[i] for i in ids[0].tolist()] == [tables.code_name(code) for code in codes[0].tolist()]


@pytest.mark.parametrize("original", [False, True])
def test_emu3s_vision_tokenizer_goes_there_and_back(published, original):
    folder = published(make.emu3_vision, original=original)
    names = set(tensors_of(folder))
    if original:
        assert {"encoder.mid.attn_1.norm.weight", "decoder.up.3.attn.1.norm.conv_y.weight"} <= names
        assert tensors_of(folder)["encoder.down.3.attn.0.q.weight"].shape == (64, 64, 1, 1)
        assert not any("attn_norm" in name or "_block." in name or "_proj." in name for name in names)
        assert len(names) == len(tensors_of(published(make.emu3_vision)))
        return
    model, info = transformers.Emu3VQVAE.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    variances = [buffer for name, buffer in model.named_buffers() if name.endswith("running_var")]
    assert variances and all(variance.std() > 0.01 for variance in variances)
    pixels = torch.from_numpy(make.pictures(64, 2))
    with torch.inference_mode():
        codes = model.encode(pixels, torch.tensor([[64, 64]] * 2)).image_tokens
        back = model.decode(torch.stack(list(codes)))
    assert [tuple(code.shape) for code in codes] == [(8, 8)] * 2 and len(torch.stack(list(codes)).unique()) > 16
    assert back.shape == (2, 3, 64, 64) and torch.isfinite(back).all()


# ---- one model in several formats ------------------------------------------------------------------------------------


def test_original_and_ported_emu3_are_one_model_under_two_names(published):
    old, port = tensors_of(published(make.emu3_original)), tensors_of(published(make.emu3))
    renamed = {
        name.replace("text_model.model.", "model.").replace("text_model.lm_head.", "lm_head."): tensor.shape
        for name, tensor in port.items()
        if not name.startswith("vqmodel.")
    }
    assert renamed == {name: tensor.shape for name, tensor in old.items()}


@pytest.mark.parametrize("swin", [False, True])
def test_metas_ranks_and_transformers_agree(published, swin):
    """The transcription on the shards (with RoPE of neighbours) is compared with Chameleon's class on the joined
    tensors."""
    parts, params, _, sizes = formats.meta_shards(swin=swin)
    ids = ids_for(sizes.V)
    expected = reference.load(published(formats.meta, twin=True, swin=swin)).logits(ids)
    np.testing.assert_allclose(interleaved.meta_logits(parts, params, ids), expected, atol=5e-5)
    other = interleaved.meta_logits(parts, {"model": params["model"] | {"swin_norm": not swin}}, ids)
    assert np.abs(other - expected).max() > 0.05  # the flag alone makes a difference


def test_lwms_transcription_and_llama_agree_on_text():
    params = formats.lwm_params(vision=False)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": formats.LWM_THETA},
    )  # fmt: skip
    llama = make.fill(transformers.LlamaForCausalLM(config))  # weights are drawn by name, so they are the same
    state = llama.state_dict()
    query = state["model.layers.1.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(params["transformer/h/1/attention/wq/kernel"], neighbours(query, 4).T)
    ids = ids_for(320)
    hidden = interleaved.Lwm(params, formats.LWM_THETA).hidden(ids, np.zeros(ids.shape, bool))
    oracle = reference.Reference(llama)
    np.testing.assert_allclose(hidden @ params["lm_head/kernel"], oracle.logits(ids), atol=5e-5)
    np.testing.assert_allclose(hidden, oracle.hidden(ids), atol=2e-5)


def test_metas_shards_go_through_torchs_own_file(tmp_path):
    """torch.load with weights_only gives back the tensors of the .pth files that `meta_pickles` writes."""
    parts, *_ = formats.meta_shards()
    paths = make.meta_pickles(tmp_path, parts, "bfloat16")
    assert [path.name for path in paths] == [f"consolidated.{i:02}.pth" for i in range(4)]
    for path, part in zip(paths, parts, strict=True):
        found = torch.load(path, weights_only=True)
        assert set(found) == set(part)
        assert all(torch.equal(found[name], torch.from_numpy(t).to(torch.bfloat16)) for name, t in part.items())


@pytest.mark.parametrize(("maker", "groups"), [(formats.lumina_1, 2), (formats.lumina_2, 1)])
def test_luminas_norms_are_stored_by_group_and_repeated_in_the_twin(published, maker, groups):
    stored, twin = tensors_of(published(maker)), tensors_of(published(maker, twin=True))
    name = "model.layers.0.self_attn.q_norm.bias"
    assert stored[name].shape == (groups, 16) and twin[name].shape == (4, 16)
    assert np.array_equal(twin[name], np.repeat(stored[name], 4 // groups, axis=0))
    assert set(twin) - set(stored) and all("vqmodel" in key for key in set(twin) - set(stored))
