"""What a verb says on stderr: lines that begin with its name."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ar_unified.interrupts import Interrupted

# These verbs write their result at the end, whole, so a stopped one has kept nothing. All others continue.
_ANEW = ("import", "export", "convert-pickle", "plan", "validate")


def continues(verb: str, arguments: argparse.Namespace) -> bool:
    """Whether a verb that was stopped continues from its finished work when it is started again."""
    return verb not in _ANEW and not (verb == "evaluate" and arguments.source)


def tell(verb: str, message: str) -> None:
    """Prints a line about the verb on stderr."""
    print(f"ar-unified {verb}: {message}", file=sys.stderr, flush=True)


def tell_stop(verb: str, arguments: argparse.Namespace, stop: Interrupted) -> None:
    """Prints which signal stopped the verb, and what the same command will do."""
    kept = "Finished work is kept, and the same command continues from there"
    lost = "Nothing was finished: the same command starts from the beginning"
    tell(verb, f"stopped by {stop.name}. {kept if continues(verb, arguments) else lost}")


@contextmanager
def plain_warnings(verb: str) -> Iterator[None]:
    """A context in which Python's warnings are printed as `tell` does, without the source line that raised them."""

    def plain(message: Warning | str, *_: object, **__: object) -> str:
        return f"ar-unified {verb}: warning: {message}\n"

    before, warnings.formatwarning = warnings.formatwarning, plain
    try:
        yield
    finally:
        warnings.formatwarning = before
