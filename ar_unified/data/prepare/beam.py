"""Makes shards in an Apache Beam pipeline (Dataflow, Flink, Spark). It runs on many hosts without accelerators. These
hosts need not start together as one job.

A shard depends on nothing but its items, so the elements of the pipeline are names of shards. A shard that is made
twice, because the runner tried again, has the same bytes.
"""

from __future__ import annotations

import functools
import importlib
import shlex
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ar_unified.errors import RunError, UserError

Opener = Callable[[], Callable[[str], object]]
_one_at_a_time = threading.Lock()  # one shard at a time in this process, because its shards share one image tokenizer


def run(names: Sequence[str], opener: Opener, options: str) -> None:
    """Runs a pipeline. At least once with each of `names`, a worker calls the function that `opener` returns. Returns
    when the pipeline ends.

    Args:
        opener: returns the function. `opener` must be hashable, and is sent to the workers as a pickle. Each process
            of a worker calls `opener` once.
        options: Beam's options, as on its command line, such as "--runner=FlinkRunner --flink_master=...".

    Raises:
        UserError: if Beam is not installed, or cannot use the options.
        RunError: if the pipeline fails; the message ends with the last line of a worker.
    """
    try:
        beam: Any = importlib.import_module("apache_beam")
        settings: Any = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
        raise UserError(f"--beam needs Apache Beam ({error}): pip install 'ar_unified[beam]'") from error
    try:
        pipeline = beam.Pipeline(options=settings.PipelineOptions(shlex.split(options)))
    except (ValueError, ImportError, SystemExit) as error:  # argparse raises SystemExit after it has printed why
        raise UserError(f"--beam {options!r}: Apache Beam cannot use these options: {error}") from error
    # Without `Reshuffle` a runner may join the steps into one, and a single worker would do all the work.
    pipeline | beam.Create(list(names)) | beam.Reshuffle() | beam.Map(functools.partial(_make, opener))
    try:
        pipeline.run().wait_until_finish()
    except (UserError, RunError):
        raise
    except Exception as error:  # each runner has its own class of error; the message is a worker's traceback
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RunError(
            "the pipeline failed. Finished shards are kept, and the same command makes the others. The last line of a "
            f"worker is: {said[-1]}"
        ) from error


def _make(opener: Opener, name: str) -> str:
    with _one_at_a_time:
        _opened(opener)(name)
    return name


_opened = functools.cache(lambda opener: opener())
