"""The first difference between two runs: recipe, then step by step metrics and samples.

python -m tools.compare_runs RUN_DIR RUN_DIR      exits with 0: equal, 1: different, 2: bad input
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tools.run_folder import RunError, metrics, read_jsonl, sample_files

# Where and when a run took place is no part of what it computes.
IGNORED = ("time/", "cost/", "recipe/run.dir", "recipe/run.ray_address", "recipe/run.worker_logs")
ABSENT = "nothing"


class Difference(NamedTuple):
    step: int
    """0 for the recipe."""
    field: str
    first: Any
    second: Any


def differences(first: Path, second: Path, *, ignored: Sequence[str], tolerance: float) -> Iterator[Difference]:
    """Every difference, in the order of the steps; recipe/KEY, then metric names, then samples/ROW/KEY.

    Numbers differ by more than `tolerance` times the larger; NaN equals NaN. Raises RunError.
    """
    tables, files = (metrics(first), metrics(second)), (sample_files(first), sample_files(second))

    def differing(step: int, a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
        for name in list(a) + [name for name in b if name not in a]:
            field, values = prefix + name, (a.get(name, ABSENT), b.get(name, ABSENT))
            if not field.startswith(tuple(ignored)) and not _same(*values, tolerance):
                yield Difference(step, field, *values)

    yield from differing(0, _recipe(first), _recipe(second), prefix="recipe/")
    for step in sorted(tables[0].keys() | tables[1].keys()):
        if any(step not in table for table in tables):
            yield Difference(step, "metrics", *["present" if step in table else ABSENT for table in tables])
            return
        yield from differing(step, tables[0][step], tables[1][step])
        yield from differing(step, _samples(files[0].get(step)), _samples(files[1].get(step)), prefix="samples/")


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=0.0)
    return a == b


def _recipe(run: Path) -> dict[str, Any]:
    """RUN/recipe.yaml with dotted keys; empty where there is none."""
    file = run / "recipe.yaml"
    if not file.is_file():
        return {}
    try:
        return dict(_flat(yaml.safe_load(file.read_text())))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: not YAML ({' '.join(str(error).split())})") from error


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _samples(file: Path | None) -> dict[str, Any]:
    """Values of a samples file as ROW/KEY, rows from 1; empty where the step has none.

    A row of before success had a name has its reward as one, where that is 0 or 1.
    """
    rows = read_jsonl(file) if file else []
    rows = [{"success": row["reward"], **row} if row.get("reward") in (0, 1) else row for row in rows]
    return {f"{number}/{key}": value for number, row in enumerate(rows, 1) for key, value in row.items()}


def show(value: Any) -> str:
    """A value on one line; a long text is cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_runs",
        description="Print the first difference between two runs: recipe, metrics, samples.",
        epilog=f"exit code: 0 equal, 1 different, 2 bad input. Never compared: {', '.join(IGNORED)}",
    )
    parser.add_argument("first", type=Path, metavar="RUN_DIR")
    parser.add_argument("second", type=Path, metavar="RUN_DIR")
    parser.add_argument("--all", action="store_true", help="print every difference, not only the first")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative, for numbers; default: %(default)s")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PREFIX", help="fields to leave out, as recipe/ or samples/"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.tolerance < 1:
        parser.error(f"--tolerance is in [0, 1), not {args.tolerance}")
    count = 0
    try:
        ignored = (*IGNORED, *args.ignore)
        for found in differences(args.first, args.second, ignored=ignored, tolerance=args.tolerance):
            place = f"step {found.step}, {found.field}" if found.step else found.field
            print(f"{place}: {show(found.first)} in {args.first}, {show(found.second)} in {args.second}")
            count += 1
            if not args.all:
                break
        if not count:
            steps, samples = len(metrics(args.first)), len(sample_files(args.first))
            print(f"equal: {steps} steps, samples of {samples} of them")
    except (RunError, OSError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
