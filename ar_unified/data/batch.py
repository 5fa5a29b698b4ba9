"""The fields of a batch of packed rows. The loader makes batches. Memory planning needs only the fields' shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike

from ar_unified.language.vocabulary import Role

A = TypeVar("A")  # type of a field: np.ndarray in the loader, jax.Array in a step, jax.ShapeDtypeStruct in planning


def _of(dtype: DTypeLike) -> Any:
    return dataclasses.field(metadata={"dtype": np.dtype(dtype)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch(Generic[A]):
    """Rows of whole documents, one after another. Every field is [B, T]: a numpy or jax array, or a shape. A pytree."""

    tokens: A = _of(np.int32)  # the inputs; pad after the last document
    targets: A = _of(np.int32)  # the next token of the same document; pad if there is none
    positions: A = _of(np.int32)  # position in the document; 0 on padding
    doc_start: A = _of(np.int32)  # position in the row where the document begins; T on padding
    segment_ids: A = _of(np.int32)  # number of the document in the row, from 1; 0 on padding
    tasks: A = _of(np.int8)  # task of the document, as an index into TASKS
    roles: A = _of(np.int8)  # role of the target (language.encoded); PAD if there is none, or it has "weight": 0
    prompt: A = _of(np.bool_)  # whether the target is only read and not learned, as in a user's turn

    @classmethod
    def padding(cls, rows: int, length: int, pad: int) -> PackedBatch[np.ndarray]:
        """Rows of padding, as numpy arrays into which documents can be written."""
        fill = {"tokens": pad, "targets": pad, "doc_start": length}
        return PackedBatch(
            **{name: np.full((rows, length), fill.get(name, 0), dtype) for name, dtype in cls.dtypes().items()}
        )

    @classmethod
    def shapes(cls, rows: int, length: int) -> PackedBatch[jax.ShapeDtypeStruct]:
        """The batch as ShapeDtypeStructs [rows, length]."""
        return PackedBatch(
            **{name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in cls.dtypes().items()}
        )

    @classmethod
    def dtypes(cls) -> dict[str, np.dtype]:
        """The dtype of each field."""
        return {field.name: field.metadata["dtype"] for field in dataclasses.fields(cls)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch(Generic[A]):
    """Rows of preference pairs. In each row, the documents with `segment_ids` 2p + 1 and 2p + 2 are the chosen and the
    rejected answer of pair p. A pytree like `PackedBatch`.

    Attributes:
        documents: PackedBatch [B, T].
        reference: f32 [B, P, 2, R], for up to P pairs in a row. It has the log-probabilities under the reference model,
            summed over the trained positions of each answer, separately for each Role of the target. It is 0 where
            there is no pair or no reference.
    """

    documents: PackedBatch[A]
    reference: A

    @classmethod
    def shapes(cls, rows: int, length: int, pairs: int) -> PreferenceBatch[jax.ShapeDtypeStruct]:
        """The batch as ShapeDtypeStructs."""
        reference = jax.ShapeDtypeStruct((rows, pairs, 2, len(Role)), np.float32)
        return PreferenceBatch(PackedBatch.shapes(rows, length), reference)
