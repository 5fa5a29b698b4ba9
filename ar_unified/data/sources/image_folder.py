"""Documents of one image each, without text: the image files of a folder, for an image tokenizer."""

from __future__ import annotations

import copy
import hashlib
import posixpath

from ar_unified import storage
from ar_unified.data import images
from ar_unified.data.files import FileError, folder_at
from ar_unified.data.items import BadItem
from ar_unified.errors import UserError
from ar_unified.language.document import Document, ImagePart
from ar_unified.manifests import Json
from ar_unified.storage import AnyPath


class ImageFiles:
    """Every image file under `path`, however deep, in the order of their paths. `files.Folder` decides which files
    are read.

    Links that lead out of the folder, and unreadable files, are bad items.

    Raises:
        UserError: if there is no such folder, or no image in it.
    """

    def __init__(
        self,
        path: str | AnyPath,
        *,
        links: bool = False,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        self.root, self.limits = storage.path(path), limits
        self._resize: images.Resize | None = None
        self.name, self.reversible = label or self.root.resolve().name, reversible
        self._folder = folder_at(self.root, links)
        self._found = self._folder.search(lambda name: name.lower().endswith(images.SUFFIXES))
        if not self._found:
            endings = ", ".join(images.SUFFIXES)
            raise UserError(f"{self.root}: expected a folder with image files ({endings}), found none")
        names = "".join(f"{found.name} {found.size}\n" for found in self._found)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        self.fingerprint: dict[str, Json] = {"kind": "images", "items": len(self), "sha256": digest}

    def resized(self, resize: images.Resize) -> ImageFiles:
        """See `items.resized`."""
        other = copy.copy(self)
        other._resize = resize
        return other

    def __len__(self) -> int:
        return len(self._found)

    def origin(self, i: int) -> str:
        """The image's file."""
        return str(self.root / self._found[i].name)

    def __getitem__(self, i: int) -> Document:
        found = self._found[i]
        try:
            if found.error:
                raise found.error
            pixels = images.decode(self._folder.read_file(found.name), self.limits, self._resize)
        except (images.ImageError, FileError) as error:
            raise BadItem(error.kind, self.origin(i), error.reason) from error
        return Document.of((ImagePart(pixels),), id=posixpath.basename(found.name), origin=self.origin(i))

    def texts(self, i: int) -> list[str]:
        """Returns [], because the items are images without text."""
        return []
