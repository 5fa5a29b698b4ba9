"""`ar-unified VERB --config FILE[:arg] --workdir DIR [--config.key=value ...]`"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from ar_unified import interrupts
from ar_unified.cli.arguments import module_of, parser_of
from ar_unified.cli.telling import continues, plain_warnings, tell, tell_stop
from ar_unified.errors import FAULT, UNUSABLE, explain, nearest
from ar_unified.version import version

VERBS = {
    "demo": "run the experiment that comes with the package: everything on its embedded data, in 12 to 25 minutes",
    "run": "every stage of an experiment in order: tokenizer, prepare, train, sample, evaluate",
    "tokenizer": "train the text and the image tokenizer",
    "prepare": "turn the experiment's documents into token shards",
    "train": "train the transformer on the shards",
    "sample": "write interleaved documents for the prompts of a JSONL file",
    "score": "write how likely the model finds given documents, answers or preference pairs",
    "evaluate": "score the model of a workdir or a bundle on held-out documents; write evaluation.json and report.html",
    "import": "make a bundle from a published model's files: Chameleon, Emu3, LWM, Llama, Qwen, Gemma and others",
    "export": "write the trained model as one folder, which ar_unified.load opens and a training can begin with",
    "convert-pickle": "make .safetensors files from pickled checkpoints (.pth, .pt, .ckpt), running nothing in them",
    "plan": "compile the training or sampling for a TPU slice or GPUs that are not here: memory, traffic, time",
    "validate": "check a dataset folder or a config and print what is in it, bad items by file and line",
}
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as for any command when nobody reads its output any longer


def _overview() -> str:
    lines = [f"  {verb:<14} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: ar-unified VERB --config FILE[:arg] --workdir DIR [--config.KEY=VALUE ...]",
            "       ar-unified VERB --help",
            "       ar-unified --version",
            "",
            "Train and sample autoregressive image+text models.",
            "",
            *lines,
            "",
            "`ar-unified VERB --help` says what a verb reads, what it writes, and its options. FILE is an experiment",
            "in Python, or the name of one of the package: shapes (as in demo), folder:path=DIR (your own data).",
            "import, convert-pickle and bundles (--from) need none. On many hosts, give the same command on each.",
            "A verb that was killed can be started again. A verb that works in a workdir skips what is finished",
            "and continues; import, export, convert-pickle, plan and validate start from the beginning.",
            "",
            "Exit status: 0 done; 1 a plan does not fit, or data are bad (validate); 2 an input is not usable; 3 a run",
            "stopped by itself; 70 an error of ar-unified, with a traceback; 129, 130, 143 by SIGHUP, Ctrl-C, SIGTERM.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the process's exit status (ar_unified.errors says what each means).

    Raises SystemExit when argparse ends the process: for --help, and for an argument that is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # prints the number of a character that the terminal lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else UNUSABLE
    if argv[0] == "--version":
        print(f"ar-unified {version()}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        expected = f"expected one of {', '.join(VERBS)}{nearest(verb, VERBS)}"
        print(f"ar-unified: unknown verb {verb!r}; {expected}", file=sys.stderr)
        return UNUSABLE
    parser = parser_of(verb)
    arguments, overrides = parser.parse_known_args(rest)
    if stray := [word for word in overrides if not (word.startswith("--config.") and "=" in word)]:
        parser.error(f"unknown arguments {' '.join(stray)} (a config key is changed by --config.KEY=VALUE)")
    debug = arguments.debug or bool(os.environ.get("AR_UNIFIED_DEBUG"))
    try:
        with interrupts.raised(), contextlib.nullcontext() if debug else plain_warnings(verb):
            return _run(verb, arguments, overrides)
    except interrupts.Interrupted as stop:
        if not isinstance(stop, interrupts.Preempted):  # `Preempted` was already reported
            tell_stop(verb, arguments, stop)
        return int(stop.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end
        return _BROKEN_PIPE
    except Exception as error:
        explained = explain(error, continues=continues(verb, arguments))
        if explained is None or debug:
            traceback.print_exc()
        if explained is None:
            tell(verb, "this is a fault of ar-unified, not of yours: please report it with the lines above")
            return FAULT
        tell(verb, explained[0])
        return explained[1]


def _run(verb: str, arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    _quiet_libraries()
    from ar_unified.parallel import runtime  # imports JAX, which --help does not need

    module = importlib.import_module(f"ar_unified.cli.{module_of(verb)}")
    with runtime.ending(), _workdir(arguments):
        status = int(module.main(arguments, overrides) or 0)
        sys.stdout.flush()  # so that a closed pipe raises here, not when Python ends
        return status


@contextlib.contextmanager
def _workdir(arguments: argparse.Namespace) -> Iterator[None]:
    """A context for a verb: a workdir in an object store becomes a local folder, and any other path that is a URL is
    refused.
    """
    from ar_unified import storage, workdir

    for name, value in vars(arguments).items():
        if name not in ("workdir", "data", "config"):
            for path in value if isinstance(value, list) else [value]:
                storage.refuse(path if isinstance(path, str) else None, f"--{name.replace('_', '-')}")
    if getattr(arguments, "workdir", None) is None:
        yield
        return
    with workdir.opened(arguments.workdir) as here:
        arguments.workdir = str(here)
        yield


def _quiet_libraries() -> None:
    """Makes the libraries log only warnings and errors, so that our own lines are visible."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from absl import logging

    logging.set_verbosity(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
