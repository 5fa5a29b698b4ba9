"""Folders that appear whole or not at all, and what becomes of those that did not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from ar_tokenizers.files import UNFINISHED, whole_folder

WRITER = """
import os, signal, sys
from ar_tokenizers.files import whole_folder
with whole_folder(sys.argv[1]) as here:
    (here / "part").write_bytes(b"x" * 1000)
    print("written", flush=True)
    sys.stdin.read()
"""


def left_in(folder):
    return {path for path in folder.iterdir() if path.name.endswith(UNFINISHED)}


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "model[1]"  # a pattern too, if one took it for that
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"written\n"
    other = tmp_path / f".model[1]x.host.1{UNFINISHED}"
    other.mkdir()
    before = left_in(tmp_path)
    assert len(before) == 3
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    with pytest.raises(KeyError), whole_folder(path):
        during = left_in(tmp_path)
        raise KeyError
    assert len(during) == 3 and len(during - before) == 1  # the dead one's is gone, this one's is new
    assert left_in(tmp_path) == during & before and other in during
    writers[1].communicate()
    assert path.joinpath("part").stat().st_size == 1000 and left_in(tmp_path) == {other}
    with pytest.raises(FileExistsError), whole_folder(path):
        pass
