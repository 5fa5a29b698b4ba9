"""Sampling as configured in an experiment: on which devices, with which cache."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.sample import _run
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.facts import weights_hash
from ar_unified.language.document import TextPart
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Request
from ar_unified.sampling.steps import Shape
from ar_unified.workdir import Workdir, write_json
from tests.sampling.tiny import CONFIG, GRAMMARS, random_params


def experiment(folder, **changes):
    """A workdir with a trained tiny model, without the earlier stages."""
    config = configs.defaults()
    config.sampling.update(dict(batch_size=4, max_length=64) | changes.pop("sampling", {}))
    config.mesh.update(changes)
    opened = Experiment(config, Workdir(folder))
    opened.__dict__ |= {"grammar": GRAMMARS["grid"], "model": CONFIG}  # usually made from the tokenizers
    return opened


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = Checkpoints(folder / "model" / "checkpoints")
    metadata = {"manifest": GRAMMARS["grid"].manifest()}
    checkpoints.save(1, params=random_params(), optimizer={"count": np.zeros(1)}, metadata=metadata)
    checkpoints.close()
    write_json(folder / "model" / "done.json", {"fingerprint": {}})
    return folder


def test_rows_are_split_over_a_process_own_devices_and_heads_as_the_mesh_says(trained):
    """Eight devices: 4 groups of rows x tensor 2. No device has all weights, and the tokens are equal to those of one
    device."""
    engine = experiment(trained, fsdp=4, tensor=2).engine
    assert dict(engine.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "context": 1}
    query = engine.params["layers"][0]["attention"]["query"]  # [D, N * H]
    assert query.addressable_shards[0].data.shape == (32, 4 // 2 * 8)
    cache = engine.call(engine._programs.empty, Shape(1, 64), 4, None).cache
    assert cache[0][0].addressable_shards[0].data.shape == (4 // 4, 2 // 2, 64, 8)  # [rows, K, S, H]

    asked = [Request(name, (TextPart(name),), mode="image", seed=3) for name in ("a", "bc", "def", "g", "hh")]
    alone = Engine(CONFIG, random_params(), GRAMMARS["grid"], batch_size=4, max_length=64)
    ours, theirs = ({s.request.id: s.tokens.tolist() for s in e.generate(asked)} for e in (engine, alone))
    assert ours == theirs


def test_one_device_needs_no_mesh(trained, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    opened = experiment(trained, sampling=dict(kv_dtype="int8"))
    assert opened.engine.mesh is None and opened.engine.kv_dtype == "int8"


@pytest.mark.parametrize(
    "mesh, sampling, words",
    [
        (dict(tensor=3), {}, "8 devices: mesh .*tensor=3"),
        (dict(tensor=2), dict(batch_size=6), "batch_size: expected a multiple of the mesh's 4 data devices, found 6"),
        ({}, dict(kv_dtype="int4"), "kv_dtype: expected one of .*int8.*; found 'int4'"),
    ],
)
def test_what_does_not_fit_is_said(trained, mesh, sampling, words):
    with pytest.raises(UserError, match=words):
        experiment(trained, sampling=sampling, **mesh).engine  # noqa: B018


def test_a_job_all_of_whose_requests_fail_is_an_error(trained, tmp_path):
    """It is also an error when the job runs again with nothing left to do."""
    opened = experiment(trained, sampling=dict(batch_size=8))
    cells = SimpleNamespace(factor=4, codes_per_position=1, decode=None, encode=None, hash="")
    opened.__dict__ |= {"image_tokenizer": cells}
    requests = tmp_path / "requests.jsonl"
    requests.write_text(2 * (json.dumps({"prompt": "abcd" * 40}) + "\n"))
    for _ in range(2):
        with pytest.raises(UserError, match="none of 2 requests could be served.*the first: .*max_length is 64"):
            _run(opened, [requests], tmp_path / "out", part=(0, 1))


def test_the_best_checkpoint_is_sampled_from_when_asked(tmp_path):
    """Two steps have different weights. `sampling.checkpoint` chooses one, and all results record which."""
    params = random_params()
    metadata = {"manifest": GRAMMARS["grid"].manifest()}
    checkpoints = Checkpoints(tmp_path / "model" / "checkpoints")
    for step, loss in ((1, 2.0), (2, 3.0)):
        scaled = jax.tree.map(lambda x, step=step: x * step, params)
        more = dict(optimizer={"count": np.zeros(1)}, metadata=metadata, validation_loss=loss)
        checkpoints.save(step, params=scaled, **more)
    checkpoints.close()
    done, summary = tmp_path / "model" / "done.json", {"steps": 2, "best_step": 1, "best_validation_loss": 2.0}
    write_json(done, {"fingerprint": {}, "summary": summary})

    last, best = (experiment(tmp_path, sampling=dict(checkpoint=which)) for which in ("last", "best"))
    for opened, step in ((last, 2), (best, 1)):
        assert opened.checkpoint == step
        np.testing.assert_array_equal(opened.params["embedding"], params["embedding"] * step)
    assert weights_hash(last) != weights_hash(best)  # samples of the two checkpoints never mix
    with pytest.raises(UserError, match="sampling.checkpoint: expected 'last' or 'best', found 'first'"):
        experiment(tmp_path, sampling=dict(checkpoint="first")).checkpoint  # noqa: B018
    write_json(done, {"fingerprint": {}, "summary": {"steps": 2}})
    with pytest.raises(UserError, match="kept no best step: .* training.keep_best=True"):
        best.checkpoint  # noqa: B018
