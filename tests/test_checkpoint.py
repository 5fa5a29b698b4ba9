"""The checkpoint interface: atomic, asynchronous, for any mesh, and with clear errors for wrong checkpoints."""

from __future__ import annotations

import os
import resource
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from ar_unified.checkpoint import CheckpointMismatch, Checkpoints, SaveFailed, adopt, restore_params, steps_in
from ar_unified.manifests import ManifestMismatch
from ar_unified.parallel.mesh import make_mesh

PARAMS: dict[str, Any] = {
    "w": np.arange(64, dtype=np.float32).reshape(8, 8),
    "layers": {"b": np.ones((2, 4), np.float32)},
}


def on(mesh, dtype=jnp.float32):
    placement = {"w": jax.P("fsdp", "tensor"), "layers": {"b": jax.P()}}
    return jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, dtype, sharding=jax.NamedSharding(mesh, p)), PARAMS, placement
    )


def save(folder, *steps, **options):
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    params = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), PARAMS, on(mesh))
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        scaled = jax.tree.map(lambda x, step=step: x * step, params)
        checkpoints.save(step, params=scaled, optimizer={"mu": scaled}, metadata={"manifest": {"size": 128}})
    return checkpoints


def test_restored_onto_another_mesh_and_dtype(tmp_path):
    save(tmp_path, 1, 2).close()
    checkpoints = Checkpoints(tmp_path)
    target = on(make_mesh(dict(fsdp=2), jax.devices()[6:]), jnp.bfloat16)
    found = checkpoints.restore(params=target, manifest={"size": 128})["params"]
    assert found["w"].sharding == target["w"].sharding and found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found["w"], np.float32), 2 * PARAMS["w"])
    assert checkpoints.metadata()["step"] == 2 and checkpoints.metadata(1)["manifest"] == {"size": 128}
    checkpoints.close()


@pytest.mark.parametrize("rows, shared", [(16, False), (1 << 15, True)], ids=["small", "large"])
def test_only_large_arrays_are_shared_out_among_their_copies(tmp_path, monkeypatch, rows, shared):
    """Each part needs a program. For a small model, compiling these programs took longer than its training step."""
    cut = []
    slice_in_dim = jax.lax.slice_in_dim
    monkeypatch.setattr(jax.lax, "slice_in_dim", lambda *a, **k: cut.append(1) or slice_in_dim(*a, **k))
    x = np.arange(rows * 64, dtype=np.float32).reshape(rows, 64)
    everywhere = jax.NamedSharding(make_mesh(dict(data=8)), jax.P())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params={"x": jax.device_put(x, everywhere)}, optimizer={"mu": jnp.ones(3)}, metadata={})
    checkpoints.close()
    assert len(cut) == (8 if shared else 0)
    np.testing.assert_array_equal(restore_params(tmp_path)["x"], x)


def test_params_alone_without_knowing_the_model(tmp_path):
    save(tmp_path, 3).close()
    shutil.rmtree(tmp_path / "3" / "optimizer")  # restore_params does not read it
    found = restore_params(tmp_path)
    np.testing.assert_array_equal(found["w"], 3 * PARAMS["w"])
    assert found["w"].devices() == {jax.devices()[0]}


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    save(tmp_path, 1).close()
    target = on(make_mesh(dict(fsdp=4, tensor=2)))
    wrong = target | {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=target["w"].sharding)}
    with pytest.raises(CheckpointMismatch, match=r"1, params: leaf w: expected \(8, 4\), found \(8, 8\)"):
        restore_params(tmp_path, wrong)
    with pytest.raises(CheckpointMismatch, match=r"leaf layers.b: expected none, found \(2, 4\)"):
        restore_params(tmp_path, {"w": target["w"]})
    with pytest.raises(ManifestMismatch, match="'size': this run has 256, checkpoint .*/1 has 128"):
        restore_params(tmp_path, manifest={"size": 256})
    with pytest.raises(FileNotFoundError, match=r"no step 7 in .*it has steps \[1\]"):
        restore_params(tmp_path, step=7)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        restore_params(tmp_path / "elsewhere")


def test_the_newest_and_every_fourth_are_kept(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=4).close()
    assert Checkpoints(tmp_path, readonly=True).steps() == [4, 6, 7]


def test_the_best_is_kept_until_a_better_one_is_on_disk(tmp_path):
    losses = {1: 3.0, 2: 1.5, 3: None, 4: 2.0, 5: 1.5}
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    params = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), PARAMS, on(mesh))

    def write(*steps):
        checkpoints = Checkpoints(tmp_path, keep=1, keep_best=True)
        for step in steps:
            checkpoints.save(step, params=params, optimizer=params, metadata={}, validation_loss=losses[step])
        checkpoints.close()

    write(1, 2, 3)
    assert Checkpoints(tmp_path, readonly=True).steps() == [2, 3]
    write(4, 5)  # after a restart the best step is still known, and the first of equally good steps is kept
    reader = Checkpoints(tmp_path, readonly=True)
    assert reader.steps() == [2, 5] and reader.best() == (2, 1.5) and reader.latest() == 5
    losses[6] = 1.0
    write(6)
    assert Checkpoints(tmp_path, readonly=True).steps() == [6]
    (tmp_path / "6" / "_CHECKPOINT_METADATA").unlink()
    assert Checkpoints(tmp_path, readonly=True).best() is None


def test_a_half_written_checkpoint_is_not_seen_and_is_cleaned_up(tmp_path):
    save(tmp_path, 1).close()
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    half_deleted = tmp_path / "0.old.orbax-checkpoint-tmp"
    for left in (torn, half_deleted):
        shutil.copytree(tmp_path / "1", left)
    assert Checkpoints(tmp_path, readonly=True).steps() == [1] and torn.exists()
    checkpoints = save(tmp_path, 3)
    checkpoints.close()
    assert checkpoints.steps() == [1, 3] and not torn.exists() and not half_deleted.exists()


def test_an_old_checkpoint_that_was_half_deleted_is_in_nobodys_way(tmp_path):
    save(tmp_path, 1, 2).close()
    shutil.rmtree(tmp_path / "1" / "params")
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    checkpoints = save(tmp_path, 3, keep=1)
    checkpoints.wait()
    assert checkpoints.latest() == 3
    np.testing.assert_array_equal(restore_params(tmp_path)["w"], 3 * PARAMS["w"])
    checkpoints.close()


def test_a_failed_save_is_raised_without_waiting_for_the_next(tmp_path):
    checkpoints = save(tmp_path, 1)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # no file may grow past 1 MiB: a disk that is full
    try:
        large = {"w": np.random.default_rng(0).normal(size=(1500, 1500))}
        checkpoints.save(2, params=large, optimizer=PARAMS, metadata={})
        with pytest.raises(SaveFailed, match=r"checkpoint 2 could not be written.*Complete checkpoints: \[1\]\. If"):
            for _ in range(1000):  # as a loop calls it at every step
                checkpoints.check()
                time.sleep(0.02)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()  # does not raise the error again
    assert Checkpoints(tmp_path, readonly=True).steps() == [1]


@pytest.mark.parametrize("readonly", [False, True])
def test_a_url_reaches_orbax_as_it_is(monkeypatch, readonly):
    """The test needs no bucket, because writing to buckets is left to Orbax and TensorStore."""
    seen = []
    monkeypatch.setattr(ocp.training, "Checkpointer", lambda folder, **_: seen.append(folder))
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "is_dir", lambda path: seen.append(path) or True)
    Checkpoints("gs://bucket/runs/a", readonly=readonly)
    assert [str(folder) for folder in seen] == ["gs://bucket/runs/a"]


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 1024))
    for step in range(1, 5):
        x = add(x)
        checkpoints.save(step, params={"x": x}, optimizer={"n": jnp.int32(step)}, metadata={})
        for _ in range(50):
            x = add(x)
    checkpoints.close()
    for step in (2, 3, 4):
        assert set(np.unique(restore_params(tmp_path, step=step)["x"])) == {51 * (step - 1) + 1}


def test_a_checkpoint_is_adopted_whole_and_outlives_its_origin(tmp_path):
    origin, folder = tmp_path / "origin", tmp_path / "branch"
    save(origin, 1, 2, 3).close()
    shutil.copytree(origin / "1", folder / "2.new.orbax-checkpoint-tmp")  # the files of a killed attempt
    adopt(origin, 2, folder)
    adopt(origin, 2, folder)  # a second time, as after a kill during a later step
    assert steps_in(folder) == [2] and steps_in(origin) == [1, 2, 3] and steps_in(tmp_path / "none") == []
    assert [path.name for path in folder.iterdir()] == ["2"]
    shutil.rmtree(origin)
    checkpoints = save(folder, 4)
    checkpoints.close()
    assert checkpoints.steps() == [2, 4] and checkpoints.metadata(2)["step"] == 2
    found = checkpoints.restore(2, params=None, optimizer=None)
    np.testing.assert_array_equal(found["params"]["w"], 2 * PARAMS["w"])
    with pytest.raises(FileNotFoundError, match=r"no step 5 in .*it has steps \[2, 4\]"):
        adopt(folder, 5, tmp_path / "again")


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    save(tmp_path / "origin", 1).close()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not here")))
    adopt(tmp_path / "origin", 1, tmp_path / "branch")
    shutil.rmtree(tmp_path / "origin")
    np.testing.assert_array_equal(restore_params(tmp_path / "branch")["w"], PARAMS["w"])
