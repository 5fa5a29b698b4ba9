"""Our side of parity tests: hidden states, fine-tuning, files as arrays. It needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from ar_unified.data.batch import PackedBatch
from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import Transformer, abstract_params
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import make_state, make_train_step
from ar_unified.training.tasks import TransformerTask
from tests.interop.formats import META_CUTS
from tests.interop.weights import Tensors

# `reference.ADAMW` as our config, with a constant rate.
ADAMW = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=0, schedule="wsd", decay_fraction=0.0, final_fraction=1.0, b1=0.9, b2=0.95,
    eps=1e-8, weight_decay=0.1, clip_norm=1.0,
)  # fmt: skip


def hidden(model: Any, tokens: Any) -> np.ndarray:
    """A loaded model's states after the last norm: int [B, T] of our ids -> float32 [B, T, D]."""
    config, tokens = model.engine.config, jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def run(params: Any) -> jax.Array:
        return Transformer.bind(config, params)(tokens, positions, jnp.zeros_like(tokens))

    return np.asarray(jax.jit(run)(model.engine.params))


def stacked(config: TransformerConfig, params: Any) -> Any:
    """Converts an engine's parameters (a list of layers with flat matrices) to the form of a training, float32."""

    def stack(path: Any, like: Any) -> jax.Array:
        name, *more = (entry.key for entry in path)
        layers = params[name] if name == "layers" else [params[name]]
        for key in more:
            layers = [layer[key] for layer in layers]
        return jnp.array(jnp.stack(layers) if name == "layers" else layers[0], jnp.float32).reshape(like.shape)

    return jax.tree_util.tree_map_with_path(stack, abstract_params(config))


def batch_of(model: Any, tokens: np.ndarray) -> PackedBatch:
    """A batch in which each row of int [B, T] is one document, learned from its second id on."""
    rows, length = tokens.shape
    batch = PackedBatch.padding(rows, length, model.vocabulary.pad)
    batch.tokens[:] = tokens
    batch.targets[:, :-1] = tokens[:, 1:]
    batch.roles[:, :-1] = model.vocabulary.role(tokens[:, 1:])
    batch.positions[:] = np.arange(length)
    batch.doc_start[:] = 0
    batch.segment_ids[:] = 1
    return batch


def fine_tune(model: Any, batches: Sequence[np.ndarray], **settings: Any) -> list[float]:
    """The loss before each AdamW step on batches int [B, T] of our ids, starting from a loaded model's weights.

    settings: the task's settings.
    """
    packed = [batch_of(model, tokens) for tokens in batches]
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    config, vocabulary = model.engine.config, model.vocabulary
    task = TransformerTask(config, vocabulary, batch=lambda step, index=0, count=1: packed[step], **settings)
    optimizer = make_optimizer(ADAMW, len(packed))
    params = stacked(model.engine.config, model.engine.params)
    step = make_train_step(task, optimizer, mesh, seed=0, clip_norm=ADAMW.clip_norm)
    state, losses = make_state(task, optimizer, 0, params), []
    for batch in packed:
        state, report = step(state, batch)
        losses.append(float(report.loss))
    return losses


# ---- files -----------------------------------------------------------------------------------------------------------


def tensors(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors, in one table."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def joined(folder: Path) -> Tensors:
    """The tensors of Meta's shards in a folder. Divided tensors are joined, QK-norm vectors are [shards, H]; RoPE
    frequencies are left out."""
    paths = sorted(folder.glob("models/*/consolidated*.safetensors"))
    parts = [load_file(path) for path in paths]
    out: Tensors = {}
    for name in parts[0].keys() - {"rope.freqs"}:
        pieces = [part[name] for part in parts]
        if "_normalization" in name:
            out[name] = np.stack(pieces)
        elif cut := [axis for end, axis in META_CUTS.items() if name.endswith(end)]:
            out[name] = np.concatenate(pieces, cut[0])
        else:
            assert all(np.array_equal(piece, pieces[0]) for piece in pieces), name
            out[name] = pieces[0]
    return out


def stream(folder: Path) -> Tensors:
    """LWM's `params` by path, with "/" between the parts."""
    import msgpack
    from flax.serialization import msgpack_restore

    with (folder / "params").open("rb") as file:
        return {"/".join(key): msgpack_restore(value) for key, value in msgpack.Unpacker(file)}


def edit(folder: Path, change: Callable[[str, np.ndarray], np.ndarray], within: str) -> None:
    """Changes the tensors with `within` in their name, in a folder with one file."""
    path = folder / "model.safetensors"
    changed = {name: change(name, tensor) if within in name else tensor for name, tensor in load_file(path).items()}
    assert any(not np.array_equal(tensor, changed[name]) for name, tensor in load_file(path).items())
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in changed.items()}, path, metadata={"format": "pt"})


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Asserts that names, dtypes, shapes and bits are the same."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name


def assert_codes(found: np.ndarray, expected: np.ndarray, latents: np.ndarray, codebook: np.ndarray) -> None:
    """Asserts that codes int [B, h, w] are equal, except where a latent [B, h, w, C] is equally near to two codes
    (within 1e-4 of the distance)."""
    distances = np.square(latents[..., None, :] - codebook).sum(-1)
    nearest = np.sort(distances, -1)
    margin = (nearest[..., 1] - nearest[..., 0]) / nearest[..., 1]
    assert found.shape == expected.shape
    assert not ((found != expected) & (margin >= 1e-4)).any()
