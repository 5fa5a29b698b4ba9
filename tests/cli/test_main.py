"""The command line itself: it starts quickly, prints one sentence for errors that a person can fix, and stops
cleanly."""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from ar_unified import interrupts
from ar_unified.cli import main as program
from ar_unified.cli.arguments import module_of, parser_of
from ar_unified.cli.main import VERBS, main
from ar_unified.errors import RunError, UserError, about, explain

ROOT = Path(__file__).resolve().parents[2]
ARGV = ["train", "--config", "x.py", "--workdir", "w"]


WORDS = {  # enough for the parser of each verb
    "demo": [],
    "score": ["--data", "d", "--output", "o"],
    "export": ["--output", "o"],
    "import": ["--from", "f", "--as", "chameleon", "--output", "o"],
    "convert-pickle": ["--from", "f", "--output", "o"],
    "plan": ["--config", "x.py", "--target", "v5p:2x2x1"],
    "validate": ["d"],
}


def ends(monkeypatch, error: BaseException, *more: str, argv: Sequence[str] = ARGV) -> int:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(program, "_run", fail)
    return main([*argv, *more])


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_a_mistyped_flag_need_no_jax(verb):
    """`--help` takes only as long as the imports of the parser."""
    code = (
        "import sys; from ar_unified.cli.main import main\n"
        "for words in (['--help'], ['--confg', 'x.py']):\n"
        "    try: main([sys.argv[1], *words])\n"
        "    except SystemExit: pass\n"
        "slow = {'jax', 'flax', 'orbax', 'tensorflow_datasets', 'tensorboardX', 'torch'} & sys.modules.keys()\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])
    found = subprocess.run(
        [sys.executable, "-c", code, verb], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "usage: ar-unified " + verb in found.stdout and "--debug" in found.stdout


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ar-unified 0.")


def test_a_near_miss_of_a_verb_is_suggested(capsys):
    assert main(["evalute"]) == 2
    assert "did you mean 'evaluate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("config.x: expected 1, found 2"), 2, "config.x: expected 1, found 2"),
        (RunError("not finite at step 3"), 3, "not finite at step 3"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.jsonl"), 2, "a.jsonl: No such file"),
        (
            OSError(errno.ENOSPC, "No space left on device", "w/x"),
            3,
            "w/x: No space left on device. Finished work is kept",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"),
            3,
            "No setting of this command needs less",
        ),
        (RuntimeError("INTERNAL: YNNPACK operation failed: error"), 3, "out of memory: INTERNAL: YNNPACK"),
        (MemoryError(), 3, "out of memory: MemoryError"),
        (RuntimeError("Unable to initialize backend 'tpu': no TPU"), 2, "JAX_PLATFORMS=cpu"),
    ],
)
def test_what_a_person_can_mend_is_one_sentence(monkeypatch, capsys, error, status, words):
    monkeypatch.delenv("AR_UNIFIED_DEBUG", raising=False)
    assert ends(monkeypatch, error) == status
    said = capsys.readouterr().err
    assert said.startswith("ar-unified train: ") and words in said and "Traceback" not in said
    assert said.count("\n") == 1


def test_debug_shows_the_traceback_too(monkeypatch, capsys):
    assert ends(monkeypatch, UserError("no"), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_has_a_traceback_and_a_status_of_its_own(monkeypatch, capsys):
    assert ends(monkeypatch, KeyError("offload")) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said and "this is a fault of ar-unified" in said


def test_a_reader_that_goes_ends_the_verb_quietly(tmp_path):
    """The test runs `ar-unified validate DIR | head -1`."""
    (tmp_path / "captions.jsonl").write_text("".join(f'{{"image": "{i}.png", "text": "a"}}\n' for i in range(3000)))
    command = f"{sys.executable} -m ar_unified.cli.main validate {tmp_path} | head -1; echo ${{PIPESTATUS[0]}}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])
    found = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "Traceback" not in found.stderr and "Broken" not in found.stderr, found.stderr
    assert found.stdout.splitlines()[-1] in ("141", "1")  # 1 if everything was written before the reader ended


def test_a_terminal_without_our_letters_is_no_error(tmp_path):
    folder = tmp_path / "Bücher→"
    folder.mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])
    found = subprocess.run(
        [sys.executable, "-m", "ar_unified.cli.main", "validate", str(folder / "none")],
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert found.returncode == 2 and b"B\\xfccher\\u2192" in found.stderr and b"Traceback" not in found.stderr


def test_about_says_where_and_keeps_the_cause():
    with pytest.raises(UserError, match="^config.x: a.bin: Permission denied$") as caught, about("config.x"):
        raise PermissionError(errno.EACCES, "Permission denied", "a.bin")
    assert isinstance(caught.value.__cause__, PermissionError)
    assert explain(ValueError("of a programmer")) is None


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_outside_training_ends_with_a_line_and_its_status(monkeypatch, capsys, name, status):
    def sent(*_: object) -> int:
        os.kill(os.getpid(), getattr(signal, name))
        raise AssertionError("the signal was not heard")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(program, "_run", sent)
    assert main(ARGV) == status
    said = capsys.readouterr().err
    assert "stopped by" in said and "the same command continues" in said and "Traceback" not in said
    assert before == {number: signal.getsignal(number) for number in before}


@pytest.mark.parametrize("verb", [*VERBS, "evaluate --from"])
def test_a_stopped_verb_promises_only_what_is_so(verb, monkeypatch, capsys):
    """Verbs of stages and of lines of JSON continue. Verbs that write one result, whole, start again."""
    argv = [verb, *WORDS.get(verb, ARGV[1:])] if " " not in verb else [*verb.split(), "b", "--output", "o"]
    again = verb in ("import", "export", "convert-pickle", "plan", "validate", "evaluate --from")
    assert ends(monkeypatch, interrupts.Interrupted(signal.SIGINT), argv=argv) == 130
    said = capsys.readouterr().err
    assert "stopped by Ctrl-C. " in said
    assert ("starts from the beginning" in said, "continues" in said, "is kept" in said) == (
        again,
        not again,
        not again,
    )
    assert ends(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "w/x"), argv=argv) == 3
    assert ("is kept" in capsys.readouterr().err) == (not again)


def test_a_warning_is_a_sentence_without_the_line_of_its_source():
    code = (
        "import sys, warnings; from ar_unified.cli import main as program\n"
        "program._run = lambda *_: warnings.warn('xla_foo=1: this compiler has no such option') or 0\n"
        "sys.exit(program.main(sys.argv[1:]))"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])}
    for more, plain in (([], True), (["--debug"], False)):
        found = subprocess.run(
            [sys.executable, "-c", code, *ARGV, *more], env=os.environ | path, capture_output=True, text=True
        )
        line = "ar-unified train: warning: xla_foo=1: this compiler has no such option\n"
        assert (found.returncode, found.stderr == line) == (0, plain), found.stderr
    assert "<string>:2: UserWarning" in found.stderr


def test_a_signal_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with interrupts.raised():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_first_signal_is_noted_and_the_second_raises(capfd):
    with interrupts.noted() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(interrupts.Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert "Ctrl-C: stopping after this step with a checkpoint" in capfd.readouterr().err


def test_after_work_that_ends_at_once_signals_are_handled_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with interrupts.at_once(print):
        assert "signals" in [thread.name for thread in threading.enumerate()]
    assert "signals" not in [thread.name for thread in threading.enumerate()]
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(interrupts.Interrupted), interrupts.raised():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_parser_that_says_what_the_module_says(verb):
    assert parser_of(verb).description


@pytest.mark.parametrize("verb", VERBS)
def test_help_offers_config_keys_only_to_verbs_that_take_them(verb):
    takes = verb not in ("import", "convert-pickle")
    assert ("--config.KEY=VALUE" in parser_of(verb).format_help()) == takes
    if not takes:
        with pytest.raises(UserError, match=r"--config.x=1 does nothing"):
            arguments = parser_of(verb).parse_args(WORDS[verb])
            importlib.import_module(f"ar_unified.cli.{module_of(verb)}").main(arguments, ["--config.x=1"])


def test_words_that_are_wrong_by_themselves_are_refused_at_once(capsys):
    for verb, flag, wrong, expected in [
        ("train", "--profile", "5:5", "FIRST:LAST"),
        ("train", "--profile", "1:2:3", "FIRST:LAST"),
        ("sample", "--part", "16/16", "K/N"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--config", "x.py", "--workdir", "w", flag, wrong])
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    assert parser_of("train").parse_args([*ARGV[1:], "--profile", "100:105"]).profile == (100, 105)


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["validate", "--help"]])
def test_help_says_what_a_verb_leaves(argv, capsys):
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code == 0
    out = capsys.readouterr().out
    assert "workdir" in out and "--config" in out


def test_an_unknown_verb_or_argument_is_refused(capsys):
    assert main(["trian"]) == 2
    assert "expected one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--config", "x.py", "--workdir", "w", "--steps=3"])
    assert "--config.KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_path_of_a_verb_may_begin_with_the_home_folder(verb, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/a/person")
    parser = parser_of(verb)
    named = re.compile("DIR|FILE|WORKDIR|PATH|FOLDER|BUNDLE")
    paths = [action for action in parser._actions if named.match(str(action.metavar))]
    assert paths and all("~" not in str(action.type("~/x")) for action in paths if callable(action.type))
    assert not [action.dest for action in paths if action.type is None]
