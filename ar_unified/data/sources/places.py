"""Finds a value by its place in a record. A place is a column, a path into a column, the number of an element in a
list, or a text made of several values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ar_unified.language.document import DocumentError

_FIELD = re.compile(r"\{([^{}]+)\}")
_CHOICE = re.compile(r"([^{}\[\]]+)\[([^{}\[\]]+)\]")


def look_up(record: Mapping[str, object], place: str, part: str) -> Any:
    """The value at a place in a record. part: the document part for which it is wanted. Raises DocumentError."""
    if place in record:
        return record[place]
    if fields := _FIELD.findall(place):
        values = {field: words(look_up(record, field, part), part) for field in fields}
        return _FIELD.sub(lambda field: values[field[1]], place)
    if choice := _CHOICE.fullmatch(place):
        return chosen(look_up(record, choice[1], part), look_up(record, choice[2], part), part)
    value: Any = record
    for name in place.split("/"):
        try:
            if isinstance(value, Sequence) and not isinstance(value, str | bytes):
                value = value[int(name)] if name.isdigit() else [each[name] for each in value]
            else:
                value = value[name]
        except (KeyError, IndexError, TypeError) as error:
            raise DocumentError("bad_row", f"{part}: expected a value at {place!r}, found no {name!r} there") from error
    return value


def words(value: object, part: str) -> str:
    """A value as a text. Raises DocumentError unless it is a text, a number or a list of these."""
    if isinstance(value, list):
        return "\n".join(words(each, part) for each in value)
    if value is None or isinstance(value, bytes | Mapping):
        raise DocumentError("bad_row", f"{part}: expected a text or a number, found {type(value).__name__}")
    return str(value)


def chosen(options: Any, number: Any, part: str) -> Any:
    """The option with this number. Raises DocumentError."""
    try:
        return options[int(number)]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise DocumentError("bad_row", f"{part}: expected the number of an option, found {number!r:.40}") from error


def ways(place: str, names: Iterable[str]) -> list[str]:
    """The columns, or paths into columns, that a place uses."""
    if place in names:
        return [place]
    if fields := _FIELD.findall(place):
        return [way for field in fields for way in ways(field, names)]
    choice = _CHOICE.fullmatch(place)
    return [choice[1], choice[2]] if choice else [place]
