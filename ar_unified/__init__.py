"""Train and sample autoregressive image+text models: `ar_unified.load(folder)` opens one.

Importing this package has one effect: it imports `ar_tokenizers`, which keeps JAX from computing wrong sums on a CPU.
The names below import JAX when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import ar_tokenizers  # noqa: F401

if TYPE_CHECKING:
    from ar_unified.language.document import Document as Document
    from ar_unified.language.document import ImagePart as ImagePart
    from ar_unified.language.document import TextPart as TextPart
    from ar_unified.sampling.decoding import Filter as Filter
    from ar_unified.sampling.model import Model as Model
    from ar_unified.sampling.model import load as load
    from ar_unified.sampling.request import Request as Request

    __version__: str

_LAZY = {
    "Document": "language.document",
    "Filter": "sampling.decoding",
    "ImagePart": "language.document",
    "Model": "sampling.model",
    "Request": "sampling.request",
    "TextPart": "language.document",
    "load": "sampling.model",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("ar_unified.version").version()
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
