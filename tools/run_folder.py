"""What a run folder holds, for the tools that read runs, ended or not. Errors name file, line and remedy."""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class RunError(ValueError):
    """A run folder that cannot be read."""


def read_jsonl(file: Path) -> list[Row]:
    """The objects of a JSONL file, one a line. Raises RunError for anything else.

    A last line without its end, which a run writes just now or was killed in, is left out, and stderr says so.
    """
    rows = []
    try:
        # Split on \n alone: str.splitlines would also split inside a string that holds U+2028.
        *lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number > len(lines):
                _say_once(f"{file}, line {number}: left out, its end is not written; is the run still writing it?")
                break
            raise RunError(f"{file}, line {number}: not JSON ({error}); remove the line, or mend it") from error
        if not isinstance(row, dict):
            raise RunError(f"{file}, line {number}: {type(row).__name__} instead of an object; is this a run's file?")
        rows.append(row)
    return rows


_said: set[str] = set()


def _say_once(text: str) -> None:
    """On stderr, whenever a tool reads a file twice."""
    if text not in _said:
        _said.add(text)
        print(text, file=sys.stderr)


def metrics(run: Path) -> dict[int, Row]:
    """Rows of RUN/metrics.jsonl by step. Of a step made twice, before and after a resume, the later one.

    Rows without train/step, which no training step wrote, are left out. Where a run of before it had a name lacks
    rollout/success_rate, it is the mean of its rewards, which were 0 and 1.
    """
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; name the folder of a run")
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise RunError(f"{file}: no such file; name the folder of a run that has finished a step")
    rows = {int(row["train/step"]): row for row in read_jsonl(file) if _is_number(row.get("train/step"))}
    if not rows:
        raise RunError(f"{file}: no line has train/step; the run has finished no step")
    for row in rows.values():
        if "rollout/reward_mean" in row:
            row.setdefault("rollout/success_rate", row["rollout/reward_mean"])
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def optional(run: Path, name: str) -> list[Row]:
    """Rows of RUN/NAME; none where there is no such file."""
    file = run / name
    return read_jsonl(file) if file.is_file() else []


_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")


def sample_files(run: Path) -> dict[int, Path]:
    """RUN/samples/step_NNNNNN.jsonl by step, in order; what else lies there is nothing of the run's."""

    def found() -> Iterator[tuple[int, Path]]:
        for file in (run / "samples").glob("step_*.jsonl"):
            match = _STEP_FILE.fullmatch(file.name)
            if match and file.name == f"step_{int(match[1]):06d}.jsonl" and file.is_file():
                yield int(match[1]), file

    return dict(sorted(found()))
