"""Reads rows from tables of prompts: CSV, TSV and Parquet files with a column named prompt, caption or text.

The first line of a CSV or TSV file names the columns. A TSV cell is the text between two tabs, because PartiPrompts.tsv
has prompts that contain a quotation mark. If a whole cell is in quotes and has doubled quotes inside, it is unquoted as
in CSV. If cells span lines, the file is read like CSV. Columns with the names of settings are settings, and all other
columns are kept in `meta`. An empty cell counts as absent.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ar_unified.manifests import Json
from ar_unified.sampling.columns import ROW, SETTINGS
from ar_unified.sampling.request import RequestError

PROMPTS = ("prompt", "caption", "text", "prompts", "captions")  # the first of these in a table is used
_TEXTS = {"prompt", "id", *(key for key, types in SETTINGS.items() if types == (str,))}
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"', re.DOTALL)

Read = Callable[[], Mapping[str, Json]]


def delimited(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Read]]:
    """The rows of a CSV or TSV file, numbered from 1 after its header.

    lines: the lines of the file, with line ends. Raises RequestError if there is no column of prompts, or a cell is cut
    off.
    """
    lines = iter(lines)
    first = next(lines, "")
    tabs = path.suffix.lower() != ".csv" or ("\t" in first and "," not in first)
    # Some spreadsheets write semicolons between cells.
    delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
    records = _tabs([first, *lines]) if tabs else csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    try:
        names = _names(path, next(records, []))
        number = 0
        for cells in records:
            if any(cell.strip() for cell in cells):
                number += 1
                yield number, partial(_row, names, cells)
    except csv.Error as error:
        raise RequestError(f"{path}: expected a CSV file: {error}") from None


def parquet(path: Path, leave: Callable[[str], None]) -> Iterator[tuple[int, Read]]:
    """The rows of a Parquet file, numbered from 1. Columns of bytes are left out, and `leave` is called for each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    open(path, "rb").close()  # so that a missing file raises OSError, not RequestError
    try:
        with pq.ParquetFile(path) as file:
            fields = list(file.schema_arrow)
            plain = [field.name for field in fields if not _binary(pa, field.type)]
            for field in fields:
                if field.name not in plain:
                    leave(f"column {field.name}")
            names = _names(path, plain)
            number = 0
            for batch in file.iter_batches(columns=plain):
                for values in batch.to_pylist():
                    number += 1
                    yield number, partial(_typed_row, names, [values[name] for name in plain])
    except pa.ArrowException as error:
        raise RequestError(f"{path}: expected a Parquet file: {error}") from None


def header(line: str) -> bool:
    """Whether the first line of a text file is a table's header, such as "Prompt" or "prompt<tab>category"."""
    names = [cell.strip().strip('"').casefold() for cell in line.split("\t")]
    return len(set(names)) == len(names) and any(name in PROMPTS and name != "text" for name in names)


def _tabs(lines: Sequence[str]) -> Iterator[list[str]]:
    width = lines[0].count("\t") + 1
    if any(line.strip() and line.count("\t") + 1 != width for line in lines):
        try:
            records = list(csv.reader(lines, delimiter="\t", strict=True))
        except csv.Error:
            records = [[]]
        if all(len(cells) in (0, width) for cells in records[1:]) and len(records) > 1:
            yield from records
            return
    for line in lines:
        cells = line.rstrip("\r\n").split("\t")
        yield [cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell for cell in cells]


def _names(path: Path, header: Sequence[str]) -> list[str]:
    """The keys of a table's columns: settings in our spelling, and "prompt" for the column of prompts."""
    plain = [name.strip() for name in header]
    lower = [name.casefold() for name in plain]
    found = next((lower.index(name) for name in PROMPTS if name in lower), None)
    if found is None:
        shown = ", ".join(plain)
        raise RequestError(
            f"{path}: expected a first line that names the columns, one of them {', '.join(PROMPTS[:3])}; "
            f"found {shown!r:.120}. If each line is a prompt, the file's name must end in .txt"
        )
    names = [low if low in ROW else name for low, name in zip(lower, plain, strict=True)]
    names[found] = "prompt"
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise RequestError(f"{path}: expected columns of different names, found {twice[0]!r:.80} twice")
    return names


def _row(names: Sequence[str], cells: Sequence[str]) -> dict[str, Json]:
    if len(cells) > len(names):
        raise RequestError(f"expected {len(names)} cells like the first line, found {len(cells)}: {cells!r:.120}")
    return {name: _cell(name, cell) for name, cell in zip(names, cells, strict=False) if name and _says(name, cell)}


def _says(name: str, cell: str) -> bool:
    return bool(cell.strip()) or name == "prompt"


def _cell(name: str, cell: str) -> Any:
    """The value of a cell: a number or a list if the column is a setting of that kind; else the text."""
    if name in _TEXTS or name not in ROW:
        return cell.strip()
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except (ValueError, RecursionError):
        return cell


def _typed_row(names: Sequence[str], values: Sequence[Any]) -> dict[str, Json]:
    return {name: _json(value) for name, value in zip(names, values, strict=True) if value is not None}


def _json(value: object) -> Any:
    """Converts a value from Arrow to JSON's types."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _binary(pa: Any, kind: Any) -> bool:
    """Whether a column holds bytes, such as images, at any depth."""
    if pa.types.is_nested(kind):
        return any(_binary(pa, kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
