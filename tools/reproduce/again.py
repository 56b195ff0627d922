"""One cell's runs made again, on a second machine: do they lie inside the cell's intervals?

python -m tools.reproduce.again [CELL] [--run]

The runs, of the seeds that the cell has, go to docs/results/again/; the small model is made anew where the user's cache
has none, which gives other weights on another kind of processor.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.reproduce import archive
from tools.reproduce import statistics as s
from tools.reproduce.grid import CELLS, Run
from tools.reproduce.report import Measure, row, shown

CELL = "dcpo"
"""Of results.md."""
MEASURES: dict[str, Measure] = {
    "H, last quarter [nats/token]": s.final_entropy,
    "right in training, T = 1, last quarter": s.final_success,
    "held-out accuracy, T = 0.1": s.accuracy,
    "Avg@128, T = 0.6": s.average_at_k,
}


def folder(results: Path | None = None) -> Path:
    return (results or archive.RESULTS) / "again"


def table(cell: str, results: Path | None = None) -> str:
    """A row a measure: the cell's interval, the mean of what was made again, and whether it lies inside."""
    once, later = (archive.committed(CELLS[cell], where) for where in (results, folder(results)))
    first, again = list(once.values()), [later[seed] for seed in once if seed in later]
    title = f"## {CELLS[cell].label}, made again\n\n`python -m tools.reproduce.again {cell}`\n\n"
    if len(first) < 2 or not again:
        return f"{title}**not run yet**: {len(first)} runs and {len(again)} made again; two and one are needed."
    lines = [row(["", f"{_on(first)}, {len(first)} seeds", f"{_on(again)}, {len(again)} seeds", "inside"])]
    lines += [row(["---"] * 4)]
    for label, measure in MEASURES.items():
        interval, mean = s.interval([measure(r) for r in first]), s.interval([measure(r) for r in again])
        inside = interval.low <= mean.mean <= interval.high
        lines.append(row([label, shown(interval), shown(mean), "yes" if inside else "no"]))
    return title + "\n".join(lines)


def _on(runs: Sequence[archive.Result]) -> str:
    return "; ".join(sorted({run.about["machine"] for run in runs}))


def run(cell: str) -> None:
    """Make again what is missing, in a session of its own."""
    from tools.reproduce import runner
    from tools.reproduce.session import session

    done = archive.committed(CELLS[cell], folder())
    missing = [Run(CELLS[cell], seed) for seed in archive.committed(CELLS[cell]) if seed not in done]
    with session() as shared:
        for each in missing:
            runner.make(each, shared, results=folder())
            print(f"{each.name} is made again", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce.again", description="A cell's runs on a second machine."
    )
    parser.add_argument("cell", nargs="?", choices=CELLS, default=CELL, metavar="CELL", help="default: %(default)s")
    parser.add_argument("--run", action="store_true", help="make its runs again, where docs/results/again has none")
    args = parser.parse_args(argv)
    if args.run:
        run(args.cell)
    print(table(args.cell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
