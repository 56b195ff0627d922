"""Rows of data files as they come: (place, row), where the place names file and line for an error."""

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class PrepareError(ValueError):
    """Data that cannot be had or read; names the place, the value and the remedy."""


Row = Mapping[str, Any]


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """(place, row) of a .jsonl, .json, .csv or .parquet file. Raises PrepareError that names file and line."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise PrepareError(f"{path}: the file name ends in none of {', '.join(readers)}; convert or rename it")
    try:
        rows = readers[path.suffix](path)
    except OSError as error:
        raise PrepareError(f"{path}: cannot be read: {error.strerror or error}; give a readable file") from error
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path}: not UTF-8 ({error}); convert it") from error
    if not rows:
        raise PrepareError(f"{path}: holds no rows; give a file with at least one problem")
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise PrepareError(f"{place}: {type(row).__name__} instead of an object; give one object a row")
    return rows


def _jsonl_rows(path: Path) -> list[tuple[str, Row]]:
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")  # splitlines would split at U+2028 too
    return [(f"{path}:{n}", _parse(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line or len(lines) > 1]


def _json_rows(path: Path) -> list[tuple[str, Row]]:
    rows = _parse(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise PrepareError(f"{path}: {type(rows).__name__} instead of a list of objects")
    return [(f"{path}, entry {n}", row) for n, row in enumerate(rows, 1)]


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PrepareError(f"{place}: not JSON ({error}): {text[:60].decode(errors='replace')!r}") from error


def _csv_rows(path: Path) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if twice := [name for name, number in Counter(header).items() if number > 1]:
                raise PrepareError(f"{path}:1: column {twice[0]!r} is there twice; rename one")
            for fields in reader:
                if len(fields) != len(header) and fields:  # an empty line gives none
                    raise PrepareError(
                        f"{path}:{reader.line_num}: {len(fields)} fields for {len(header)} columns ({fields!r:.200}); "
                        'put a text that holds a comma into "quotes"'
                    )
                rows.extend([(f"{path}:{reader.line_num}", dict(zip(header, fields, strict=True)))] if fields else [])
        except csv.Error as error:
            raise PrepareError(
                f"{path}:{reader.line_num}: not CSV ({error}); close the quotes, double inner ones"
            ) from error
    return rows


def _parquet_rows(path: Path) -> list[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise PrepareError(f"{path}: not a parquet file ({error})") from error
    return [(f"{path}, row {n}", row) for n, row in enumerate(rows, 1)]
