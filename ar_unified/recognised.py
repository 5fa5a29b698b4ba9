"""Says what a folder or a file is, where a program expected something else there.

A person who names the wrong folder gets one sentence about it, with the command that helps. Nothing here decides
whether something can be read; these words are only added to an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

PICKLED = (".pth", ".pt", ".ckpt", ".bin", ".pkl")
LFS = b"version https://git-lfs"  # a file that Git LFS has not fetched begins with these bytes
_LARGEST = 1 << 26  # maximum bytes of a config.json
# What `ar-unified import --as` may be for a `model_type` of a config.json.
FAMILIES: dict[str, tuple[str, ...]] = {
    "chameleon": ("chameleon", "anole", "lumina_mgpt"),
    "emu3": ("emu3", "emu3_gen", "emu3_chat", "emu3_5"),
    "llama": ("llama",),
    "qwen2": ("qwen", "simplear", "tar"),
    "qwen3": ("qwen",),
    "gemma": ("gemma", "liquid"),
}


def recognised(path: Path, system: str = "", *, model: bool = True) -> str:
    """What is at `path`, for example "is a bundle already: ..."; "" if nothing is known about it.

    Args:
      system: the `--as` of an import. A config.json that may belong to this system needs no explanation.
      model: whether a model was expected; if not, its config.json is not looked at.
    """
    if not path.exists():
        return ""
    folder = path if path.is_dir() else path.parent
    names = {each.name for each in path.iterdir()} if path.is_dir() else {path.name}
    if not names:
        return "is empty"
    if pointer := next(_pointers(folder, names), None):
        return f"has only a pointer of Git LFS for {pointer}, not its content: run `git lfs pull` there"
    if "bundle.json" in names:
        return f"is a bundle already: sample, evaluate and train take it as --from {path} or init={path}"
    if {"text_tokenizer", "model"} <= names:
        return f"is a workdir: `ar-unified export --workdir {path} --output BUNDLE` makes a bundle of it"
    if "language.json" in names:
        return "is a part of a bundle, without its bundle.json: copy the whole bundle again"
    if {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} & names:
        return "is a checkpoint of Orbax: name the workdir that it is in"
    if "adapter_config.json" in names and "config.json" not in names:
        return f"is a LoRA adapter: `ar-unified sample --from BUNDLE --adapter NAME={path}` uses it"
    if {"weights.safetensors", "config.json"} <= names:
        return f"is an image tokenizer of this project: --config.image_tokenizer.model={path} uses it"
    # LWM's files are streams without an ending.
    weights = _ending(names, ".safetensors") or "params" in names
    if (gguf := _ending(names, ".gguf")) and not weights:
        return f"has {gguf}, a GGUF file, which is not read: download the .safetensors files of the same model"
    if (pickled := _ending(names, *PICKLED)) and not weights:
        return (
            f"has no .safetensors files, and {pickled} is pickled: convert it with "
            f"`ar-unified convert-pickle --from {path / pickled if path.is_dir() else path} --output FOLDER` first"
        )
    return _published(path, names, system) if model else ""


def unknown_family(folder: Path) -> str:
    """The `model_type` of a folder's config.json if it is not in FAMILIES; otherwise ""."""
    kind = str((_json(folder / "config.json") or {}).get("model_type") or "")
    return "" if kind.lower() in FAMILIES else kind


def no_workdir(folder: Path) -> str:
    """What is in a folder that was named as a workdir, if it is the folder of a model; otherwise ""."""
    if (folder / "bundle.json").exists():
        return f"is a bundle: name it with --from, or begin a training with --config.init={folder}"
    if "model_type" in (_json(folder / "config.json") or {}):
        return _published(folder, {"config.json"}, "")
    return ""


def _published(path: Path, names: set[str], system: str) -> str:
    """What a config.json of the library transformers says."""
    if path.is_file():
        weights = system == "lwm" or (system and path.suffix == ".safetensors")
        return "" if weights else "is a single file: name its folder"
    if "config.json" not in names or "params" in names:  # LWM's config.json describes nothing
        return ""
    config = _json(path / "config.json")
    if config is None:
        return ""
    if (kind := config.get("model_type")) is None:
        return "" if "hidden_size" in config else "has a config.json that describes no model: it has no model_type"
    ways = FAMILIES.get(str(kind).lower(), ())
    said = f"has a config.json of model_type {kind!r:.40}"
    if system in ways or (system and not ways):  # the error itself says more
        return ""
    if system:
        return f"{said}: give --as {' or '.join(ways)}, not {system}"
    if not ways:
        return f"{said}; `ar-unified import` knows {', '.join(FAMILIES)}"
    return f"{said}: `ar-unified import --from {path} --as {' | '.join(ways)} --output BUNDLE` makes a bundle of it"


def _json(path: Path) -> dict[str, object] | None:
    try:
        if path.stat().st_size > _LARGEST:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _ending(names: set[str], *endings: str) -> str:
    return min((name for name in names if name.endswith(endings)), default="")


def _pointers(folder: Path, names: set[str]) -> Iterator[str]:
    for name in sorted(names):
        file = folder / name
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
            yield name
