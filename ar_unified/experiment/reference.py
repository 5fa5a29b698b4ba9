"""The log-probabilities of every preference pair under the model that a training begins with. They are computed once,
and kept in the workdir.

reference/KEY/record.json   what the reference depends on (KEY is its hash), and the sha256 of the other files
              SOURCE.npy    f32 [pairs, 2, R], in the order of the shards, as in `data.batch.PreferenceBatch`

record.json is written last. If something in a folder is missing or changed, the folder is made again. In a job of many
processes, all of them compute the log-probabilities, and only process 0 writes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified import progress
from ar_unified.data.preferences import PreferenceBatches, Sums
from ar_unified.errors import RunError
from ar_unified.experiment.adapter import first_adapter, read_base
from ar_unified.experiment.beginning import with_adapter
from ar_unified.experiment.experiment import Experiment
from ar_unified.language.vocabulary import Role
from ar_unified.manifests import Json, manifest_hash
from ar_unified.model.transformer import Params, abstract_params
from ar_unified.parallel import runtime
from ar_unified.parallel.rules import on_mesh, place_batch, shardings
from ar_unified.training.preference import PreferenceTask
from ar_unified.workdir import read_json, write_bytes, write_json

VERSION = 1


def reference(experiment: Experiment, task: PreferenceTask, split: str, batches: PreferenceBatches) -> Sums:
    """The reference of every pair of data/SPLIT, by source. If it is missing, it is computed with the weights of
    config.init.

    Raises errors.RunError if the model gives NaN or an infinity.
    """
    depends = _depends(experiment, task, experiment.workdir.data / split)
    folder = experiment.workdir.path / "reference" / manifest_hash(depends)[:16]
    known = _read(folder, depends, batches.counts) if runtime.first() else None
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(known is not None)):
        known = known or _read(folder, depends, batches.counts)
    if known is not None:
        experiment.say(f"reference: log-probabilities of {split} are read from {folder}")
        return known
    count = sum(batches.counts.values())
    experiment.say(f"reference: computing log-probabilities of {experiment.config.init} on {count} pairs of {split}")
    found = _computed(experiment, task, batches)
    if runtime.first():
        _write(folder, depends, found)
    return found


def _depends(experiment: Experiment, task: PreferenceTask, data: Path) -> dict[str, Json]:
    """Everything that decides the numbers, apart from rounding."""
    assert experiment.bundle is not None  # `check` requires config.init
    begun = {"base": "int8"} if _rounded(task) else {}
    if (first := first_adapter(experiment.config, experiment.bundle)) is not None:
        begun["adapter"] = first.adapter.hash
    return begun | {
        "version": VERSION,
        "weights": experiment.bundle.hash,
        "data": hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest(),
        "dtype": task.config.dtype,
        "split": task.split,
    }


def _rounded(task: PreferenceTask) -> bool:
    """Whether the weights have 8 bits. If so, the model that the training begins with is not exactly the bundle's."""
    return task.lora is not None and task.lora.base_dtype == "int8"


def _params(experiment: Experiment, task: PreferenceTask) -> Params:
    """The model that the training begins with. A new adapter changes nothing, so it is left out."""
    assert experiment.bundle is not None
    mesh, first = experiment.mesh, first_adapter(experiment.config, experiment.bundle)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    abstract = on_mesh(shapes, shardings(mesh, task.logical_axes(shapes), shapes))
    if _rounded(task):
        params = read_base(experiment.bundle, abstract)
    else:
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(task.config, mesh))
        params = experiment.bundle.params(places, "float32")
    if first is not None:
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params = with_adapter(params, first, experiment.grammar, places)
    return params


def _computed(experiment: Experiment, task: PreferenceTask, batches: PreferenceBatches) -> Sums:
    mesh, params = experiment.mesh, _params(experiment, task)
    begun = task.lora if "lora" in params else None  # None if the reference has no adapter
    task = dataclasses.replace(task, lora=begun, only=(), rates=(), phases=())
    answers = jax.jit(functools.partial(task.answers, pairs=batches.pairs), out_shardings=NamedSharding(mesh, P()))
    found = {name: np.zeros((count, 2, len(Role)), np.float32) for name, count in batches.counts.items()}
    total = sum(batches.rows_per_epoch.values())
    with progress.bar(total, "rows", "reference", shown=runtime.first()) as bar, jax.set_mesh(mesh):
        for name, rows, which in batches.every():
            sums, there = np.asarray(answers(params, place_batch(mesh, rows))), which >= 0
            found[name][which[there]] = sums[there]
            bar.update(int(there.any(1).sum()))
    for name, sums in found.items():
        if not np.isfinite(sums).all():
            pair = int(np.flatnonzero(~np.isfinite(sums).all((1, 2)))[0])
            raise RunError(
                f"reference: expected finite log-probabilities of all pairs of {name!r}, found {sums[pair].tolist()} "
                f"for pair {pair}, from {experiment.config.init} in {task.config.dtype}: try model.dtype=float32"
            )
    return found


def _write(folder: Path, depends: Mapping[str, Json], found: Sums) -> None:
    digests = {}
    for name, sums in found.items():
        data = io.BytesIO()
        np.save(data, sums, allow_pickle=False)
        write_bytes(folder / f"{name}.npy", data.getvalue())
        digests[name] = hashlib.sha256(data.getvalue()).hexdigest()
    write_json(folder / "record.json", dict(depends) | {"files": digests})


def _read(folder: Path, depends: Mapping[str, Json], counts: Mapping[str, int]) -> Sums | None:
    """What `_write` wrote; None if it is missing or changed."""
    try:
        record = read_json(folder / "record.json")
        if record != dict(depends) | {"files": record.get("files")} or record["files"].keys() != counts.keys():
            return None
        found = {}
        for name, digest in record["files"].items():
            data = (folder / f"{name}.npy").read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                return None
            found[name] = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return found if all(len(found[name]) == count for name, count in counts.items()) else None
