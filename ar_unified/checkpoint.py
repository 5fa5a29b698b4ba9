"""Checkpoints: a small interface to Orbax v1.

A checkpoint of step s is the folder `<folder>/<s>` with two trees that are read independently, `params` and
`optimizer`, and JSON metadata (step, vocabulary manifest, model and training config). Orbax writes into a temporary
folder and renames it when all of it is on disk, so a half-written checkpoint is never seen. Saving is asynchronous:
arrays are copied to the host before `save` returns, and written to disk during the next steps.

In a job of many processes each writes its own shards, and all must open, save, wait and close together. Each process
reads alone: it restores what its devices hold, whatever the others do. Folders are local, or URLs as `gs://bucket/run`.
Orbax writes arrays only to file systems and to gs://. For s3://, a single process writes its checkpoint to local disk
first and then copies it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from ar_unified import storage
from ar_unified.errors import RunError, UserError
from ar_unified.manifests import Json, require_same

_COMMITTED = "commit_success.txt"  # the file that makes a folder of a bucket a checkpoint

# Orbax logs every save, and a failed one in pages of JSON. Failures are raised anyway; the rest is noise.
absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)


class SaveFailed(RunError):
    """An earlier save did not reach the disk. It was asynchronous: training went on meanwhile."""


class CheckpointMismatch(UserError):
    """The checkpoint holds something else than was asked for; the message names the first leaf that differs."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they lie, on storage that all processes share.
      keep: how many of the newest survive.
      keep_every: also keep every step that is a multiple of this; 0: none.
      keep_best: also keep the step with the lowest validation loss, among steps that were saved with one.
      readonly: for readers beside a running writer: they create, clean and save nothing, and wait for no other process.
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
        self._where = epath.Path(path if "://" in path else os.path.abspath(path))  # as people know it
        self.folder = epath.Path(self._copied.here) if self._copied else self._where
        self.readonly = readonly
        self._saving: tuple[int, ocp.AsyncResponse[bool]] | None = None
        self._failed = False
        self._losses: dict[int, float | None] = {}  # by step, as its metadata has it: read once
        if readonly:
            if not (self._copied.steps() if self._copied else self.folder.is_dir()):
                raise FileNotFoundError(f"no checkpoints: {self._where} does not exist; has the training stage run?")
            return
        if self._copied and jax.process_count() > 1:
            raise UserError(
                f"{path}: checkpoints of {jax.process_count()} processes cannot be written to s3://, because Orbax "
                "writes only to gs:// and file systems: name a folder that all share, --config.checkpoint_folder=DIR"
            )
        self.keep, self.keep_every, self.keep_best = keep, keep_every, keep_best
        self._orbax = ocp.training.Checkpointer(self.folder, cleanup_tmp_directories=True)  # what a killed writer left

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if self._copied:
            return self._copied.steps()
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.folder))

    def latest(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the complete checkpoint with the lowest loss (the first of several), or None.

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
        """Starts saving and returns; the arrays may be donated at once. `metadata` is JSON; `step` is added to it.

        validation_loss: finite, and measured with these parameters; None: not known. It is added to the metadata.

        Raises SaveFailed if the save before this one failed.
        """
        if self.readonly:
            raise RuntimeError(f"{self.folder} was opened read-only")
        self.wait()
        response = self._orbax.save_checkpointables_async(
            step,
            {"params": params, "optimizer": optimizer},
            force=True,  # when to save is the loop's decision
            custom_metadata={**metadata, "step": step, "validation_loss": validation_loss},
        )
        self._losses[step] = validation_loss
        if response is not None:
            self._saving = step, response

    def check(self) -> None:
        """Raises SaveFailed if the last save has failed by now; never waits, so a loop can call it in every step."""
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
                f"Complete checkpoints: {self.steps()}. Is the disk full or gone? Starting again continues from them."
            ) from error
        self._saving = None
        if self._copied:
            self._copied.put(step)
        if jax.process_index() == 0:
            self._delete_old()

    def _delete_old(self) -> None:
        """Deletes old checkpoints. Orbax's own policies are not used: if the writer is killed while they delete, half a
        checkpoint stays under its name.
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
                (old / _COMMITTED).unlink(missing_ok=True)  # what makes it a checkpoint in a bucket
            else:
                old = old.rename(self.folder / f"{step}.old.orbax-checkpoint-tmp")  # cleaned like a torn one, if torn
            old.rmtree()

    def close(self) -> None:
        """Waits, raises like `wait`, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if not self.readonly:
                # Orbax raises a failed save once more here; SaveFailed has said it.
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
        """Reads `params=...` and/or `optimizer=...` onto the shapes, dtypes and shardings of the given abstract trees.

        Args:
          step: default the latest.
          manifest: the vocabulary manifest of the reader; a checkpoint of another vocabulary is refused.
          **targets: trees of jax.ShapeDtypeStruct with shardings, for any mesh of any number of processes, and any
            floating dtype (bfloat16 from float32); None: as saved, on this process's first device.

        Raises FileNotFoundError, manifests.ManifestMismatch, or CheckpointMismatch.
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


def _alone() -> ocp.Context:
    """Orbax's context for a process that reads without waiting for others."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


def restore_params(folder: str | Path, target: Any = None, *, step: int | None = None, manifest: Any = None) -> Any:
    """Reads the parameters alone, without optimizer state; arguments as `Checkpoints.restore`."""
    return Checkpoints(folder, readonly=True).restore(step, manifest=manifest, params=target)["params"]


def steps_in(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints of a folder, ascending; [] where there is no such folder."""
    try:
        return Checkpoints(folder, readonly=True).steps()
    except FileNotFoundError:
        return []


def adopt(origin: str | Path, step: int, folder: str | Path) -> None:
    """Puts checkpoint `step` of `origin` into `folder`, whole or not at all; what is there already stays.

    On one file system the files are shared by hard links, because nobody writes into a checkpoint; otherwise they are
    copied. Call it only while nobody trains in `folder`. Raises OSError, and FileNotFoundError, also if the checkpoint
    is deleted meanwhile.
    """
    there, here = (Checkpoints(path, readonly=True).folder for path in (origin, _made(folder)))
    if step not in steps_in(there):
        raise FileNotFoundError(f"no step {step} in {there}; it has steps {steps_in(there)}")
    if step in steps_in(here):
        return
    bucket = "://" in str(here)
    target = here / (str(step) if bucket else f"{step}.new.orbax-checkpoint-tmp")  # cleaned like a torn one, if torn
    if target.exists():
        target.rmtree()
    for path in sorted(_files(there / str(step)), key=lambda path: path.name == _COMMITTED):
        copy = target / path.relative_to(there / str(step))
        copy.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, copy)
    if not bucket:
        target.rename(here / str(step))


def link_or_copy(path: Any, copy: Any) -> None:
    """Gives a file one more name; copies it where the file system cannot do that."""
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
    """Shapes by path. Orbax describes a saved named tuple as a dict, so only names can be compared."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _on_first_device(stored: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored)


def _check(stored: Any, target: Any, where: str) -> None:
    """Raises CheckpointMismatch with the leaf and both shapes, because Orbax reports a different tree as an unknown
    handler."""
    found, expected = _shapes(stored), _shapes(target)
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            raise CheckpointMismatch(
                f"{where}: leaf {path}: expected {expected.get(path, 'none')}, found {found.get(path, 'none')}; "
                "another model or optimizer wrote it: use the config and the --config.KEY flags that it was "
                "trained with, or a new workdir"
            )
