"""Interleaved documents from pages of Markdown and HTML with the images beside them."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from urllib.parse import unquote, urlsplit

from ar_unified import storage
from ar_unified.data import encoding, images
from ar_unified.data.files import FileError, folder_at
from ar_unified.data.items import BadItem
from ar_unified.data.sources import markup
from ar_unified.data.sources.columns import Columns
from ar_unified.data.sources.records import Record, RecordSource
from ar_unified.data.sources.splits import Split
from ar_unified.data.sources.text_files import find
from ar_unified.manifests import Json
from ar_unified.storage import AnyPath

FILES = ("*.md", "*.markdown", "*.html", "*.htm")
_LARGEST = 1 << 26  # most bytes of a page


class Pages(RecordSource):
    """Every page under `path`, in the order of their names, with text and images in reading order (`markup`).

    An image's name is relative to the page's folder, or to `path` if it begins with "/"; nothing is fetched. A page is
    a bad item if one of its images is missing or outside the folder, or if the page is empty or not UTF-8.

    Args:
        path: a folder; all pages below it are read, except hidden ones (`files.Folder`).
        files: patterns of names.
        split: as for `TextFiles`; a part takes pages by their names.

    Raises:
        UserError: if there is no such folder, no page in it, or no page in `split`.
    """

    def __init__(
        self,
        path: str | AnyPath,
        *,
        files: Sequence[str] = FILES,
        links: bool = False,
        split: str | None = None,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        self._root = storage.path(path)
        folder = folder_at(self._root, links)
        super().__init__(Columns(), folder, label or self._root.resolve().name, reversible=reversible, limits=limits)
        found = find(self._root, files, links)
        if split is not None:
            chosen = Split(split)
            if chosen.by_part:
                for page in found:
                    chosen.has({"id": page.name}, b"")
                chosen.settle()
            found = [page for page in found if chosen.has({"id": page.name}, b"")]
            if not found:
                raise chosen.empty(path, "text")
        self._pages, self._folder = found, folder
        digest = hashlib.sha256()
        for page in found:
            digest.update(f"{page.name} {page.size}\n".encode(errors="surrogateescape"))
        self.fingerprint: Mapping[str, Json] = {
            "kind": "pages",
            "items": len(self),
            "split": split,
            "sha256": digest.hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._pages)

    def origin(self, i: int) -> str:
        """The page's file."""
        return str(self._root / self._pages[i].name)

    def read(self, indices: Sequence[int], pictures: bool = True) -> list[Record | BadItem]:
        """Pages as records, in the order of `indices`; a BadItem takes the place of a page that cannot be read."""
        return [self._page(i) for i in indices]

    def _page(self, i: int) -> Record | BadItem:
        page = self._pages[i]
        try:
            if page.error:
                raise page.error
            if page.size > _LARGEST:
                raise FileError("too_large", f"expected at most {_LARGEST >> 20} MiB, found {page.size >> 20} MiB")
            text = encoding.text(encoding.unmarked((self._root / page.name).read_bytes()))
        except encoding.EncodingError as error:
            return BadItem("bad_utf8", self.origin(i), str(error))
        except FileError as error:
            return BadItem(error.kind, self.origin(i), error.reason)
        except OSError as error:
            return BadItem("unreadable_file", self.origin(i), str(error.strerror))
        parts = markup.from_html(text) if page.name.lower().endswith((".html", ".htm")) else markup.from_markdown(text)
        if not parts:
            return BadItem("empty_text", self.origin(i), "the page has neither text nor images")
        here = posixpath.dirname(page.name)
        for part in parts:
            if part["type"] == "image":
                part["image"] = _name(part["image"], here)
        return {"segments": parts, "id": page.name}


def _name(target: str, here: str) -> str:
    """A path below the root, or a URL as it is."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return f"https:{target}" if target.startswith("//") else target
    path = unquote(parts.path)
    return path.lstrip("/") if path.startswith("/") else posixpath.join(here, path)
