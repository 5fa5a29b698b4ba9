"""How fast images and tokens are read from files, compared with tf.data, Grain, and webdataset with torch's DataLoader.

    pip install 'ar_unified[simd]'      # without it, ours has Pillow's filters alone
    python -m venv PEERS && PEERS/bin/pip install grain webdataset torch tensorflow pillow   # only for the peers
    python experiments/benchmarks/feeding.py --photos DIR --folder DIR2 --peers PEERS/bin/python --output FILE.json

There are two tasks. Each side runs in its own process. All sides run in turns, --repeats times.
    images   The data are --images JPEG files of --side pixels (cut from the photos in DIR) with captions, in tars
             (ours, webdataset), ArrayRecord (Grain) and TFRecord (tf.data). Each side decodes them in order, cuts out
             the central square, scales it to 256 x 256 as uint8, and makes batches of 64. Ours and tf.data do this
             with Lanczos and with bilinear filters. They do it again "reduced": then the JPEG decoder halves images
             that have at least four times the target's sides. Ours has Pillow's filters and those with names that end
             in `_simd`. Grain and webdataset do what ours does by default.
    tokens   The data are the documents of `loader_scale` (captions, texts, interleaved). Each side shuffles them, packs
             them uncut into rows of 4,096 tokens, and makes batches of 64. Ours reads the shards that `prepare` writes,
             Grain the same records in ArrayRecord, webdataset the same documents in tars. Ours makes eight fields; the
             others make tokens, positions and segments.
Grain and webdataset run in one thread, with two and with three processes, and Grain also with threads; tf.data chooses
its number of threads (AUTOTUNE). Timing starts after the first --warm items. Two columns show items (images, or tokens
without padding) per second of wall time and per second of CPU time of all processes of a side; both are medians. The
other columns show ours divided by theirs for both rates, first with Pillow's filters, then with `_simd`. They are
medians over the repeats. Each peer is compared with our run at the same settings or, if there is none, with our
run at the defaults.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PIXELS, BATCH, LENGTH = 256, 64, 4096
Batches = Iterator[int]  # the number of items (images, tokens) in each batch


# ---- the images ------------------------------------------------------------------------------------------------------


def make_images(photos: Path, folder: Path, count: int, side: int) -> None:
    """Writes the same JPEG files as tars, ArrayRecord and TFRecord; the last two with the peers' interpreter
    (`convert`)."""
    from PIL import Image

    from ar_unified.data.images import SUFFIXES

    found = sorted(path for path in photos.rglob("*") if path.suffix.lower() in SUFFIXES)
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for shard in range(8):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i in range(shard, count, 8):
                with Image.open(found[i % len(found)]) as image:
                    width = int(image.width * draw.uniform(0.6, 1.0))
                    height = min(width * 3 // 4, image.height)
                    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
                    window = image.convert("RGB").crop((left, top, left + width, top + height))
                photo = window.resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
                photo.save(file := io.BytesIO(), "JPEG", quality=90)
                _add(tar, f"{i:06d}.jpg", file.getvalue())
                _add(tar, f"{i:06d}.txt", f"photo {i}".encode())


def convert_images(folder: Path) -> None:
    """Writes the images of the tars as ArrayRecord and TFRecord."""
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter

    records = ArrayRecordWriter(str(folder / "images.array_record"), "group_size:1")
    with tf.io.TFRecordWriter(str(folder / "images.tfrecord")) as file:
        for data in _members(sorted(folder.glob("*.tar")), ".jpg"):
            records.write(data)
            file.write(data)
    records.close()


def our_images(folder: Path, resample: Any = "lanczos", decoding: Any = "full") -> Batches:
    """Reads images as `prepare` does."""
    from ar_tokenizers.host import keep_memory

    from ar_unified.data.images import Resize
    from ar_unified.data.items import resized
    from ar_unified.data.sources import decoders, open_source, read

    keep_memory()  # as `ar-unified` does
    resize = Resize("crop", PIXELS, PIXELS, resample=resample, decoding=decoding)
    source = resized(open_source(dict(kind="webdataset", path=str(folder))), resize)
    items: Iterable[Any] = (item for _, item in read(source, range(len(source)), decoders()))
    return _stacked(item.parts[-1].pixels for item in items)


def _square(data: bytes) -> np.ndarray:
    """Decodes and resizes a JPEG as `images.resize` does, for peers that have no function for it."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        small = image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
        return np.asarray(small)


def tf_images(folder: Path, method: str, decoding: str = "full") -> Batches:
    """tf.data, entirely in C++, with as many threads as it chooses."""
    import tensorflow as tf
    from PIL import Image

    ratio = 1
    if decoding == "reduced":  # all images have the same size, so one gives the ratio
        with tarfile.open(folder / "000.tar") as tar:
            first = next(info for info in tar if info.name.endswith(".jpg"))
            with Image.open(tar.extractfile(first)) as image:  # type: ignore[arg-type]  # a file, by its name
                ratio = max(n for n in (1, 2, 4, 8) if n == 1 or min(image.size) >= 2 * n * PIXELS)

    def square(data: Any) -> Any:
        image = tf.io.decode_jpeg(data, channels=3, ratio=ratio, dct_method="INTEGER_FAST")
        side = tf.minimum(tf.shape(image)[0], tf.shape(image)[1])
        image = tf.image.resize_with_crop_or_pad(image, side, side)
        small = tf.image.resize(image, (PIXELS, PIXELS), method, antialias=True)
        return tf.saturate_cast(tf.round(small), tf.uint8)

    data = tf.data.TFRecordDataset(str(folder / "images.tfrecord"))
    data = data.map(square, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    return (len(batch) for batch in data.as_numpy_iterator())


def grain_images(folder: Path, workers: str) -> Batches:
    """Grain, over ArrayRecord."""
    import grain

    source = grain.sources.ArrayRecordDataSource(str(folder / "images.array_record"))
    data = grain.MapDataset.source(source).map(_square)
    return (len(batch) for batch in _grain(data, workers, lambda rows: rows.batch(BATCH)))


def webdataset_images(folder: Path, workers: str) -> Batches:
    """webdataset's pipeline in torch's DataLoader."""
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(shards, shardshuffle=False).to_tuple("jpg", "txt").map_tuple(_square, bytes.decode)
    batches = data.batched(BATCH, collation_fn=lambda rows: np.stack([pixels for pixels, _ in rows]))
    return (len(batch) for batch in _loader(batches, workers))


def _stacked(images: Iterable[np.ndarray]) -> Batches:
    images = iter(images)
    while rows := list(itertools.islice(images, BATCH)):
        yield len(np.stack(rows))


# ---- the tokens ------------------------------------------------------------------------------------------------------


def make_tokens(folder: Path, count: int) -> None:
    """Writes documents of random tokens as shards of `prepare`, and as tars for webdataset."""
    from loader_scale import GRAMMAR, lengths

    from ar_unified.data import shards
    from ar_unified.data.prepare import Report, SourceReport, plan_rows
    from ar_unified.language.encoded import TRAINED, Encoded
    from ar_unified.workdir import write_json

    draw, size = np.random.default_rng(0), 8192
    found = lengths(count, 0)
    pieces = range(0, count, size)
    for number, begin in enumerate(pieces):
        with (
            shards.ShardWriter(folder / "all", number) as shard,
            tarfile.open(folder / f"{number:03d}.tar", "w") as tar,
        ):
            for item, length in enumerate(found[begin : begin + size].tolist(), begin):
                tokens = draw.integers(0, 256, length, np.int32)
                document = Encoded(tokens, np.full(length, TRAINED, np.uint8))
                shard.write(document, item=item, part=0, text_bytes=length, task=0, images=0, pair=False)
                _add(tar, f"{item:09d}.bin", tokens.tobytes())
    report = SourceReport(items=count, documents=count, longest=int(found.max()), shards=len(pieces))
    plan_rows(folder, Report({"all": report}), LENGTH)
    write_json(folder / "manifest.json", {"vocabulary": GRAMMAR.manifest(), "report": {"all": vars(report)}})


def our_tokens(folder: Path) -> Batches:
    """The loader of the training."""
    from ar_tokenizers.host import keep_memory
    from loader_scale import GRAMMAR

    from ar_unified.data.loader import PackedBatches

    keep_memory()  # as `ar-unified` does
    loader = PackedBatches(folder, GRAMMAR, batch_size=BATCH, sequence_length=LENGTH)
    return (int(np.count_nonzero(loader.batch(step).segment_ids)) for step in itertools.count())


def grain_tokens(folder: Path, workers: str) -> Batches:
    """Grain: a global shuffle, and first-fit packing into 64 open rows."""
    import grain
    from grain.experimental import FirstFitPackIterDataset

    source = grain.sources.ArrayRecordDataSource(sorted(map(str, folder.glob("all/*.array_record"))))
    data = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(_tokens_of)

    def packed(rows: Any) -> Any:
        return FirstFitPackIterDataset(rows, length_struct={"tokens": LENGTH}, num_packing_bins=BATCH).batch(BATCH)

    return (int(np.count_nonzero(batch["tokens_segment_ids"])) for batch in _grain(data, workers, packed))


def _tokens_of(record: bytes) -> dict[str, np.ndarray]:
    """The tokens of one of our records, which has 8 bytes for its item, 4 per token, and 1 per mark."""
    return {"tokens": np.frombuffer(record, "<i4", (len(record) - 8) // 5, offset=8)}


def webdataset_tokens(folder: Path, workers: str) -> Batches:
    """webdataset: shards in random order, shuffled in a buffer, packed by first fit."""
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(shards, shardshuffle=len(shards), repeat=True, seed=0).to_tuple("bin")
    data = data.map_tuple(lambda data: np.frombuffer(data, "<i4")).shuffle(1000).compose(_first_fit)
    return (int(np.count_nonzero(batch["segments"])) for batch in _loader(data, workers))


def _first_fit(documents: Iterable[tuple[np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Fills batches of 64 open rows. When a document fits into no row, the batch is complete. (Grain then completes
    only one row; its rows are as full as these, within one percent.)
    """
    free = np.full(BATCH, LENGTH)
    batch = {name: np.zeros((BATCH, LENGTH), np.int32) for name in ("tokens", "positions", "segments")}
    numbers = [0] * BATCH
    for (tokens,) in documents:
        fits = free >= len(tokens)
        row = int(fits.argmax())
        if not fits[row]:
            yield batch
            free[:], numbers, row = LENGTH, [0] * BATCH, 0
            batch = {name: np.zeros((BATCH, LENGTH), np.int32) for name in batch}
        at = slice(LENGTH - free[row], LENGTH - free[row] + len(tokens))
        numbers[row] += 1
        batch["tokens"][row, at], batch["segments"][row, at] = tokens, numbers[row]
        batch["positions"][row, at] = np.arange(len(tokens))
        free[row] -= len(tokens)


# ---- common to both tasks ----------------------------------------------------------------------------------------


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _members(tars: Iterable[Path], ending: str) -> Iterator[bytes]:
    for path in tars:
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(ending) and (file := tar.extractfile(info)):
                    yield file.read()


def _grain(data: Any, workers: str, then: Callable[[Any], Any]) -> Any:
    import grain

    if workers == "threads":
        return then(data.to_iter_dataset(grain.ReadOptions(num_threads=3, prefetch_buffer_size=128)))
    rows = then(data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    return (
        rows.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=int(workers)))
        if workers != "0"
        else rows
    )


def _loader(data: Any, workers: str) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(data, batch_size=None, num_workers=int(workers))


SIDES: dict[str, dict[str, Callable[[Path], Batches]]] = {
    "images": {
        "ours": our_images,
        "ours, bilinear": partial(our_images, resample="bilinear"),
        "ours, reduced": partial(our_images, decoding="reduced"),
        "ours, bilinear, reduced": partial(our_images, resample="bilinear", decoding="reduced"),
        "ours, simd": partial(our_images, resample="lanczos_simd"),
        "ours, bilinear, simd": partial(our_images, resample="bilinear_simd"),
        "ours, reduced, simd": partial(our_images, resample="lanczos_simd", decoding="reduced"),
        "ours, bilinear, reduced, simd": partial(our_images, resample="bilinear_simd", decoding="reduced"),
        "tf.data, Lanczos": partial(tf_images, method="lanczos3"),
        "tf.data, bilinear": partial(tf_images, method="bilinear"),
        "tf.data, Lanczos, reduced": partial(tf_images, method="lanczos3", decoding="reduced"),
        "tf.data, bilinear, reduced": partial(tf_images, method="bilinear", decoding="reduced"),
        **{f"grain, {w}": partial(grain_images, workers=w) for w in ("0", "threads", "2", "3")},
        **{f"webdataset, {w}": partial(webdataset_images, workers=w) for w in ("0", "2", "3")},
    },
    "tokens": {
        "ours": our_tokens,
        **{f"grain, {w}": partial(grain_tokens, workers=w) for w in ("0", "threads", "2", "3")},
        **{f"webdataset, {w}": partial(webdataset_tokens, workers=w) for w in ("0", "2", "3")},
    },
}


def run_side(batches: Batches, warm: int, most: int) -> None:
    """Prints the number of items, the wall seconds and the CPU seconds."""
    count = 0
    while count < warm:
        count += next(batches)
    began, spent, count = time.perf_counter(), _processor_time(), 0
    for items in batches:
        count += items
        if count >= most:
            break
    print(json.dumps([count, time.perf_counter() - began, _processor_time() - spent]), flush=True)
    for pid in _family()[1:]:  # do not wait for busy workers
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _processor_time() -> float:
    """CPU seconds of this process and of all processes that it has started, ended or not."""
    ticks = 0
    for pid in _family():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _family() -> list[int]:
    """This process and all its descendants."""
    found = [os.getpid()]
    for pid in found:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _ratio(ours: list[list[float]], theirs: list[list[float]], at: int) -> float:
    """The median, over the repeats, of our rate divided by theirs. `at` is 1 for rates per second of wall time, 2 for
    rates per second of CPU time."""
    return statistics.median(a[0] / a[at] / (b[0] / b[at]) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="photos of at least 640 x 480 pixels to cut images out of")
    parser.add_argument("--folder", type=Path, required=True, help="where to make the benchmark's data, and keep them")
    parser.add_argument("--peers", default=sys.executable, help="the Python interpreter that has the peers' packages")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--warm", type=int, nargs=2, default=[128, 2 * BATCH * LENGTH], help="images, tokens")
    parser.add_argument("--most", type=int, nargs=2, default=[1536, 20_000_000], help="images, tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--task", choices=list(SIDES), nargs="+", default=list(SIDES))
    parser.add_argument(
        "--sides", nargs="+", default=[""], help="run ours and the peers that begin with this; `ours`: no peer"
    )
    parser.add_argument("--output", type=Path, help="write raw numbers to this file, as JSON")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one side, run in this process
    arguments = parser.parse_args()
    places = {"images": arguments.folder / f"images-{arguments.side}", "tokens": arguments.folder / "tokens"}
    limits = {task: (w, m) for task, w, m in zip(SIDES, arguments.warm, arguments.most, strict=True)}
    if arguments.run == "convert":
        return convert_images(places["images"])
    if arguments.run:
        (task,) = arguments.task
        return run_side(SIDES[task][arguments.run](places[task]), *limits[task])

    again = [__file__, *sys.argv[1:]]
    if "images" in arguments.task and not (places["images"] / "images.tfrecord").exists():
        if not any(places["images"].glob("*.tar")):
            make_images(arguments.photos, places["images"], arguments.images, arguments.side)
        if not all(side.startswith("ours") for side in arguments.sides):
            subprocess.run([arguments.peers, *again, "--run", "convert"], check=True)
    if "tokens" in arguments.task and not (places["tokens"] / "manifest.json").exists():
        make_tokens(places["tokens"], arguments.documents)
    raw: dict[str, dict[str, list[list[float]]]] = {task: {} for task in arguments.task}
    for task, _ in itertools.product(arguments.task, range(arguments.repeats)):
        for side in (name for name in SIDES[task] if name.startswith(("ours", *arguments.sides))):
            if side.endswith("simd") and not find_spec("cykooz_resizer"):
                continue
            python = sys.executable if side.startswith("ours") else arguments.peers
            done = subprocess.run([python, *again, "--task", task, "--run", side], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{task}, {side}:\n{done.stderr}")
            raw[task].setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(task, side, *(f"{each:.2f}" for each in raw[task][side][-1]), file=sys.stderr, flush=True)
    for task, sides in raw.items():
        columns = ("a second", "a CPU second", "ours / theirs", "by CPU", "simd / theirs", "by CPU")
        print(f"\n{task:30s}" + "".join(f"{name:>14s}" for name in columns))
        for side, runs in sides.items():
            same = side.replace("tf.data", "ours").replace(", Lanczos", "")
            mine = [sides[name] for name in (same, f"{same}, simd") if name in sides] or [sides["ours"]]
            cells = [f"{statistics.median(run[0] / run[at] for run in runs):14,.0f}" for at in (1, 2)]
            cells += [f"{_ratio(ours, runs, at):14.2f}" for ours in mine for at in (1, 2)]
            print(f"{side:30s}" + "".join(cells))
    if arguments.output:
        arguments.output.write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
