"""What a process keeps in memory of prepared shards: memory-mapped files, the last open shards, and the requested
items."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ar_unified.data import shards
from ar_unified.data.shards import INDEX, Shards, ShardWriter, join_indexes, read_index, shard_path
from ar_unified.errors import UserError
from ar_unified.language.encoded import Encoded

COUNTS = (3, 0, 4, 1)  # documents of each shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, count in enumerate(COUNTS):
        with ShardWriter(tmp_path / "set", number) as shard:
            for i in range(count):
                tokens = np.full(5 + i, 256 * number, np.int32)  # zero bytes at the end
                marks = np.zeros(5 + i, np.uint8)
                shard.write(
                    Encoded(tokens, marks), item=10 * number + i, part=0, text_bytes=0, task=i, images=0, pair=False
                )
    return tmp_path / "set"


def held_open(folder: Path) -> set[str]:
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    names = {os.readlink(link) for link in links if link.exists()}
    return {Path(name).name for name in names if name.startswith(str(folder)) and name.endswith("array_record")}


def test_the_index_is_one_file_that_processes_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Shards(folder, 4)  # without a joined index, as in earlier versions
    joined = join_indexes(folder, 4)
    assert np.array_equal(joined, np.concatenate([read_index(shard_path(folder, n)) for n in range(4)]))
    stamp = (folder / "index.npy").stat().st_mtime_ns
    assert np.array_equal(join_indexes(folder, 4), joined) and (folder / "index.npy").stat().st_mtime_ns == stamp
    mapped = Shards(folder, 4)
    assert isinstance(mapped.index.base, np.memmap) and not mapped.index.flags.writeable
    assert mapped.index.dtype == INDEX and np.array_equal(mapped.index, plain.index)
    for found, seconds in ((plain, 60.0), (mapped, 60.0), (mapped, 0.0)):  # read one by one, or all at once
        monkeypatch.setattr(shards, "_QUICKLY", seconds)
        order = [7, 0, 2, 3, 6, 2]
        assert [d.tokens.tolist() for d in found.read(order)] == [[256 * n] * (5 + i) for n, i in map(place, order)]
        assert [found.item(i) for i in order] == [10 * n + i for n, i in map(place, order)]
        assert found.read([]) == []


def place(document: int) -> tuple[int, int]:
    return next((n, document - sum(COUNTS[:n])) for n in range(4) if document < sum(COUNTS[: n + 1]))


def test_a_source_without_documents_has_an_index(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0):
        pass
    assert join_indexes(tmp_path, 1).shape == Shards(tmp_path, 1).index.shape == (0,)


def test_only_what_is_read_from_is_open_and_of_that_the_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN", 2)
    join_indexes(folder, 4)
    found = Shards(folder, 4)
    assert not held_open(folder)
    found.read([0, 2])
    assert held_open(folder) == {"00000.array_record"}
    found.read([7])
    found.read([4])
    assert held_open(folder) == {"00002.array_record", "00003.array_record"}


def test_shards_that_are_not_those_of_the_index_are_refused(folder: Path) -> None:
    join_indexes(folder, 4)
    shutil.copy(shard_path(folder, 0), shard_path(folder, 2))
    found = Shards(folder, 4)
    assert len(found.read([0, 1, 7])) == 3
    with pytest.raises(
        UserError, match=r"00002.array_record: found 3 documents, but its index has 4, so a file was changed"
    ):
        found.read([1, 5])
    with pytest.raises(UserError, match="index.npy belongs to other shards than these 3"):
        Shards(folder, 3)
    shard_path(folder, 3).unlink()
    with pytest.raises(UserError, match="00003.array_record: no such file, but the manifest names it"):
        Shards(folder, 4)
