"""The paper's figures and tables at small scale: from the committed numbers, or from nothing with --run.

python -m tools.reproduce TABLE [TABLE ...] [--run]       TABLE: a name of the list, or all
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dcpo_openrlhf.errors import RunError
from dcpo_openrlhf.recipe.schema import RecipeError
from dcpo_openrlhf.signals import Interrupted
from dcpo_openrlhf.train_dcpo import log_to
from tools.reproduce import again, archive, gradients, report
from tools.reproduce.grid import SEEDS, Run
from tools.reproduce.tables import COLLAPSES, HOLDS, TABLES, Table

INTRODUCTION = f"""# The paper's claims at small scale

Written by `python -m tools.reproduce all` from the numbers in `runs/`; `--run` makes those that are missing. Numbers
are means over seeds with their 95 % intervals (Student's t; a comparison pairs the seeds, which share prompts and the
start); a number without one is of a single seed. All runs on the small model begin with the same one, so intervals say
nothing of others.

**reproduced**: the whole interval is on the claim's side. **not reproduced**: all of it is on the other side.
**undecided**: neither; with few seeds intervals are wide. Where a table asks what the paper leaves open, the words say
the same of a claim of ours. *holds*: over the last half of the steps H is on average less than {100 * HOLDS:.0f} % of
H_0 away from it. *collapses*: the mean of the last quarter is below {100 * COLLAPSES:.0f} % of H_0; GRPO, which has no
H_0, is held against that of the runs beside it.

[README.md](README.md) says what was run on what, the task, and what was tried and dropped.
"""


def progress(tables: Sequence[Table]) -> str:
    """A line a table: finished, broken and missing runs; what several tables share counts in each."""
    from tools.reproduce.runner import state

    widths = {"finished": 10, "broken": 8, "not run yet": 13}
    lines = [f"{'table':<14}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for table in tables:
        states = [state(run) for run in table.runs()]
        counts = "".join(f"{states.count(name):>{width}}" for name, width in widths.items())
        lines.append(f"{table.name:<14}{counts}")
    return "\n".join(lines)


def results(reports: Iterable[report.Report], folder: Path | None = None) -> str:
    """The text of results.md, folder in place of docs/results."""
    tables = "".join(f"\n{r.markdown()}\n" for r in reports)
    repeated = f"{again.table(again.CELL, folder)}\n\n{again.theorem_table(folder)}"
    ran = f"{archive.ran(folder)} Theorem 3.1: {gradients.machine(folder or archive.RESULTS)}."
    return f"{INTRODUCTION}{tables}\n{repeated}\n\n## What ran on what\n\n{ran}\n"


def run(tables: Sequence[Table], *, minutes: float, seeds: int) -> int:
    """Make what the tables lack; how many runs are left."""
    from tools.reproduce import runner

    if any(table.name == "theorem_3_1" for table in tables):
        runner.make_gradients()
    runs: list[Run] = [run for table in tables for run in table.runs() if run.seed <= seeds]
    return runner.make_all(runs, minutes=minutes, say=lambda line: print(line, flush=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce",
        description="Print tables of docs/results/ from the committed numbers; `all` also writes results.md.",
        epilog=f"tables: {', '.join(TABLES)}, all",
    )
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all"], metavar="TABLE")
    parser.add_argument("--run", action="store_true", help="first make the runs that are missing, broken ones go on")
    parser.add_argument("--seeds", type=int, default=max(map(max, SEEDS.values())), help="of these alone, from 1")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write one HTML page of the tables")
    args = parser.parse_args(argv)
    names = list(TABLES) if "all" in args.tables else list(dict.fromkeys(args.tables))
    tables = [TABLES[name] for name in names]
    if args.run:
        log_to(sys.stdout)
        try:
            left = run(tables, minutes=args.minutes, seeds=args.seeds)
        except (RecipeError, RunError) as error:
            print(f"reproduce: {error}", file=sys.stderr)
            return 1
        except Interrupted as interrupted:
            print("reproduce: ended by a signal; the run in hand goes on from its last checkpoint", file=sys.stderr)
            return 128 + interrupted.args[0]
        print(f"{left} runs are left" if left else "every run is finished")
    print(progress(tables))
    reports = [table.report() for table in tables]
    print("\n\n".join(r.markdown() for r in reports))
    if "all" in args.tables:
        (archive.RESULTS / "results.md").write_text(results(reports))
    if args.page is not None:
        args.page.write_text(report.page(progress(tables), reports, archive.RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
