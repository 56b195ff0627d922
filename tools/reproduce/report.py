"""What a table says: claims with their verdicts, rows, a figure; as Markdown and as HTML from the same parts."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.plot_run import COLOURS, STYLE
from tools.reproduce.archive import Result
from tools.reproduce.statistics import Interval, Verdict, interval

Results = Mapping[str, Mapping[int, Result]]
"""Cell -> seed -> run; cells without a finished run have no seeds."""
Measure = Callable[[Result], float]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, what the runs say of it, and the numbers that it rests on."""

    text: str
    verdict: Verdict
    because: str = ""

    def __str__(self) -> str:
        return f"{self.text}: **{self.verdict}**{f' ({self.because})' if self.because else ''}."


@dataclass(frozen=True)
class Report:
    """One table of results.md."""

    name: str
    title: str
    claims: Sequence[Claim]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    figure: str = ""
    """File name of the picture beside results.md."""
    missing: Sequence[str] = ()
    """Labels of the rows that no run has yet."""

    def said(self) -> list[str]:
        """The claims, those that nothing can be said of in one line."""
        open_ = [claim.text for claim in self.claims if claim.verdict == "not run yet"]
        told = [str(claim) for claim in self.claims if claim.verdict != "not run yet"]
        return [*told, f"**not run yet**: {'; '.join(open_)}."] if open_ else told

    def remarks(self) -> list[str]:
        return [*self.notes, *([f"Not run yet: {'; '.join(self.missing)}."] if self.missing else [])]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", f"`python -m tools.reproduce {self.name}`", ""]
        lines += [f"- {line}" for line in self.said()]
        lines += ["", f"![{self.title}]({self.figure})"] if self.figure and self.rows else []
        lines += ["", row(self.header), row(["---"] * len(self.header)), *map(row, self.rows)] if self.rows else []
        lines += [line for note in self.remarks() for line in ("", note)]
        return "\n".join(lines)

    def html(self, folder: Path) -> str:
        """The same; the picture is put inside."""
        said = "".join(f"<li>{_bold(line)}</li>" for line in self.said())
        picture = (folder / self.figure).read_text() if self.figure else ""
        picture = picture[picture.find("<svg") :]
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.remarks())
        title = f"<h2 id={self.name!r}>{html.escape(self.title)}</h2>"
        return f"{title}<ul>{said}</ul>{picture}<table><tr>{head}</tr>{rows}</table>{notes}"


def row(cells: Sequence[str]) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _bold(text: str) -> str:
    first, *rest = html.escape(text).split("**")
    return first + "".join(f"<b>{part}</b>" if i % 2 == 0 else part for i, part in enumerate(rest))


PAGE = """<!doctype html><meta charset="utf-8"><title>Reproduction</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ border-bottom: 1px solid #ccc; padding: .2em .8em; text-align: left }}
svg {{ max-width: 100%; height: auto }}</style><h1>The paper's claims at small scale</h1>{body}
"""


def page(progress: str, reports: Sequence[Report], folder: Path) -> str:
    """One self-contained HTML page: how far the grid is, then every table."""
    return PAGE.format(body=f"<pre>{html.escape(progress)}</pre>" + "".join(r.html(folder) for r in reports))


# --- numbers over seeds ----------------------------------------------------------------------------------------------


def over_seeds(results: Results, cell: str, measure: Measure) -> Interval | None:
    """Mean and interval of the cell's finished runs; None without one."""
    runs = results.get(cell, {})
    return interval([measure(run) for run in runs.values()]) if runs else None


def difference(results: Results, first: str, second: str, measure: Measure) -> Interval | None:
    """first - second over the seeds that both have: with a seed they share prompts, their order and the start."""
    one, other = results.get(first, {}), results.get(second, {})
    seeds = sorted(one.keys() & other.keys())
    return interval([measure(one[s]) - measure(other[s]) for s in seeds]) if seeds else None


def columns_of(results: Results, cells: Mapping[str, str], columns: Mapping[str, Measure]) -> dict[str, Any]:
    """header, rows and missing of a Report: a row a cell (name -> label), mean and interval of each column."""
    rows = []
    for name, label in cells.items():
        if runs := results.get(name, {}):
            found = [interval([measure(run) for run in runs.values()]) for measure in columns.values()]
            rows.append([label, str(len(runs)), *map(shown, found)])
    missing = [label for name, label in cells.items() if not results.get(name)]
    return {"header": ["method", "seeds", *columns], "rows": rows, "missing": missing}


def shown(value: Interval | None, digits: int = 3) -> str:
    """mean [low, high]; the mean alone for one seed."""
    if value is None:
        return "not run yet"
    if value.seeds == 1:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


# --- figures ---------------------------------------------------------------------------------------------------------


@contextmanager
def _drawn(output: Path, columns: int, size: tuple[float, float]) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure and its axes, side by side; written, the same numbers as the same bytes, when the block ends."""
    with plt.rc_context({**STYLE, "svg.hashsalt": "reproduce", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
        yield figure, axes[0]
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata={"Date": None})
        plt.close(figure)


def curves(
    results: Results,
    cells: Mapping[str, str],
    output: Path,
    *,
    panels: Mapping[str, str],
    targets: Sequence[float] = (),
) -> None:
    """A panel a metric (metric -> its label): each cell's mean over seeds as a line, its range as a band."""
    with _drawn(output, len(panels), (5.2 * len(panels), 3.6)) as (figure, axes):
        for axis, (metric, label) in zip(axes, panels.items(), strict=True):
            for i, (name, text) in enumerate(cells.items()):
                _band(axis, results.get(name, {}), metric, text, COLOURS[i % len(COLOURS)], i // len(COLOURS))
            if metric == "entropy/exact":
                for target in targets:
                    axis.axhline(target, color="#555555", linestyle=":", linewidth=1.2)
            axis.set(xlabel="step", ylabel=label, ylim=(0, None))
        lines, labels = axes[0].get_legend_handles_labels()
        if lines:
            figure.legend(lines, labels, loc="outside lower center", ncols=5, fontsize=9)


def _band(axis: Axes, runs: Mapping[int, Result], metric: str, label: str, colour: str, dash: int) -> None:
    if not runs:
        return
    series = [run.series(metric) for run in runs.values()]
    columns = list(zip(*series, strict=False))
    steps = range(1, len(columns) + 1)
    axis.plot(
        steps,
        [sum(c) / len(c) for c in columns],
        color=colour,
        linestyle=("-", "--", ":")[dash],
        label=label,
        linewidth=1.5,
    )
    if len(series) > 1:
        axis.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0
        )


MARKS = "osD^v"


def plane(
    results: Results,
    cells: Mapping[str, str],
    output: Path,
    *,
    across: tuple[str, Measure],
    up: tuple[str, Measure],
    band: tuple[float, float],
) -> None:
    """A point a run: two measures, with their labels, against each other; band: what counts as good of the second."""
    with _drawn(output, 1, (9.4, 4.2)) as (_, (axis,)):
        axis.axhspan(*band, color="#555555", alpha=0.12, linewidth=0)
        for i, (name, text) in enumerate(cells.items()):
            runs = list(results.get(name, {}).values())
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i // len(COLOURS)], "s": 30}
            if runs:
                axis.scatter([across[1](run) for run in runs], [up[1](run) for run in runs], label=text, **look)
        axis.set(xlabel=across[0], ylabel=up[0], xlim=(0, None), ylim=(0, None))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
