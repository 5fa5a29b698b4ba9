"""A run that is changed on the way: what it costs at any time, how long it is from where it stands; told in its history."""

import time

from ar_unified.cli.main import main
from tests.cli.conftest import command


def test_time(folder, tmp_path):
    t = time.time()
    small = dict(image_tokenizer__steps=1, training__steps=30)
    for verb in ("tokenizer", "prepare", "train"):
        assert main(command(verb, folder, tmp_path, **small)) == 0
        print(verb, time.time() - t)
        t = time.time()
    assert main(command("train", folder, tmp_path, **small | dict(training__steps=40))) == 0
    print("ext", time.time() - t)
    t = time.time()
    print((tmp_path / "model" / "history.json").read_text())
    assert (
        main(
            [
                *command("train", folder, tmp_path.with_name("branch"), **small | dict(training__steps=45)),
                "--branch",
                str(tmp_path) + ":30",
            ]
        )
        == 0
    )
    print("branch", time.time() - t)
    t = time.time()
    print((tmp_path.with_name("branch") / "model" / "history.json").read_text())
