"""The sources of documents: TFDS datasets by name, JSONL with images, Parquet, Arrow, tars, pages, clips, plain files.

A source has random access: opening it reads no image, and reading item i reads nothing else. An item that cannot be
used raises BadItem, which says what is wrong and where. The caller decides what to do then.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, starmap
from pathlib import Path
from statistics import median
from typing import Any

from ar_unified import storage
from ar_unified.data.balance import indices
from ar_unified.data.files import FileError, folder_at
from ar_unified.data.items import BadItem, Source, fetched, texts_of
from ar_unified.data.sources.augmentation import Augmented
from ar_unified.data.sources.clips import Clips
from ar_unified.data.sources.image_folder import ImageFiles
from ar_unified.data.sources.packed import unpacked
from ar_unified.data.sources.pages import Pages
from ar_unified.data.sources.rows import Rows
from ar_unified.data.sources.shard_names import TABLES as TABLE_FILES
from ar_unified.data.sources.shard_names import TARS as TAR_FILES
from ar_unified.data.sources.splits import EmptySplit
from ar_unified.data.sources.tars import Tars
from ar_unified.data.sources.text_files import FILES as TEXT_FILES
from ar_unified.data.sources.text_files import TextFiles
from ar_unified.data.sources.unread import about_file, about_folder
from ar_unified.errors import UserError, about
from ar_unified.language.document import Document
from ar_unified.paths import home
from ar_unified.storage import AnyPath, Remote

__all__ = ["BadItem", "EmptySplit", "Source", "open_source", "read", "texts"]
_OF_OTHERS = ("kind", "weight", "image_weight", "augmentation", "made_by")  # keys that the source does not read
_PATHS = ("path", "root", "data_dir")
_TFDS_INFO = "dataset_info.json"
FOLDER_FILES = ("captions", "docs", "vqa")


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens the source that a config describes.

    Args:
        spec: one of
            dict(kind="tfds", name="shapes/captions", split="train", data_dir=None, columns=None): a TFDS dataset. It is
                built or downloaded first if it is not in data_dir (by default, TFDS's own folder).
            dict(kind="folder", path=..., files=None, split=None): the rows of <path>/<file>.jsonl for all `files`, by
                default captions, docs and vqa, if they exist.
            dict(kind="jsonl", path=..., root=None, columns=None, split=None): one file, compressed (.gz, .zst) or
                not. Images are in the file or under `root` (by default, the file's folder).
            dict(kind="parquet", path=..., columns=None, split=None): Parquet and Arrow files (see `Tables`).
            dict(kind="webdataset", path="shards/{000..063}.tar", keys=None, split=None): tars (see `Tars`).
            dict(kind="pages", path=..., split=None): Markdown and HTML pages with the images they show, in reading
                order (see `Pages`).
            dict(kind="clips", path=..., frames=8): GIF and WebP files, videos and folders of frames (see `Clips`).
            dict(kind="images", path=...): every image file under a folder, without text; for image tokenizers.
            dict(kind="text", path=..., files=("*.txt", "*.md", "*.jsonl"), by="file", field="text",
                language="language", split=None): text alone. Each file, each line (by="line") or each row of a .jsonl
                file is a document (see `TextFiles`).
            `path` may be a URL of an object store, s3://bucket/... or gs://bucket/... (docs/object_stores.md).
            All kinds except tfds take `links`, which says whether links that lead out of the folder are followed. The
                default is False. Module `files` has the rules for links and names.
            `columns` (`keys`) say which column, feature or member is which part of a document, if the names do not show
                it. An example is dict(image="photo", text="{title}. {body}"); see `columns.Columns`.
            `split` of folder, jsonl and text is, for example, "train", "train[:95%]" or "[95%:]" (see `splits`).
            Any source may have `label` (its name), `reversible` (default True) and `augmentation`
                (dict(count=..., shift=..., mirror=..., whole=...), see `Augmented`).
            Any source may also have keys that it does not read itself. `weight` is its weight in the mixture of
                documents. `image_weight` is its weight among the images for the image tokenizer; all sources with
                images have one, or none has: the default is its
                number of documents. `made_by` is the command that makes the data at `path`, for the message if the data
                is missing.

    Raises:
        UserError: if a kind or key is unknown, a file is missing (`made_by` says how to make it), an augmentation is
            out of range, or a split has no rows (EmptySplit if all rows belong to one image or text).
    """
    kinds: dict[str, Callable[..., Source]] = {
        "tfds": _tfds, "folder": _folder, "jsonl": _jsonl, "images": ImageFiles, "text": TextFiles,
        "parquet": _tables, "webdataset": Tars, "pages": Pages, "clips": Clips,
    }  # fmt: skip
    kind = spec.get("kind")
    if kind not in kinds:
        raise UserError(f"source: expected a kind, one of {sorted(kinds)}; found {kind!r} in {dict(spec)}")
    if spec.get("made_by") and not storage.path(home(spec.get("path", "."))).exists():
        raise UserError(f"{spec['path']}: no such file or folder. This command makes it: {spec['made_by']}")
    try:
        options = {key: value for key, value in spec.items() if key not in _OF_OTHERS}
        options |= {key: options[key].to_dict() for key in ("columns", "keys") if hasattr(options.get(key), "to_dict")}
        options |= {key: home(options[key]) for key in _PATHS if options.get(key)}
        source = kinds[kind](**options)
        return Augmented(source, **spec["augmentation"]) if spec.get("augmentation") else source
    except TypeError as error:
        raise UserError(f"source of kind {kind!r}: {error}; in {dict(spec)}") from error


def kind_of(path: str | AnyPath, links: bool = False) -> str:
    """The kind of source that can read a path, from the ending of a file or the content of a folder.

    Raises UserError, which says what to do instead (`unread`), if nothing at the path is read as it is: images without
    rows, a table of text, an archive, an empty folder, or a folder that TFDS wrote, because TFDS datasets are read by
    name.
    """
    path = str(path)
    name = path.lower()
    if not (place := storage.path(path)).is_dir():
        if place.is_file() and (unread := about_file(place)):
            raise UserError(unread)
        kinds = {"parquet": TABLE_FILES, "webdataset": TAR_FILES, "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst")}
        return next((kind for kind, endings in kinds.items() if name.endswith(endings)), "text")
    if row_files(path):
        return "folder"
    texts = tuple(pattern.removeprefix("*") for pattern in TEXT_FILES)
    endings = (*TABLE_FILES, *TAR_FILES, *texts, _TFDS_INFO)
    files = folder_at(path, links).search(lambda name: name.lower().endswith(endings))
    found = [file for file in files if file.name.lower().endswith((*TABLE_FILES, *TAR_FILES))]
    if not found:
        _refuse_datasets(place, [file.name for file in files if file.name.rpartition("/")[2] == _TFDS_INFO])
        if any(file.name.lower().endswith(texts) for file in files):
            return "text"
        expected = ", ".join(f"{file}.jsonl" for file in FOLDER_FILES)
        raise UserError(
            f"{path}: expected at least one of {expected}, or Parquet, Arrow, tar or text files, in it; found none. "
            f"{about_folder(path, links)}"
        )
    return "webdataset" if all(file.name.lower().endswith(TAR_FILES) for file in found) else "parquet"


def _refuse_datasets(root: AnyPath, infos: Sequence[str]) -> None:
    """Raises UserError if one of these files below a folder describes a TFDS dataset. The message gives the source spec
    that reads it.

    TFDS writes DATA_DIR/NAME[/CONFIG]/VERSION/dataset_info.json, so it is at most three folders below the root.
    """
    specs = []
    for info in (root / name for name in infos if name.count("/") <= 3):
        folder = Path(str(info.parent)).resolve() if isinstance(info, Path) else info.parent
        if not (folder / "features.json").is_file():
            continue
        try:
            found = json.loads(info.read_bytes())
            names = [each for key in ("name", "configName", "version") if (each := found.get(key))]
        except (OSError, ValueError, AttributeError):
            continue
        *named, version = map(str, names) if len(names) > 1 else ("NAME", "VERSION")
        data_dir = folder
        for _ in (*named, version):
            data_dir = data_dir.parent
        spec = {"kind": "tfds", "name": f"{'/'.join(named)}:{version}", "data_dir": str(data_dir)}
        specs.append(json.dumps(spec, ensure_ascii=False))
    if specs:
        more = f", and {len(specs) - 3} more" if len(specs) > 3 else ""
        raise UserError(
            f"{root}: expected rows, tables, tars or texts, found a dataset of TFDS, which is read with this source: "
            + ", ".join(specs[:3])
            + more
        )


def _tfds(name: str, split: str = "train", **options: Any) -> Source:
    from ar_unified.data.sources.named import TfdsSource  # importing TFDS takes a second, and only TfdsSource needs it

    return TfdsSource(name, split, **options)


def _tables(path: str | AnyPath, **options: Any) -> Source:
    from ar_unified.data.sources.tables import Tables  # PyArrow, too, is imported only if needed

    return Tables(path, **options)


def row_files(root: str | AnyPath) -> list[str]:
    """Which of FOLDER_FILES a folder has. Raises UserError if one of them has capital letters in its name, or if there
    is no folder."""
    root = storage.path(root)
    with about(str(root)):
        names = storage.names_in(root) if isinstance(root, Remote) else os.listdir(root)
    for name in names:
        meant = name.lower()
        if name != meant and meant.removesuffix(".jsonl") in FOLDER_FILES and meant.endswith(".jsonl"):
            raise UserError(f"{root / name}: expected a name in lower case: rename it to {meant}")
    return [file for file in FOLDER_FILES if f"{file}.jsonl" in names]


def _folder(path: str | AnyPath, files: Sequence[str] | None = None, *, links: bool = False, **options: Any) -> Source:
    root, folder = storage.path(path), folder_at(path, links)
    found = files or (row_files(root) if root.is_dir() else [])
    if not root.is_dir() or not found:
        what = "no file of these names" if root.is_dir() else "a file" if root.is_file() else "no such folder"
        expected = " or ".join(f"{file}.jsonl" for file in files or FOLDER_FILES)
        way = about_folder(root, links) if root.is_dir() else ""
        raise UserError(
            f"{root}: expected a folder with {expected} and their images, found {what} at {root.absolute()}. "
            + (way or "Give the path of the data (for an experiment of ar_unified: --config FILE:path=DIR)")
        )

    paths, beside = list[AnyPath](), list[AnyPath]()
    for name in (f"{file}.jsonl" for file in found):
        with about(str(root / name)):
            paths.append(folder.path(name))
    for name in (f"{file}.jsonl" for file in FOLDER_FILES if file not in found):
        with suppress(FileError):  # the source that reads this file reports the error
            beside += [path for path in (folder.path(name),) if path.is_file()]  # opening a pipe would block
    return Rows(paths, root, beside=beside, links=links, **options)


def _jsonl(path: str | AnyPath, root: str | AnyPath | None = None, **options: Any) -> Source:
    file = storage.path(path)
    return Rows([file], storage.path(root or file.parent), **{"label": unpacked(file).stem} | options)


def decoders() -> int:
    """The best number of decoding threads, at most 16. It is one more than the number of this process's processors,
    because each thread sometimes waits for the interpreter.
    """
    own = getattr(os, "sched_getaffinity", None)
    return min(1 + (len(own(0)) if own else os.cpu_count() or 1), 16)


def read(source: Source, indices: Iterable[int], workers: int = 2) -> Iterator[tuple[int, Document | BadItem]]:
    """Reads items in the order of `indices`; `workers` threads decode a few items ahead. Bad items are yielded, too.

    If an item takes less than a millisecond, no thread is used: on two cores, passing small images between threads cost
    `prepare` a third of its speed.
    """

    def get(i: int, decode: Callable[[], Document]) -> tuple[int, Document | BadItem]:
        try:
            return i, decode()
        except BadItem as bad:
            return i, bad

    left, seconds = fetched(source, indices), []
    for i, decode in islice(left, 4):
        began = time.perf_counter()
        item = get(i, decode)
        seconds.append(time.perf_counter() - began)
        yield item
    if not seconds or median(seconds) < 1e-3:  # the median, because the first item may open files
        yield from starmap(get, left)
        return
    waiting: deque[Future[tuple[int, Document | BadItem]]] = deque()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            for i, decode in left:
                waiting.append(pool.submit(get, i, decode))
                if len(waiting) > 2 * workers + 4:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def texts(
    sources: Sequence[Source],
    passes: Sequence[float] | None = None,
    left_out: Callable[[BadItem], object] | None = None,
) -> Iterator[str]:
    """The texts of all sources, on which a text tokenizer is trained. Opens no image.

    Args:
        passes: how often each source is read (`balance.passes`); None means once.
        left_out: called with each bad item.
    """
    for source, times in zip(sources, passes or [1.0] * len(sources), strict=True):
        for _, found in texts_of(source, indices(len(source), times, source.name)):
            if not isinstance(found, BadItem):
                yield from found
            elif left_out:
                left_out(found)
