"""Errors that a person can fix, each explained in one sentence, and the exit status of the process for each outcome.

    0    success
    1    the command's answer is no: `plan` found too little memory, `validate` found bad items
    2    an input cannot be used: the arguments, the config, data, files or the workdir. Fix it and start again
    3    a run had to stop: out of memory, numbers that are not finite, a full disk or a lost process. Its work is kept
    70   any other error: a bug of ours, shown with its traceback
    129, 130, 143   stopped by SIGHUP, Ctrl-C or SIGTERM; a training has saved a checkpoint

Modules raise these errors (or ValueError, for a mistake that only a programmer can make). Only `ar_unified.cli.main`
prints them and ends the process.
"""

from __future__ import annotations

import difflib
import errno
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

NO, UNUSABLE, STOPPED, FAULT = 1, 2, 3, 70
MORE_MEMORY = "No setting of this command needs less memory: use a machine with more"

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EFBIG}
# What XLA and its libraries say when an allocation fails. YNNPACK, which computes convolutions on CPUs, says no more.
_NO_MEMORY = (
    "RESOURCE_EXHAUSTED|out of memory|bad_alloc|failed to allocate|ALLOC_FAILED|YNNPACK operation failed: error"
)
_OUT_OF_MEMORY = re.compile(_NO_MEMORY, re.IGNORECASE)
_NO_BACKEND = re.compile(r"Unable to initialize backend|Unknown backend")


class UserError(ValueError):
    """An input cannot be used. The message says where, what was expected, what was found, and what to do."""

    exit_status = UNUSABLE


class RunError(RuntimeError):
    """A run had to stop. The message says what happened, what is kept, and how to continue."""

    exit_status = STOPPED


@contextmanager
def about(where: str) -> Iterator[None]:
    """A context that turns a ValueError or OSError into a UserError whose message begins with `where`.

    `where` names what the user gave, such as a config key or a file. The code inside the context checks the value and
    need not know that name.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: {in_words(error) if isinstance(error, OSError) else error}") from error


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of a message that refuses `word`, such as "; did you mean 'adamw'?"; it is "" if no choice is similar."""
    found = difflib.get_close_matches(str(word), list(choices), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def outside(settings: Any, **intervals: str) -> list[str]:
    """The problems of a dataclass or config: one message for each field with a value outside its interval.

    Each message is one line and begins with the field's name.

    Args:
        settings: the dataclass or config.
        intervals: the interval of each field that is checked, by the field's name, such as "[0, 1)".
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


def explain(error: BaseException, *, continues: bool = True) -> tuple[str, int] | None:
    """The message for the user about an error, and the exit status. Returns None if the error is a bug of ours, which
    is then shown with its traceback.

    continues: whether the work is one that continues from its finished part when it is started again.
    """
    if isinstance(error, UserError | RunError):
        return str(error), error.exit_status
    if out_of_memory(error):
        return f"out of memory: {_first_line(error)}. {MORE_MEMORY}", STOPPED
    if isinstance(error, OSError):
        stopped = error.errno in _DISK
        kept = "Finished work is kept: free" if continues else "Free"
        more = f". {kept} some space and run the same command again" if stopped else ""
        return in_words(error) + more, STOPPED if stopped else UNUSABLE
    if isinstance(error, RuntimeError) and _NO_BACKEND.search(str(error)):
        return f"JAX: {_first_line(error)}; set JAX_PLATFORMS=cpu to run without an accelerator", UNUSABLE
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device was not enough."""
    if isinstance(error, RunError):  # already explained
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


@contextmanager
def saving_memory(advice: Callable[[], str]) -> Iterator[None]:
    """A context that turns an error which is `out_of_memory` into a RunError. `advice` says what needs less memory, in
    the work inside the context; if it is "", the error stays as it is. Of nested contexts, the innermost decides."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error) or not (told := advice()):
            raise
        raise RunError(f"out of memory: {_first_line(error)}. {told}") from error


def in_words(error: OSError) -> str:
    """The file and the reason, such as "data/a.jsonl: No such file or directory"."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*names[:1], error.strerror or str(error) or type(error).__name__])


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300].rstrip(" .")
