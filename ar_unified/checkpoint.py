"""Checkpoints: a small interface to Orbax v1.

The checkpoint of step s is the folder `<folder>/<s>`. It has two trees, `params` and `optimizer`, which can be read
independently, and JSON metadata (step, vocabulary manifest, model and training config). Orbax writes into a temporary
folder and renames it when everything is on disk, so a half-written checkpoint is never seen. Saving is asynchronous:
arrays are copied to the host before `save` returns, and written to disk during the next steps.

In a job of many processes, each process writes its own shards, and all processes must open, save, wait and close
together. Reading needs no other process: each process restores only the parts for its own devices. A folder is local
or a URL such as `gs://bucket/run`. Orbax writes arrays only to file systems and to gs://. For s3://, process 0 gathers
the shards of all processes (`runtime.to_host`), writes the checkpoint to its local disk and then uploads it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from ar_unified import storage
from ar_unified.errors import RunError, UserError
from ar_unified.manifests import Json, require_same
from ar_unified.parallel import runtime

_PART = 1 << 20  # bytes
_COMMITTED = "commit_success.txt"  # in a bucket, only a folder with this file is a checkpoint

# Orbax logs every save, and pages of JSON if a save fails. Its log is dropped, because failures are raised anyway.
absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)


class SaveFailed(RunError):
    """An earlier save failed. Saving is asynchronous, so training has continued since then."""


class CheckpointMismatch(UserError):
    """The arrays of the checkpoint differ from those that were asked for. The message names the first leaf that
    differs."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: the folder of all checkpoints, on storage that all processes share.
      keep: how many of the newest checkpoints are kept.
      keep_every: also keep each step that is a multiple of this number; 0 keeps no such steps.
      keep_best: also keep the step with the lowest validation loss, among the steps that were saved with such a loss.
      readonly: for a process that only reads, perhaps while another process writes. It creates, deletes and saves
        nothing, and never waits for other processes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 3,
        keep_every: int = 0,
        keep_best: bool = False,
        readonly: bool = False,
    ):
        path = os.fspath(folder)
        self._copied = storage.Steps(path, _COMMITTED) if path.startswith("s3://") else None
        self._where = epath.Path(path if "://" in path else os.path.abspath(path))  # for messages
        self.folder = epath.Path(self._copied.here) if self._copied else self._where
        self.readonly = readonly
        self._saving: tuple[int, ocp.AsyncResponse[bool]] | None = None
        self._failed = False
        self._losses: dict[int, float | None] = {}  # by step; read once from each step's metadata
        if readonly:
            if not (self._copied.steps() if self._copied else self.folder.is_dir()):
                raise FileNotFoundError(f"no checkpoints: {self._where} does not exist; has the training stage run?")
            return
        self.keep, self.keep_every, self.keep_best = keep, keep_every, keep_best
        self._orbax = ocp.training.Checkpointer(self.folder, cleanup_tmp_directories=True)  # left by a killed writer

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if self._copied:
            return self._copied.steps()
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.folder))

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> tuple[int, float] | None:
        """Returns (step, validation loss) of the complete checkpoint with the lowest loss (the first if several are
        equal), or None.

        The loss is part of each checkpoint's metadata, so a later process knows it too.
        """
        steps = self.steps()
        for step in steps:
            if step not in self._losses:
                try:
                    self._losses[step] = self.metadata(step).get("validation_loss")
                except (OSError, ValueError):  # half deleted, so it cannot be the best
                    self._losses[step] = None
        found = [(loss, step) for step in steps if (loss := self._losses[step]) is not None]
        loss, step = min(found, default=(0.0, 0))
        return (step, loss) if found else None

    def save(
        self,
        step: int,
        *,
        params: Any,
        optimizer: Any,
        metadata: Mapping[str, Json],
        validation_loss: float | None = None,
    ) -> None:
        """Starts saving and returns. After that the arrays may be donated.

        Args:
          metadata: JSON values; `step` and `validation_loss` are added to them.
          validation_loss: the finite loss of these parameters; None if it was not measured.

        Raises SaveFailed if the previous save failed.
        """
        if self.readonly:
            raise RuntimeError(f"{self.folder} was opened read-only")
        self.wait()
        if self._copied and jax.process_count() > 1:
            params, optimizer = _on_process_0(params), _on_process_0(optimizer)
        with _in_large_parts():
            response = self._orbax.save_checkpointables_async(
                step,
                {"params": params, "optimizer": optimizer},
                force=True,  # the training loop decides when to save
                custom_metadata={**metadata, "step": step, "validation_loss": validation_loss},
            )
        self._losses[step] = validation_loss
        if response is not None:
            self._saving = step, response

    def check(self) -> None:
        """Raises SaveFailed if the last save has already failed. Never waits, so a loop can call it in every step."""
        self._settle(timeout=0)

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises SaveFailed."""
        self._settle(timeout=None)

    def _settle(self, timeout: float | None) -> None:
        if self._saving is None:
            return
        step, response = self._saving
        try:
            response.result(timeout)
        except Exception as error:
            if timeout is not None and isinstance(error, TimeoutError):
                return  # still writing
            self._saving, self._failed = None, True
            raise SaveFailed(
                f"checkpoint {step} could not be written to {self._where}: {str(error)[:300]} ... "
                f"Is the disk full or gone? Complete checkpoints: {self.steps()}. If you start again, the training "
                "continues from the last of them."
            ) from error
        self._saving = None
        if runtime.first():
            if self._copied:
                self._copied.put(step)
            self._delete_old()

    def _delete_old(self) -> None:
        """Deletes old checkpoints. Orbax's own policies are not used: if the process were killed while they delete a
        checkpoint, half of it would stay under its normal name.
        """
        steps = self.steps()
        best = self.best() if self.keep_best else None
        for step in steps[: -self.keep]:
            if (self.keep_every and step % self.keep_every == 0) or (best and step == best[0]):
                continue
            if self._copied:
                self._copied.delete(step)
                continue
            old = self.folder / str(step)
            if "://" in str(self.folder):
                (old / _COMMITTED).unlink(missing_ok=True)  # now it is not a checkpoint any more
            else:
                # If this process is killed here, Orbax removes a folder with this name at the next start.
                old = old.rename(self.folder / f"{step}.old.orbax-checkpoint-tmp")
            old.rmtree()

    def close(self) -> None:
        """Waits until the last save is on disk, and ends Orbax's threads. Raises SaveFailed."""
        try:
            self.wait()
        finally:
            if not self.readonly:
                # Orbax raises the error of a failed save again here, but SaveFailed has already reported it.
                with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                    self._orbax.close()

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The JSON saved with a step (default: the latest)."""
        with _alone():
            stored = ocp.checkpointables_metadata(self._at(self._existing(step)))
        return dict(stored.custom_metadata or {})

    def restore(
        self, step: int | None = None, *, manifest: Mapping[str, Json] | None = None, **targets: object
    ) -> dict[str, Any]:
        """Reads `params=...`, `optimizer=...` or both, with the dtypes and shardings of the given abstract trees.

        Args:
          step: the step to read; None means the latest.
          manifest: the vocabulary manifest of the reader; a checkpoint with another vocabulary is refused.
          **targets: trees of jax.ShapeDtypeStruct with shardings. The mesh, the number of processes and the floating
            dtype (such as bfloat16 for saved float32) may differ from the writer's. If a target is None, the tree is
            read as it was saved, onto this process's first device.

        Raises FileNotFoundError if there is no such step, manifests.ManifestMismatch, and CheckpointMismatch if names
        or shapes differ.
        """
        step = self._existing(step)
        where = f"checkpoint {self._where.name}/{step}"
        with _alone():
            stored = ocp.checkpointables_metadata(self._at(step))
            if manifest is not None:
                found = (stored.custom_metadata or {}).get("manifest") or {}
                require_same(manifest, found, expected_from="this run", found_from=where)
            shapes = {name: stored.metadata[name] for name in targets}
            for name, target in targets.items():
                if target is None:
                    targets[name] = _on_first_device(shapes[name])
                else:
                    _check(shapes[name], target, f"{where}, {name}")
            return ocp.load_checkpointables(self._at(step), targets)

    def _at(self, step: int) -> epath.Path:
        """The folder from which Orbax reads a step."""
        return epath.Path(self._copied.bring(step)) if self._copied else self.folder / str(step)

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a complete checkpoint" if step is None else f"step {step}"
            raise FileNotFoundError(f"no {wanted} in {self._where}; it has steps {steps}")
        return steps[-1] if step is None else step


def _on_process_0(tree: Any) -> Any:
    """The arrays on the host of process 0. In other processes each leaf is one number, which Orbax does not write."""
    host = runtime.to_host(tree)
    return jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), tree) if host is None else host


def _alone() -> ocp.Context:
    """Orbax's context for a process that reads without waiting for others."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _in_large_parts() -> ocp.Context:
    """Orbax's context for saving. If all devices have a copy of an array, each device writes a part of it. By default
    this is done for arrays of any size, and each part needs a program to compile. Here a part has at least _PART bytes.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _PART
    return context


def restore_params(folder: str | Path, target: Any = None, *, step: int | None = None, manifest: Any = None) -> Any:
    """Reads the parameters without the optimizer state. The arguments are those of `Checkpoints.restore`."""
    return Checkpoints(folder, readonly=True).restore(step, manifest=manifest, params=target)["params"]


def steps_in(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints of a folder, ascending; [] if the folder does not exist."""
    try:
        return Checkpoints(folder, readonly=True).steps()
    except FileNotFoundError:
        return []


def adopt(origin: str | Path, step: int, folder: str | Path) -> None:
    """Puts checkpoint `step` of `origin` into `folder`, whole or not at all. Nothing changes if `folder` has that step.

    On the same file system the files are shared by hard links, because nobody writes into a checkpoint; otherwise they
    are copied. Call it only while no training uses `folder`. Raises OSError. It is a FileNotFoundError if `origin` does
    not have the step, or if the step is deleted meanwhile.
    """
    there, here = (Checkpoints(path, readonly=True).folder for path in (origin, _made(folder)))
    if step not in steps_in(there):
        raise FileNotFoundError(f"no step {step} in {there}; it has steps {steps_in(there)}")
    if step in steps_in(here):
        return
    bucket = "://" in str(here)
    # If this process is killed, Orbax removes a folder with this temporary name at the next start.
    target = here / (str(step) if bucket else f"{step}.new.orbax-checkpoint-tmp")
    if target.exists():
        target.rmtree()
    for path in sorted(_files(there / str(step)), key=lambda path: path.name == _COMMITTED):
        copy = target / path.relative_to(there / str(step))
        copy.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, copy)
    if not bucket:
        target.rename(here / str(step))


def link_or_copy(path: Any, copy: Any) -> None:
    """Makes a hard link to a file, or copies the file if the file system has no hard links."""
    try:
        os.link(path, copy)
    except (OSError, TypeError, NotImplementedError):
        epath.Path(path).copy(copy)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _made(folder: str | Path) -> str | Path:
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its path. Orbax describes a saved named tuple as a dict, so whole trees cannot be
    compared."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _on_first_device(stored: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored)


def _check(stored: Any, target: Any, where: str) -> None:
    """Raises CheckpointMismatch, which names the first different leaf and both shapes. Orbax would report a different
    tree as an unknown handler."""
    found, expected = _shapes(stored), _shapes(target)
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            raise CheckpointMismatch(
                f"{where}: leaf {path}: expected {expected.get(path, 'none')}, found {found.get(path, 'none')}; "
                "the checkpoint is from another model or optimizer: use the config and the --config.KEY flags that it "
                "was trained with, or a new workdir"
            )
