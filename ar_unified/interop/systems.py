"""The published systems by the name that `ar-unified import --as` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ar_unified.interop import text
from ar_unified.interop.files import Files
from ar_unified.interop.published import Published

SYSTEMS: Mapping[str, Callable[[Files], Published]] = MappingProxyType(
    {
        "llama": text.open_llama,
        "qwen": text.open_qwen,
        "gemma": text.open_gemma,
    }
)
