"""Runs on disk: the folder that one is made in, and the compressed file of its numbers that is committed."""

import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.reproduce.grid import ROOT, SEEDS, Cell, Run

WORK = ROOT / "runs" / "reproduce"
RESULTS = ROOT / "docs" / "results"
DIGITS = 6
"""Significant digits that are kept."""


@dataclass(frozen=True)
class Result:
    """The numbers of a run that came to its end."""

    about: dict[str, Any]
    """Run, identity of its cell, versions, machine, minutes."""
    steps: list[dict[str, float]]
    """metrics.jsonl."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """evaluation.jsonl: held-out accuracy before, between and after."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Right answers of each held-out problem among `samples`, after the last step."""

    def series(self, metric: str) -> list[float]:
        """The metric at every step; NaN where a step lacks it."""
        return [float(row.get(metric, math.nan)) for row in self.steps]


def file_of(run: Run, results: Path | None = None) -> Path:
    """Where the run's numbers are committed; results: in place of RESULTS."""
    return (results or RESULTS) / "runs" / f"{run.name}.jsonl.gz"


def write(file: Path, result: Result) -> None:
    """One object a line; the same numbers give the same bytes."""
    lines: list[dict[str, Any]] = [{"about": result.about}]
    lines += [{"evaluation": row} for row in result.evaluations]
    lines += [{"counts": result.counts}] if result.counts else []
    lines += [{"step": row} for row in result.steps]
    text = "".join(json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(gzip.compress(text.encode(), mtime=0))
    part.replace(file)


def read(file: Path) -> Result:
    about, counts, evaluations, steps = {}, {}, [], []
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        ((kind, value),) = json.loads(line).items()
        if kind == "about":
            about = value
        elif kind == "counts":
            counts = value
        else:
            (evaluations if kind == "evaluation" else steps).append(value)
    return Result(about, steps, evaluations, counts)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


def load(run: Run, results: Path | None = None) -> Result | None:
    """The run's committed numbers; None where there are none, or they are of another recipe or other keys."""
    file = file_of(run, results)
    if not file.is_file():
        return None
    result = read(file)
    return result if result.about["identity"] == run.cell.identity else None


def committed(cell: Cell, results: Path | None = None) -> dict[int, Result]:
    """Seed -> run of the cell, of those that `load` finds."""
    runs = [Run(cell, seed) for seed in SEEDS[cell.model]]
    return {run.seed: found for run in runs if (found := load(run, results)) is not None}


def ran(results: Path | None = None) -> str:
    """How many runs are committed, their minutes in all, on which machines, with which versions."""
    files = sorted((results or RESULTS).glob("runs/**/*.jsonl.gz"))
    about = [read(file).about for file in files]
    machines = sorted({a["machine"] for a in about})
    versions = sorted({", ".join(f"{name} {version}" for name, version in a["versions"].items()) for a in about})
    minutes = sum(a["minutes"] for a in about)
    size = sum(file.stat().st_size for file in files) / 2**20
    return (
        f"{len(files)} runs, {minutes:.0f} minutes in all, beside other work; {size:.1f} MiB of metrics. Machine: "
        f"{'; '.join(machines) or '-'}. {'; '.join(versions) or '-'}."
    )
