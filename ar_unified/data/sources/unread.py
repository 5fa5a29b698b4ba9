"""Says what a path holds that no source reads as it is, and what to do: the command or the source that leads on.

Captions come in many forms: tables (.csv, .tsv), one .txt beside each image, JSONL with other keys. A folder is read
only with captions.jsonl, so that nothing about it is guessed. For each of these forms, the message has the command that
writes this file.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ar_unified import storage
from ar_unified.data import encoding, videos
from ar_unified.data.files import AnyFolder, FileError, folder_at
from ar_unified.data.images import SUFFIXES
from ar_unified.data.sources.columns import COMMON
from ar_unified.storage import AnyPath, Remote

CAPTIONS = "captions.jsonl"
LINE = '{"image": "name.png", "text": "what it shows"}'
TABLES = (".csv", ".tsv")  # tables of text; Parquet and Arrow are read as they are
_ARCHIVES = (".zip", ".7z", ".rar", ".tar.bz2", ".tar.xz")
_PAGES = (".md", ".markdown", ".html", ".htm")
_HEAD = 1 << 18  # bytes of a table that are looked at
_LARGEST_JSON = 1 << 26  # bytes of a .json file that is looked at
_MOST = 50  # rows of a table that are looked at


def about_file(path: AnyPath) -> str:
    """Says what a file is and what to do, if nothing reads it as rows or as text; otherwise ""."""
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return f"{path}: expected a dataset, found one image; give the folder of the images, {path.parent}"
    if name.endswith(videos.SUFFIXES):
        spec = _spec("clips", path.parent)
        return f"{path}: expected a dataset, found one video; a folder of videos is this source: {spec}"
    if name.endswith(_ARCHIVES):
        return f"{path}: expected a dataset, found an archive; unpack it and give the folder"
    if name.endswith(TABLES):
        return f"{path}: expected JSONL, found a table. {_of_table(path, folder_at(path.parent), path.name)}"
    if name.endswith(".json"):
        if _json_rows(_head(path)):
            return f"{path}: expected a name that ends in .jsonl, because it has an object in each line: rename it"
        return f"{path}: expected JSONL, with one object in each line; found JSON. {_of_json(path)}".rstrip()
    if name.endswith(".txt") and (way := _of_table(path, folder_at(path.parent), path.name, silent=True)):
        return f"{path}: expected text or JSONL, found a table with images. {way}"
    return ""


def about_folder(root: str | AnyPath, links: bool = False) -> str:
    """Says what a folder holds that its rows do not name, and what to do. "" if it holds nothing that a source could
    read.

    The folder has no captions.jsonl, docs.jsonl or vqa.jsonl.
    """
    root, folder = storage.path(root), folder_at(root, links)
    names = [found.name for found in folder.search(lambda _: True) if found.error is None]
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if images and (way := _captions(root, folder, names, images)):
        return f"It has {len(images)} images. {way}"
    if images:
        return (
            f"It has {len(images)} images and no captions. To train on images with texts, write {CAPTIONS} with a line "
            f"{LINE} for each image. To train an image tokenizer, which needs no texts: `ar-unified tokenizer --only "
            f"image --config {shlex.quote(f'photos:path={root}')} --workdir workdirs/photos`. `ar-unified validate` "
            f"checks images without texts as this source: {_spec('images', root)}"
        )
    counts = Counter("".join(PurePosixPath(name).suffixes[-2:]).lower() or "no ending" for name in names)
    if any(name.lower().endswith(videos.SUFFIXES) for name in names):
        return f"Its videos are this source: {_spec('clips', root)}"
    if archive := next((name for name in names if name.lower().endswith(_ARCHIVES)), ""):
        return f"Unpack {archive} and give the folder"
    if table := next((name for name in names if name.lower().endswith(TABLES)), ""):
        return _of_table(root / table, folder, table)
    if any(name.lower().endswith(".txt") for name in names):
        return f"Its texts alone are this source, for a config of your own (docs/your_data.md): {_spec('text', root)}"
    if not names:
        return f"It has no files: put images and {CAPTIONS} there, with a line {LINE} for each image"
    return "Nothing reads what it has: " + ", ".join(f"{ending} ({count})" for ending, count in counts.most_common(3))


def about_unnamed(root: str | AnyPath, links: bool = False) -> str:
    """Says how to use images in a folder of which only texts are read; "" if it has no images."""
    root, folder = storage.path(root), folder_at(root, links)
    names = [found.name for found in folder.search(lambda _: True) if found.error is None]
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not images:
        return ""
    way = _captions(root, folder, names, images)
    ways = [way or f"To train on them, write {CAPTIONS} with a line {LINE} for each image"]
    if any(name.lower().endswith(_PAGES) for name in names):
        ways.append(f"If the texts are pages that show these images, they are this source: {_spec('pages', root)}")
    if any(name.lower().endswith((".gif", ".webp")) for name in images):
        ways.append(f"If name.txt describes the clip name.gif, they are this source: {_spec('clips', root)}")
    count = f"{len(images)} images" if len(images) > 1 else "1 image"
    return f"{root}: only its texts are used. It also has {count} that no row names. {'. '.join(ways)}"


def _spec(kind: str, path: AnyPath) -> str:
    return json.dumps({"kind": kind, "path": str(path)}, ensure_ascii=False)


# ---- captions in another form -----------------------------------------------------------------------------------


def _captions(root: AnyPath, folder: AnyFolder, names: Sequence[str], images: Sequence[str]) -> str:
    """The command that makes captions.jsonl of what a folder has; "" if its captions are not found."""
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        lower = name.lower()
        if lower.endswith(TABLES) or (lower.endswith(".txt") and "caption" in lower):
            if way := _of_table(root / name, folder, name, images, silent=not lower.endswith(TABLES)):
                return way
        elif lower.endswith(".jsonl") and (found := _keys(_json_rows(_head(root / name)))):
            if PurePosixPath(name).name == CAPTIONS:
                return f"{name} is below the folder: give {(root / name).parent}"
            if found == ("image", "text"):
                return f"{name} has rows with images: give the file, {root / name}, or rename it to {CAPTIONS}"
            rows = 'map(json.loads, open(0, encoding="utf-8-sig"))'
            return _command(name, "json", rows, found, "", root / name, (root / name).parent)
        elif lower.endswith(".json") and (way := _of_json(root / name)):
            return way
    beside = {name.rpartition(".")[0] for name in names if name.lower().endswith(".txt")}
    described = [name for name in images if name.rpartition(".")[0] in beside]
    if not described or isinstance(root, Remote):
        return ""
    endings = tuple(sorted({PurePosixPath(name).suffix for name in described}))
    script = (
        "import json, pathlib, sys; root = pathlib.Path(sys.argv[1]); "
        '[print(json.dumps({"image": image.relative_to(root).as_posix(), "text": '
        'image.with_suffix(".txt").read_text("utf-8-sig").strip()})) for image in sorted(root.rglob("*")) '
        f'if image.suffix in {json.dumps(endings)} and image.with_suffix(".txt").is_file()]'
    )
    here = shlex.quote(str(root))
    first = PurePosixPath(described[0])
    return (
        f"{len(described)} have their text beside them, as {first.stem}.txt beside {first.name}. This command makes "
        f"{CAPTIONS} of them: python3 -c {shlex.quote(script)} {here} > {shlex.quote(str(root / CAPTIONS))}"
    )


def _of_table(
    path: AnyPath, folder: AnyFolder, name: str, images: Sequence[str] | None = None, *, silent: bool = False
) -> str:
    """The command that makes JSONL of a table of text.

    Args:
        images: the names of the images in the folder; None means that they are searched for.
        silent: whether to return "" if the table is not UTF-8 or has no column of images.
    """
    try:
        found = _parsed(encoding.text(encoding.unmarked(_head(path))))
    except encoding.EncodingError as error:
        return "" if silent else f"{name}: {error}"
    if found is None:
        if silent:
            return ""
        script = 'import csv, json; [print(json.dumps(row)) for row in csv.DictReader(open(0, encoding="utf-8-sig"))]'
        shown = f"python3 -c {shlex.quote(script)} < {shlex.quote(str(path))}"
        return (
            f"{name} names no images: a column needs their file names. This command makes JSONL of its columns: "
            f"{shown} > {shlex.quote(str(path.with_suffix('.jsonl')))}"
        )
    delimiter, columns, reference, header = found
    given = "" if delimiter == "," else f", delimiter={json.dumps(delimiter)}"
    rows = f'list(filter(None, csv.reader(open(0, encoding="utf-8-sig", newline=""){given})))'
    if images is None:
        images = [each.name for each in folder.search(lambda name: name.lower().endswith(SUFFIXES))]
    prefix = _prefix(folder, reference, images)
    return _command(name, "csv, json", rows + ("[1:]" if header else ""), columns, prefix, path, folder.root)


def _command(
    name: str,
    modules: str,
    rows: str,
    columns: tuple[str | int, str | int],
    prefix: str,
    path: AnyPath,
    root: AnyPath,
) -> str:
    if isinstance(path, Remote):
        return f"{name} has the texts: write {CAPTIONS} from it, with a line {LINE} for each image"
    image, text = (f"row[{json.dumps(column)}]" for column in columns)
    image = f"{json.dumps(prefix)} + {image}" if prefix else image
    script = f'import {modules}; [print(json.dumps({{"image": {image}, "text": {text}}})) for row in {rows}]'
    return (
        f"{name} has the texts. This command makes {CAPTIONS} of it: python3 -c {shlex.quote(script)} < "
        f"{shlex.quote(str(path))} > {shlex.quote(str(root / CAPTIONS))}"
    )


def _of_json(path: AnyPath) -> str:
    """The command that makes JSONL of a file with one list of objects; "" if it is another file."""
    try:
        rows = json.loads(_head(path, _LARGEST_JSON).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return ""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return ""
    source = 'json.load(open(0, encoding="utf-8-sig"))'
    if found := _keys(rows[:_MOST]):
        return _command(path.name, "json", source, found, "", path, path.parent)
    script = f"import json; [print(json.dumps(row)) for row in {source}]"
    made = shlex.quote(str(path.with_suffix(".jsonl")))
    return f"This command makes JSONL of it: python3 -c {shlex.quote(script)} < {shlex.quote(str(path))} > {made}"


def _parsed(text: str) -> tuple[str, tuple[int, int], str, bool] | None:
    """How a table is to be read: its delimiter, the columns of images and of texts, the first image, and whether the
    first row has the names of the columns. None if no column has the names of images."""
    for delimiter in ",;\t|":
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row][:_MOST]
        except csv.Error:  # a cell of more than 128 KiB: this is no delimiter
            continue
        if not rows or len(rows[0]) < 2:
            continue
        header = not any(cell.strip().lower().endswith(SUFFIXES) for cell in rows[0])
        body = [dict(enumerate(row)) for row in rows[header:] if len(row) == len(rows[0])]
        if 2 * len(body) < len(rows) - header:  # a text, in some lines of which this character stands
            continue
        if found := _columns(body, dict(enumerate(rows[0])) if header else {}):
            return delimiter, found, body[0][found[0]], header
    return None


def _columns(rows: Sequence[Mapping[int, str]], names: Mapping[int, str]) -> tuple[int, int] | None:
    """The columns of images and of texts; `names` has the names of the columns."""
    image = next((column for column in (rows[0] if rows else ()) if _all_images(rows, column)), None)
    if image is None:
        return None
    others = [column for column in rows[0] if column != image]
    known = [column for word in COMMON["text"] for column in others if names.get(column, "").strip().lower() == word]
    longest = max(others, key=lambda column: sum(len(row[column]) for row in rows))
    return image, known[0] if known else longest


def _keys(rows: Sequence[Mapping[str, object]]) -> tuple[str, str] | None:
    """The keys of the image and of its text in JSON objects; None if no key has the names of images, or if there is no
    text."""
    texts = [{key: value for key, value in row.items() if isinstance(value, str)} for row in rows]
    image = next((key for key in (texts[0] if texts else ()) if _all_images(texts, key)), None)
    others = [key for key in texts[0] if key != image and all(key in row for row in texts)] if texts else []
    if image is None or not others:
        return None
    known = [key for word in COMMON["text"] for key in others if key.lower() == word]
    return image, known[0] if known else max(others, key=lambda key: sum(len(row[key]) for row in texts))


def _all_images(rows: Sequence[Mapping[Any, str]], column: object) -> bool:
    return all(column in row and row[column].lower().endswith(SUFFIXES) for row in rows)


def _prefix(folder: AnyFolder, reference: str, images: Sequence[str]) -> str:
    """What must stand before the names in a table, if these images lie in another folder than the table says."""
    try:
        if folder.path(reference).is_file():
            return ""
    except FileError:
        pass
    there = [name for name in images if name.endswith(f"/{reference}")]
    return there[0].removesuffix(reference) if there else ""


def _json_rows(head: bytes) -> list[Mapping[str, object]]:
    """The objects in the first lines of JSONL; [] if a line is something else."""
    try:
        rows = [json.loads(line) for line in head.decode("utf-8-sig").splitlines()[:_MOST] if line.strip()]
    except (ValueError, RecursionError):
        return []
    return rows if all(isinstance(row, dict) for row in rows) else []


def _head(path: AnyPath, size: int = _HEAD) -> bytes:
    """The first whole lines of a file; b"" if it cannot be read."""
    try:
        with storage.open_binary(path) as file:
            data = file.read(size)
    except OSError:
        return b""
    return data if len(data) < size else data[: data.rfind(b"\n") + 1]
