"""The model in an adapter's training, made of the bundle and a checkpoint."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ar_unified.bundle import named
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.adapter import beginning_with, first_adapter, in_base, read_base, require_base, require_rows
from ar_unified.experiment.beginning import with_adapter
from ar_unified.interop import peft
from ar_unified.interop.token_rows import TokenRows
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.manifests import manifest_hash
from ar_unified.model.lora import LoraConfig
from ar_unified.model.quantized import Quantized
from ar_unified.model.transformer import logical_axes
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import on_mesh, shardings
from ar_unified.sampling.weights import read_as
from ar_unified.training.selection import select
from ar_unified.training.tasks import TransformerTask
from tests import adapters, bundles

LORA = LoraConfig(rank=2, alpha=4.0, targets=("mlp.up", "attention.output"))


def test_the_adapter_is_in_its_matrices_and_what_was_trained_beside_it_in_its_rows(tmp_path) -> None:
    bundle = bundles.write(tmp_path / "bundle")
    drawn, vocabulary = adapters.drawn(bundle.config, LORA), bundle.grammar.vocabulary
    axes = logical_axes(bundle.params() | {"lora": drawn})
    selection = select(("lora", "head[image]"), axes, vocabulary)
    rows = np.full((vocabulary.codebook_size, bundle.config.d_model), 7.0, np.float32)
    stored = {"lora": jax.tree.map(jax.numpy.asarray, drawn), "head": jax.numpy.asarray(rows)}
    base = named(jax.device_get(bundle.params()))
    for target, dtype in ((None, "float32"), (read_as(bundle.config, None), bundle.config.dtype)):
        found = named(jax.device_get(in_base(bundle, bundle.config, LORA, selection, stored, target)))
        assert found.keys() == base.keys() and str(found["head"].dtype) == dtype
        codes = slice(vocabulary.image_offset, vocabulary.rest_offset)
        np.testing.assert_array_equal(found["head"][codes], rows)
        np.testing.assert_array_equal(np.delete(found["head"], codes, 0), np.delete(base["head"], codes, 0))
        up = drawn["mlp"]["up"]
        np.testing.assert_allclose(found["layers.mlp.up"], base["layers.mlp.up"] + 2.0 * up["a"] @ up["b"], atol=1e-5)
        for name in base.keys() - {"head", "layers.mlp.up", "layers.attention.output"}:
            np.testing.assert_array_equal(found[name], base[name], err_msg=name)
        assert np.abs(found["layers.attention.output"] - base["layers.attention.output"]).max() > 0.01


def test_another_bundle_than_it_was_trained_on_is_refused(tmp_path) -> None:
    bundle = bundles.write(tmp_path / "bundle")
    require_base(bundle, bundle.hash)
    with pytest.raises(
        UserError, match=f"config.init: the adapter was trained on bundle abcdef012345, found {bundle.hash[:12]}"
    ):
        require_base(bundle, "abcdef0123456789")


def test_a_base_in_8_bits_is_the_bundles_rounded_and_the_same_on_every_mesh(tmp_path) -> None:
    bundle = bundles.write(tmp_path / "bundle")
    vocabulary = bundle.grammar.vocabulary
    lora = LoraConfig(rank=2, base_dtype="int8")
    task = TransformerTask(bundle.config, vocabulary, lambda *_: None, lora=lora, only=("layers.mlp.down",))
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    base = jax.device_get(bundle.params(dtype="float32"))
    expected = task.selection(shapes).fixed(base | {"lora": shapes["lora"]}, "int8")
    del expected["lora"]
    for shape, count in (({}, 1), (dict(fsdp=2, tensor=2), 4)):
        mesh = make_mesh(shape, jax.devices()[:count])
        abstract = on_mesh(shapes, shardings(mesh, task.logical_axes(shapes), shapes))
        found = read_base(bundle, abstract)
        del abstract["lora"]
        jax.tree.map(lambda x, wanted: x.sharding == wanted.sharding or pytest.fail("elsewhere"), found, abstract)
        assert isinstance(found["layers"]["mlp"]["up"], Quantized)
        for name, leaf in named(jax.device_get(found)).items():
            np.testing.assert_array_equal(leaf, named(expected)[name], err_msg=name)


MIXED = dataclasses.replace(LORA, ranks=("mlp=3",), alphas=("mlp.up=9",))


def test_a_training_begins_with_a_file_that_is_what_the_config_describes(tmp_path) -> None:
    bundle = bundles.write(tmp_path / "bundle")
    drawn = adapters.write(tmp_path / "adapter", bundle, MIXED)
    found = peft.read(tmp_path / "adapter", bundle.config, bundle.hash)
    assert found.ranks == {"mlp.up": (3,), "attention.output": (2,)} and found.scales["mlp.up"] == (3.0,)
    jax.tree.map(np.testing.assert_array_equal, beginning_with(found, MIXED), drawn)

    def refused(said: str, **changes: object) -> None:
        with pytest.raises(UserError, match=said):
            beginning_with(found, dataclasses.replace(MIXED, **changes))

    refused(
        r"config.lora.targets: expected attention.output, mlp.up, as the adapter .* has; found mlp.up",
        targets=("mlp.up",),
    )
    refused(r"config.lora.rank \(or ranks\): expected 3, as .* has for mlp.up; found 2", ranks=())
    refused(r"config.lora.alpha \(or alphas, rslora\): expected 9, .* mlp.up; found 4", alphas=())
    refused(r"config.lora.alpha \(or alphas, rslora\)", rslora=True)
    matrices = found.matrices | {"mlp.up": tuple(np.asarray(each) for each in found.matrices["mlp.up"])}
    found = found._replace(matrices=matrices, ranks=found.ranks | {"mlp.up": (3, 0)})
    refused("the same in all layers, .* has the ranks 3, 0 for mlp.up. It can still be served")


def test_rows_of_a_file_take_their_places_and_must_be_trained_on(tmp_path) -> None:
    bundle = bundles.write(tmp_path / "bundle")
    vocabulary = bundle.grammar.vocabulary
    drawn, codes = adapters.drawn(bundle.config, LORA), list(vocabulary.ids(Role.IMAGE))
    values = np.full((2, bundle.config.d_model), 7.0, np.float32)
    rows = {"embedding": TokenRows(np.array([codes[1], codes[4]]), values)}
    peft.write(tmp_path / "rows", bundle, LORA, drawn, rows, manifest_hash(bundle.grammar.manifest()))
    peft.write(tmp_path / "others", bundle, LORA, drawn, rows, "0" * 64)
    config = configs.defaults()
    config.lora.update(dict(rank=2, alpha=4.0, targets=LORA.targets, init=str(tmp_path / "rows")))
    first = first_adapter(config, bundle)
    base = bundle.params(dtype="float32")
    places = jax.tree.map(lambda leaf: leaf.sharding, base | {"lora": jax.tree.map(jax.numpy.asarray, drawn)})
    made = jax.device_get(with_adapter(base, first, bundle.grammar, places))
    jax.tree.map(np.testing.assert_array_equal, made["lora"], drawn)
    expected = np.array(base["embedding"])
    expected[[codes[1], codes[4]]] = 7.0
    np.testing.assert_array_equal(made["embedding"], expected)
    np.testing.assert_array_equal(made["head"], base["head"])

    axes = logical_axes(base | {"lora": drawn})
    for places in ((), ("lora", "embedding[image]"), ("lora", "embedding")):
        require_rows(first, bundle.grammar, select(places, axes, vocabulary))
    for places in (("lora",), ("lora", "embedding[text]"), ("lora", "head[image]")):
        with pytest.raises(UserError, match=r"training.only: expected embedding\[image\] in it: .* has 2 rows"):
            require_rows(first, bundle.grammar, select(places, axes, vocabulary))
    config.lora.init = str(tmp_path / "others")
    with pytest.raises(UserError, match="config.lora.init: .*others: its rows are for the ids of another vocabulary"):
        require_rows(first_adapter(config, bundle), bundle.grammar, select((), axes, vocabulary))


def test_rows_of_any_phase_and_new_rows_are_trained_beside_an_adapter() -> None:
    config = configs.defaults()
    config.lora.rank, config.model.tie_embeddings = 2, False
    config.training.only = ("head[image]",)
    config.training.phases = (ConfigDict(dict(begin=0.5, only=("embedding[image]",))),)
    vocabulary = Vocabulary(16, 24)
    parts = settings.trained(config, vocabulary, ()).parts
    codes = ((vocabulary.image_offset, vocabulary.image_offset + 24),)
    assert parts is not None and {"lora.mlp.up", "lora.attention.query"} < parts.keys()
    assert parts["head"] == parts["embedding"] == codes
    new = settings.trained(config, vocabulary, (17, 18, 20)).parts
    assert new is not None and new["embedding"] == ((17, 19), (20, 21), *codes)
