"""The same documents in every format that a source reads. The tests of formats compare them."""

from __future__ import annotations

import base64
import copy
import gzip
import io
import itertools
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

Examples = Sequence[Mapping[str, Any]]  # examples of one kind; images are bytes of files


def folder(root: Path, file: str, examples: Examples) -> dict[str, Any]:
    """JSONL beside files of images."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    numbers = itertools.count()

    def put(data: bytes) -> str:
        name = f"images/{next(numbers)}.png"
        (root / name).write_bytes(data)
        return name

    _write_rows(root / f"{file}.jsonl", [_row(example, put) for example in examples])
    return dict(kind="folder", path=str(root), files=(file,))


def jsonl(path: Path, examples: Examples) -> dict[str, Any]:
    """JSONL with its images inside."""
    rows = [
        _row(example, lambda data: "data:image/png;base64," + base64.b64encode(data).decode()) for example in examples
    ]
    _write_rows(path, rows)
    return dict(kind="jsonl", path=str(path))


def table(examples: Examples) -> pa.Table:
    """A table as Hugging Face `datasets` has it: images are structs of bytes and a path."""

    def held(value: Any) -> Any:
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        return [held(each) for each in value] if isinstance(value, list) and isinstance(value[0], bytes) else value

    return pa.Table.from_pylist([{key: held(value) for key, value in example.items()} for example in examples])


def parquet(root: Path, examples: Examples, files: int = 3, rows: int = 16) -> dict[str, Any]:
    """A folder of Parquet files, with groups of `rows` rows."""
    (root / "data").mkdir(parents=True)
    for i, part in enumerate(_parts(table(examples), files)):
        pq.write_table(part, root / "data" / f"train-{i:05d}-of-{files:05d}.parquet", row_group_size=rows)
    return dict(kind="parquet", path=str(root))


def arrow(root: Path, examples: Examples, files: int = 2, rows: int = 16) -> dict[str, Any]:
    """A folder of Arrow streams, as `save_to_disk` writes them."""
    root.mkdir(parents=True)
    for i, part in enumerate(_parts(table(examples), files)):
        with pa.ipc.new_stream(root / f"data-{i:05d}-of-{files:05d}.arrow", part.schema) as stream:
            stream.write_table(part, max_chunksize=rows)
    (root / "state.json").write_text("{}")
    return dict(kind="parquet", path=str(root))


def webdataset(root: Path, examples: Examples, shards: int = 4) -> dict[str, Any]:
    """Tars of .png, .txt and .json. If a sample has several images, they are 0.png, 1.png."""
    root.mkdir(parents=True)
    count = -(-len(examples) // shards)
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for i, example in enumerate(examples[shard * count : (shard + 1) * count]):
            shown = example.get("images", [example["image"]] if "image" in example else [])
            names = [f"{i:04d}.png"] if len(shown) == 1 else [f"{i:04d}.{j}.png" for j in range(len(shown))]
            members += zip(names, shown, strict=True)
            rest = {key: value for key, value in example.items() if key not in ("image", "images", "text")}
            members += [(f"{i:04d}.txt", example["text"].encode())] if "text" in example else []
            members += [(f"{i:04d}.json", json.dumps(rest).encode())] if rest else []
        (root / f"{shard:03d}.tar").write_bytes(tar(members))
    return dict(kind="webdataset", path=str(root / f"{{000..{shards - 1:03d}}}.tar"))


def packed_tars(root: Path, examples: Examples, ending: str, shards: int = 4) -> dict[str, Any]:
    """`webdataset`, compressed: ending "tar.gz", "tgz" or "tar.zst"."""
    webdataset(root, examples, shards)
    for path in sorted(root.iterdir()):
        data = path.read_bytes()
        packed = pa.compress(data, "zstd", asbytes=True) if ending.endswith("zst") else gzip.compress(data)
        (root / f"{path.stem}.{ending}").write_bytes(packed)
        path.unlink()
    return dict(kind="webdataset", path=str(root / f"{{000..{shards - 1:03d}}}.{ending}"))


def tar(members: Sequence[tuple[str | tarfile.TarInfo, bytes]]) -> bytes:
    """A tar of these members, in order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def dataset(root: Path, name_: str, features: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
    """A prepared dataset in TFDS's own format, without its code; images are bytes of files."""
    with registered.skip_registration():

        class Fixture(tfds.core.GeneratorBasedBuilder):
            name = name_
            VERSION = tfds.core.Version("1.0.0")
            url_infos = None

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(dict(features)), disable_shuffling=True
                )

            def _split_generators(self, manager: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                images = ("image", "images", "photo")
                for i, example in enumerate(examples):
                    files = {key: _as_files(example[key]) for key in images if key in example}
                    yield i, dict(example) | files

    Fixture(data_dir=root, file_format="array_record").download_and_prepare()
    return dict(kind="tfds", name=f"{name_}:1.0.0", data_dir=str(root))


def _as_files(value: Any) -> Any:
    """Images as TFDS takes them without TensorFlow."""
    return [io.BytesIO(each) for each in value] if isinstance(value, list) else io.BytesIO(value)


def _row(example: Mapping[str, Any], put: Any) -> dict[str, Any]:
    """The example as a row in the format of `language.rows`. put: converts an image to its form in the row."""
    row = {key: copy.deepcopy(value) for key, value in example.items() if key not in ("image", "images", "texts")}
    if "image" in example:
        row["image"] = put(example["image"])
    if "texts" in example:
        parts = []
        for text, image in zip(example["texts"], example["images"], strict=True):
            parts += [{"type": "text", "text": text}, {"type": "image", "image": put(image)}]
        row["segments"] = parts
    elif "images" in example:
        shown = iter(example["images"])
        for message in row["messages"]:
            pieces = message["content"].split("<image>")
            content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
            for piece in pieces[1:]:
                content += [{"type": "image", "image": put(next(shown))}]
                content += [{"type": "text", "text": piece}] if piece else []
            message["content"] = content
    return row


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parts(whole: pa.Table, count: int) -> list[pa.Table]:
    size = -(-len(whole) // count)
    return [whole.slice(i * size, size) for i in range(count)]
