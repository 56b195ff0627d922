"""Answers by kind: own examples, and the labelled cases and gold answers of ../shared where they are at hand."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcpo_openrlhf.reward.compare import settle, symbolic_equal
from dcpo_openrlhf.reward.extract import extract_boxed
from dcpo_openrlhf.reward.pool import GraderPool
from tools.grade_cases import faults

SHARED = Path(__file__).resolve().parents[3] / "shared"
DATA_SETS = ("math500", "minerva_math", "olympiadbench", "amc23", "aime24")


def earned(answer: str, gold: str) -> float:
    """What the answer in a box earns, as a pool grades it, in this process."""
    found = extract_boxed(f"So the answer is $\\boxed{{{answer}}}$.")
    reward = settle(found, gold)
    return float(symbolic_equal(gold, found or "")) if reward is None else reward


def own_examples() -> dict[str, list[tuple[str, str, int]]]:
    kinds: dict[str, list[tuple[str, str, int]]] = {}
    for line in (Path(__file__).parent / "kinds.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            kinds[line.removeprefix("== ")] = []
        elif line and not line.startswith("#"):
            gold, _, rest = line.partition(" | ")
            answer, _, success = rest.rpartition(" | ")
            kinds[list(kinds)[-1]].append((gold, answer, int(success)))
    return kinds


EXAMPLES = own_examples()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_answers_of_each_kind(kind: str) -> None:
    wrong = [(gold, answer, success) for gold, answer, success in EXAMPLES[kind] if earned(answer, gold) != success]
    assert len(EXAMPLES[kind]) >= 4 and wrong == []


def test_the_pool_grades_as_this_process_does() -> None:
    examples = [e for kind in EXAMPLES.values() for e in kind][::7]
    with GraderPool(workers=2, extractor="boxed", deadline_s=120) as pool:
        grades = pool.grade([f"\\boxed{{{answer}}}" for _, answer, _ in examples], [gold for gold, _, _ in examples])
        assert [g.reward for g in grades] == [success for _, _, success in examples]
        assert (pool.timeouts, pool.crashes) == (0, 0)


def test_labelled_cases() -> None:
    """Fewer than 1 in 100 wrong answers earn 1, fewer than 1 in 30 right ones earn 0."""
    path = SHARED / "grading" / "cases.jsonl"
    if not path.exists():
        pytest.skip("cases.jsonl is not beside the repository in shared/grading")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    faults: dict[int, list[str]] = {0: [], 1: []}
    for case in cases:
        if earned(case["answer"], case["gold"]) != case["success"]:
            faults[case["success"]].append(f"{case['family']}: {case['gold']} | {case['answer']}")
    count = sum(case["success"] for case in cases)
    assert 100 * len(faults[0]) < len(cases) - count, faults[0]
    assert 30 * len(faults[1]) < count, faults[1]


# --- real gold answers, in other typography and with one thing changed


def golds(name: str) -> list[str]:
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository in shared/data")
    return list(dict.fromkeys(json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()))


FULL_WIDTH = {ord(c): ord(c) + 0xFEE0 for c in "0123456789.,()+="}


def spellings(gold: str) -> Iterator[str]:
    """The same answer, set in other type."""
    yield from (
        gold,
        f"{gold}.",
        f"{gold},",
        f"${gold}$",
        f"\\({gold}\\)",
        f" {gold} ",
        f"\\displaystyle {gold}",
        f"{gold}\\,",
    )
    yield re.sub(r"\\frac", r"\\dfrac", gold)
    yield re.sub(r"\\d?frac", r"\\nicefrac", gold)
    yield gold.replace("-", "\u2212")
    yield gold.replace("\\pi", "\u03c0")
    yield gold.replace("\\cdot", "\\times")
    yield re.sub(r"\\sqrt\{(\w+)\}", "\u221a\\1", gold)
    yield f"\\boldsymbol{{{gold}}}"
    if "\\" not in gold:
        yield gold.translate(FULL_WIDTH)
    if re.fullmatch(r"[0-9]{4,}", gold):
        yield re.sub(r"(?<=[0-9])(?=(?:[0-9]{3})+$)", "\u2009", gold)
        yield re.sub(r"(?<=[0-9])(?=(?:[0-9]{3})+$)", r"\\,", gold)


OTHER_UNITS = (
    ("cents", "dollars"),
    ("inches", "feet"),
    ("degrees", "radians"),
    ("cm", "m"),
    ("^\\circ", "\\text{ rad}"),
    ("\\$", "\u20ac"),
    ("}^2", "}^3"),
)


def mutations(gold: str) -> Iterator[str]:
    """The answer with its first or last digit, a sign, its base, unit, a letter or its number of members changed."""
    digits = list(re.finditer(r"[0-9]", gold))
    for match in digits[:1] + digits[-1:]:
        yield gold[: match.start()] + str((int(match[0]) + 1) % 10) + gold[match.end() :]
    yield gold[1:] if gold.startswith("-") else f"-{gold}"
    for old, new in (("+", "-"), ("-", "+"), ("\\pm", "+")):
        at = gold.find(old, 1)
        if at > 0:
            yield f"{gold[:at]}{new} {gold[at + len(old) :]}"
    base = re.search(r"_\{?([0-9])\}?$", gold)
    if base:
        yield f"{gold[: base.start()]}_{int(base[1]) + 1}"
    yield from (
        gold.replace(old, new) for old, new in OTHER_UNITS if old in gold and "text" not in gold[: gold.find(old)][:-12]
    )
    for match in re.finditer(r"(?<![A-Za-z\\{])[A-Za-z](?![A-Za-z])", gold):
        yield f"{gold[: match.start()]}{'q' if match[0].islower() else 'Q'}{gold[match.end() :]}"
    members = re.split(r",(?![^()\[\]{}]*[)\]}])", gold)
    if len(members) > 1 and not re.fullmatch(r"[0-9,\\!$]+", gold):
        yield from (",".join(members[1:]), ",".join(members[:-1]), f"{gold}, 77")
    yield "0"


@pytest.mark.parametrize("name", DATA_SETS)
def test_golds_in_any_typography_earn_one(name: str) -> None:
    failed = [(g, s) for g in golds(name) for s in dict.fromkeys(spellings(g)) if earned(s, g) != 1.0]
    assert failed == []


@pytest.mark.parametrize("name", DATA_SETS)
def test_golds_with_one_thing_changed_earn_zero(name: str) -> None:
    unchanged = {"-0", "-0,-1,-\\frac{3}{2}"}
    failed = [
        (g, m) for g in golds(name) for m in mutations(g) if m != g and m not in unchanged and earned(m, g) != 0.0
    ]
    assert failed == []


def test_the_tool_names_the_faults() -> None:
    labels = [("5", "5.0", 1), ("5", "6", 0), ("\\sqrt{2}", "2^{1/2}", 0)]
    cases = [{"family": "f", "gold": gold, "answer": answer, "success": success} for gold, answer, success in labels]
    with GraderPool(workers=1, extractor="boxed", deadline_s=120) as pool:
        assert faults(cases, pool) == cases[2:]
