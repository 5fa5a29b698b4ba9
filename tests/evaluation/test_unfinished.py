"""Output that is written a few lines at a time: continuing after a kill, other settings, two processes, and the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ar_unified.errors import UserError
from ar_unified.evaluation.unfinished import Unfinished

FACTS = {"weights": "a", "data": {"items": 7}}


def begun(path: Path, count: int) -> None:
    """Leaves the file as a killed process does."""
    with Unfinished(path, FACTS, 2) as lines:
        for i in range(0, count, 2):
            lines.add({"i": n, "said": "ü"} for n in range(i, min(i + 2, count)))


def test_it_goes_on_behind_the_last_whole_part_and_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    begun(path, 5)
    assert not path.exists()
    with open(path.with_name("out.jsonl.unfinished") / "lines.jsonl", "ab") as file:
        file.write(b'{"i": 5, "sa')
    with Unfinished(path, FACTS, 2) as lines:
        assert lines.done == 4 and [row["i"] for row in lines.rows()] == [0, 1, 2, 3]
        lines.add([{"i": 4}, {"i": 5}])
        assert not path.exists()
        lines.finish()
    assert [json.loads(line)["i"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]
    assert [each.name for each in path.parent.iterdir()] == ["out.jsonl"]
    with pytest.raises(UserError, match="exists and is not overwritten"):
        Unfinished(path, FACTS, 2)


def test_what_was_begun_with_something_else_is_refused_and_stays(tmp_path: Path) -> None:
    begun(tmp_path / "out", 2)
    kept = (tmp_path / "out.unfinished" / "lines.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"started with data.items 7, and this command has 8: .*delete the folder"):
        Unfinished(tmp_path / "out", FACTS | {"data": {"items": 8}}, 2)
    assert (tmp_path / "out.unfinished" / "lines.jsonl").read_bytes() == kept != b""
    (tmp_path / "out.unfinished" / "made_of.json").unlink()
    with Unfinished(tmp_path / "out", FACTS, 2) as lines:
        assert lines.done == 0, "nothing says what these lines are of"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with Unfinished(tmp_path / "out", FACTS, 2), pytest.raises(UserError, match="being written by another process"):
        Unfinished(tmp_path / "out", FACTS, 2)


def test_lines_that_another_process_finishes_between_opening_and_locking(tmp_path, monkeypatch):
    other = Unfinished(tmp_path / "out", FACTS, 2)

    def finish_first(file, how):
        monkeypatch.undo()
        with other:
            other.finish()

    monkeypatch.setattr("fcntl.flock", finish_first)
    with pytest.raises(UserError, match="was finished by another process meanwhile"):
        Unfinished(tmp_path / "out", FACTS, 2)
    assert (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()
