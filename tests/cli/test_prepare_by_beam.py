"""`prepare --beam`: workers of an Apache Beam pipeline make the same shards as `prepare` without Beam."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from ar_unified.cli.main import main
from ar_unified.data.prepare.making import ShardMaker
from tests.cli.conftest import command, refused
from tests.cli.test_prepare_on_two import shards
from tests.cli.test_text_alone import CONFIG
from tests.storage.conftest import store, url
from tests.storage.test_workdir import in_store

__all__ = ["store", "url"]
TWO = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """Arguments without the verb and the workdir, for a corpus of three shards."""
    (tmp_path / "corpus").mkdir()
    lines = (f"the red circle {i} stands left of the blue square {i * i} and smiles" for i in range(20_000))
    (tmp_path / "corpus" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "config.py").write_text(CONFIG)
    return ["--config", f"{tmp_path / 'config.py'}:{tmp_path / 'corpus'}", "--workdir"]


def test_without_beam_it_says_what_to_install(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert main(["tokenizer", *text, str(tmp_path / "run")]) == 0
    refused(
        ["prepare", "--beam=", *text, str(tmp_path / "run")],
        r"--beam needs Apache Beam .*pip install 'ar_unified\[beam\]'",
    )


@pytest.mark.interop
def test_two_workers_in_processes_of_their_own_make_the_same_shards(
    text: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, beam = tmp_path / "alone", tmp_path / "beam"
    assert main(["tokenizer", *text, str(alone)]) == 0
    shutil.copytree(alone, beam)
    assert main(["prepare", *text, str(alone)]) == 0
    monkeypatch.setattr(ShardMaker, "make", None)  # this process makes no shard
    assert main(["prepare", f"--beam={TWO}", *text, str(beam)]) == 0
    assert shards(beam) == shards(alone)
    assert len(list((beam / "data" / "train").rglob("*.array_record"))) == 3
    assert "train: 3 shards are left to an Apache Beam pipeline" in capfd.readouterr().out


@pytest.mark.interop
def test_images_and_filters(tmp_path: Path, folder: Path) -> None:
    alone, beam = tmp_path / "alone", tmp_path / "beam"
    changes = dict(data__filters__duplicates="images")
    assert main(command("tokenizer", folder, alone, **changes)) == 0
    shutil.copytree(alone, beam)
    assert main(command("prepare", folder, alone, **changes)) == 0
    assert main([*command("prepare", folder, beam, **changes), "--beam=--runner=DirectRunner"]) == 0
    assert shards(beam) == shards(alone)


@pytest.mark.interop
def test_in_an_object_store(text: list[str], tmp_path: Path, url: str) -> None:
    alone = tmp_path / "alone"
    for verb in ("tokenizer", "prepare"):
        assert main([verb, *text, str(alone)]) == 0
        more = ["--beam="] if verb == "prepare" else []
        assert main([verb, *more, *text, url]) == 0
    assert in_store(url) == shards(alone)


@pytest.mark.interop
def test_a_worker_that_fails_is_told_and_the_next_start_goes_on(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, beam = tmp_path / "alone", tmp_path / "beam"
    assert main(["tokenizer", *text, str(alone)]) == 0
    shutil.copytree(alone, beam)
    assert main(["prepare", *text, str(alone)]) == 0
    make = ShardMaker.make

    def fails(self, piece, *more):
        if piece.number == 1:
            raise OSError("the disk is full")
        make(self, piece, *more)

    with monkeypatch.context() as patched:
        patched.setattr(ShardMaker, "make", fails)
        refused(["prepare", "--beam=", *text, str(beam)], "the pipeline failed.*the disk is full", status=3)
    assert main(["prepare", "--beam=", *text, str(beam)]) == 0
    assert shards(beam) == shards(alone)


@pytest.mark.interop
def test_options_that_beam_does_not_know_are_refused(text: list[str], tmp_path: Path) -> None:
    assert main(["tokenizer", *text, str(tmp_path / "run")]) == 0
    refused(
        ["prepare", "--beam=--runner=NoRunner", *text, str(tmp_path / "run")], "--beam '--runner=NoRunner': .*NoRunner"
    )
