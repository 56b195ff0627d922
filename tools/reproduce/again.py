"""One cell's runs, or theorem_3_1, made again on a second machine: do they lie inside the first one's intervals?

python -m tools.reproduce.again [CELL] [--run] [--model DIR]        CELL: one of the grid's, or theorem_3_1

The runs, of the seeds that the cell has, go to a folder of the machine in docs/results/again/. The small model is made
anew where the user's cache has none, which gives other weights on another kind of processor; --model takes the folder
of the machine that made the cell, so that nothing but the machine differs.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from tools.reproduce import archive, gradients, theorem
from tools.reproduce import statistics as s
from tools.reproduce.grid import CELLS, Run
from tools.reproduce.report import Measure, difference, row, shown

CELL = "dcpo"
"""Of results.md."""
THEOREM = "theorem_3_1"
EXACT = 1e-9
"""An interval that is narrower is of a number without error, which tells nothing."""
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
    """A row a measure: the cell's interval; of each machine that made it again the mean, whether it lies inside, and
    how far it is off, by pairs of runs with one seed.
    """
    once = archive.committed(CELLS[cell], results)
    machines = sorted(((results or archive.RESULTS) / "again").glob("*"))
    found = [archive.committed(CELLS[cell], each) for each in machines]
    again = [{seed: runs[seed] for seed in once if seed in runs} for runs in found if once.keys() & runs.keys()]
    title = f"## {CELLS[cell].label}, made again\n\n`python -m tools.reproduce.again {cell}`\n\n"
    if len(once) < 2 or not again:
        return (
            f"{title}**not run yet**: {len(once)} runs and {sum(map(len, again))} made again; two and one are needed."
        )
    first = list(once.values())
    repeats = [text for runs in again for text in (_on(list(runs.values())), "inside", "difference")]
    header = ["", _on(first), *repeats]
    lines = [row(header), row(["---"] * len(header))]
    for label, measure in MEASURES.items():
        interval = s.interval([measure(run) for run in first])
        cells = [label, shown(interval)]
        for runs in again:
            mean = s.interval([measure(run) for run in runs.values()])
            off = difference({"again": runs, "once": once}, "again", "once", measure)
            cells += [shown(mean), "yes" if interval.low <= mean.mean <= interval.high else "no", shown(off)]
        lines.append(row(cells))
    return title + "\n".join(lines)


def theorem_table(results: Path | None = None) -> str:
    """A row a number: at how many (T, n, weight) a second machine's mean lies inside the first one's interval."""
    root = results or archive.RESULTS
    title = f"## Theorem 3.1, made again\n\n`python -m tools.reproduce.again {THEOREM}`\n\n"
    once, folders = gradients.load(root), sorted((root / "again").glob("*"))
    repeats = {gradients.machine(each): found for each in folders if (found := gradients.load(each)) is not None}
    if once is None or not repeats:
        return f"{title}**not run yet**"
    first = theorem.Numbers(once)
    lines = [row([f"{gradients.machine(root)}: intervals over problems that hold the mean of", *repeats])]
    lines.append(row(["---"] * (1 + len(repeats))))
    later = [theorem.Numbers(found) for found in repeats.values()]
    for key, label in theorem.COLUMNS.items():
        inside = [_inside(first, numbers, key) for numbers in later]
        lines.append(row([label, *(f"{sum(found)} of {len(found)}" for found in inside)]))
    said, *others = ([claim.verdict for claim in theorem.claims(numbers)] for numbers in (first, *later))
    same = (f"{sum(a == b for a, b in zip(said, other, strict=True))} of {len(said)}" for other in others)
    return title + "\n".join([*lines, row(["claims that are told alike", *same])])


def _inside(first: theorem.Numbers, later: theorem.Numbers, key: str) -> list[bool]:
    """For each weight, T and n whose number has an error: does the first one's interval hold the later one's mean?"""
    found = []
    for weight, place in itertools.product(gradients.WEIGHTS, first.places):
        interval = s.interval(first.of(weight, key, place))
        if interval.high - interval.low > EXACT:
            found.append(interval.low <= fmean(later.of(weight, key, place)) <= interval.high)
    return found


def _on(runs: Sequence[archive.Result]) -> str:
    count = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    return f"{'; '.join(sorted({run.about['machine'] for run in runs}))}, {count}"


def run(cell: str, model: Path | None = None) -> None:
    """Make again what is missing, runs in a session of their own; model: as --model."""
    from tools.reproduce import runner
    from tools.reproduce.session import session

    here = folder(runner.machine(model))
    if cell == THEOREM:
        runner.make_gradients(here)
        return
    done = archive.committed(CELLS[cell], here)
    missing = [Run(CELLS[cell], seed) for seed in archive.committed(CELLS[cell]) if seed not in done]
    with session() as shared:
        for each in missing:
            runner.make(each, shared, results=here, model=model)
            print(f"{each.name} is made again", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce.again", description="A cell's runs, or theorem_3_1, on a second machine."
    )
    parser.add_argument(
        "cell", nargs="?", choices=[*CELLS, THEOREM], default=CELL, metavar="CELL", help="default: %(default)s"
    )
    parser.add_argument("--run", action="store_true", help="make its runs again, where docs/results/again has none")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="start from this copy of the small model that the cell's runs had"
    )
    args = parser.parse_args(argv)
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} is no model's folder: it has no config.json")
    if args.model is not None and (args.cell == THEOREM or CELLS[args.cell].model != "small"):
        parser.error(f"--model is the small model of the grid's cells; {args.cell} has another one")
    if args.run:
        run(args.cell, args.model)
    print(theorem_table() if args.cell == THEOREM else table(args.cell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
