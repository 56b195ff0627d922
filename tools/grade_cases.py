"""Grade labelled answers with the grader of training: how many wrong ones earn 1, how many right ones 0, how fast.

python -m tools.grade_cases FILE [--workers N] [--list]      FILE: JSON lines {"family", "gold", "answer", "success"}
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from dcpo_openrlhf.reward.pool import GraderPool

SPEED_INTEGERS, SPEED_FORMULAS = 20_000, 2_000


def faults(cases: list[dict], pool: GraderPool) -> list[dict]:
    """The cases that do not earn what they must."""
    grades = pool.grade([f"\\boxed{{{case['answer']}}}" for case in cases], [case["gold"] for case in cases])
    return [case for case, grade in zip(cases, grades, strict=True) if grade.success != case["success"]]


def speed(pool: GraderPool) -> tuple[float, float]:
    """(integers, formulas) graded a second; no two formulas alike, each for a worker."""
    integers = [str(n) for n in range(SPEED_INTEGERS)]
    formulas = [(f"\\sqrt{{{n}}}+x", f"x+\\frac{{{n}}}{{\\sqrt{{{n}}}}}") for n in range(2, SPEED_FORMULAS + 2)]
    rates = []
    for answers, golds in ((integers, integers), tuple(zip(*formulas, strict=True))):
        started = time.perf_counter()
        pool.grade([f"So it is \\boxed{{{answer}}}." for answer in answers], list(golds))
        rates.append(len(answers) / (time.perf_counter() - started))
    return rates[0], rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print each fault")
    options = parser.parse_args()
    cases = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines() if line]
    with GraderPool(workers=options.workers, extractor="boxed", deadline_s=20) as pool:
        wrong = faults(cases, pool)
        integers, formulas = speed(pool)
    for success, name in ((0, "wrong answers that earn 1"), (1, "right answers that earn 0")):
        some = [case for case in wrong if case["success"] == success]
        families = ", ".join(f"{family} {n}" for family, n in Counter(case["family"] for case in some).most_common())
        print(f"{name}: {len(some)} of {sum(case['success'] == success for case in cases)}  {families}".rstrip())
        for case in some if options.list else ():
            print(f"  {case['gold']} | {case['answer']}")
    print(f"a second, {options.workers} workers: {integers:,.0f} integers, {formulas:,.0f} formulas")


if __name__ == "__main__":
    main()
