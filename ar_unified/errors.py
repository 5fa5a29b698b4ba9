"""What a person can mend, said in one sentence, and the exit status that each kind of ending has.

    0    done
    1    the verb's answer is no: `plan` found no room, `validate` found bad items
    2    something given cannot be used: the call, the config, data, files, the workdir. Mend it and start again
    3    a run stopped by itself: not finite, diverged, a full disk, a lost process. What is done stays
    70   none of these: a fault of ours, with its traceback
    129, 130, 143   stopped by SIGHUP, Ctrl-C, SIGTERM; in training with a checkpoint

Modules raise these errors, or ValueError where only a programmer can be at fault; `ar_unified.cli.main` alone prints
them and ends the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

NO, UNUSABLE, STOPPED, FAULT = 1, 2, 3, 70


class UserError(ValueError):
    """Something given cannot be used. The message: where, what was expected, what came, and what to do."""

    exit_status = UNUSABLE


class RunError(RuntimeError):
    """A run that stopped by itself. The message: what happened, what is kept, and how to go on."""

    exit_status = STOPPED


@contextmanager
def about(where: str) -> Iterator[None]:
    """Turns a ValueError or OSError from inside into a UserError whose message begins with `where`.

    For what a person gave (a config key, a file) and a module checks that knows neither people nor configs.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: {error}") from error
