"""The part of `evaluate` that needs no model: it measures how good an experiment's image tokenizer is.

Scores the images of every held-out set, or those of a folder, and writes
  evaluation.json   {"tokenizer": {set: numbers}} (ar_unified.evaluation.tokenizer)
  <set>.png         original | reconstruction | difference; a row for each of a few images
  report.html       all of this and the tokenizer's training curves on one self-contained page
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified import progress
from ar_unified.data.images import NoImages, decode, draws_none, to_png
from ar_unified.data.sources import Source, open_source
from ar_unified.errors import UserError, about, saving_memory
from ar_unified.evaluation.report import write_report
from ar_unified.evaluation.tokenizer import PROTOCOL, NoReadableImage, Probe, draw_images, evaluate_tokenizer
from ar_unified.experiment import config as configs
from ar_unified.experiment import memory
from ar_unified.experiment.changes import changeable
from ar_unified.experiment.check_opened import HOLD_OUT
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.start import by_first_process
from ar_unified.manifests import Json
from ar_unified.training.probe import images_wanted, train_probe
from ar_unified.workdir import read_json, write_bytes, write_json


@by_first_process
def evaluate_held_out(experiment: Experiment, *, required: bool = False) -> None:
    """Runs the stage `tokenizer_evaluation`. If there is no image tokenizer, or no image to score it on, nothing is
    scored; with `required`, this raises UserError."""
    if experiment.text_only and not required:
        return experiment.say("==== tokenizer_evaluation: there is no image tokenizer to score")
    if not any(experiment.held_out.values()) and not required:
        return experiment.say(f"==== tokenizer_evaluation: nothing is held out to score it on. {HOLD_OUT}")
    config, sets = experiment.config, {name: sources for name, sources in experiment.held_out.items() if sources}
    steps = config.evaluation.tokenizer_probe_steps
    stage = experiment.stage(
        "tokenizer_evaluation",
        tokenizer=_tokenizer(experiment).hash,
        protocol=PROTOCOL,
        image_size=configs.plain(config.data.image_size),
        limit=config.evaluation.limit,
        probe_steps=steps,
        sources={name: [dict(source.fingerprint) for source in sources] for name, sources in sets.items()},
        probed=experiment.fingerprints() if steps else {},
        weights={name: file for name, file in _files(config).items() if file},
        may=changeable(anew=["tokenizer"]),
    )
    if stage.done:
        return experiment.skip(stage)
    results = score(experiment, sets, config.data.image_size, stage.folder, required=required)
    _tell(experiment, stage.folder)
    experiment.finish(stage, {name: numbers["psnr"] for name, numbers in results.items()})


@by_first_process
def evaluate_folder(experiment: Experiment, images: str, crop: int | None = None, links: bool = False) -> None:
    """Scores the image files of a folder in place of the held-out sets. The result has its own folder, and is made
    again each time.

    `crop` is the side of square crops in pixels; None means config.data.image_size. `links` is the same as the key
    `links` of a source.
    """
    with about("--images"):
        source = open_source(dict(kind="images", path=images, links=links))
    size = (crop, crop) if crop else experiment.config.data.image_size
    with about("--crop"):
        _tokenizer(experiment).config.grid(*size)
    folder = experiment.workdir.tokenizer_evaluation / f"{source.name}-{size[0]}x{size[1]}"
    with saving_memory(lambda: memory.advice("tokenizer_evaluation", experiment.config)):
        score(experiment, {source.name: [source]}, size, folder, required=True)
    _tell(experiment, folder)


def results_of(experiment: Experiment) -> tuple[dict[str, Json], dict[str, np.ndarray]]:
    """The numbers and the image sheets by held-out set, as the stage wrote them."""
    folder = experiment.workdir.tokenizer_evaluation
    if experiment.text_only or not any(experiment.held_out.values()):
        return {}, {}
    results = read_json(folder / "evaluation.json")["tokenizer"]
    return results, {name: decode((folder / f"{name}.png").read_bytes()) for name in results}


def score(
    experiment: Experiment,
    sets: Mapping[str, Sequence[Source]],
    size: Sequence[int],
    folder: Path,
    *,
    required: bool = False,
) -> dict[str, Any]:
    """Scores images of `size` (height, width) in pixels, writes the files, and returns the numbers by set. Raises
    UserError, with `required` also if there is no image to score."""
    config, (height, width) = experiment.config, size
    tokenizer = _tokenizer(experiment)
    networks = _networks(config)
    probe = _probe(experiment, (height, width))
    results: dict[str, Any] = {}
    sheets: dict[str, np.ndarray] = {}
    nothing: list[str] = []
    for name, sources in sets.items():
        try:
            most = min(config.evaluation.limit, sum(map(len, sources)))
            with progress.bar(most, "images", f"tokenizer on {name}") as bar:
                results[name], sheets[name] = evaluate_tokenizer(
                    tokenizer,
                    sources,
                    size=(height, width),
                    limit=config.evaluation.limit,
                    seed=config.seed,
                    probe=probe,
                    progress=bar.update,
                    **networks,
                )
        except NoReadableImage as error:
            nothing.append(f"{name}: {error}")
            continue
        write_bytes(folder / f"{name}.png", to_png(sheets[name]))
        experiment.say(_line(name, results[name]))
    if required and not results:
        raise UserError("; ".join(nothing))
    for line in nothing:
        experiment.say(line)
    write_json(folder / "evaluation.json", {"tokenizer": results})
    write_report(
        folder / "report.html",
        title=f"{config.name}: the image tokenizer",
        evaluation={"tokenizer": results},
        sheets=sheets,
        telemetry={"image_tokenizer": experiment.workdir.image_tokenizer / "metrics.jsonl"},
        config=configs.plain(config),
        facts=_facts(experiment),
        parts=("data", "images"),
    )
    return results


def _tell(experiment: Experiment, folder: Path) -> None:
    experiment.say(f"{folder / 'evaluation.json'}\n{folder / 'report.html'}")


def _tokenizer(experiment: Experiment) -> ImageTokenizer:
    tokenizer = experiment.image_tokenizer
    if isinstance(tokenizer, NoImages):
        raise UserError("this experiment is of text alone (config.image_tokenizer.steps=0): there is nothing to score")
    if why := draws_none(tokenizer):
        raise UserError(why)
    return tokenizer


def _files(config: Mapping[str, Any]) -> dict[str, str]:
    """The weight file for each measurement; "" for none."""
    return {"LPIPS": config["evaluation"]["lpips_file"], "inception": config["evaluation"]["inception_file"]}


def _networks(config: Mapping[str, Json]) -> dict[str, Any]:
    if not any(_files(config).values()):
        return {}
    from ar_unified.evaluation.networks import load_networks

    with about("config.evaluation"):
        return load_networks(_files(config))


def _probe(experiment: Experiment, size: tuple[int, int]) -> Probe | None:
    """A probe trained on the ids of the experiment's training images; None if the config asks for none."""
    config, tokenizer = experiment.config, _tokenizer(experiment)
    steps = config.evaluation.tokenizer_probe_steps
    if not steps:
        return None
    if not experiment.train:
        raise UserError(
            "config.evaluation.tokenizer_probe_steps: expected 0, because the probe learns from the images of "
            f"config.data.train, which has no sources; found {steps}"
        )
    height, width = tokenizer.config.grid(*size)
    wanted = images_wanted(steps, height * width)
    drawn = draw_images(experiment.train, size, wanted, config.seed)
    ids = []
    with progress.bar(wanted, "images", "ids for the probe") as bar:
        while batch := list(itertools.islice(drawn, tokenizer.batch_size)):
            ids.append(tokenizer.encode(np.stack([image.pixels for image in batch])))
            bar.update(len(batch))
    experiment.say(f"probe: {steps} steps on the ids of {sum(map(len, ids))} training images")
    return train_probe(np.concatenate(ids), tokenizer.codebook_size, steps=steps, seed=config.seed)


def _line(name: str, numbers: Mapping[str, Any]) -> str:
    said = [f"PSNR {numbers['psnr']:.2f} dB"]
    said += [f"SSIM {numbers['ssim']:.3f}"] if "ssim" in numbers else []
    said += [
        f"{numbers['usage']:.1%} of {numbers['codebook_size']} codes used, entropy {numbers['entropy_bits']:.2f} bits"
    ]
    said += [f"{numbers['probe']['bits_per_id']:.2f} bits per id under the probe"] if "probe" in numbers else []
    return f"{name}, {numbers['images']} images: {', '.join(said)}"


def _facts(experiment: Experiment) -> dict[str, str]:
    tokenizer = _tokenizer(experiment)
    size = sum(leaf.size for leaf in jax.tree.leaves(tokenizer.params))
    facts = f"{size / 1e6:.2f}M parameters, {tokenizer.codebook_size} codes, sha256 {tokenizer.hash[:12]}"
    return {"image tokenizer": facts}
