"""A realistic set of thousands of files for every reader, some of them broken, in each known way.

PYTHONPATH=.:tokenizers python -m tests.data.broken FOLDER [FILES]    makes FOLDER/set of 5,000 files

FOLDER/specs.json has the set's sources, which `tests.data.watched` prepares.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ar_unified.data.prepare import folder_name, load_report
from ar_unified.data.shards import Shards
from ar_unified.language.document import CodesPart, TextPart
from ar_unified.language.syntax import fixed_grid
from tests.data.broken_archives import packed, tables, tars
from tests.data.broken_files import BROKEN, GOOD, LONG, Bad, Part, Said, odd, odd_text, said, saved
from tests.data.conftest import Kit

# ---- images ------------------------------------------------------------------------------------------------------


def _placed(folder: Path) -> dict[str, tuple[Callable[[Path], Any], str, str]]:
    """Ways in which a path is not an image file. For each: a function that makes the path, the kind of fault when a
    folder is searched, and the kind when a row names the path."""
    secret = folder.parent.parent / "outside/secret.png"

    def huge(path: Path) -> None:
        path.write_bytes(GOOD)
        os.truncate(path, 64 << 30)

    return {
        "a link that leads out": (lambda path: path.symlink_to(secret), "path_escapes", "path_escapes"),
        "a link to nothing": (lambda path: path.symlink_to(folder / "none"), "unreadable_file", "missing_image"),
        "a link to itself": (lambda path: path.symlink_to(path), "unreadable_file", "missing_image"),
        "a pipe": (os.mkfifo, "unreadable_file", "missing_image"),
        "an image of 64 GB": (huge, "unreadable_image", "unreadable_image"),
    }


def _image_files(folder: Path, each: int, named: bool) -> list[Bad]:
    """Puts broken files of every kind into a folder. named: whether rows name them."""
    found = []
    for i in range(each):
        for number, (data, kind) in enumerate(BROKEN.values()):
            found.append((f"broken {i} {number}.png", kind))
            (folder / found[-1][0]).write_bytes(data)
        for number, (put, as_found, as_named) in enumerate(_placed(folder).values()):
            found.append((f"placed {i} {number}.png", as_named if named else as_found))
            put(folder / found[-1][0])
    return found


def _rows(outside: Path) -> dict[str, tuple[dict[str, Any] | bytes, str]]:
    """Ways in which a row with a good image is broken, and the kind of each fault."""
    here = "fine.png"
    return {
        "no such image": (dict(image="nowhere.png", text="x"), "missing_image"),
        "another case": (dict(image="FINE.png", text="x"), "missing_image"),
        "a folder for an image": (dict(image=".", text="x"), "missing_image"),
        "..": (dict(image="../../outside/secret.png", text="x"), "path_escapes"),
        "an absolute path": (dict(image=str(outside / "secret.png"), text="x"), "path_escapes"),
        "an address": (dict(image="https://example.com/a.png", text="x"), "missing_image"),
        "a zero byte in a name": (dict(image="fine.png\0", text="x"), "missing_image"),
        "a name of half a surrogate": (dict(image="\udcff.png", text="x"), "missing_image"),
        "a name of 5,000 letters": (dict(image="a" * 5000, text="x"), "missing_image"),
        "a name that is no text": (dict(image=7, text="x"), "bad_row"),
        "a data: URL that is none": (dict(image="data:image/png;base64,@@@", text="x"), "unreadable_image"),
        "empty text": (dict(image=here, text=""), "empty_text"),
        "blanks": (dict(image=here, text=" \t\u2003\n"), "empty_text"),
        "a number for text": (dict(image=here, text=7), "bad_text"),
        "null for text": (dict(image=here, text=None), "bad_text"),
        "half a surrogate": (b'{"image": "fine.png", "text": "a \\ud800 b"}', "bad_text"),
        "a caption of 1 MB": (dict(image=here, text=LONG), "too_long"),
        "latin-1": (b'{"image": "fine.png", "text": "caf\xe9"}', "bad_utf8"),
        "half a row": (b'{"image": "fine.png", "te', "bad_json"),
        "brackets without end": (b"[" * 200_000, "bad_json"),
        "a number of 5,000 digits": (b'{"image": "fine.png", "text": "x", "n": ' + b"9" * 5000 + b"}", "bad_json"),
        "a list": (b'["fine.png", "x"]', "bad_row"),
        "other keys": (dict(photo=here, words="x"), "bad_row"),
    }


def photos(root: Path, count: int, each: int) -> Part:
    """captions.jsonl with its images. Images with odd numbers are unusual but good, and so are two rows with the same
    id."""
    root.mkdir()
    (root / "fine.png").write_bytes(GOOD)
    rows: list[tuple[Any, Any]] = []
    for i in range(count):
        data, greys = odd(i)
        name = f"{i}{('.png', '.JPG', '.jpeg', ' é.png')[i % 4]}"
        (root / name).write_bytes(data)
        rows.append((dict(image=name, text=odd_text(i), id=str(i // 2)), said(odd_text(i), greys)))
    ways = _rows(root.parent.parent / "outside")
    rows += [*ways.values()] * each
    rows += [(dict(image=name, text="x"), kind) for name, kind in _image_files(root, each, named=True)]
    random.Random(0).shuffle(rows)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in rows]
    (root / "captions.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    items = [
        told if isinstance(told, tuple) else (f"photos/captions.jsonl:{i}", told) for i, (_, told) in enumerate(rows, 1)
    ]
    return Part(dict(kind="folder", path=str(root)), items, {*ways, *BROKEN, *_placed(root)})


def plain(root: Path, count: int, each: int) -> Part:
    """Only images, one of them with a name that is not UTF-8."""
    root.mkdir()
    items: dict[str, Any] = {}
    for i in range(count):
        data, greys = odd(i)
        name = os.fsdecode(b"caf\xe9.png") if i == 0 else f"{i}.png"
        (root / name).write_bytes(data)
        items[name] = said("", greys)
    items |= {name: (f"plain/{name}", kind) for name, kind in _image_files(root, each, named=False)}
    (root / ".hidden.png").write_bytes(b"litter")
    (root / "folder.png").mkdir()
    return Part(dict(kind="images", path=str(root)), _in_order(items))


def _in_order(items: Mapping[str, Any]) -> list[Any]:
    return [items[name] for name in sorted(items)]


# ---- texts, pages, clips -----------------------------------------------------------------------------------------


def texts(root: Path, count: int, each: int) -> Part:
    """Text files, one of 1 MB, one with a name that is not UTF-8."""
    root.mkdir()
    ways: dict[str, tuple[bytes, str]] = {
        "an empty text": (b"", "empty_text"),
        "a mark alone": (b"\xef\xbb\xbf \n", "empty_text"),
        "a text in latin-1": (b"caf\xe9", "bad_utf8"),
        "a text in UTF-16": (("words " * 9).encode("utf-16"), "bad_utf8"),
        "zero bytes": (b"a text\0\0 that goes on", "bad_utf8"),
        "a zip called .txt": (b"PK\x03\x04" + bytes(100), "bad_utf8"),
    }
    items: dict[str, Any] = {}
    for i in range(count):
        text = LONG.replace("caption ", "caption\n") if i == 1 else f"{odd_text(i)}\r\nand more"
        name = os.fsdecode(b"caf\xe9.txt") if i == 0 else f"{i}.txt"
        (root / name).write_bytes((b"\xef\xbb\xbf" if i % 5 == 2 else b"") + text.encode())
        items[name] = said(text)
    for i in range(each):
        for number, (data, kind) in enumerate(ways.values()):
            (root / f"broken {i} {number}.txt").write_bytes(data)
            items[f"broken {i} {number}.txt"] = f"texts/broken {i} {number}.txt", kind
        os.mkfifo(root / f"pipe {i}.txt")
        items[f"pipe {i}.txt"] = f"texts/pipe {i}.txt", "unreadable_file"
    return Part(dict(kind="text", path=str(root)), _in_order(items), {*ways, "a pipe for a text"})


def pages(root: Path, count: int, each: int) -> Part:
    """Markdown and HTML files, each with an image."""
    root.mkdir()
    ways: dict[str, tuple[bytes, str]] = {
        "a page with an image elsewhere": (b"# A\n![x](https://example.com/a.png)", "missing_image"),
        "a page with an image that is not there": (b"# A\n![x](none.png)", "missing_image"),
        "a page with an image outside": (b"# A\n![x](../../outside/secret.png)", "path_escapes"),
        "a page with a broken image": (b"# A\n![x](broken.png)", "unreadable_image"),
        "a page in latin-1": (b"caf\xe9", "bad_utf8"),
        "an empty page": (b"\n\n", "empty_text"),
    }
    (root / "broken.png").write_bytes(GOOD[:50])
    items: dict[str, Any] = {}
    for i in range(count):
        data, greys = odd(i)
        (root / f"{i}.jpg").write_bytes(data)
        page = (
            f"<h1>Page {i}</h1><p>of <img src='{i}.jpg'> it</p><p><b>unclosed" if i % 2 else f"# Page {i}\n![]({i}.jpg)"
        )
        name = f"{i}.html" if i % 2 else f"{i}.md"
        (root / name).write_text(page)
        items[name] = said(f"Page {i} of it unclosed" if i % 2 else f"# Page {i}", greys)
    for i in range(each):
        for number, (data, kind) in enumerate(ways.values()):
            (root / f"broken {i} {number}.md").write_bytes(data)
            items[f"broken {i} {number}.md"] = f"pages/broken {i} {number}.md", kind
    return Part(dict(kind="pages", path=str(root)), _in_order(items), set(ways))


def clips(root: Path, count: int, each: int) -> Part:
    """Animations of three images and folders of two, with the texts of what they show."""
    root.mkdir()

    def frames(number: int) -> list[Image.Image]:
        return [Image.new("L", (16, 16), 16 * ((number + 3 * i) % 16) + 8) for i in range(3)]

    def animated(number: int) -> bytes:
        first, *more = frames(number)
        return saved(first, "GIF", save_all=True, append_images=more)

    items: dict[str, Any] = {}
    for i in range(count):
        shown = [(grey, grey) for grey in ((i + 3 * j) % 16 for j in range(3))]
        name = f"{i}" if i % 3 == 0 else f"{i}.gif"
        if i % 3 == 0:
            (root / name).mkdir()
            for j, frame in enumerate(frames(i)):
                frame.save(root / name / f"{j}.png")
        else:
            (root / name).write_bytes(animated(i))
        (root / f"{i}.txt").write_text(odd_text(i))
        items[name] = said(odd_text(i), *shown)
    for i in range(each):
        found = {"cut": (animated(i)[:-40], "unreadable_image"), "mute": (animated(i), "empty_text"),
                 "latin": (animated(i), "bad_utf8"), "none": (b"GIF89a", "unreadable_image")}  # fmt: skip
        for name, (data, kind) in found.items():
            (root / f"{name} {i}.gif").write_bytes(data)
            where = f"clips/{name} {i}.{'txt' if name in ('mute', 'latin') else 'gif'}"
            items[f"{name} {i}.gif"] = where, kind
        (root / f"mute {i}.txt").write_text(" ")
        (root / f"latin {i}.txt").write_bytes(b"caf\xe9")
        (root / f"frames {i}").mkdir()
        for j, data in enumerate((GOOD, GOOD[:50])):
            (root / f"frames {i}" / f"{j}.png").write_bytes(data)
        items[f"frames {i}"] = f"clips/frames {i}", "unreadable_image"
    ways = {"an animation cut short", "an empty text beside a clip", "a clip's text in latin-1", "a clip of no frames",
            "a broken frame"}  # fmt: skip
    return Part(dict(kind="clips", path=str(root)), _in_order(items), ways)


# ---- the whole ---------------------------------------------------------------------------------------------------


def make(root: Path, files: int = 5000, each: int = 2) -> dict[str, Part]:
    """Makes a set of this many files in root/set, with each kind of fault `each` times. Returns what every source
    holds."""
    base, outside = root / "set", root / "outside"
    base.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(GOOD)
    small = max(files // 100, 8)
    small = max(files // 100, 6)
    parts = {
        "plain": plain(base / "plain", files // 5, each),
        "texts": texts(base / "texts", files // 6, each),
        "pages": pages(base / "pages", small, each),
        "clips": clips(base / "clips", small, each),
        "tables": tables(base / "tables", small, each),
        "tars": tars(base / "tars", small, each),
        **packed(base, small),
    }
    beside = 2 + each * (len(BROKEN) + len(_placed(base)))  # captions.jsonl, fine.png and broken files
    parts["photos"] = photos(base / "photos", files - count(base) - beside, each)
    (root / "specs.json").write_text(json.dumps({name: part.spec for name, part in parts.items()}))
    return parts


def count(folder: Path) -> int:
    """All files below a folder."""
    return sum(len(names) for _, _, names in os.walk(folder))


def found(data: Path, name: str) -> list[Said]:
    """The documents that `prepare` wrote for a source; (-1, -1) stands for an image that does not have two greys."""
    folder, grammar = data / folder_name(name), Kit.grammar(fixed_grid(4, 4))
    shards = Shards(folder, load_report(data).sources[name].shards)
    said_by: dict[int, tuple[str, list[tuple[int, int]]]] = {}
    for i, tokens in enumerate(shards.read(range(len(shards)))):
        text, greys = said_by.setdefault(shards.item(i), ("", []))
        for part in grammar.parse(tokens.tokens).parts:
            if isinstance(part, TextPart):
                text += part.text
            elif isinstance(part, CodesPart):
                upper, lower = (set(half.flatten().tolist()) for half in np.split(part.codes, 2))
                greys.append((upper.pop(), lower.pop()) if len(upper) == len(lower) == 1 else (-1, -1))
        said_by[shards.item(i)] = text, greys
    return [said(text, *greys) for text, greys in said_by.values()]


if __name__ == "__main__":
    make(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
