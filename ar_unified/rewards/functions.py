"""A Python function (prompt, answer) -> number as a reward. Its errors are reported, and its time is limited.

The function runs on its own thread. If it hangs, it cannot be stopped. Its thread is then abandoned and ends with the
process, and the next answers get another thread.
"""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Callable, Sequence

from ar_unified.errors import UserError, nearest
from ar_unified.language.document import Document
from ar_unified.rewards.reward import Failure, Reward, Verdict, verdict

Function = Callable[[Document, Document], object]


def named(module: str, name: str) -> Function:
    """The function with the name "module:name". Raises UserError if there is none.

    The module is imported, which runs its code. So a config can run code, just as a command line can.
    """
    where = f"{module}:{name}"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{where}: {error}; Python searches for modules in its path (see PYTHONPATH)") from error
    except Exception as error:
        raise UserError(f"{where}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise UserError(f"{where}: {module} has no function of that name{nearest(name, dir(found))}")
    return function


def guarded(function: Function, timeout: float) -> Reward:
    """The function as a reward. It is called for one answer at a time, and each call may take `timeout` seconds."""

    def reward(prompts: Sequence[Document], answers: Sequence[Document]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        pairs = list(zip(prompts, answers, strict=True))
        while len(verdicts) < len(pairs):  # starts a new thread after each answer that hangs
            said: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
            left = pairs[len(verdicts) :]
            threading.Thread(target=_ask, args=(function, left, said), name="reward", daemon=True).start()
            for _ in left:
                try:
                    verdicts.append(said.get(timeout=timeout))
                except queue.Empty:
                    verdicts.append(Failure(f"the function returned nothing within {timeout:g} s"))
                    break
        return verdicts

    return reward


def _ask(function: Function, pairs: Sequence[tuple[Document, Document]], said: queue.SimpleQueue[Verdict]) -> None:
    for prompt, answer in pairs:
        try:
            found = verdict(function(prompt, answer))
        except Exception as error:
            found = Failure(f"{type(error).__name__}: {error}")
        said.put(found)
