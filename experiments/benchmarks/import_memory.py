"""How much memory and time an import of real size needs, with files of random numbers that are made here and not kept.

The files are bfloat16 shards of a preset, with transformers' names. They repeat one block of random numbers, scaled to
1/sqrt(width), so making them takes no longer than writing them. Everything that is not part of the transformer
(settings, tokenizers, other tensors) comes from --beside, a small model in the same format with the preset's
vocabulary; its config.json gets the preset's sizes. Then `ar-unified import` runs in its own process. Two numbers are
printed: seconds per GB read, and that process's peak of resident memory, minus the peak of a process that only imports
the same modules. The bound for this peak is two shards + 2 GiB; the exit status is 1 if it is higher.

    python experiments/benchmarks/import_memory.py --model chameleon_34b --as chameleon --beside TINY --folder DIR

The disk needs room for the files and for the bundle: 2 x 68 GB for chameleon_34b. --layers N takes fewer layers than
the preset has. --holes makes files of zeros, which need no room but make times less meaningful. Works on Linux.

Before the measured import, another import is started, and is killed after --kill-after seconds. The measured import
must remove the unfinished files of the killed one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ar_unified.interop.keys import HF, Keys
from ar_unified.interop.sources import open_source
from ar_unified.language.border import Border
from ar_unified.manifests import Json
from ar_unified.model.config import TransformerConfig, config_from
from ar_unified.tensors import INDEX, Kind, TensorWriter

_BLOCK = 1 << 22  # how many random numbers are made
# Linux counts the parent's memory as the new process's, so the import is started by a parent with little memory.
_PARENT = """
import json, resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
json.dump([status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss], open(sys.argv[1], "w"))
"""
# What a training or a sampler does when it loads the bundle on a host with --devices devices.
_LOAD = """
import sys
import jax
from ar_unified.bundle import Bundle
from ar_unified.model.transformer import abstract_params
from ar_unified.parallel.mesh import make_mesh
bundle = Bundle(sys.argv[1])
mesh = make_mesh({"data": 1, "fsdp": -1}, jax.devices())
places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(bundle.config, mesh))
jax.block_until_ready(bundle.params(places))
"""
_PREFIX = {"emu3": {"model.": "text_model.model.", "lm_head.": "text_model.lm_head."}}


def main() -> int:
    """Makes the files, imports them and prints memory and seconds; returns 1 if the memory is over the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a preset")
    parser.add_argument("--as", dest="system", required=True, help="the format, as in `ar-unified import --as`")
    parser.add_argument("--beside", required=True, help="a small model in the same format")
    parser.add_argument("--folder", required=True, help="a folder to make, and to remove at the end")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--devices", type=int, default=8, help="number of CPU devices that the import sees")
    parser.add_argument("--layers", type=int, default=0, help="number of layers, if fewer than the preset's")
    parser.add_argument("--holes", action="store_true", help="make files of zeros, which need no disk space")
    parser.add_argument("--kill-after", type=float, default=10.0, help="seconds until the first import is killed")
    parser.add_argument("--load", action="store_true", help="also read the whole bundle onto the devices")
    parser.add_argument("--keep", action="store_true", help="do not remove the files and the bundle")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    config = config_from({"preset": arguments.model})
    config = dataclasses.replace(config, n_layers=arguments.layers or config.n_layers)
    started = time.perf_counter()
    shard_bytes = int(arguments.shard_gb * 1e9)
    size = generate(
        folder / "published", config, arguments.system, arguments.beside, shard_bytes, holes=arguments.holes
    )
    print(f"made {size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={arguments.devices}",
    }
    verb = ["import", "--as", arguments.system, "--from", str(folder / "published"), "--output", str(folder / "bundle")]
    _, idle, _ = measure(
        [sys.executable, "-c", "import ar_unified.interop.importing, ar_unified.cli.main"], environment
    )
    killed = subprocess.Popen([sys.executable, "-m", "ar_unified.cli.main", *verb], env=environment)
    time.sleep(arguments.kill_after)
    killed.kill()
    killed.wait()
    left = [path.name for path in folder.iterdir() if path.name != "published"]
    print(f"first import killed after {arguments.kill_after:.0f} s, left {', '.join(left) or 'nothing'}", flush=True)
    status, peak, seconds = measure([sys.executable, "-m", "ar_unified.cli.main", *verb], environment)
    found = sorted(path.name for path in folder.iterdir())
    if arguments.load:
        shutil.rmtree(folder / "published")
        _, held, took = measure([sys.executable, "-c", _LOAD, str(folder / "bundle")], environment)
        print(
            f"onto {arguments.devices} devices: peak {(held - idle) / 1e9:.2f} GB, "
            f"including the model's {size / 1e9:.2f} GB"
        )
        print(f"{took:.1f} s, {took / (size / 1e9):.2f} s/GB")
    if not arguments.keep:
        shutil.rmtree(folder)
    if found != ["bundle", "published"]:
        raise SystemExit(f"expected only the folders bundle and published, found {', '.join(found)}")
    if status:
        raise SystemExit(f"the import ended with {status}")
    most = 2 * arguments.shard_gb * 1e9 + (2 << 30)
    print(
        f"peak {(peak - idle) / 1e9:.2f} GB, expected at most {most / 1e9:.2f} GB "
        f"(both without {idle / 1e9:.2f} GB for the imported modules)"
    )
    print(f"{seconds:.1f} s, {seconds / (size / 1e9):.2f} s/GB")
    return int(peak - idle > most)


def generate(
    folder: Path, config: TransformerConfig, system: str, beside: str | Path, shard_bytes: int, *, holes: bool = False
) -> int:
    """Writes a model in transformers' format, of zeros if `holes`. Returns its bytes."""
    extra = open_source(beside)
    folder.mkdir(parents=True)
    for path in Path(beside).iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, folder / path.name)
    found = json.loads((Path(beside) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(resized(found, config)))
    groups = (config.n_heads, config.n_kv_heads) if config.qk_norm == "layernorm" else (0, 0)
    dialect = HF.prefixed(_PREFIX.get(system, {}))
    keys = Keys(dialect, config, Border.from_ids(range(config.vocab_size)), qk_groups=groups)
    shapes = {name: shape for slot in keys.slots() for name, shape in zip(slot.names, slot.shapes, strict=True)}
    ours = tuple({name.split(".")[0] + "." for name in shapes} - {"model."}) + ("model.layers.",)
    others = sorted(name for name in extra.names() - shapes.keys() if not name.startswith(ours))
    kinds = {name: Kind(shape, "bfloat16") for name, shape in shapes.items()}
    kinds |= {name: Kind(extra.shape(name), str(extra.read(name).dtype)) for name in others}
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
    # Parts that are not written are holes. The writer complains about them at the end, when everything else is done.
    unwritten = contextlib.suppress(AssertionError) if holes else contextlib.nullcontext()
    with unwritten, TensorWriter(folder, kinds, shard_bytes, alone=True, metadata={"format": "pt"}) as writer:
        for name in () if holes else shapes:
            writer.put(name, numbers(kinds[name].shape, block))
        for name in others:
            writer.put(name, extra.read(name))
    return sum(kind.nbytes for kind in kinds.values())


def numbers(shape: tuple[int, ...], block: np.ndarray) -> np.ndarray:
    """bfloat16 numbers. For a matrix, their variance is 1/width; for a vector, they are around 1."""
    scaled = block / math.sqrt(shape[-1]) if len(shape) > 1 else 1 + 0.3 * block
    return np.resize(scaled.astype(ml_dtypes.bfloat16), shape)


def resized(found: dict[str, Any], config: TransformerConfig) -> dict[str, Json]:
    """A config.json with the sizes of another model. In a model of two parts, the text part gets them."""
    if isinstance(found.get("text_config"), dict):
        return found | {"text_config": resized(found["text_config"], config)}
    sizes = {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
    }
    return found | sizes | ({"head_dim": config.head_dim} if "head_dim" in found else {})


def measure(command: list[str], environment: dict[str, str]) -> tuple[int, int, float]:
    """(exit status, peak of resident memory in bytes, seconds) of a process."""
    with tempfile.NamedTemporaryFile("r") as file:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-S", "-c", _PARENT, file.name, *command], env=environment, check=True)
        seconds = time.perf_counter() - started
        status, kib = json.load(file)
    return status, kib * 1024, seconds


if __name__ == "__main__":
    sys.exit(main())
