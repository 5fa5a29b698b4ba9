"""Types for nested dicts of arrays, which both ar_tokenizers and ar_unified use. Importing this module does not import
JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import jax
    import numpy as np

Params = dict[str, Any]  # nested dicts of arrays, or of their shapes, shardings or axis names

# Sums over a batch on the device: a plain sum, a (sum, count) pair, or nested sums that are not reported.
_Metric: TypeAlias = "jax.Array | tuple[jax.Array, jax.Array | float] | Params"
Metrics: TypeAlias = "dict[str, _Metric]"
# The reported sums on the host, in float64.
Totals: TypeAlias = "Mapping[str, np.ndarray | float | tuple[np.ndarray, np.ndarray]]"
