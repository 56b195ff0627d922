"""One cell's runs made again, on a second machine: do they lie inside the cell's intervals?

python -m tools.reproduce.again [CELL] [--run]

The runs, of the seeds that the cell has, go to a folder of the machine in docs/results/again/; the small model is made
anew where the user's cache has none, which gives other weights on another kind of processor.
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


def folder(machine: str, results: Path | None = None) -> Path:
    """Where runs made on this machine are committed."""
    words = "".join(c if c.isalnum() else " " for c in machine).split()
    return (results or archive.RESULTS) / "again" / "-".join(words)


def table(cell: str, results: Path | None = None) -> str:
    """A row a measure: the cell's interval; of each machine that made it again the mean, and whether it lies inside."""
    once = archive.committed(CELLS[cell], results)
    machines = sorted(((results or archive.RESULTS) / "again").glob("*"))
    found = [archive.committed(CELLS[cell], each) for each in machines]
    again = [[runs[seed] for seed in once if seed in runs] for runs in found if once.keys() & runs.keys()]
    title = f"## {CELLS[cell].label}, made again\n\n`python -m tools.reproduce.again {cell}`\n\n"
    if len(once) < 2 or not again:
        return (
            f"{title}**not run yet**: {len(once)} runs and {sum(map(len, again))} made again; two and one are needed."
        )
    first = list(once.values())
    repeats = [text for runs in again for text in (f"{_on(runs)}, {len(runs)} seeds", "inside")]
    header = ["", f"{_on(first)}, {len(first)} seeds", *repeats]
    lines = [row(header), row(["---"] * len(header))]
    for label, measure in MEASURES.items():
        interval = s.interval([measure(run) for run in first])
        cells = [label, shown(interval)]
        for runs in again:
            mean = s.interval([measure(run) for run in runs])
            cells += [shown(mean), "yes" if interval.low <= mean.mean <= interval.high else "no"]
        lines.append(row(cells))
    return title + "\n".join(lines)


def _on(runs: Sequence[archive.Result]) -> str:
    return "; ".join(sorted({run.about["machine"] for run in runs}))


def run(cell: str) -> None:
    """Make again what is missing, in a session of its own."""
    from tools.reproduce import runner
    from tools.reproduce.session import session

    here = folder(runner.machine())
    done = archive.committed(CELLS[cell], here)
    missing = [Run(CELLS[cell], seed) for seed in archive.committed(CELLS[cell]) if seed not in done]
    with session() as shared:
        for each in missing:
            runner.make(each, shared, results=here)
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
