"""The transformer: what a position may see, packing, padding, the cache, and options that change cost but not
results."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.kernels.attention import xla
from ar_unified.model.cache import init_cache
from ar_unified.model.config import PRESETS, TransformerConfig, config_from, parameter_count
from ar_unified.model.dropout import dropout
from ar_unified.model.transformer import Transformer, init, logical_axes, rms_norm
from ar_unified.parallel.mesh import make_mesh

CONFIG = config_from("debug", 40, qk_norm="layernorm")


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_params(config: TransformerConfig, seed: int = 0):
    """Parameters without special values, because norm scales of 1 and biases of 0 would hide mistakes."""
    params = init(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    )


def make_tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocab_size)


def whole_rows(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """tokens, positions and doc_start of rows with one document each."""
    return tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.zeros_like(tokens)


def forward(config: TransformerConfig, params, *rows: jax.Array) -> jax.Array:
    return jax.jit(lambda params, *rows: Transformer.bind(config, params)(*rows))(params, *rows)


def forward_logits(config: TransformerConfig, params, *rows: jax.Array) -> jax.Array:
    def logits(params, *rows):
        model = Transformer.bind(config, params)
        return model.logits(model(*rows))

    return jax.jit(logits)(params, *rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width, depth", [(32, 2), (32, 12), (256, 2)])
def test_fresh_parameters_keep_the_size_of_what_they_read(width, depth, tied):
    sizes = dict(d_model=width, n_layers=depth, n_heads=4, n_kv_heads=4, head_dim=width // 4, d_mlp=2 * width)
    config = dataclasses.replace(CONFIG, vocab_size=400, tie_embeddings=tied, **sizes)
    params = init(config, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"]):
        if leaf.ndim > 2:
            name = path[-1].key
            fan_in = {"down": 2 * width}.get(name, width)
            shrunk = 2 * depth if name in ("output", "down") else 1
            np.testing.assert_allclose(jnp.var(leaf), 1 / (fan_in * shrunk), rtol=0.1, err_msg=name)
    logits = forward_logits(config, params, *whole_rows(jax.random.randint(jax.random.key(1), (4, 64), 0, 400)))
    # An untrained model with tied embeddings prefers the token that it has just read.
    assert 0.8 < float(jnp.median(jnp.std(logits, axis=-1))) < (1.4 if tied else 1.2)


@pytest.fixture(params=["one chunk", "chunks", "chunks in a loop"])
def chunks(request, monkeypatch):
    """Attention over rows of 12 tokens in one piece, in 3 prefixes of one chunk each, and in 2 prefixes of two
    chunks."""
    if request.param != "one chunk":
        monkeypatch.setattr(xla, "CHUNK", 4 if request.param == "chunks" else 3)
        monkeypatch.setattr(xla, "PREFIXES", 8 if request.param == "chunks" else 2)
    return request.param


def packed_rows() -> tuple[jax.Array, jax.Array, jax.Array, list[tuple[int, slice]]]:
    """Two rows of documents with padding after them, and the place of each document."""
    T, lengths = 12, [[5, 4], [1, 7, 2]]
    positions, doc_start = np.zeros((2, T), np.int32), np.full((2, T), T, np.int32)
    where = []
    for row, row_lengths in enumerate(lengths):
        begin = 0
        for length in row_lengths:
            positions[row, begin : begin + length] = np.arange(length)
            doc_start[row, begin : begin + length] = begin
            where.append((row, slice(begin, begin + length)))
            begin += length
    return make_tokens(2, T), jnp.asarray(positions), jnp.asarray(doc_start), where


@pytest.mark.parametrize("norm_placement", ["pre", "swin"])
def test_a_position_sees_itself_and_the_past_of_its_document_and_nothing_else(chunks, norm_placement):
    config = dataclasses.replace(CONFIG, norm_placement=norm_placement)
    params = make_params(config)
    _, positions, doc_start, where = packed_rows()
    inputs = jax.random.normal(jax.random.key(3), (*positions.shape, config.d_model))
    # Tokens cannot be differentiated. So each position has a different id, and the embedding table is differentiated.
    ids = jnp.arange(positions.size, dtype=jnp.int32).reshape(positions.shape)

    def hidden(inputs):
        return Transformer.bind(config, params | {"embedding": inputs.reshape(-1, config.d_model)})(
            ids, positions, doc_start
        )

    reach = np.abs(jax.jit(jax.jacrev(hidden))(inputs)).sum((2, 5))  # [B, T, B, T]: output against input
    expected = np.zeros_like(reach, dtype=bool)
    for row, place in where:
        expected[row, place, row, place] = np.tri(place.stop - place.start, dtype=bool)
    for row, position in np.argwhere(doc_start == doc_start.shape[1]):
        expected[row, position, row, position] = True  # padding sees only itself, through the residual stream
    np.testing.assert_array_equal(reach > 0, expected)


@pytest.mark.exact
def test_packed_documents_are_as_if_each_were_alone(chunks):
    params = make_params(CONFIG)
    tokens, positions, doc_start, where = packed_rows()
    packed = forward(CONFIG, params, tokens, positions, doc_start)
    rows = np.zeros(
        (len(where), *tokens.shape[1:]), np.int32
    )  # one document per row; causality hides the padding after it
    for i, (row, place) in enumerate(where):
        rows[i, : place.stop - place.start] = tokens[row, place]
    alone = forward(CONFIG, params, *whole_rows(jnp.asarray(rows)))
    for i, (row, place) in enumerate(where):
        np.testing.assert_allclose(packed[row, place], alone[i, : place.stop - place.start], atol=1e-5)


@pytest.mark.exact
@pytest.mark.parametrize("norm_placement", ["pre", "swin"])
def test_prefill_and_decode_equal_the_teacher_forced_forward(norm_placement):
    config = dataclasses.replace(CONFIG, norm_placement=norm_placement)
    model = Transformer.bind(config, make_params(config))
    lengths, total = np.array([5, 2, 1]), 11
    tokens = make_tokens(3, total)
    expected = forward_logits(config, make_params(config), *whole_rows(tokens))

    @jax.jit
    def extend(tokens, cache, start):
        hidden, cache = model.extend(tokens, cache, start)
        return model.logits(hidden), cache

    prompts = jnp.where(jnp.arange(5) < lengths[:, None], tokens[:, :5], 0)  # right-padded
    logits, cache = extend(prompts, init_cache(config, 3, total), jnp.zeros(3, jnp.int32))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-5)
    # Padding beyond the end of the cache is not written, so it does not overwrite the last key of the row.
    padded = jnp.pad(tokens, [(0, 0), (0, 2)])
    logits_of_all, _ = extend(padded, init_cache(config, 3, total), jnp.zeros(3, jnp.int32))
    np.testing.assert_allclose(logits_of_all[:, :total], expected, atol=1e-5)

    start = lengths.copy()
    for _ in range(8):  # the first row exceeds the cache
        step = tokens[np.arange(3), np.minimum(start, total - 1)][:, None]
        logits, cache = extend(step, cache, jnp.asarray(start))
        for i in np.flatnonzero(start < total).tolist():
            np.testing.assert_allclose(logits[i, 0], expected[i, start[i]], atol=1e-5, err_msg=f"{i} at {start[i]}")
        start += 1


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(dict(fsdp=2, tensor=2, context=2), marks=pytest.mark.exact),
        pytest.param(dict(data=4, tensor=2), marks=pytest.mark.exact_later),
        pytest.param(dict(data=2, tensor=4), marks=pytest.mark.exact_later),
    ],
    ids=str,
)
def test_the_cache_is_read_alike_on_any_mesh(shape):
    model, tokens = Transformer.bind(CONFIG, make_params(CONFIG)), make_tokens(4, 6)

    def read(tokens):
        start = jnp.array([0, 3, 1, 0], jnp.int32)  # the zeros in the cache before a start are read too
        hidden, cache = model.extend(tokens[:, :5], init_cache(CONFIG, 4, 12), start)
        return hidden, model.extend(tokens[:, 5:], cache, start + 5)[0]

    expected = jax.jit(read)(tokens)
    with jax.set_mesh(make_mesh(shape)):
        found = jax.jit(read)(tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    "change",
    [
        dict(scan_layers=True),
        dict(remat="full"),
        *(pytest.param(dict(remat=name), marks=pytest.mark.slow) for name in ("dots", "attention")),
        *(
            pytest.param(dict(scan_layers=True, remat=name), marks=pytest.mark.slow)
            for name in ("offload", "offload_attention")
        ),
    ],
    ids=str,
)
def test_options_of_cost_change_neither_values_nor_gradients(change):
    base = dataclasses.replace(CONFIG, dropout=0.2)  # dropout must draw the same masks
    params = make_params(base)
    tokens, positions, doc_start, _ = packed_rows()

    def run(config):
        def loss(params):
            model = Transformer.bind(config, params)
            return (
                model.logits(model(tokens, positions, doc_start, jax.random.split(jax.random.key(7), 2))) ** 2
            ).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        run(base),
        run(dataclasses.replace(base, **change)),
    )


def test_dropout_drops_at_its_rate_keeps_the_mean_and_needs_a_key():
    dropped = np.asarray(dropout(jnp.ones((400, 500)), 0.3, jax.random.split(jax.random.key(0), 400)))
    assert abs((dropped == 0).mean() - 0.3) < 0.01 and abs(dropped.mean() - 1) < 0.01
    config = dataclasses.replace(CONFIG, dropout=0.3)
    params, rows = make_params(config), whole_rows(make_tokens(2, 12))
    assert not np.allclose(
        *(forward(config, params, *rows, jax.random.split(jax.random.key(seed), 2)) for seed in (0, 1))
    )
    np.testing.assert_array_equal(forward(config, params, *rows), forward(CONFIG, params, *rows))


def test_bfloat16_computes_in_bfloat16_over_float32_parameters():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params, rows = make_params(config), whole_rows(make_tokens(2, 12))
    hidden = forward(config, params, *rows)
    assert hidden.dtype == jnp.bfloat16 and forward_logits(config, params, *rows).dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    exact = forward(CONFIG, params, *rows)
    assert np.corrcoef(np.asarray(hidden, np.float32).ravel(), np.asarray(exact).ravel())[0, 1] > 0.999


def reference_layer(config: TransformerConfig, params, x: np.ndarray) -> np.ndarray:
    """One layer on one document, loop by loop in float64: x [T, D], the params of layer 0."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["layers"])
    H, G = config.head_dim, config.n_heads // config.n_kv_heads

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def head_norm(x, p):
        if config.qk_norm == "none":
            return x
        if config.qk_norm == "rmsnorm":
            return rms(x, p["scale"])
        return (x - x.mean()) / np.sqrt(x.var() + config.norm_eps) * p["scale"] + p["bias"]

    def turn(x, position):
        pairs = x[: H // 2] + 1j * x[H // 2 :]
        pairs = pairs * np.exp(1j * position * config.rope_theta ** (-np.arange(0, H, 2) / H))
        return np.concatenate([pairs.real, pairs.imag])

    def attend(x):
        out = np.zeros((len(x), config.n_heads, H))
        for n in range(config.n_heads):
            norms = p["attention"].get("query_norm"), p["attention"].get("key_norm")
            query = [turn(head_norm(row @ p["attention"]["query"][:, n], norms[0]), t) for t, row in enumerate(x)]
            key = [turn(head_norm(row @ p["attention"]["key"][:, n // G], norms[1]), t) for t, row in enumerate(x)]
            value = x @ p["attention"]["value"][:, n // G]
            for t in range(len(x)):
                weights = np.exp([query[t] @ key[s] / np.sqrt(H) for s in range(t + 1)])
                out[t, n] = weights @ value[: t + 1] / weights.sum()
        return np.einsum("tnh,nhd->td", out, p["attention"]["output"])

    def mlp(x):
        gate = x @ p["mlp"]["gate"]
        return (gate / (1 + np.exp(-gate)) * (x @ p["mlp"]["up"])) @ p["mlp"]["down"]

    for part, norm in ((attend, p["attention"]["norm"]), (mlp, p["mlp"]["norm"])):
        x = x + (part(rms(x, norm)) if config.norm_placement == "pre" else rms(part(x), norm))
    return x


@pytest.mark.parametrize("qk_norm", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("norm_placement", ["pre", "swin"])
def test_a_layer_equals_its_plain_reference(norm_placement, qk_norm):
    config = config_from("debug", 40, n_layers=1, norm_placement=norm_placement, qk_norm=qk_norm)
    params = make_params(config)
    tokens = make_tokens(1, 6)
    expected = reference_layer(config, params, np.asarray(params["embedding"], np.float64)[tokens[0]])
    normed = rms_norm(jnp.asarray(expected, jnp.float32), params["norm"], config.norm_eps)
    found = forward(config, params, *whole_rows(tokens))[0]
    np.testing.assert_allclose(found, normed, atol=2e-5)


# Computed by hand from the published sizes: layers * (attention + MLP + norms) + last norm + tables.
COUNTS = {
    "2m": 4 * (4 * 192 * 192 + 3 * 192 * 512 + 2 * 192 + 2 * 32) + 192 + 1700 * 192,
    "25m": 8 * (4 * 512 * 512 + 3 * 512 * 1408 + 2 * 512) + 512 + 1700 * 512,
    "chameleon_7b": 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 + 4 * 32 * 128) + 4096 + 2 * 65536 * 4096,
    "lumina_mgpt_7b": 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 + 4 * 128) + 4096 + 2 * 65536 * 4096,
    **dict.fromkeys(
        ("chameleon_34b", "lumina_mgpt_34b"),
        48 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 22016 + 2 * 8192 + 2 * (64 + 8) * 128)
        + (8192 + 2 * 65536 * 8192),
    ),
    "emu3_8b": 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096 + 2 * 184622 * 4096,
    "emu3_5_34b": 64 * (2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128)
    + (5120 + 2 * 282926 * 5120),
    "lwm_7b": 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * 40448 * 4096,
    # The numbers of parameters in the published files, from their index.
    "llama3_8b": 8_030_261_248,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "gemma_7b": 8_537_680_896,
    # The config with tables of another length.
    "liquid_7b": 8_537_680_896 + (264192 - 256000) * 3072,
    "simplear_1_5b": 1_543_714_304 + (151665 + 7 + 64000 - 151936) * 1536,
    "tar_1_5b": 1_543_714_304 + (151665 + 2 + 3 + 65536 - 151936) * 1536,
    "tar_7b": 7_615_616_512 + 2 * (151665 + 2 + 3 + 65536 - 152064) * 3584,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_traces_at_full_size_with_the_parameters_its_source_has(preset):
    config = config_from(preset, PRESETS[preset].get("vocab_size", 1700))
    params = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == parameter_count(config) == COUNTS.get(preset, count)
    assert preset in COUNTS or "vocab_size" not in PRESETS[preset], "a published one has a count from elsewhere"
    names = logical_axes(params)
    jax.tree.map(lambda leaf, axes: len(axes) == leaf.ndim or pytest.fail(f"{axes} of {leaf}"), params, names)

    rows = (jax.ShapeDtypeStruct((2, 16), jnp.int32),) * 3
    hidden = jax.eval_shape(lambda p, *rows: Transformer.bind(config, p)(*rows), params, *rows)
    assert hidden.shape == (2, 16, config.d_model) and hidden.dtype == config.dtype


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_kv_heads=3), "divisor of n_heads = 4; found 3"),
        (dict(qk_norm="batch"), "none, layernorm, rmsnorm; found 'batch'"),
        (dict(d_modle=3), "unknown field d_modle"),
        (dict(preset="7t"), "chameleon_34b.*found '7t'"),
        (dict(rope_factor=8.0), "rope_factor: expected 1.0 with rope_scaling 'none', which ignores rope_factor"),
        (dict(rope_original_length=8192), "rope_original_length: expected 0 with rope_scaling 'none'"),
        (
            dict(rope_scaling="linear", rope_factor=2.0, rope_low=2.0),
            "rope_low: expected 1.0 with rope_scaling 'linear'",
        ),
        (dict(qk_norm_per_head=True), "qk_norm_per_head: expected False with qk_norm 'none'"),
    ],
)
def test_a_wrong_config_says_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        config_from({"preset": "debug"} | wrong, 40)


@pytest.mark.interop
def test_logits_equal_those_of_hugging_face_llama():
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (the [interop] extra)")
    transformers = pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    config = config_from("debug", 96, rope_theta=5e4)
    params = make_params(config)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4}, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    peer.load_state_dict({k: torch.tensor(np.array(v)) for k, v in llama_state(config, params).items()})
    tokens = make_tokens(2, 17)
    with torch.inference_mode():
        expected = peer(torch.tensor(np.asarray(tokens))).logits.numpy()
    np.testing.assert_allclose(forward_logits(config, params, *whole_rows(tokens)), expected, atol=1e-4)


def llama_state(config: TransformerConfig, params) -> dict[str, np.ndarray]:
    """The parameters with the names and layout of Hugging Face's Llama, where weights are [out, in]."""
    D = config.d_model
    state = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]}
    state["lm_head.weight"] = params["embedding" if config.tie_embeddings else "head"]
    for i in range(config.n_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        layer = {"input_layernorm": p["attention"]["norm"], "post_attention_layernorm": p["mlp"]["norm"]}
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            layer[f"self_attn.{theirs}"] = p["attention"][ours].reshape(D, -1).T
        layer["self_attn.o_proj"] = p["attention"]["output"].reshape(-1, D).T
        for name in ("gate", "up", "down"):
            layer[f"mlp.{name}_proj"] = p["mlp"][name].T
        state |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return {name: np.asarray(value) for name, value in state.items()}
