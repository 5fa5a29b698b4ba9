"""Collects the problems of a config, so that all of them can be reported at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ar_unified.errors import UserError, several


class Problems:
    """The problems found so far, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def of(self, section: str, names: Collection[str] = ()) -> Iterator[None]:
        """A context that notes a ValueError, TypeError or OSError as a problem of a section of the config.

        `names` are the section's keys; a message that begins with one of them is about that key.
        """
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            self.add(section, str(error), names)

    def add(self, section: str, message: str, names: Collection[str] = ()) -> None:
        """Notes a message about a section, or about one of its keys if the message begins with that key."""
        if not message.startswith("config."):
            # "b2: ...", "objective: ema ...", "model.remat: ..."
            begins = (message, re.sub(r"^\w+[:.] ?", "", message))
            about = [words for words in begins if re.split(r"\W", words)[0] in names]
            key = ".".join(filter(None, ["config", section]))
            message = f"{key}.{about[0]}" if about else f"{key}: {message}"
        if message not in self.lines:
            self.lines.append(message)

    def say(self, key: str, message: str) -> None:
        """Notes a message about a key."""
        self.lines.append(f"config.{key}: {message}")

    def found_in(self, *sections: str) -> bool:
        """Whether a key of one of these sections is wrong already, so that its consequences need not be reported."""
        return any(line.startswith(f"config.{section}") for line in self.lines for section in sections)

    def end(self) -> None:
        """Raises UserError with all noted problems, if there are any."""
        if self.lines:
            raise UserError(several(self.lines))
