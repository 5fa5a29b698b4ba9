"""Turns requests into a folder of samples. A job that was killed at any moment can continue where it stopped.

    manifest.json   what determines the samples: vocabulary, weights, requests, defaults, engine shape
    samples*.jsonl  one line per sample, appended after its images are written; a bad request has a line, too
    images/NAME/    the images of a request: 00_00.png is image 00 of sample 00, and prompt_00.png is an image of the
                    prompt as the model saw it. If a side has more than 256 pixels, 00_00.jpg is the thumbnail. NAME is
                    the request's id, or the "name" in its lines if the id cannot be a folder's name
    index.html      the gallery, when all is done
    batch_output.jsonl, batch_errors.jsonl   the output files of an OpenAI batch, when all is done; only if the requests
                                             are such a batch

A sample depends only on its request. So a job ends with the same lines and images, even if it is interrupted or split
over several processes. Only the order of the lines may differ.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ar_unified import progress, storage
from ar_unified.data.images import Cells, ImageCodec, by_size, draws_none
from ar_unified.data.sizes import default_resize
from ar_unified.language.document import CodesPart, TextPart, TokensPart, Turn
from ar_unified.language.reading import GrammarError
from ar_unified.manifests import Json, Mismatch, differences
from ar_unified.parallel.hardware import of_kind
from ar_unified.sampling import batch_output, gallery
from ar_unified.sampling.bandwidth import MemoryTime
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.formats import fingerprint
from ar_unified.sampling.plan import Plan
from ar_unified.sampling.request import Request, RequestError, Sample
from ar_unified.sampling.requests import Canvas, Line, PromptImage, PromptImageError, choose_adapters, read_requests
from ar_unified.sampling.results import Done, Entry, Writer, open_shard, shard_name, shards, write_image
from ar_unified.workdir import clean, own, read_json, write_json

_WINDOW = 4  # batches of requests that are prepared together, while the engine works on the previous ones


class JobMismatch(Mismatch):
    """The output folder belongs to another job."""


@dataclass(frozen=True)
class JobReport:
    """What a process did.

    Attributes:
        samples, errors, tokens: how many there were in this run.
        seconds: how long the run took.
        found: how many samples were done before this run.
        complete: whether no process has anything left to do.
        first_error: the first error of this run, with its line, or "".
        tokens_a_step: the mean number of tokens that a sample got from one step of the engine; 1 without a window.
    """

    samples: int
    errors: int
    found: int
    tokens: int
    seconds: float
    complete: bool
    first_error: str = ""
    tokens_a_step: float = 1.0

    def __str__(self) -> str:
        rate = f"{self.samples / self.seconds:.2f} samples/s, {self.tokens / self.seconds:.0f} tokens/s"
        found = f", {self.found} were done already" if self.found else ""
        many = f", {self.tokens_a_step:.2f} tokens a step" if self.tokens_a_step > 1 else ""
        first = f"\nerrors are in samples.jsonl; the first is in {self.first_error}" if self.first_error else ""
        return f"{self.samples} samples, {self.errors} errors{found}; {rate}{many}{first}"


def run_job(
    engine: Engine,
    image_tokenizer: ImageCodec,
    requests: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    defaults: Mapping[str, Json] | None = None,
    weights: str = "",
    resize: Callable[[np.ndarray], np.ndarray] | None = None,
    links: bool = False,
    process: tuple[int, int] = (0, 1),
    show_progress: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> JobReport:
    """Serves every request of a file (`sampling.formats` lists the formats), except samples that are done already.

    Args:
        engine: its grammar must fit `image_tokenizer`. `requests.choose_adapters` says how its adapters are used.
        requests: the file, or several files.
        output: the folder, made if it is missing.
        defaults: values for settings that a request does not give, with the keys of a request.
        weights: a name of the weights (a hash, or checkpoint and step), so that a job never mixes weights.
        resize: resizes an image as data preparation did, from uint8 [H, W, 3] to uint8; None: as the layout implies.
        links: whether to follow links that lead out of the requests' folder (`data.files`).
        process: (k, n): this is process k of n that share the job; it serves every n-th request. Each process has its
            own engine. The number of processes may change when the job is run again.
        show_progress: whether to show a bar with rate and time left, on stderr.
        warn: called with remarks on the files of requests, once for each file, and on adapters.

    Raises:
        JobMismatch: if `output` has a job with other requests, weights, tokenizers, defaults or engine shape (the batch
            size may differ).
        JobBusy: if another process writes to the same files.
        RequestError: if `defaults` are wrong, a file of requests is broken or empty, or no adapter of several is named.
        OSError: if reading or writing fails (a full disk). Finished samples stay; the same call continues from them.
        ValueError: if samples.jsonl contains a line that no job wrote.
    """
    rank, count = process
    if not 0 <= rank < count:
        raise ValueError(f"process: expected (k, n) with 0 <= k < n, found {process}")
    paths = [Path(requests)] if isinstance(requests, str | Path) else [Path(path) for path in requests]
    output = Path(output)
    lines = read_requests(paths, cells=image_tokenizer, defaults=defaults, links=links, warn=warn)
    lines, adapter = choose_adapters(lines, engine.adapter_hashes, warn)
    _begin(output, _manifest(engine, paths, dict(defaults or {}) | adapter, weights), mend=rank == 0)
    prepare = _Preparation(engine, image_tokenizer, resize, output)
    if storage.is_mirrored(output):  # the lock of `open_shard` is on a local file, which other machines cannot see
        own(output / shard_name(rank, count))
    with open_shard(output, rank, count) as file:
        done = Done.read(output)
        mine = [line for line in lines[rank::count] if _undone(line, done)]
        total = sum(_count(line) for line in lines[rank::count])
        left = sum(_count(line) for line in mine)
        with progress.bar(total, "samples", "sample", done=total - left, shown=show_progress) as bar:
            tally = _Tally(engine, bar.update, bar.set_postfix_str)
            with Writer(output, file, image_tokenizer.decode, engine.batch_size, tally.add) as writer:
                prompts: dict[str, tuple[Line, list[dict[str, Json]]]] = {}

                def pairs() -> Iterator[tuple[Plan, int]]:
                    for window in _ahead(prepare, _chunks(mine, _WINDOW * engine.batch_size)):
                        for line, prompt, plan in window:
                            if plan is None:
                                if done.failed.get(line.number) != line.error:
                                    writer.put(Entry(_refused(line)))
                                continue
                            prompts[line.id] = line, prompt
                            yield from ((plan, i) for i in _undone(line, done))

                for sample in engine.draw(pairs()):
                    line, prompt = prompts[sample.request.id]
                    writer.put(_entry(line, prompt, sample, image_tokenizer))
        storage.push(output)
        storage.refresh()
        found = Done.read(output)
    complete = not any(_undone(line, found) and line.number not in found.failed for line in lines)
    if complete:  # only the last process of a job finds everything done
        gallery.write(output)
        batch_output.write(output, lines, weights)
    counted = tally.samples, tally.errors, len(done.samples), tally.tokens, tally.seconds
    return JobReport(*counted, complete, tally.first_error, engine.tokens_a_step)


def _count(line: Line) -> int:
    return line.request.n if line.request else 1


def _undone(line: Line, done: Done) -> list[int]:
    """The samples of a line that must still be drawn, or [0] if the line is an error that must still be written."""
    if line.request is None:
        return [] if done.has(line.number, None) else [0]
    return [i for i in range(line.request.n) if not done.has(line.number, i)]


class _Tally:
    """Counts what was written, and reports speed: tokens a second, busy slots and, on known devices, the fraction of
    the speed that memory bandwidth allows.
    """

    def __init__(self, engine: Engine, advance: Callable[[float], object], say: Callable[..., object]):
        self._engine, self._advance, self._say = engine, advance, say
        self._started = time.monotonic()
        hardware = of_kind(jax.devices()[0].device_kind)
        devices = engine.mesh.size if engine.mesh else 1  # each process reports the speed of its own engine
        self._memory = MemoryTime(engine, hardware.hbm_bandwidth * devices) if hardware else None
        self.samples = self.errors = self.tokens = 0
        self.first_error = ""

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        failed = sum("error" in row for row in rows)
        self.errors += failed
        if failed and not self.first_error:
            row = next(row for row in rows if "error" in row)
            self.first_error = f"line {row['line']}: {row['error']}"
        self.samples += len(rows) - failed
        self.tokens += sum(len(row.get("tokens", ())) for row in rows)
        self._advance(sum(row["n"] if row["sample"] is None else 1 for row in rows))
        said = f"{self.tokens / self.seconds:.0f} tokens/s, {self._engine.occupancy:.0%} of slots"
        if self._memory:
            for row in rows:
                contexts = 1 if "context" not in row else 3 if "image_guidance" in row else 2
                self._memory.add(len(row.get("tokens", ())), contexts)
            read = self._memory.seconds / self._engine.tokens_a_step  # with a window, one read serves several tokens
            said += f", {read / self.seconds:.0%} of memory bandwidth"
        self._say(said, refresh=False)


# ---- the manifest -----------------------------------------------------------------------------------------------


def _manifest(engine: Engine, requests: Sequence[Path], defaults: Mapping[str, Json], weights: str) -> dict[str, Json]:
    manifest = {
        "version": 3,
        "vocabulary": engine.grammar.manifest(),
        "weights": weights,
        "requests": fingerprint(requests),
        "defaults": defaults,
        "engine": {
            "batch_size": engine.batch_size,
            "max_length": engine.max_length,
            "dtype": str(engine.config.dtype),
            "kv_dtype": engine.kv_dtype,
        }
        # Older jobs lack this key, because there was no choice then. They can still continue.
        | ({"weights_dtype": engine.weights_dtype} if engine.weights_dtype else {}),
    } | ({"adapters": engine.adapter_hashes} if engine.adapter_hashes else {})
    return json.loads(json.dumps(manifest))


def _begin(output: Path, manifest: Mapping[str, Json], *, mend: bool) -> None:
    """Writes the manifest, or compares it with an existing one. mend: whether to remove files that killed processes
    left.
    """
    path = output / "manifest.json"
    if path.exists():
        for field, (a, b) in differences(read_json(path), manifest).items():
            if field != "engine.batch_size":  # another size may be needed to continue after running out of memory
                raise JobMismatch(
                    field,
                    f"{output} holds a job with {field} = {a!r:.120}, this one has {b!r:.120}: "
                    f"the samples of both would be mixed. Use another output folder, or delete {output}",
                )
        if mend:
            clean(output, deep=False)
    elif shards(output):
        raise JobMismatch(
            "manifest.json", f"{output} has {shards(output)[0].name} but no manifest.json: use another output folder"
        )
    else:
        write_json(path, manifest)


# ---- requests in ------------------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    """A line with its request, the prompt as JSON, and the plan; the plan is None if the line has an error."""

    line: Line
    prompt: list[dict[str, Json]]
    plan: Plan | None


class _Preparation:
    """Gives requests their parts, or an error. It reads and encodes images, and writes them to the folder."""

    def __init__(
        self, engine: Engine, tokenizer: ImageCodec, resize: Callable[[np.ndarray], np.ndarray] | None, output: Path
    ):
        self._engine, self._tokenizer, self._output = engine, tokenizer, output
        self._resize = resize or default_resize(engine.grammar.layout, tokenizer)

    def __call__(self, lines: Sequence[Line]) -> list[_Ready]:
        opened = [self._open(line) for line in lines]
        codes = iter(by_size(self._tokenizer.encode, [pixels for _, images, _ in opened for pixels in images]))
        return [self._ready(line, images, [next(codes) for _ in images], mask) for line, images, mask in opened]

    def _open(self, line: Line) -> tuple[Line, list[np.ndarray], np.ndarray | None]:
        """Returns the line, its images (the canvas last), and which codes of the canvas must be drawn, bool [h, w]."""
        try:
            if not self._engine.grammar.vocabulary.codebook_size:
                if line.canvas or _images(line):
                    raise RequestError(
                        "content: expected texts, because this model was trained on text alone; found an image"
                    )
            if line.request is not None and line.request.mode != "text" and (why := draws_none(self._tokenizer)):
                raise RequestError(f'mode: expected "text", found {line.request.mode!r}: {why}')
            images = [self._resize(image.load()) for image in _images(line)]
            if line.canvas is None:
                return line, images, None
            canvas, mask = self._canvas(line.canvas)
            return line, [*images, canvas], mask
        except RequestError as error:
            return replace(line, error=str(error), retry=isinstance(error, PromptImageError)), [], None

    def _canvas(self, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
        whole = canvas.image.load()
        pixels, factor = self._resize(whole), self._tokenizer.factor
        height, width = (side // factor for side in pixels.shape[:2])
        if canvas.mask is None:
            if canvas.top % factor or not 0 < canvas.top < pixels.shape[0]:
                raise RequestError(
                    f"canvas.top: expected a multiple of {factor} pixels between 0 and {pixels.shape[0]}, "
                    f"found {canvas.top}"
                )
            width *= self._tokenizer.codes_per_position
            return pixels, np.broadcast_to(np.arange(height)[:, None] >= canvas.top // factor, (height, width))
        mask = canvas.mask.load()
        if mask.shape != whole.shape:
            raise RequestError(
                f"canvas.mask: expected {whole.shape[0]} x {whole.shape[1]} pixels (height x width) like its image, "
                f"found {mask.shape[0]} x {mask.shape[1]}"
            )
        white = self._resize(mask)[..., 0] > 127
        drawn = np.any(white.reshape(height, factor, width, factor), axis=(1, 3))
        return pixels, np.repeat(drawn, self._tokenizer.codes_per_position, axis=1)

    def _ready(
        self, line: Line, images: Sequence[np.ndarray], codes: Sequence[np.ndarray], mask: np.ndarray | None
    ) -> _Ready:
        if line.request is None or line.error:
            return _Ready(line, [], None)
        left = iter(codes)

        def coded(parts: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(CodesPart(next(left)) if isinstance(part, PromptImage) else part for part in parts)

        history = tuple(replace(turn, parts=coded(turn.parts)) for turn in line.history)
        parts = coded(line.content)
        canvas = None if mask is None else np.where(mask, -1, next(left)).astype(np.int32)
        request = replace(line.request, history=history, parts=parts, canvas=canvas)
        try:
            plan = self._engine.plan(request)
        except (RequestError, GrammarError) as error:
            return _Ready(replace(line, error=str(error)), [], None)
        line = replace(line, request=request, prompt_tokens=len(plan.prompt))
        return _Ready(line, self._prompt(request, line.name, images), plan)

    def _prompt(self, request: Request, name: str, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Returns the parts as JSON, and writes their images to files, unless the files exist already."""
        segments: list[dict[str, Any]] = []
        given = iter(enumerate(images))
        for turn in request.turns:
            who = {"role": turn.speaker} if request.history else {}
            for part in turn.parts:
                if isinstance(part, TextPart):
                    segments.append({"type": "text", "text": part.text} | who)
                elif isinstance(part, TokensPart):
                    segments.append({"type": "tokens", "ids": list(part.ids)} | who)
                else:
                    number, pixels = next(given)
                    segments.append(self._save(f"images/{name}/prompt_{number:02d}.png", pixels) | who)
        for _, pixels in given:
            segments.append(self._save(f"images/{name}/canvas.png", pixels) | {"type": "canvas"})
        return segments

    def _save(self, name: str, pixels: np.ndarray) -> dict[str, Json]:
        path = self._output / name
        if not path.exists():
            clean(path.parent)  # removes what a killed process left
            write_image(path, pixels)
        return _image(name, *pixels.shape[:2])


def _images(line: Line) -> list[PromptImage]:
    parts = (part for turn in (*line.history, Turn("user", line.content)) for part in turn.parts)
    return [part for part in parts if isinstance(part, PromptImage)]


def _ahead(prepare: _Preparation, windows: Iterable[list[Line]]) -> Iterator[list[_Ready]]:
    """Yields the prepared `windows` (lists of lines) in order, while another thread prepares the next one."""
    with ThreadPoolExecutor(1) as pool:
        going: deque[Future[list[_Ready]]] = deque()
        for window in windows:
            going.append(pool.submit(prepare, window))
            if len(going) > 1:
                yield going.popleft().result()
        while going:
            yield going.popleft().result()


def _chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ---- samples out ------------------------------------------------------------------------------------------------


def _refused(line: Line) -> dict[str, Any]:
    prompt = [{"type": "text", "text": part.text} for part in line.content if isinstance(part, TextPart)]
    row = {"id": line.id, "sample": None, "n": _count(line), "line": line.number, "error": line.error, "prompt": prompt}
    return row | ({"retry": True} if line.retry else {})


def _entry(line: Line, prompt: list[dict[str, Any]], sample: Sample, cells: Cells) -> Entry:
    """The line of a sample, and its images."""
    request = sample.request
    row: dict[str, Any] = {"id": request.id, "sample": sample.index, "n": request.n, "line": line.number}
    row |= {"name": line.name} if line.name != request.id else {}
    row["prompt"] = prompt
    images: list[tuple[str, np.ndarray]] = []
    if sample.document is None:
        row["error"] = sample.error
    else:
        row["segments"] = []
        for part in sample.document.parts:
            if isinstance(part, TextPart):
                row["segments"].append({"type": "text", "text": part.text})
            elif isinstance(part, CodesPart):
                name = f"images/{line.name}/{sample.index:02d}_{len(images):02d}.png"
                images.append((name, part.codes))
                height, width = (side * cells.factor for side in part.codes.shape)
                row["segments"].append(_image(name, height, width // cells.codes_per_position))
    row |= {"finish_reason": sample.finish_reason, "seed": request.seed, "guidance": request.guidance}
    if request.contexts > 1:
        row["context"] = request.context
    if request.image_guidance:
        row["image_guidance"] = request.image_guidance
    if request.adapter:
        row["adapter"] = request.adapter
    row |= {"prompt_tokens": line.prompt_tokens, "tokens": sample.tokens.tolist()}
    row |= {"meta": dict(request.meta)} if request.meta else {}
    return Entry(row, tuple(images))


def _image(name: str, height: int, width: int) -> dict[str, Json]:
    return {"type": "image", "image": name, "height": height, "width": width}
