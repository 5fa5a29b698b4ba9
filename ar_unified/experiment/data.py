"""The stage `data`: all processes of a job, or a pipeline elsewhere, turn documents into token shards."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import jax
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified import storage, workdir
from ar_unified.data import prepare as preparing
from ar_unified.data.filters import filtered
from ar_unified.data.images import WAY, NoImages
from ar_unified.data.items import Source
from ar_unified.data.prepare import beam
from ar_unified.data.prepare.claims import Team
from ar_unified.data.prepare.encoder import Tokenizers
from ar_unified.data.prepare.image_codes import ImageCodes
from ar_unified.data.sizes import Counting
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.parallel import runtime
from ar_unified.workdir import Stage, Workdir


def prepare(experiment: Experiment, pipeline: str | None = None) -> None:
    """Prepares the splits train and validation. Each continues where it was interrupted.

    `pipeline` has the options of an Apache Beam pipeline whose workers make the shards; None means that the processes
    of this job make them. Raises UserError or RunError.
    """
    if pipeline is not None and jax.process_count() > 1:
        raise UserError(f"--beam: expected one process, which starts the pipeline; found {jax.process_count()}")
    filters = settings.filters(experiment.config)
    keys = ("image_size", "resize", *WAY, "layout", "max_tokens", *(("filters",) if filters.used else ()))
    with experiment.leaving_nothing():
        stage = experiment.stage(
            "data",
            data={key: configs.plain(experiment.config.data[key]) for key in keys},
            sources=experiment.fingerprints(held_out=True),
            text_hash=experiment.text_tokenizer.hash,
            image_hash=experiment.image_tokenizer.hash,
            together=True,
        )
        if stage.done:
            return experiment.skip(stage)
        _prepare(experiment, stage, pipeline)


def _prepare(experiment: Experiment, stage: Stage, pipeline: str | None) -> None:
    known = _codes(experiment, refresh=True) if runtime.first() else None  # process 0 opens it before the others
    splits = {"train": _filtered(experiment), "validation": experiment.held_out["validation"]}
    codes = known if known is not None else _codes(experiment, refresh=False)
    if runtime.first():
        for split in splits:  # claims of a job that has ended; no process works here yet
            storage.remove_tree(stage.folder / split / preparing.CLAIMS)
    tokenizer, summary = experiment.image_tokenizer, dict[str, object]()
    resize = Counting(experiment.resize)
    tokenizers = Tokenizers(_replicas(tokenizer), codes)
    with runtime.apart() as alive:
        team = Team(jax.process_index(), jax.process_count(), alive=alive)
        for split, sources in splits.items():
            if not sources:
                continue
            report = preparing.prepare(
                sources,
                experiment.grammar,
                tokenizer,
                stage.folder / split,
                max_tokens=experiment.config.data.max_tokens,
                resize=resize,
                may_be_lost=split == "validation",
                tokenizers=tokenizers,
                team=team,
                elsewhere=None if pipeline is None else partial(_by_beam, experiment, split, pipeline),
            )
            experiment.say(f"{split}:\n{report}")
            summary[split] = {name: asdict(counts) for name, counts in report.sources.items()}
        if tokenizers.encoded or tokenizers.known:
            counts = f"{tokenizers.encoded} encoded here, {tokenizers.known} encoded before"
            experiment.say(f"images: {counts} ({tokenizers})")
        if small := str(resize.enlarged):
            experiment.say(f"WARNING: {small}")
    experiment.finish(stage, summary)


def _filtered(experiment: Experiment) -> list[Source]:
    """The training sources without the items that the filters leave out. Process 0 decides which items these are; the
    others read the result.
    """
    held_out = [source for those in experiment.held_out.values() for source in those]

    def decided() -> list[Source]:
        verdicts = experiment.workdir.data / "filters.json"
        return filtered(experiment.train, held_out, settings.filters(experiment.config), verdicts)

    found = decided() if runtime.first() else []
    runtime.barrier("filters", timeout=runtime.ALONE)
    return found if runtime.first() else decided()


def _replicas(tokenizer: ImageTokenizer | NoImages) -> list[ImageTokenizer | NoImages]:
    """One replica for each device of this process, but only one on a CPU, because its simulated devices share its
    cores."""
    devices = jax.local_devices()
    if isinstance(tokenizer, NoImages) or len(devices) == 1 or devices[0].platform == "cpu":
        return [tokenizer]
    return [tokenizer.on(device) for device in devices]


def _codes(experiment: Experiment, refresh: bool) -> ImageCodes:
    tokenizer = experiment.image_tokenizer
    return ImageCodes(experiment.workdir.image_codes, tokenizer.hash, tokenizer.codebook_size, refresh=refresh)


# ---- shards that other processes make ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """Opens a workdir in a process outside the job, and returns a function that makes a shard by its name.

    Attributes:
        workdir: a URL, or a path that exists for that process, too; the stage `data` has begun there.
        split: train or validation.
    """

    workdir: str
    split: str

    def __call__(self) -> Callable[[str], None]:
        """Raises UserError if the workdir cannot be opened from here."""
        here = _open.enter_context(workdir.opened(self.workdir))
        experiment = Experiment(configs.recorded(here / "config.json"), Workdir(here, reader=True))
        return preparing.shard_maker(
            _filtered(experiment) if self.split == "train" else experiment.held_out[self.split],
            experiment.grammar,
            experiment.workdir.data / self.split,
            Tokenizers(_replicas(experiment.image_tokenizer), _codes(experiment, refresh=False)),
            max_tokens=experiment.config.data.max_tokens,
            resize=experiment.resize,
        )


_open = ExitStack()  # when this process ends, closes the workdirs that it has opened
atexit.register(_open.close)


def _by_beam(experiment: Experiment, split: str, options: str, names: Sequence[str]) -> None:
    experiment.say(f"{split}: {len(names)} shards are left to an Apache Beam pipeline ({options or 'its defaults'})")
    beam.run(names, Shards(storage.address(experiment.workdir.path.absolute()), split), options)
