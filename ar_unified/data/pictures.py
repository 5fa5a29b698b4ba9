"""Documents that are one picture each and no text: the picture files of a folder, for an image tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ar_unified.data import images
from ar_unified.data.items import BadItem
from ar_unified.document import Document, ImagePart
from ar_unified.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


class Pictures:
    """Every picture file under `path`, however deep, in the order of their paths.

    Raises:
        UserError: there is none.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        self.root, self.limits = Path(path), limits
        self.name, self.reversible = label or self.root.resolve().name, reversible
        found = (path for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        self.files = sorted(found, key=lambda path: path.relative_to(self.root).as_posix())
        if not self.files:
            raise UserError(f"{self.root}: expected a folder with picture files ({', '.join(SUFFIXES)}), found none")
        names = "".join(f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}\n" for path in self.files)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        self.fingerprint: dict[str, Any] = {"kind": "pictures", "items": len(self), "sha256": digest}

    def __len__(self) -> int:
        return len(self.files)

    def origin(self, i: int) -> str:
        return str(self.files[i])

    def __getitem__(self, i: int) -> Document:
        try:
            pixels = images.decode(self.files[i].read_bytes(), self.limits)
        except images.ImageError as error:
            raise BadItem(error.kind, self.origin(i), error.reason) from error
        except OSError as error:
            raise BadItem("missing_image", self.origin(i), str(error)) from error
        return Document((ImagePart(pixels),), id=self.files[i].name, origin=self.origin(i))

    def texts(self, i: int) -> list[str]:
        return []
