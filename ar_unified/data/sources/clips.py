"""Documents of several images from clips: animated GIF and WebP files, videos, and folders of frames."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping

import numpy as np

from ar_unified import storage
from ar_unified.data import encoding, images, videos
from ar_unified.data.files import FileError, Found, folder_at
from ar_unified.data.items import BadItem
from ar_unified.errors import UserError
from ar_unified.language.document import Document, DocumentError, ImagePart, Part, TextPart
from ar_unified.manifests import Json
from ar_unified.storage import AnyPath

_ANIMATED = (".gif", ".webp")
_MOVING = (*_ANIMATED, *videos.SUFFIXES)
_FRAMES = tuple(suffix for suffix in images.SUFFIXES if suffix not in _ANIMATED)


class Clips:
    """Every clip under `path`, in the order of their names: a .gif or .webp file, a video (`videos`), or a folder of
    frames in other image formats.

    A clip becomes at most `frames` images, evenly spaced from the first to the last. NAME.txt beside NAME.gif or
    beside the folder NAME is the text of the clip. Without this file, the clip has no text. Frames in a folder are
    sorted by the numbers in their names.

    Raises:
        UserError: if there is no such folder or no clip in it, if `frames` is below 1, or if there is a video and the
            package `av` is missing.
    """

    def __init__(
        self,
        path: str | AnyPath,
        *,
        frames: int = 8,
        links: bool = False,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        if frames < 1:
            raise UserError(f"frames: expected at least 1, found {frames}")
        self._root, self._frames, self._limits = storage.path(path), frames, limits
        self.name, self.reversible = label or self._root.resolve().name, reversible
        self._folder = folder_at(self._root, links)
        found = self._folder.search(lambda name: name.lower().endswith((*images.SUFFIXES, *_MOVING, ".txt")))
        self._texts = {item.name for item in found if item.name.lower().endswith(".txt")}
        clips: dict[str, list[Found]] = {}
        for item in found:
            if item.error or item.name.lower().endswith(_MOVING):
                clips[item.name] = [item]
            elif item.name.lower().endswith(_FRAMES) and posixpath.dirname(item.name):
                clips.setdefault(posixpath.dirname(item.name), []).append(item)
        self._clips = [
            (name, sorted(items, key=lambda item: _numbers(item.name))) for name, items in sorted(clips.items())
        ]
        if not clips:
            raise UserError(f"{path}: expected .gif, .webp or video files, or folders of frames, in it; found none")
        if video := next((name for name in sorted(clips) if name.lower().endswith(videos.SUFFIXES)), ""):
            videos.require(str(self._root / video))
        names = "".join(f"{item.name} {item.size}\n" for item in found)
        self.fingerprint: Mapping[str, Json] = {
            "kind": "clips",
            "items": len(self),
            "frames": frames,
            "sha256": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._clips)

    def origin(self, i: int) -> str:
        """The clip's file or folder."""
        return str(self._root / self._clips[i][0])

    def __getitem__(self, i: int) -> Document:
        name, items = self._clips[i]
        texts = self.texts(i)
        try:
            shown = self._animated(items[0]) if items[0].name == name else self._folder_of(items)
            parts: list[Part] = [*map(TextPart, texts), *map(ImagePart, shown)]
            document = Document.of(parts, 1 if texts else None, id=name, origin=self.origin(i))
            document.check()
        except (images.ImageError, FileError, DocumentError) as error:
            raise BadItem(error.kind, self.origin(i), str(error)) from error
        return document

    def texts(self, i: int) -> list[str]:
        """The text beside clip i, if there is one. Raises BadItem."""
        name, items = self._clips[i]
        name = f"{name.rpartition('.')[0] if items[0].name == name else name}.txt"
        if name not in self._texts:
            return []
        try:
            text = encoding.text(encoding.unmarked(self._folder.read_file(name))).strip()
        except encoding.EncodingError as error:
            raise BadItem("bad_utf8", f"{self._root / name}", str(error)) from error
        except FileError as error:
            raise BadItem(error.kind, f"{self._root / name}", error.reason) from error
        if not text:
            raise BadItem("empty_text", f"{self._root / name}", "the text is empty")
        return [text]

    def _animated(self, item: Found) -> list[np.ndarray]:
        if item.error:
            raise item.error
        frames = videos.frames if item.name.lower().endswith(videos.SUFFIXES) else images.frames
        return frames(self._folder.read_file(item.name), self._frames, self._limits)

    def _folder_of(self, items: list[Found]) -> list[np.ndarray]:
        chosen = (items[number].name for number in images.evenly(len(items), self._frames))
        shown = []
        for name in chosen:
            try:
                shown.append(images.decode(self._folder.read_file(name), self._limits))
            except images.ImageError as error:
                raise images.ImageError(error.kind, f"{name!r}: {error.reason}") from error
        return shown


def _numbers(name: str) -> list[tuple[int, str]]:
    """A key for sorting that puts 2.png before 10.png."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
