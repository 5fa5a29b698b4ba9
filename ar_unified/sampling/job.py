"""A file of requests in, a folder of samples out; killed at any moment, it goes on where it was.

    manifest.json   what decides the samples: vocabulary, weights, requests, defaults, engine shape
    samples.jsonl   one line per sample, appended when its pictures are in their place; bad requests are lines, too
    images/ID/00_00.png   picture 00 of sample 00; prompt_00.png, a picture of the prompt as the model saw it
    index.html      the gallery

A sample depends on its request alone and the order of work on the requests alone, so the files of an interrupted job
are, byte for byte, those of one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from ar_unified import progress
from ar_unified.data.images import to_png
from ar_unified.data.prepare import default_resize
from ar_unified.document import CodesPart, ImagePart, Part, TextPart
from ar_unified.grammar import GrammarError
from ar_unified.sampling import gallery
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import RequestError, Sample
from ar_unified.sampling.requests import Line, load_picture, read_requests
from ar_unified.workdir import clean, read_json, write_bytes, write_json

_WINDOW = 16  # batches of requests whose pictures are in memory at once


class ImageTokenizer(Protocol):
    """Pictures uint8 [B, H, W, 3] <-> codes int32 [B, h, w]; `factor` pixels a side of one code."""

    @property
    def factor(self) -> int: ...

    def encode(self, images: np.ndarray, /) -> np.ndarray: ...

    def decode(self, codes: np.ndarray, /) -> np.ndarray: ...


class JobMismatch(ValueError):
    """The output folder belongs to another job. `field`: the first that differs, dotted."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class JobReport:
    """What a job did: samples and errors of this run, lines found done, tokens drawn, seconds."""

    samples: int
    errors: int
    found: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = f"{self.samples / self.seconds:.2f} samples/s, {self.tokens / self.seconds:.0f} tokens/s"
        found = f", {self.found} were done already" if self.found else ""
        return f"{self.samples} samples, {self.errors} errors{found}; {rate}"


def run_job(
    engine: Engine,
    image_tokenizer: ImageTokenizer,
    requests: str | Path,
    output: str | Path,
    *,
    defaults: Mapping[str, Any] | None = None,
    weights: str = "",
    resize: Callable[[np.ndarray], np.ndarray] | None = None,
    show_progress: bool = True,
) -> JobReport:
    """Serves every request of a JSONL file (`sampling.requests`); what is done already is not done again.

    Args:
        engine: its grammar is that of `image_tokenizer`.
        requests: the file. output: the folder, made if it is missing.
        defaults: settings of requests that do not say, with the keys of a request.
        weights: names the weights (a hash, or checkpoint and step): samples of others are not mixed in.
        resize: what data preparation did to a picture, uint8 [H, W, 3] to uint8; None: what the layout implies.
        show_progress: a bar with rate and time left, on stderr.

    Raises:
        JobMismatch: `output` holds a job with other requests, weights, tokenizers, defaults or engine shape.
        RequestError: `defaults` are wrong. OSError: the requests cannot be read, or the output not be written.
        ValueError: samples.jsonl holds a line that no job wrote.
    """
    requests, output = Path(requests), Path(output)
    lines = read_requests(requests, factor=image_tokenizer.factor, defaults=defaults)
    _begin(output, _manifest(engine, requests, defaults or {}, weights))
    done = recover(output / "samples.jsonl")
    started = time.monotonic()

    def finished(line: Line, sample: int | None) -> bool:
        return (line.number, sample) in done or (line.number, None) in done

    def undone(line: Line) -> list[int]:
        return [i for i in range(line.request.n) if not finished(line, i)] if line.request else []

    total = sum(line.request.n for line in lines if line.request)
    writer = _Writer(output, image_tokenizer)
    left = sum(len(undone(line)) for line in lines)
    resize = resize or default_resize(engine.grammar.layout, image_tokenizer.factor)
    with (
        progress.bar(total, "samples", "sample", done=total - left, shown=show_progress) as bar,
        open(output / "samples.jsonl", "ab") as file,
    ):
        for window in _chunks(lines, _WINDOW * engine.batch_size):
            bad = [line for line in window if line.error]
            good = [line for line in window if undone(line)]
            ready, refused = _prepare(engine, image_tokenizer, good, requests.parent, resize)
            errors = sorted(bad + refused, key=lambda line: line.number)
            writer.append(file, [_error(line) for line in errors if not finished(line, None)])
            bar.update(sum(len(undone(line)) for line in refused))
            by_id = {line.id: (line, pictures) for line, pictures in ready}
            pairs = [(line.request, i) for line, _ in ready for i in undone(line) if line.request]
            for batch in _chunks(engine.draw(pairs), engine.batch_size):
                writer.write(file, batch, by_id)
                bar.update(len(batch))
                bar.set_postfix_str(f"{writer.tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
    gallery.write(output)
    return JobReport(writer.samples, writer.errors, len(done), writer.tokens, max(time.monotonic() - started, 1e-9))


def recover(path: Path) -> set[tuple[int, int | None]]:
    """What a samples.jsonl says is done, as (line of the requests, sample), sample None for a bad request.

    A torn last line is cut off.

    Raises:
        ValueError: a whole line is not one a job wrote.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):  # the writer was killed in the middle of a line: its sample is drawn again
        with open(path, "r+b") as file:
            file.truncate(whole)
    done: set[tuple[int, int | None]] = set()
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            done.add((row["line"], row["sample"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a sample, found {line[:60]!r} ({error!r})") from None
    return done


# ---- the manifest -----------------------------------------------------------------------------------------------


def _manifest(engine: Engine, requests: Path, defaults: Mapping[str, Any], weights: str) -> dict[str, Any]:
    manifest = {
        "version": 1,
        "vocabulary": engine.grammar.manifest(),
        "weights": weights,
        "requests": hashlib.sha256(requests.read_bytes()).hexdigest(),
        "defaults": dict(defaults),
        "engine": {"batch_size": engine.batch_size, "max_length": engine.max_length, "dtype": str(engine.config.dtype)},
    }
    return json.loads(json.dumps(manifest))


def _begin(output: Path, manifest: Mapping[str, Any]) -> None:
    path = output / "manifest.json"
    if path.exists():
        ours, theirs = dict(_flat(manifest)), dict(_flat(read_json(path)))
        for field in sorted(ours.keys() | theirs.keys()):
            a, b = theirs.get(field, "(absent)"), ours.get(field, "(absent)")
            if a != b:
                raise JobMismatch(
                    field,
                    f"{output} holds a job with {field} = {a!r:.120}, this one has {b!r:.120}: "
                    "its samples would be mixed. Use another output folder, or delete this one.",
                )
        clean(output)
    elif (output / "samples.jsonl").exists():
        raise JobMismatch(
            "manifest.json", f"{output} has samples.jsonl but no manifest.json: use another output folder"
        )
    else:
        write_json(path, manifest)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


# ---- pictures in ------------------------------------------------------------------------------------------------


def _prepare(
    engine: Engine,
    tokenizer: ImageTokenizer,
    lines: Sequence[Line],
    folder: Path,
    resize: Callable[[np.ndarray], np.ndarray],
) -> tuple[list[tuple[Line, list[np.ndarray]]], list[Line]]:
    """Lines with their parts, as (line, pictures of the prompt), and the lines that the engine cannot serve."""
    loaded: list[tuple[Line, list[np.ndarray]]] = []
    refused: list[Line] = []
    for line in lines:
        try:
            names = [part for part in line.content if isinstance(part, Path)]
            loaded.append((line, [resize(load_picture(folder, name)) for name in names]))
        except RequestError as error:
            refused.append(replace(line, error=str(error)))
    codes = iter(_by_size(tokenizer.encode, [picture for _, pictures in loaded for picture in pictures]))
    ready: list[tuple[Line, list[np.ndarray]]] = []
    for line, pictures in loaded:
        parts: list[Part] = [part if isinstance(part, TextPart) else CodesPart(next(codes)) for part in line.content]
        assert line.request is not None
        request = replace(line.request, parts=tuple(parts))
        try:
            engine.check(request)
            ready.append((replace(line, request=request), pictures))
        except (RequestError, GrammarError) as error:
            refused.append(replace(line, error=str(error)))
    return ready, refused


def _by_size(function: Callable[[np.ndarray], np.ndarray], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`function` over the arrays, those of one shape in one call; results in the order of the arrays."""
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, array in enumerate(arrays):
        places[array.shape].append(i)
    out: list[np.ndarray] = list(arrays)
    for where in places.values():
        for i, result in zip(where, function(np.stack([arrays[i] for i in where])), strict=True):
            out[i] = result
    return out


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# ---- samples out ------------------------------------------------------------------------------------------------


def _error(line: Line) -> dict[str, Any]:
    prompt = [{"type": "text", "text": part.text} for part in line.content if isinstance(part, TextPart)]
    return {"id": line.id, "sample": None, "line": line.number, "error": line.error, "prompt": prompt}


class _Writer:
    """Puts a batch of samples into the folder: first the pictures, whole, then one line each."""

    def __init__(self, output: Path, tokenizer: ImageTokenizer):
        self.output, self.tokenizer = output, tokenizer
        self.samples = self.errors = self.tokens = 0

    def write(
        self, file: IO[bytes], batch: Sequence[Sample], lines: Mapping[str, tuple[Line, list[np.ndarray]]]
    ) -> None:
        codes = [
            part.codes
            for s in batch
            for part in (s.document.parts if s.document else ())
            if isinstance(part, CodesPart)
        ]
        pictures = iter(_by_size(self.tokenizer.decode, codes))
        rows = []
        for sample in batch:
            request, (line, given) = sample.request, lines[sample.request.id]
            row: dict[str, Any] = {"id": request.id, "sample": sample.index, "line": line.number}
            row["prompt"] = self._segments(request.parts, iter(given), request.id, "prompt", known=True)
            if sample.document is None:
                row["error"] = sample.error
            else:
                row["segments"] = self._segments(
                    sample.document.parts, pictures, request.id, f"{sample.index:02d}", known=False
                )
            row |= {"finish_reason": sample.finish_reason, "seed": request.seed, "guidance": request.guidance}
            row |= {"tokens": sample.tokens.tolist()} | ({"meta": dict(request.meta)} if request.meta else {})
            rows.append(row)
            self.tokens += len(sample.tokens)
        self.append(file, rows)

    def append(self, file: IO[bytes], rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            # A lone surrogate of a bad request becomes its JSON escape.
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            file.flush()  # one write a line
            self.errors += "error" in row
            self.samples += "error" not in row
        os.fsync(file.fileno())

    def _segments(
        self, parts: Iterable[Part], pictures: Iterator[np.ndarray], id: str, name: str, *, known: bool
    ) -> list[dict[str, Any]]:
        """Parts as JSON, with their pictures written to files; `known`: files that are there need not be again."""
        segments: list[dict[str, Any]] = []
        count = 0
        for part in parts:
            if isinstance(part, TextPart):
                segments.append({"type": "text", "text": part.text})
                continue
            pixels = part.pixels if isinstance(part, ImagePart) else next(pictures)
            path = f"images/{id}/{name}_{count:02d}.png"
            if not (known and (self.output / path).exists()):
                write_bytes(self.output / path, to_png(pixels))
            segments.append({"type": "image", "image": path, "height": pixels.shape[0], "width": pixels.shape[1]})
            count += 1
        return segments
