"""Errors that a person can mend, each told in one sentence, and the exit status of each kind of ending.

    0    done
    1    the verb's answer is no: `plan` found no room, `validate` found bad items
    2    something given cannot be used: the call, the config, data, files, the workdir. Mend it and start again
    3    a run stopped by itself: out of memory, not finite, a full disk, a lost process. What is done stays
    70   none of these: a fault of ours, with its traceback
    129, 130, 143   stopped by SIGHUP, Ctrl-C, SIGTERM; in training with a checkpoint

Modules raise these errors, or ValueError where only a programmer can be at fault; `ar_unified.cli.main` alone prints
them and ends the process.
"""

from __future__ import annotations

import difflib
import errno
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

NO, UNUSABLE, STOPPED, FAULT = 1, 2, 3, 70

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EFBIG}
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Out of memory", re.IGNORECASE)
_NO_BACKEND = re.compile(r"Unable to initialize backend|Unknown backend")


class UserError(ValueError):
    """Something given cannot be used. The message: where, what was expected, what came, and what to do."""

    exit_status = UNUSABLE


class RunError(RuntimeError):
    """A run that stopped by itself. The message: what happened, what is kept, and how to go on."""

    exit_status = STOPPED


@contextmanager
def about(where: str) -> Iterator[None]:
    """Turns a ValueError or OSError from inside into a UserError whose message begins with `where`.

    It is for values that a person gave (a config key, a file) and that are checked by a module which knows no configs.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: {in_words(error) if isinstance(error, OSError) else error}") from error


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of a message that refuses `word`: "; did you mean 'adamw'?", or "" if no choice is near."""
    found = difflib.get_close_matches(str(word), list(choices), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def outside(settings: Any, **intervals: str) -> list[str]:
    """A message for each of these fields of a dataclass or config whose value is outside its interval, such as "[0,
    1)".

    Each message is one line and begins with the field's name.
    """
    problems = []
    for name, interval in intervals.items():
        value, (least, most) = getattr(settings, name), map(float, interval[1:-1].split(","))
        above = least <= value if interval[0] == "[" else least < value
        below = value <= most if interval[-1] == "]" else value < most
        if not (above and below):
            whole = f"at least {least:g}" if interval[0] == "[" else f"more than {least:g}"
            expected = whole if most == math.inf else f"a number in {interval}"
            problems.append(f"{name}: expected {expected}, found {value}")
    return problems


def several(problems: Sequence[str]) -> str:
    """All problems as one message; if there are several, each has its own line."""
    return "\n  ".join([f"{len(problems)} problems:", *problems]) if len(problems) > 1 else problems[0]


def explain(error: BaseException) -> tuple[str, int] | None:
    """What to tell a person about an error, and the exit status; None for a fault of ours, which needs its
    traceback."""
    if isinstance(error, UserError | RunError):
        return str(error), error.exit_status
    if isinstance(error, OSError):
        stopped = error.errno in _DISK
        more = ". What is done stays; free some space, and the same command goes on from there" if stopped else ""
        return in_words(error) + more, STOPPED if stopped else UNUSABLE
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        return (
            f"out of memory: {_first_line(error)}. Try model.remat=full, a smaller loss.chunk or sampling.batch_size, "
            "or more training.accumulation: they do not change results, and the same command with them continues",
            STOPPED,
        )
    if isinstance(error, RuntimeError) and _NO_BACKEND.search(str(error)):
        return f"JAX: {_first_line(error)}; JAX_PLATFORMS=cpu runs without an accelerator", UNUSABLE
    return None


def in_words(error: OSError) -> str:
    """ "data/a.jsonl: No such file or directory" """
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*names[:1], error.strerror or str(error) or type(error).__name__])


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300].rstrip(" .")
