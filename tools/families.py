"""The table of model families: which proofs each has passed, and what of its config.json is not implemented.

Usage: python -m tools.families [--run [--only FAMILY ...]] [--output FILE]

--run runs the proofs, engines included (minutes), and writes what came out; without it the table names them alone.
--only runs those of some families and leaves the other rows of the page FILE as they are.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcpo_openrlhf.recipe.families import EVERYWHERE, FAMILIES, LACKS
from tests.tiny import ARCHITECTURE_FIELDS

ROOT = Path(__file__).resolve().parents[1]
_MEGATRON = "tests/policy/megatron"
PROOFS = {
    # column: the test, whose cases name the family
    "statistics as transformers' in fp32": f"{_MEGATRON}/test_model.py::test_statistics_are_those_of_transformers",
    "weights back to the bit": f"{_MEGATRON}/test_model.py::test_weights_come_back_to_the_bit",
    "an update on tp 2, pp 2, ep 2": f"{_MEGATRON}/test_step.py::test_every_family_is_updated_as_in_one_process",
    "engine: sync, greedy": "tests/weight_sync/test_families.py::test_an_engine_follows_the_trainers_weights",
}
Results = Mapping[tuple[str, str], Counter[str]]
"""(column, family or variant) -> {"passed": cases, "failed": cases}."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 where a proof was run and is not passed."""
    parser = argparse.ArgumentParser(prog="python -m tools.families", description="The table of model families.")
    parser.add_argument("--run", action="store_true", help="run the proofs (minutes)")
    parser.add_argument("--only", nargs="+", choices=variants(), metavar="FAMILY", help="with --run and --output")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the page goes; standard output otherwise")
    arguments = parser.parse_args(argv)
    chosen = arguments.only or variants()
    results = run(chosen) if arguments.run else None
    kept = arguments.output.read_text() if arguments.only else ""
    text = page(results, {name: row for name, row in rows_of(kept).items() if name not in chosen})
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text, end="")
    return 0 if results is None or all(set(results[c, f]) == {"passed"} for c in PROOFS for f in chosen) else 1


def variants() -> list[str]:
    """Families, and variants of one, of which the tests make a tiny model."""
    return list(ARCHITECTURE_FIELDS)


def rows_of(text: str) -> dict[str, str]:
    """The rows of a page by family or variant."""
    rows = {row.split("|")[1].strip().replace(", ", "_"): row for row in text.splitlines() if row.startswith("| ")}
    return {name: row for name, row in rows.items() if name in ARCHITECTURE_FIELDS}


def run(chosen: Sequence[str]) -> dict[tuple[str, str], Counter[str]]:
    """What pytest says of every proof of these families, the long ones included."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junitxml={report}", *PROOFS.values()]
        if set(chosen) != set(variants()):
            command += ["-k", " or ".join(chosen)]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        return read(report.read_text())


def read(report: str) -> dict[tuple[str, str], Counter[str]]:
    """Cases by column and family of a JUnit report; skipped ones are left out."""
    columns = {test.rpartition("::")[2]: column for column, test in PROOFS.items()}
    found = {(column, family): Counter[str]() for column in PROOFS for family in variants()}
    for case in ElementTree.fromstring(report).iter("testcase"):
        test, _, parameters = case.get("name", "").rstrip("]").partition("[")
        family = next(part for part in parameters.split("-") if part in ARCHITECTURE_FIELDS)
        if case.find("skipped") is None:
            wrong = case.find("failure") is not None or case.find("error") is not None
            found[columns[test], family]["failed" if wrong else "passed"] += 1
    return found


def page(results: Results | None, kept: Mapping[str, str]) -> str:
    """The page docs/families.md."""
    lines = [
        "# Model families",
        "",
        "`python -m tools.families --run --output docs/families.md` makes this page: it runs the proofs and counts "
        "their cases. The one list is `dcpo_openrlhf/recipe/families.py`; [add_a_model](add_a_model.md) shows the way "
        "into it.",
        "",
        f"| family | for example | {' | '.join(PROOFS)} |",
        "|---" * (2 + len(PROOFS)) + "|",
        *(kept.get(name) or _row(name, results) for name in variants()),
        "",
        "Every proof is of a tiny random model on CPU:",
        "",
        *(f"- {column}: `{test}`" for column, test in PROOFS.items()),
        "",
        *limits(),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, results: Results | None) -> str:
    fields = ARCHITECTURE_FIELDS[name]
    family = str(fields.get("model_type", name))
    shown = family if family == name else f"{family}, {name.removeprefix(family + '_')}"
    counts = [results[column, name] if results else Counter[str]() for column in PROOFS]
    cells = [", ".join(f"{n} {what}" for what, n in sorted(count.items())) or "not run" for count in counts]
    return f"| {shown} | {FAMILIES[family].example if family == name else ''} | {' | '.join(cells)} |"


def limits() -> list[str]:
    """What preflight refuses, by name."""
    lines = [f"Of every family only {_values(EVERYWHERE)} are implemented; preflight refuses other values, and:", ""]
    lines += [f"- {name}: other values than {_values(f.only)}" for name, f in FAMILIES.items() if f.only]
    if LACKS:
        lines += ["", "Looked at and not in, with what is missing:", ""]
        lines += [f"- {name}: {lacking}" for name, lacking in LACKS.items()]
    return lines


def _values(only: Mapping[str, object]) -> str:
    return ", ".join(f"`{name} = {value!r}`" for name, value in only.items())


if __name__ == "__main__":
    sys.exit(main())
