"""The arguments of every verb. They have their own module so that `VERB --help` and an error in a flag do not import
JAX."""

from __future__ import annotations

import argparse
import ast
import keyword
import re
from collections.abc import Callable
from pathlib import Path

from ar_unified.errors import UserError
from ar_unified.paths import experiment_file, home
from ar_unified.planning import CANDIDATES, JOBS

PROCESSES = ("coordinator", "processes", "process")


def module_of(verb: str) -> str:
    """The name of a verb's module in this folder: the verb's name, or the nearest name that Python allows."""
    name = verb.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb; its description is the docstring of the verb's module, read without importing it."""
    source = Path(__file__).with_name(f"{module_of(verb)}.py").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser(
        prog=f"ar-unified {verb}",
        description=ast.get_docstring(ast.parse(source)),
        epilog="Any --config.KEY=VALUE changes one key, as in --config.training.steps=100.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _VERBS[verb](parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (or AR_UNIFIED_DEBUG=1)")
    return parser


def refuse_unread(arguments: argparse.Namespace, when: str, *names: str) -> None:
    """Raises UserError for the first of these arguments that was given. `when` says, in words, in which case the
    arguments have no effect.
    """
    for name in names:
        if getattr(arguments, name) not in (None, False, ""):
            raise UserError(f"--{name.replace('_', '-')} does nothing {when}: leave it out")


def require_workdir(arguments: argparse.Namespace) -> None:
    """Raises UserError unless a workdir was given to a verb that was given no bundle."""
    if not arguments.workdir:
        raise UserError("expected --workdir DIR of a training, or --from BUNDLE; found neither")


def _experiment(parser: argparse.ArgumentParser, reads: bool = False) -> None:
    """Adds --config, --workdir, and the options by which several processes find each other.

    `reads`: whether the verb only reads a model, so that a bundle may replace both, or a workdir's own config --config.
    """
    parser.add_argument(
        "--config",
        required=not reads,
        type=_config,
        metavar="FILE[:arg]",
        help="the experiment file, or the name of one of the package, such as shapes; `:arg` is handed to it, as in "
        "experiments/folder.py:path=DIR"
        + ("; default: the config with which the workdir was last started" if reads else ""),
    )
    parser.add_argument(
        "--workdir", required=not reads, type=_path, metavar="DIR", help="where stages write their results"
    )
    _many_processes(parser)


def _model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a workdir, and --from for a bundle."""
    _experiment(parser, reads=True)
    parser.add_argument(
        "--from", dest="source", type=_path, metavar="BUNDLE", help="a bundle, instead of a workdir's model"
    )


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir",
        type=_path,
        metavar="DIR",
        default="workdirs/shapes",
        help="where the results are written (%(default)s)",
    )
    parser.set_defaults(config=_config("shapes"))
    _many_processes(parser)


def _many_processes(parser: argparse.ArgumentParser) -> None:
    many = parser.add_argument_group(
        "many processes",
        "Give the same command on every host. SLURM, Open MPI, GKE and TPU VMs number the processes. Elsewhere give:",
    )
    many.add_argument("--coordinator", metavar="HOST:PORT", help="the address of process 0, the same for all")
    many.add_argument("--processes", type=int, metavar="N", help="the number of processes (1 means only this one)")
    many.add_argument("--process", type=int, metavar="I", help="the index of this process, from 0")
    many.add_argument(
        "--start-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait until all have started (300)",
    )
    many.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="how long until the others stop after one has died or hangs (100)",
    )


def _tokenizer(parser: argparse.ArgumentParser) -> None:
    _experiment(parser)
    parser.add_argument("--only", choices=("text", "image"), help="train only one of the two tokenizers (both)")


def _prepare(parser: argparse.ArgumentParser) -> None:
    _experiment(parser)
    parser.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="let an Apache Beam pipeline make the shards; OPTIONS are Beam's, in one word: "
        '--beam="--runner=FlinkRunner --flink_master=HOST:8081"',
    )


def _train(parser: argparse.ArgumentParser) -> None:
    _experiment(parser)
    parser.add_argument(
        "--branch",
        metavar="WORKDIR[:STEP]",
        type=_branch,
        help="begin with another workdir's tokenizers, data and checkpoint (its last, if no STEP is given); that "
        "workdir is not changed",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        type=_window,
        help="write a trace of the steps from FIRST to LAST into model/profile, as in 100:105 (for xprof or Perfetto)",
    )


def _sample(parser: argparse.ArgumentParser) -> None:
    from ar_unified.sampling.benchmark_folders import (
        BENCHMARKS,  # imports NumPy and Pillow, so the --help of other verbs does not wait for them
    )

    _model(parser)
    parser.add_argument("--batch-size", type=_count, metavar="N", help="with --from: samples drawn at once (64)")
    parser.add_argument(
        "--max-length",
        type=_count,
        metavar="N",
        help="with --from: maximum tokens of a prompt and its answer (default: the bundle's)",
    )
    parser.add_argument(
        "--requests",
        metavar="FILE",
        nargs="+",
        type=_path,
        help="files of requests; default: prompts from the held-out documents",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=_path,
        help="default: samples/NAME in the workdir, with the NAME of the first FILE",
    )
    parser.add_argument(
        "--part", metavar="K/N", type=_part, help="serve part K of N, counted from 0; default: this process's part"
    )
    parser.add_argument("--links", action="store_true", help="follow links that lead out of the requests' folder")
    parser.add_argument(
        "--adapter",
        metavar="NAME=FOLDER",
        nargs="+",
        type=_named,
        help='LoRA adapters in PEFT\'s form; a request says "adapter": NAME, or all use the only one',
    )
    parser.add_argument("--layout", choices=BENCHMARKS, help="also write the images in the form that a benchmark reads")
    parser.add_argument("--n", type=_count, metavar="N", help="samples for each request that gives no number (1)")
    parser.add_argument(
        "--keep-best",
        metavar="REWARD",
        help="choose the best sample of each request, and write pairs of a better and a worse one",
    )


def _score(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=_path,
        metavar="PATH",
        help="a file or folder of documents, as `validate` takes it",
    )
    parser.add_argument(
        "--output", required=True, type=_path, metavar="FILE", help="JSONL; an existing file is not overwritten"
    )
    parser.add_argument("--links", action="store_true", help="follow links that lead out of the data's folder")
    parser.add_argument("--batch-size", type=int, metavar="N", help="with --from: documents that are read at once (8)")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--data",
        type=_path,
        metavar="PATH",
        help="with --from: a file or folder of documents, as `validate` takes it, instead of those of --config",
    )
    parser.add_argument(
        "--output",
        type=_path,
        metavar="FOLDER",
        help="with --from: where the results are written; an existing folder is not overwritten",
    )
    parser.add_argument("--only", choices=["tokenizer"], help="score the image tokenizer and stop; no model is needed")
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=_path,
        help="with --only tokenizer: score it on the image files under DIR, writing tokenizer_evaluation/<DIR>-<crop>",
    )
    parser.add_argument(
        "--links", action="store_true", help="with --images or --data: follow links that lead out of that folder"
    )
    parser.add_argument(
        "--crop", type=int, metavar="PIXELS", help="with --images: side of the square crops (config.data.image_size)"
    )


def _export(parser: argparse.ArgumentParser) -> None:
    from ar_unified.interop import ADAPTER, BESIDE, DIALECTS, FORMS

    _experiment(parser, reads=True)
    parser.add_argument(
        "--from",
        dest="source",
        type=_path,
        metavar="FOLDER",
        help="the bundle or image tokenizer to export, instead of a workdir's model",
    )
    parser.add_argument(
        "--to",
        choices=tuple(dict.fromkeys((*FORMS, ADAPTER, BESIDE, *DIALECTS))),
        help=f"what to write. After LoRA training: {ADAPTER} (the adapter) or {BESIDE} (the model that the adapter "
        f"needs). For a bundle: its form, {', '.join(FORMS)} (default: hf). For an image tokenizer: the naming of its "
        f"weights, {', '.join(DIALECTS)} (default: as imported)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        type=_path,
        help="where the result is written; an existing folder is not overwritten",
    )
    parser.add_argument("--license", default="", metavar="WORDS", help="the licence for the model card (unknown)")
    parser.add_argument("--shard-mib", type=int, metavar="MIB", help="the largest size of a weight file (2048)")


def _import(parser: argparse.ArgumentParser) -> None:
    from ar_unified.interop import IMAGE_SYSTEMS, SYSTEMS

    parser.add_argument(
        "--from",
        required=True,
        dest="source",
        type=_path,
        metavar="PATH",
        help="the folder of the weights, or their file",
    )
    parser.add_argument(
        "--as",
        required=True,
        dest="system",
        choices=(*SYSTEMS, *IMAGE_SYSTEMS),
        metavar="SYSTEM",
        help=f"the system of the weights: {', '.join(SYSTEMS)}; of image tokenizers: {', '.join(IMAGE_SYSTEMS)}",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=_path,
        metavar="FOLDER",
        help="where the bundle or image tokenizer is written; an existing folder is not overwritten",
    )
    parser.add_argument("--text", type=_path, metavar="PATH", help="the text tokenizer, if it is in another place")
    parser.add_argument(
        "--image", type=_path, metavar="PATH", help="the image tokenizer's weights, if they are in another place"
    )
    parser.add_argument("--rope-theta", type=float, help="RoPE's base, for systems whose files do not give it (LWM)")
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="largest image in codes, for systems whose images have many sizes"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="convert to this dtype (default: as published)"
    )
    parser.add_argument("--license", default="", metavar="WORDS", help="the licence for the model card (unknown)")
    parser.add_argument(
        "--shard-mib", type=int, default=2048, metavar="MIB", help="the largest size of a weight file (%(default)s)"
    )


def _convert_pickle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FILE_OR_FOLDER",
        type=_path,
        help="a pickled file, or a folder of them",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        type=_path,
        help="the new folder; an existing one is not overwritten",
    )


def _validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", nargs="?", metavar="DATA", type=_path,
        help="a dataset folder, a JSONL or text file, a prepared folder, or sources as JSON",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE[:arg]", type=_config, help="check an experiment instead")
    parser.add_argument("--workdir", metavar="DIR", type=_path, help="where the experiment's tokenizers are")
    parser.add_argument("--links", action="store_true", help="follow links that lead out of a folder")
    parser.add_argument("--first", type=int, metavar="N", help="check only the first N items of each source (all)")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="documents of each source to show (3)")
    parser.add_argument(
        "--output", metavar="FILE", type=_path, help="where the page is written (.cache/validate/NAME.html)"
    )


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:arg]", type=_config, help="the experiment file")
    parser.add_argument(
        "--target",
        required=True,
        help="v4, v5e, v5p, v6e or tpu7x and the shape of a slice, such as v5p:4x4x4 or v6e:16x16,slices=2; or h200:8",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=_path,
        help="the workdir of the run: its tokenizers give the size of the vocabulary; nothing is written there",
    )
    parser.add_argument(
        "--job", choices=JOBS, default="train", help="what to plan; sample: prefill and decode (%(default)s)"
    )
    parser.add_argument("--output", metavar="DIR", type=_path, help="also write plan.json and index.html there")
    parser.add_argument(
        "--search", metavar="N", type=int, nargs="?", const=CANDIDATES,
        help="compile N (%(const)s) choices of remat policy, rows per chip and fsdp, and plan the best",
    )  # fmt: skip
    parser.add_argument(
        "--no-advice",
        action="store_true",
        help="if the plan does not fit, do not search for changes with which it fits",
    )


def _path(text: str) -> str:
    try:
        return home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _config(text: str) -> str:
    try:
        return experiment_file(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, found {text!r}")
    return int(text)


def _window(text: str) -> tuple[int, int]:
    """ "100:105" -> (100, 105): the trace begins after 100 steps and ends after 105."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST in steps, as in 100:105, found {text!r}")
    return int(match[1]), int(match[2])


def _branch(text: str) -> tuple[Path, int | None]:
    """Reads WORKDIR or WORKDIR:STEP."""
    path, colon, step = _path(text).rpartition(":")
    if colon and step.isdecimal():
        return Path(path), int(step)
    if not text:
        raise argparse.ArgumentTypeError("expected WORKDIR or WORKDIR:STEP, found nothing")
    return Path(_path(text)), None


def _named(text: str) -> tuple[str, str]:
    """Reads NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    if not name or not equals or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, found {text!r}")
    return name, _path(folder)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in codes, as in 90x90, found {text!r}")
    return int(match[1]), int(match[2])


def _part(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"expected K/N with 0 <= K < N, as in 3/16, found {text!r}")
    return int(k), int(n)


_VERBS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "demo": _demo,
    "run": _experiment,
    "tokenizer": _tokenizer,
    "prepare": _prepare,
    "train": _train,
    "sample": _sample,
    "score": _score,
    "evaluate": _evaluate,
    "import": _import,
    "export": _export,
    "convert-pickle": _convert_pickle,
    "plan": _plan,
    "validate": _validate,
}
