"""The stage `text_tokenizer`: trains a tokenizer on the experiment's sources or takes one from elsewhere, and measures
it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ar_tokenizers.codec import Codec
from ar_tokenizers.fertility import Fertility, table
from ar_tokenizers.files import write_bytes
from ar_tokenizers.lossless import RESERVED
from ar_tokenizers.reading import load_codec
from ar_tokenizers.text import TextTokenizer

from ar_unified.bundle import KEPT, LANGUAGE, PUBLISHED
from ar_unified.data.balance import indices, passes, text_bytes
from ar_unified.data.items import BadItem, LeftOut, Source, language, texts_of
from ar_unified.data.sources import texts
from ar_unified.errors import UserError, about
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.start import by_first_process
from ar_unified.workdir import write_json

_MEASURED = 1_000_000  # bytes of each source that the report reads, spread evenly over the source


@by_first_process
def train_text(experiment: Experiment) -> None:
    """Runs the stage `text_tokenizer`."""
    settings = experiment.config.text_tokenizer
    bundle = experiment.bundle
    tokenizer: Codec | None = load(settings) if settings.model else None
    if bundle is not None:
        tokenizer = bundle.text_tokenizer
    brought = tokenizer is not None
    stage = experiment.stage(
        "text_tokenizer",
        "text_tokenizer",
        sources=experiment.fingerprints(),
        model_sha256=tokenizer.hash if tokenizer else "",
    )
    if stage.done:
        return experiment.skip(stage)
    left_out, often, reserved = LeftOut(), dict[str, float](), dict.fromkeys(RESERVED, 0)
    if tokenizer is None:
        tokenizer, often = _train(experiment, left_out, reserved)
    write_bytes(stage.folder / tokenizer.file, tokenizer.data)
    if bundle is not None:
        bundle.copy(stage.folder, LANGUAGE, PUBLISHED, KEPT)
    measured = measure(
        tokenizer,
        [(source.name, source) for source in experiment.train]
        + [(f"validation/{source.name}", source) for source in experiment.held_out["validation"]],
    )
    report: dict[str, object] = {
        "pieces": tokenizer.size,
        "hash": tokenizer.hash,
        "losses": [str(loss) for loss in tokenizer.losses],
        "symbols_that_text_can_spell": tokenizer.symbols,
        "passes": often,
        "left_out": left_out.kinds,
        "cut_at": {f"U+{ord(sign):04X}": count for sign, count in reserved.items() if count},
        "texts": {name: row.to_json() for name, row in measured.items()},
    }
    write_json(stage.folder / "report.json", report)
    experiment.say(table(measured))
    for line in _remarks(report, 0 if brought else settings.vocab_size):
        experiment.say(line)
    experiment.finish(stage, {"pieces": tokenizer.size, "hash": tokenizer.hash})


def _train(
    experiment: Experiment, left_out: LeftOut, reserved: dict[str, int]
) -> tuple[TextTokenizer, dict[str, float]]:
    """A tokenizer trained on the training sources, and how often each source was read.

    `reserved` counts for each character how many texts contain it.
    """
    settings, sources = experiment.config.text_tokenizer, experiment.train
    times = passes(sources, temperature=settings.temperature, max_bytes=settings.max_bytes)
    often = dict(zip((source.name for source in sources), times, strict=True))
    if set(times) != {1.0}:
        experiment.say("read: " + ", ".join(f"{name} {count:.3g} times" for name, count in often.items()))
    try:
        tokenizer = TextTokenizer.train(
            _counted(texts(sources, times, left_out), reserved),
            settings.vocab_size,
            model_type=settings.model_type,
            max_bytes=settings.max_bytes,
        )
    except ValueError as error:
        where = f"text tokenizer of {', '.join(often) or 'no sources'}"
        raise UserError(f"{where}: {error}" + (f". Left out: {left_out}" if left_out.kinds else "")) from error
    if left_out.kinds:
        experiment.say(f"left out: {left_out}")
    return tokenizer, often


def _counted(texts: Iterable[str], reserved: dict[str, int]) -> Iterator[str]:
    for text in texts:
        for sign in reserved:
            reserved[sign] += sign in text
        yield text


def load(settings: Mapping[str, Any]) -> Codec:
    """The tokenizer that a config names. Raises UserError if it is missing, or if it loses text and
    text_tokenizer.lossy does not allow that."""
    with about("config.text_tokenizer.model"):
        return load_codec(settings["model"], lossy=settings["lossy"])


def measure(tokenizer: Codec, sources: Sequence[tuple[str, Source]]) -> dict[str, Fertility]:
    """Fertility and round trip by source, and by language ("name/nld") if items state their language. Bad items are
    left out.
    """
    rows: dict[str, Fertility] = {}
    for name, source in sources:
        part = indices(len(source), min(1.0, _MEASURED / max(text_bytes(source), 1.0)), source.name)
        for i, found in texts_of(source, part):
            if isinstance(found, BadItem):
                continue
            group = "/".join(filter(None, (name, language(source, i))))
            for text in filter(None, found):
                rows.setdefault(group, Fertility()).add(tokenizer, text, source.origin(i))
    return dict(sorted(rows.items()))


def told(losses: Iterable[Any]) -> list[str]:
    """Lines that say how a text tokenizer loses text."""
    return [f"this text tokenizer loses text: {loss}" for loss in losses]


def _remarks(report: Mapping[str, Any], wanted: int) -> list[str]:
    lines = told(report["losses"])
    if symbols := report["symbols_that_text_can_spell"]:
        shown = ", ".join(map(repr, symbols[:8]))
        lines.append(f"texts may contain {len(symbols)} user-defined symbols of this model ({shown}): they stay text")
    for sign, count in report["cut_at"].items():
        lines.append(
            f"{sign} is in {count} of the texts. SentencePiece reserves it, so texts were split there for training, "
            "and it is encoded as bytes"
        )
    if report["pieces"] < wanted:
        lines.append(f"{report['pieces']} pieces instead of {wanted}: this corpus is too small for more")
    return lines
