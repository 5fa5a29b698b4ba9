"""Stand-ins for the two tokenizers, and a folder of data to read: small enough to check by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified.data.images import to_png
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import ImageLayout, fixed_grid
from ar_unified.language.vocabulary import Vocabulary


class ByteCodec:
    """A text tokenizer with one piece per byte."""

    size, hash = 256, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class PatchMeans:
    """An image tokenizer in which a code is the mean of a 4 x 4 patch, in 16 steps of grey. It counts the images it
    gets."""

    codebook_size, factor, codes_per_position, hash = 16, 4, 1, "patch-means"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        self.shapes.append(pixels.shape)
        B, H, W, _ = pixels.shape
        return (pixels.reshape(B, H // 4, 4, W // 4, 4, 3).mean((2, 4, 5)) / 16).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        grey = (codes * 16 + 8).astype(np.uint8).repeat(4, 1).repeat(4, 2)
        return np.repeat(grey[..., None], 3, -1)


class Kit:
    """Objects that the tests of this folder share."""

    Tokenizer = PatchMeans

    @staticmethod
    def grammar(layout: ImageLayout) -> Grammar:
        side = max(layout.height, layout.width) if layout.sized else 0
        vocabulary = Vocabulary(256, 16, size_tokens=side, text_hash="bytes", image_hash="patch-means")
        return Grammar(vocabulary, layout, ByteCodec())

    @staticmethod
    def image(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)

    @staticmethod
    def write(path: Path, rows: Sequence[dict[str, Any] | bytes]) -> None:
        """Writes a JSONL file. Lines that are bytes are written unchanged, for broken lines."""
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))

    @classmethod
    def folder(cls, root: Path, captions: int = 20, questions: int = 10, docs: int = 5) -> Path:
        """A data folder as users bring it, with images of 16 x 16."""
        (root / "images").mkdir(parents=True)
        names = [f"images/{i}.png" for i in range(captions)]
        for i, name in enumerate(names):
            (root / name).write_bytes(to_png(cls.image(i)))
        cls.write(root / "captions.jsonl", [dict(image=name, text=f"picture {i}") for i, name in enumerate(names)])
        asked = [dict(image=names[i % captions], question=f"which is {i}?", answer="it") for i in range(questions)]
        cls.write(root / "vqa.jsonl", asked)
        told = [[dict(type="text", text=f"{i} " * (5 + i)), dict(type="image", image=names[i])] for i in range(docs)]
        cls.write(
            root / "docs.jsonl", [dict(segments=2 * segments, title=f"story {i}") for i, segments in enumerate(told)]
        )
        return root

    @classmethod
    def spoil(cls, root: Path) -> dict[str, str]:
        """Puts bad rows between the good captions of `folder`; returns their faults by file:line. One new row is
        good."""
        png = to_png(cls.image(0, 64, 64))
        (root / "images/truncated.png").write_bytes(png[: len(png) // 2])
        (root / "images/empty.png").write_bytes(b"")
        (root / "images/absurd.png").write_bytes(to_png(np.zeros((1, 20000, 3), np.uint8)))
        (root.parent / "outside.png").write_bytes(to_png(cls.image(0)))
        (root / "images/link.png").symlink_to(root.parent / "outside.png")
        fine = "images/0.png"
        bad: dict[str, dict[str, Any] | bytes] = {
            "unreadable_image": dict(image="images/truncated.png", text="x"),
            "empty_file": dict(image="images/empty.png", text="x"),
            "image_shape": dict(image="images/absurd.png", text="x"),
            "empty_text": dict(image=fine, text=""),
            "bad_utf8": b'{"image": "images/0.png", "text": "caf\xe9"}',
            "path_escapes": dict(image="../outside.png", text="x"),
            "path_escapes ": dict(image="images/link.png", text="x"),
            "bad_json": b'{"image": "images/0.png", "text": "cut he',
            "missing_image": dict(image="images/nowhere.png", text="x"),
            "bad_row": dict(photo=fine, text="x"),
        }
        good: list[dict[str, Any] | bytes] = list((root / "captions.jsonl").read_bytes().splitlines())
        rows = good[:5] + [dict(image=fine, text="a <boi> b")]
        where = {}
        for i, (kind, row) in enumerate(bad.items()):
            rows += [good[5 + i], row]
            where[f"captions.jsonl:{len(rows)}"] = kind.strip()
        cls.write(root / "captions.jsonl", rows + good[5 + len(bad) :])
        return where


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def grammar() -> Grammar:
    return Kit.grammar(fixed_grid(4, 4))


@pytest.fixture
def tokenizer() -> PatchMeans:
    return PatchMeans()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Kit.folder(tmp_path / "set")
