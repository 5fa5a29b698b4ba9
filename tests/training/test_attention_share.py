"""Shares of attention equal those by hand and those from weights computed one by one, alone and packed, on meshes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.data.batch import PackedBatch
from ar_unified.language.vocabulary import Role
from ar_unified.model.transformer import Transformer
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch
from ar_unified.training.attention_share import attention_shares, layer_shares
from ar_unified.training.step import make_inspection
from tests.training import tiny

TEXT, IMAGE, CONTROL = (True, False), (False, True), (False, False)


def test_four_tokens_by_hand():
    """Controls, text and images: c i t t. Scores of a query to its keys are log(1), log(2), ..., by column."""
    modality = jnp.array([[CONTROL, IMAGE, TEXT, TEXT]])
    query = jnp.full((1, 4, 2, 4), 0.5)  # 0.5 * key * 4 numbers / sqrt(4) = key
    key = jnp.broadcast_to(jnp.log(jnp.arange(1.0, 5.0))[None, :, None, None], (1, 4, 1, 4))
    sums, uniform, counts = layer_shares(query, key, jnp.zeros((1, 4), jnp.int32), modality)
    # For text, the query of column 2 sees weights 1 2 3, and that of column 3 sees 1 2 3 4: the image has 2/6 and 2/10.
    np.testing.assert_allclose(sums[0], [3 / 6 + 7 / 10, 2 / 6 + 2 / 10], rtol=1e-6)
    np.testing.assert_allclose(uniform[0], [1 / 3 + 2 / 4, 1 / 3 + 1 / 4], rtol=1e-6)
    np.testing.assert_array_equal(counts, [2, 0])  # the image sees no text, so it does not count
    assert not np.asarray(sums[1]).any()


def naive(task, params, batch):
    """Shares from the weights of one document at a time, in numpy: {name: (sum, count)}."""
    from ar_unified.model import transformer

    inner = transformer.attend_to_documents

    def forward(params, batch):
        """The attention shares of each layer."""
        seen = []

        def attend(query, key, *more):
            seen.append((query, key))
            return inner(query, key, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "attend_to_documents", attend)
            Transformer.bind(task.config, params)(batch.tokens, batch.positions, batch.doc_start)
        return seen

    seen = jax.tree.map(np.float64, jax.device_get(jax.jit(forward)(params, batch)))
    role = task.vocabulary.role(batch.tokens)
    sums = {}
    for layer, (query, key) in enumerate(seen):
        key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
        for row, t in np.ndindex(role.shape):
            if batch.segment_ids[row, t] == 0 or role[row, t] not in (Role.TEXT, Role.IMAGE):
                continue
            document = slice(t - batch.positions[row, t], t + 1)
            scores = np.einsum("NH,SNH->NS", query[row, t], key[row, document]) * query.shape[-1] ** -0.5
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            roles = role[row, document]
            if not {Role.TEXT, Role.IMAGE} <= set(roles.tolist()):
                continue
            for other in (Role.TEXT, Role.IMAGE):
                name = f"{Role(role[row, t]).name}_to_{other.name}".lower()
                of_layer = sums.setdefault(f"attention/{name}/layer_{layer}", [0.0, 0])
                of_layer[0] += weights[:, roles == other].sum(-1).mean()
                of_layer[1] += 1
                if layer == 0:
                    of_all = sums.setdefault(f"attention/{name}/uniform", [0.0, 0])
                    of_all[0] += (roles == other).mean()
                    of_all[1] += 1
    return sums


@pytest.fixture(scope="module")
def written_out(params):
    return naive(tiny.task(), sharp(params), tiny.packed(3))


def computed(params, batch):
    task = tiny.task()
    shares_of = jax.jit(lambda p, b: attention_shares(Transformer.bind(task.config, p), task.vocabulary, b))
    return jax.device_get(shares_of(params, batch))


def shares(found):
    return {name: float(total / count) for name, (total, count) in found.items()}


def sharp(params):
    """Parameters whose attention is far from even."""
    params = jax.tree.map(np.array, params)
    for name in ("query", "key"):
        params["layers"]["attention"][f"{name}_norm"]["scale"] *= 4
    return params


@pytest.mark.parametrize("columns", [1, 5, 24])
def test_the_shares_are_those_of_weights_written_out(params, written_out, columns, monkeypatch):
    """Rows have packing and padding. Columns are computed one by one, in chunks (the last is not full), and all at
    once."""
    monkeypatch.setattr(layer_shares, "__defaults__", (columns * tiny.ROWS * tiny.MODEL.n_heads * tiny.LENGTH,))
    found = computed(sharp(params), tiny.packed(3))
    assert set(found) == set(written_out) and len(found) == 4 * 3
    for name, (total, count) in written_out.items():
        assert float(found[name][1]) == count, name
        assert float(found[name][0]) == pytest.approx(total, rel=1e-4), name
    even = shares(found)
    assert abs(even["attention/text_to_image/layer_1"] - even["attention/text_to_image/uniform"]) > 0.01


def test_packed_documents_do_not_leak(params):
    """If an image and the text after it are two documents of one row, the text does not see the image."""
    length = 8
    batch = dataclasses.replace(
        PackedBatch.padding(1, length, tiny.VOCABULARY.pad),
        tokens=np.array([[*(tiny.VOCABULARY.image_offset + np.arange(4)), *range(4)]], np.int32),
        positions=np.array([[*range(4)] * 2], np.int32),
        doc_start=np.array([[0] * 4 + [4] * 4], np.int32),
        segment_ids=np.array([[1] * 4 + [2] * 4], np.int32),
    )
    apart = computed(params, batch)
    assert all(float(count) == 0 for _, count in apart.values())
    whole = dict(doc_start=np.zeros((1, length), np.int32), positions=np.arange(length, dtype=np.int32)[None])
    one = dataclasses.replace(batch, **whole)
    together = computed(params, one)
    assert float(together["attention/text_to_image/layer_0"][1]) == 4
    assert 0 < float(together["attention/text_to_image/layer_0"][0]) < 4


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=2, tensor=2)])
def test_meshes_agree(params, mesh):
    """Rows, heads and columns are divided; scanned layers in bfloat16 are another program for the same numbers."""
    task, batch = tiny.task(attention_share=True), tiny.packed(3)
    alone = make_mesh({}, jax.devices()[:1])
    found = []
    for where, config in ((alone, tiny.MODEL), (make_mesh(mesh), dataclasses.replace(tiny.MODEL, scan_layers=True))):
        with jax.set_mesh(where):
            task = dataclasses.replace(task, config=config)
            found.append(jax.device_get(make_inspection(task, where)(sharp(params), {}, place_batch(where, batch))))
    one, many = map(shares, found)
    assert one.keys() == many.keys()
    for name in one:
        assert many[name] == pytest.approx(one[name], abs=1e-5), name


def test_it_is_written_down_by_layer_and_can_be_left_out(tmp_path):
    from ar_unified.metrics import read_metrics

    tiny.run(tmp_path, task=tiny.task(attention_share=True), steps=3, validate_every=2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    keys = {key for row in rows for key in row if key.startswith("validation/attention/")}
    assert len(keys) == 12 and {"validation/attention/image_to_text/layer_1"} <= keys
    assert all(0 <= row[key] <= 1 for row in rows for key in keys & row.keys())
    assert tiny.task(attention_share=False).inspect({}, {}, tiny.packed(3)) == {}
