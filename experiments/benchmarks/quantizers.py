"""Compares all quantizers with an equal budget: photographs and emoji, f8, 1,024 codes (fsq: 1,000 or 4,096; rq: two of
32).

    python experiments/benchmarks/quantizers.py --path DIR --workdir DIR2 --output FILE.json [--only NAME ...]

DIR (datasets) has clothing and noto-emoji with their captions.jsonl, made by ../data/make_photos.py and
make_emoji.py. One image in twenty of each is held out and scored: 135 images of 128 x 128 pixels. Each quantizer, with
its default settings, trains the network of experiments/photos.py from the same seed on the same crops, for --steps
steps of 16 images, with only the pixels' squared error as loss. Then a transformer of 1M parameters, the probe, learns
the ids of 1,200 training images for --probe steps, and its bits per id are measured on held-out images.

The table, and which quantizer to choose: docs/image_tokenizers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, parse_arg
from ar_unified.manifests import Json

CANDIDATES: dict[str, dict[str, Json]] = {
    "fsq": dict(quantizer="fsq"),
    "fsq, ifsq": dict(quantizer="fsq", activation="ifsq"),
    "fsq, 4096": dict(quantizer="fsq", levels=(8, 8, 8, 8)),  # four times the codes, with about the bits of vq
    "vq": dict(quantizer="vq"),
    "vq, ema": dict(quantizer="vq", codebook_update="ema"),
    "vq, rotation": dict(quantizer="vq", gradient="rotation"),
    "simvq": dict(quantizer="simvq"),
    "lfq": dict(quantizer="lfq"),
    "bsq": dict(quantizer="bsq"),
    "ibq": dict(quantizer="ibq"),
    "rq": dict(quantizer="rq", depth=2, codes=32),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The experiment for one quantizer. arg: "path=DIR,name=NAME,steps=N,probe=N", with a name in CANDIDATES."""
    args = parse_arg(arg, path="datasets", name="fsq", steps=None, probe=None)
    config = defaults()
    config.name = f"bake-off: {args['name']}"

    def images(split: str) -> tuple[ConfigDict, ...]:
        return tuple(
            ConfigDict(dict(kind="folder", path=f"{args['path']}/{name}", files=("captions",), split=split))
            for name in ("clothing", "noto-emoji")
        )

    config.data.train = images("[:95%]")
    config.data.validation = images("[95%:]")
    config.data.image_size = (128, 128)
    config.evaluation.tokenizer_probe_steps = int(args["probe"] or 150)

    tokenizer = config.image_tokenizer
    tokenizer.factor, tokenizer.patch = 8, 4
    tokenizer.width, tokenizer.multipliers, tokenizer.blocks = 64, (1, 2), (1, 2)
    tokenizer.crop, tokenizer.short_side, tokenizer.mirror = 64, 128, True
    tokenizer.steps, tokenizer.batch_size = int(args["steps"] or 1000), 16
    tokenizer.checkpoint_every = tokenizer.steps
    tokenizer.update(CANDIDATES[str(args["name"]).replace("+", ", ")])
    return config


def measured(name: str, told: str, folder: Path) -> dict[str, Json]:
    """Trains and scores one quantizer in separate processes. Finished stages are skipped. told: other arguments of
    `get_config`."""
    label = name.replace(", ", "+")  # a comma ends an argument
    config = ["--config", f"{__file__}:{told},name={label}", "--workdir", str(folder / label)]
    began, before = time.perf_counter(), os.times()
    for verb in (["tokenizer", "--only", "image"], ["evaluate", "--only", "tokenizer"]):
        subprocess.run([sys.executable, "-m", "ar_unified.cli.main", *verb, *config], check=True)
    after = os.times()
    (numbers,) = json.loads((folder / label / "tokenizer_evaluation/evaluation.json").read_text())["tokenizer"].values()
    keys = ("psnr", "ssim", "codebook_size", "usage", "dead", "entropy_bits", "perplexity", "id_stability", "images")
    return {key: numbers[key] for key in keys} | {
        "bits_per_id": numbers["probe"]["bits_per_id"],
        "ids_per_image": numbers["ids_per_image"],
        "psnr_corrupted_5%": numbers["psnr_corrupted"]["5%"],
        "seconds": time.perf_counter() - began,
        "cpu_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
    }


def main() -> None:
    """Trains, scores and probes each quantizer, and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="datasets")
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/bake_off"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--steps", type=int, default=1000, help="steps of each tokenizer")
    parser.add_argument("--probe", type=int, default=150, help="steps of each probe")
    arguments = parser.parse_args()
    told = f"path={arguments.path},steps={arguments.steps},probe={arguments.probe}"
    results: dict[str, Any] = {}
    for name in arguments.only:
        found = measured(name, told, arguments.workdir)
        if arguments.output.exists():  # may have the results of other processes
            results = json.loads(arguments.output.read_text())
        results[name] = found
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print(row(name, results[name]), flush=True)
    print("\n" + "\n".join(row(name, result) for name, result in results.items()))


def row(name: str, found: dict[str, Any]) -> str:
    """PSNR, SSIM, usage, entropy, the probe's bits per id and per image, stability, CPU seconds."""
    image = found["bits_per_id"] * found["ids_per_image"]
    return (
        f"    {name:14s}{found['psnr']:6.2f} {found['ssim']:6.3f} {found['usage']:6.1%} {found['entropy_bits']:6.2f} "
        f"{found['bits_per_id']:6.2f} {image:6.0f} {found['id_stability']:6.1%} {found['cpu_seconds']:6.0f}"
    )


if __name__ == "__main__":
    main()
