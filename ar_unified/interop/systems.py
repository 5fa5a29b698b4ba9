"""The published systems by the name that `ar-unified import --as` takes (`interop.SYSTEMS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ar_unified.interop import chameleon, emu3, emu3_5, liquid, lwm, simplear, tar, text
from ar_unified.interop.files import Files
from ar_unified.interop.published import Published

OPEN: Mapping[str, Callable[[Files], Published]] = MappingProxyType(
    {
        "chameleon": chameleon.open_chameleon,
        "anole": chameleon.open_anole,
        "lumina_mgpt": chameleon.open_lumina,
        "emu3": emu3.open_emu3,
        "emu3_gen": emu3.open_gen,
        "emu3_chat": emu3.open_chat,
        "emu3_5": emu3_5.open_emu3_5,
        "lwm": lwm.open_lwm,
        "liquid": liquid.open_liquid,
        "simplear": simplear.open_simplear,
        "tar": tar.open_tar,
        "llama": text.open_llama,
        "qwen": text.open_qwen,
        "gemma": text.open_gemma,
    }
)
