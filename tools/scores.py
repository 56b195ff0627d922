"""Scores of samples: Avg@k and Pass@k with their intervals, and the table of them beside the paper's numbers."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.prepare_data import SET_OF_ALIAS

CONTESTS = ("aime24", "aime25", "amc", "hmmt25")
"""Sets of some thirty problems."""
PAPER = Path(__file__).with_name("paper_results.csv")


def pass_at_k(*, n: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), the probability that k of the n samples hold one of the c correct ones.

    Unbiased for the chance that k fresh samples do; as a product, which does not overflow. Chen et al. 2021, Eq. 1.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"0 <= correct <= n and 1 <= k <= n are needed, not correct {correct}, n {n}, k {k}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def estimate(scores: Sequence[float], *, samples: int, z: float = 1.96) -> Estimate:
    """Mean of one score in [0, 1] a problem, with a 95% interval for other problems of the same kind.

    Problems are the clusters (Miller 2024, arXiv 2411.00640): samples of one problem are not independent. The interval
    is Wilson's at the effective number of samples p (1 - p) / Var(mean), at most problems * samples (Korn & Graubard
    1998), which stays inside [0, 1] and keeps a width at 0 and 1. With one sample a problem it is Wilson's own.
    """
    problems, p = len(scores), math.fsum(scores) / len(scores)
    variance = math.fsum((score - p) ** 2 for score in scores) / problems**2
    size = min(p * (1 - p) / variance, problems * samples) if variance > 0 else problems
    centre, scale = p + z * z / (2 * size), 1 + z * z / size
    half = z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    return Estimate(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


@dataclass(frozen=True)
class Result:
    """What a model scored on a benchmark."""

    benchmark: str
    problems: int
    samples: int
    avg: Estimate
    """Avg@samples."""
    pass_at: dict[int, Estimate]
    """Pass@k for the powers of two below `samples`, and for `samples`."""
    truncated: float
    """Share of samples that ended at --max-tokens."""
    unanswered: float
    """Share of samples in which no final answer was found."""
    tokens: float
    """Mean length."""
    timeouts: int
    """Answers graded 0 since their grading took too long, broke its process or failed."""


def paper_rows(backbone: str) -> list[dict[str, str]]:
    """The paper's rows for a backbone: `method`, `metric` ("avg" or "pass128") and a percentage a benchmark or ""."""
    with PAPER.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["backbone"] == backbone]


def paper_backbones() -> list[str]:
    with PAPER.open(newline="") as file:
        return sorted({row["backbone"] for row in csv.DictReader(file)})


def table(results: dict[str, list[Result]], *, paper: str | None = None) -> str:
    """Markdown: a row a model, Avg@k and Pass@k [%] a benchmark with their 95% intervals; below, the paper's rows."""
    columns = [
        (SET_OF_ALIAS.get(r.benchmark, r.benchmark), r.samples, r.problems) for r in next(iter(results.values()))
    ]
    header = ["model"]
    for name, samples, problems in columns:
        header.append(f"{name} ({problems}) Avg@{samples}")
        header.extend([f"{name} Pass@{samples}"] if samples > 1 else [])
    lines = [_row(header), _row(["---"] * len(header))]
    for label, row in results.items():
        cells = [label]
        for result in row:
            cells.append(_cell(result.avg))
            cells.extend([_cell(result.pass_at[result.samples])] if result.samples > 1 else [])
        lines.append(_row(cells))
    published = paper_rows(paper) if paper else []
    for method in dict.fromkeys(row["method"] for row in published):
        values = {row["metric"]: row for row in published if row["method"] == method}
        cells = [f"paper: {method}"]
        for name, samples, _ in columns:
            cells.append(values["avg"].get(name) or "-")
            if samples > 1:
                cells.append((values.get("pass128", {}).get(name) if samples == 128 else None) or "-")
        lines.append(_row(cells))
    notes = ["[low, high]: 95% interval over problems (Wilson at the effective sample size)."]
    if paper:
        contests = ", ".join(CONTESTS)
        notes.append(
            f"paper: arXiv 2601.12730, {paper}, as its authors print it; Avg@32 on {contests}, Pass@1 elsewhere, "
            "and Pass@128 where k is 128."
        )
    return "\n".join([*lines, "", *notes])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(e: Estimate) -> str:
    return f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"
