"""The fields of a batch of packed rows: what the loader makes, the step trains on, and planning knows by its shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


def _of(dtype: Any) -> Any:
    return dataclasses.field(metadata={"dtype": np.dtype(dtype)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows of whole documents side by side, [B, T] each: numpy arrays, jax arrays, or shapes. A pytree."""

    tokens: Any = _of(np.int32)  # what is read; pad behind the last document
    targets: Any = _of(np.int32)  # the next token of the same document, else pad
    positions: Any = _of(np.int32)  # in its document; 0 on padding
    doc_start: Any = _of(np.int32)  # where in the row its document begins; T on padding
    segment_ids: Any = _of(np.int32)  # number of its document in the row, from 1; 0 on padding
    tasks: Any = _of(np.int8)  # of its document, as an index into TASKS
    roles: Any = _of(np.int8)  # of the target, by its place (language.encoded); PAD: none, or none to learn
    prompt: Any = _of(np.bool_)  # whether the target is read and not to be learned: a user's or the system's turn

    @classmethod
    def padding(cls, rows: int, length: int, pad: int) -> PackedBatch:
        """Rows without a document, as numpy arrays to write documents into."""
        fill = {"tokens": pad, "targets": pad, "doc_start": length}
        return cls(**{name: np.full((rows, length), fill.get(name, 0), dtype) for name, dtype in cls.dtypes().items()})

    @classmethod
    def shapes(cls, rows: int, length: int) -> PackedBatch:
        """ShapeDtypeStructs [rows, length]."""
        return cls(**{name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in cls.dtypes().items()})

    @classmethod
    def dtypes(cls) -> dict[str, np.dtype]:
        """By field."""
        return {field.name: field.metadata["dtype"] for field in dataclasses.fields(cls)}
