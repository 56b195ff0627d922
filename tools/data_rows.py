"""Rows of data files as they come: (place, row), where the place names file and line for an error."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dcpo_openrlhf.rollout.data import KEYS, OWN_NAMES, Names
from dcpo_openrlhf.rollout.files import SUFFIXES, Row, files_of, rows_of


class PrepareError(ValueError):
    """Data that cannot be had or read; names the place, the value and the remedy."""


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """(place, row) of what a run reads too (rollout/files.py), or of a .csv file.

    Raises PrepareError or TaskError that names file and line.
    """
    if path.suffix != ".csv":
        if not path.is_dir() and not path.name.endswith(SUFFIXES):
            raise PrepareError(f"{path}: the name ends in none of {', '.join(SUFFIXES)}, .csv; convert or rename it")
        parts = map(rows_of, files_of(path))
        return [(rows.place(i), row) for rows in parts for i, row in enumerate(rows.scan())]
    try:
        rows = _csv_rows(path)
    except OSError as error:
        raise PrepareError(f"{path}: cannot be read: {error.strerror or error}; give a readable file") from error
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path}: not UTF-8 ({error}); convert it") from error
    if not rows:
        raise PrepareError(f"{path}: is empty; give a file with at least one problem")
    return rows


def names(pairs: Sequence[str]) -> Names:
    """The columns of "KEY=COLUMN", as task.fields of a recipe has them. Raises PrepareError for another form."""
    given = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(given) < len(pairs) or not given.keys() <= set(KEYS) or not all(given.values()):
        raise PrepareError(
            f"--fields {' '.join(pairs)}: the form is KEY=COLUMN, once for each KEY of {', '.join(KEYS)}"
        )
    return OWN_NAMES | given


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
