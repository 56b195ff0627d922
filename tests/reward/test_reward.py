"""Extraction and grading by hand-made cases and real gold answers; the pool by hostile answers and dead processes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcpo_openrlhf.reward.compare import grade
from dcpo_openrlhf.reward.extract import as_integer, extract_boxed, extract_choice, last_integer
from dcpo_openrlhf.reward.pool import Grade, GraderError, GraderPool
from dcpo_openrlhf.reward.processes import Workers
from tests.bounds import HANG_S

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
HALF, ALSO_HALF = r"\sin\frac{\pi}{6}", r"\cos\frac{\pi}{3}"  # what only a worker can compare
HANGS = r"\frac{400000!+399999!}{2(400000!+399999!)}"  # inside a C function, where no Python signal handler runs


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, extractor="boxed", deadline_s=120) as pool:
        yield pool


def boxed(answer: str) -> str:
    return f"So the answer is \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no box", None),
        (r"\boxed{5}", "5"),
        (r"first \boxed{5}, no: \boxed{ 6 }", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7", None),
        (r"\boxed{5} and then, cut off, \boxed{\frac{1}{", "5"),
        (r"open { brace \boxed{5}", "5"),
        (r"} \boxed{5}", "5"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{}", ""),
        (r"\boxed{5}{6}", "5}{6"),
        (r"\boxed{5} {6}", "5} {6"),
        (r"{\boxed{5}}{6}", "5"),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        ("3 + 4 = 7", "7"),
        ("7.", "7"),
        ("The answer is -12!", "-12"),
        ("\u22125", "-5"),
        ("+5", "5"),
        ("5-3", "3"),
        ("(2)-3", "3"),
        ("$-3$", "-3"),
        ("It costs $1,234,567.", "1234567"),
        ("1,2,34", "34"),
        ("007", "7"),
        ("-0", "0"),
        ("7.0", "7"),
        ("7 or 12.5", None),
        (".5", None),
        ("9" * 5000, "9" * 5000),
        ("x = - 5", "-5"),
        ("- 5", "-5"),
        ("7 - 5", "5"),
        ("(2) - 3", "3"),
        ("so 3 -5", "-5"),
        ("7/2", None),
        ("7 / 2", None),
        (r"\frac{7}{2}", None),
        (r"\frac72", None),
        ("3^2", None),
        ("3^{2}", None),
        ("10^-2", None),
        ("x_2", None),
        ("1e3", None),
        ("1E+3", None),
        ("12:30", None),
        ("Step 2: 30", "30"),
        ("Answer:30", "30"),
        ("5 or 6", "6"),
    ],
)
def test_last_integer(text, expected):
    assert last_integer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12", "12"), (" +2 ", "2"), ("1{,}234", "1234"), (r"32,\! 348", "32348"), (r"\$10\,000$", "10000"), ("3.00", "3")]
    + [(text, None) for text in ("", "1.5", "1,23", "x", "1/2", "2 3", "5 cm", r"5\,6", "5$6")],
)
def test_as_integer(text, expected):
    assert as_integer(text) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"So it is \boxed{B}.", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{\textbf{D}}", "D"),
        (r"\boxed{B: 12 apples}", "B"),
        (r"\boxed{12}", None),
        (r"\boxed{A, B}", None),
        (r"The answer is A. No: \boxed{C}", "C"),
        (r"I box \boxed{C} first, but the answer is (D).", "D"),
        ("The answer is (B).", "B"),
        ("the answer is: **J**", "J"),
        ("Answer: C", "C"),
        ("**Answer:** $D$", "D"),
        ("Answer: $\\boxed{E}$", "E"),
        ("The correct answer is option B, since A is too small.", "B"),
        ("The answer is A because of B.", "A"),
        ("The answer choice is (I) 5", "I"),
        ("First the answer is A. Then the answer is B.", "B"),
        ("The answer is A or B", None),
        ("The answer is (A) and (B)", None),
        ("Answer: A, C", None),
        ("The answer is I think B", None),
        ("The answer is A dog", None),
        ("The answer is a", None),
        ("The answer is K", None),
        ("The answer is 12", None),
        ("The answer is Both", None),
        ("B", "B"),
        ("Let me see.\n\n(B)", "B"),
        ("**C**.", "C"),
        ("A B C D", None),
        ("Options: A, B, C or D. It could be A.", None),
        ("", None),
    ],
)
def test_extract_choice(text, letter):
    assert extract_choice(text) == letter


def test_a_choice_is_graded_by_its_letter():
    with GraderPool(workers=1, extractor="choice", deadline_s=5) as pool:
        grades = pool.grade(["The answer is (B).", "Answer: B", "Answer: C", "no idea"], ["B", "(B)", "B", "B"])
        assert grades == [Grade(1.0, "B"), Grade(1.0, "B"), Grade(0.0, "C"), Grade(0.0, None)]
        assert pool._workers.active == []
        with pytest.raises(ValueError, match="needs a letter from A to J, not '12'"):
            pool.grade(["12"], ["12"])


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("83", "83"),
        ("1,234", "1234"),
        (r"\frac{20}{2}", "10"),
        (r"5 \text{ cm}", "5"),
        ("x=5", "5"),
        ("3/6", r"\frac{1}{2}"),
        (r"\sqrt{117}", r"3\sqrt{13}"),
        ("-2, 1", "1,-2"),
        (r"-\frac{1}{3}", "-1./3"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        (r"4.5 \cdot 10^{33} \text{ erg}", "4.5e33"),
        ("450e31", "4.5e33"),
        ("300000000", "3e8"),
        ("10^{-8}", "1e-8"),
        (r"\text{C}", "C"),
        ("D.", "D"),
        ("np.arcsin(10/13)", "np.arcsin(10/13)"),
    ],
)
def test_equal_answers_earn_one(pool, answer, gold):
    assert pool.grade([boxed(answer)], [gold]) == [Grade(1.0, answer)]
    assert grade(boxed(answer), gold, extractor="boxed") == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("203", "83"),
        ("10", "20"),
        ("-5", "5"),
        ("12345678.5", "12345678"),
        ("(2,1)", "(1,2)"),
        ("3, 5", "5"),
        ("4.6e33", "4.5e33"),
        ("0", "1e-8"),
        ("1.3e-27", "2.9e-19"),  # equal to six decimals
        ("0.00000000034", "3.3e-10"),
        ("4.5 e 33", "1e5"),
        ("blah ^^ 5", "5"),  # math-verify's defaults find the 5, here and in the next
        ("blah ^^ $5$", "5"),
        ("D", "C"),
        ("", "5"),
        ("0" * 2000 + "5", "5"),  # too long to be an answer
    ],
)
def test_wrong_answers_earn_zero(pool, answer, gold):
    assert pool.grade([boxed(answer)], [gold])[0].reward == 0.0
    assert grade(boxed(answer), gold, extractor="boxed") == 0.0


def test_only_the_last_box_counts_and_only_a_box():
    assert grade(r"\boxed{5} \boxed{6}", "5", extractor="boxed") == 0.0
    assert grade("the answer is 5", "5", extractor="boxed") == 0.0
    assert grade("the answer is 5", "5", extractor="last_integer") == 1.0


def test_integers_start_no_worker():
    with GraderPool(workers=2, extractor="last_integer", deadline_s=1) as pool:
        grades = pool.grade(["It is 7.", "8", "seven"], ["7", "7", "7"])
        assert grades == [Grade(1.0, "7"), Grade(0.0, "8"), Grade(0.0, None)]
        assert pool._workers.active == []


def test_grades_keep_the_order_of_the_responses(pool):
    answers = [r"\frac{1}{2}", "7", r"\sqrt{2}"] * 5
    responses = [boxed("0.5"), boxed("8"), boxed(r"\sqrt{2} \,")] * 5
    assert [g.reward for g in pool.grade(responses, answers)] == [1.0, 0.0, 1.0] * 5


def test_a_pool_grades_off_the_main_thread(pool):
    grades = []
    thread = threading.Thread(target=lambda: grades.extend(pool.grade([boxed(HALF)], [r"\frac{1}{2}"])))
    thread.start()
    thread.join()
    assert grades == [Grade(1.0, HALF)]


@pytest.mark.parametrize(("hostile", "times_out"), [("9**9**9**9", False), ("10^{10^{10^{10}}}", False), (HANGS, True)])
def test_a_hostile_answer_earns_zero_and_the_pool_works_on(hostile, times_out):
    with GraderPool(workers=1, extractor="boxed", deadline_s=5) as pool:
        # The same pair twice is compared once, and counted for both responses.
        grades = pool.grade([boxed(hostile), boxed(HALF), boxed(hostile)], [r"\frac{1}{2}"] * 3)
        assert grades == [Grade(0.0, hostile, times_out), Grade(1.0, HALF), Grade(0.0, hostile, times_out)]
        assert (pool.timeouts, pool.crashes) == (2 * times_out, 0)
        assert pool.grade([boxed(ALSO_HALF)], [r"\frac{1}{2}"])[0].reward == 1.0


def _wait_until(condition):
    while not condition():
        time.sleep(0.02)


def test_a_dead_worker_is_counted_and_replaced():
    with GraderPool(workers=1, extractor="boxed", deadline_s=300) as pool:
        grades = []
        thread = threading.Thread(target=lambda: grades.extend(pool.grade([boxed(HANGS)], [r"\frac{1}{2}"])))
        thread.start()
        _wait_until(lambda: pool._workers.active and pool._workers.active[0].job)
        os.kill(pool._workers.active[0].process.pid, signal.SIGKILL)
        thread.join()
        assert grades == [Grade(0.0, HANGS, crashed=True)]
        assert (pool.timeouts, pool.crashes) == (0, 1)

        assert pool.grade([boxed(ALSO_HALF)], [r"\frac{1}{2}"])[0].reward == 1.0
        idle = pool._workers.active[0].process
        idle.kill()
        idle.wait()
        assert pool.grade([boxed(HALF)], [r"\frac{1}{2}"])[0].reward == 1.0
        assert pool.crashes == 1  # it died between two comparisons: no response is to blame


def test_one_job_goes_to_one_of_two_workers_that_wait():
    workers, sent = Workers(2, deadline_s=60, batch_deadline_s=60), []
    idle = SimpleNamespace(idle=True, ready=True, function=None, send=lambda job, deadline_s: sent.append(job))
    workers.active = [idle, idle]
    workers._hand_out(defaultdict(deque, {None: deque(["job"])}))
    assert sent == ["job"]


def test_close_ends_the_workers():
    pool = GraderPool(workers=2, extractor="boxed", deadline_s=60)
    pool.grade([boxed(HALF), boxed(ALSO_HALF)], [r"\frac{1}{2}"] * 2)
    processes = [worker.process for worker in pool._workers.active]
    pool.close()
    pool.close()
    assert len(processes) == 2 and all(process.returncode is not None for process in processes)
    with pytest.raises(GraderError, match="closed"):
        pool.grade([boxed("5")], ["5"])


PARENT = """
import os, signal, sys, threading
from dcpo_openrlhf.reward.pool import GraderPool
pool = GraderPool(workers=1, extractor="boxed", deadline_s=float(sys.argv[2]))
gold = r"\\frac{1}{2}"
assert pool.grade([r"\\boxed{\\sin\\frac{\\pi}{6}}"], [gold])[0].reward == 1.0
if sys.argv[1] == "busy":
    threading.Thread(target=pool.grade, args=([rf"\\boxed{{{sys.argv[3]}}}"], [gold]), daemon=True).start()
    while pool._workers.active[0].job is None:
        pass
if sys.argv[1] != "exit":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_batch_has_a_bound_of_its_own():
    hanging = [boxed(HANGS.replace("400000", str(400000 + i))) for i in range(12)]
    with GraderPool(workers=2, extractor="boxed", deadline_s=HANG_S, batch_deadline_s=1.0) as pool:
        grades = pool.grade([*hanging, boxed("5")], [r"\frac{1}{2}"] * 12 + ["5"])
        assert [g.timed_out for g in grades] == [True] * 12 + [False] and pool.timeouts == 12
        assert pool.grade([boxed(r"\sin\frac{\pi}{6}")], [r"\frac{1}{2}"])[0].reward == 1.0  # the pool goes on


@pytest.mark.parametrize(("state", "deadline"), [("exit", 60), ("idle", 60), ("busy", 5)])
def test_no_worker_outlives_its_parent(state, deadline):
    command = [sys.executable, "-c", PARENT, state, str(deadline), HANGS]
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=root)
    # The worker holds the same stderr: its end of file comes when both have ended.
    _, errors = parent.communicate(timeout=HANG_S)
    assert parent.returncode == (0 if state == "exit" else -signal.SIGKILL), errors


def test_a_worker_that_cannot_start_is_an_error_and_not_a_zero(monkeypatch, tmp_path):
    (tmp_path / "mpmath.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        GraderPool(workers=1, extractor="boxed", deadline_s=5) as pool,
        pytest.raises(GraderError, match="exited with code 1 before it was ready"),
    ):
        pool.grade([boxed(HALF)], [r"\frac{1}{2}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extractor": "letter"}, "extractor must be one of"),
        ({"workers": 0}, "workers >= 1"),
        ({"deadline_s": 0}, "deadline_s > 0"),
    ],
)
def test_wrong_pool_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GraderPool(**{"workers": 1, "extractor": "boxed", "deadline_s": 1.0, **arguments})


def test_wrong_grading_arguments_are_refused(pool):
    with pytest.raises(ValueError, match="2 for 1"):
        pool.grade(["5"], ["5", "6"])
    with pytest.raises(ValueError, match="needs integer answers, not '1/2'"):
        grade("5", "1/2", extractor="last_integer")


def test_the_module_imports_neither_sympy_nor_torch_nor_ray():
    code = "import sys, dcpo_openrlhf.reward.pool; print(*({'sympy', 'torch', 'ray', 'vllm'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout == b"\n"


# --- real gold answers -----------------------------------------------------------------------------------------------


def golds(name: str) -> list[str]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository in shared/data")
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines() if line]


@pytest.mark.parametrize("name", ["gsm8k", "math500", "aime24", "amc23", "minerva_math", "olympiadbench"])
def test_real_golds_equal_themselves_and_nothing_else(pool, name):
    sample = golds(name)[:60]
    wrong = [str(int(gold) + 10) if gold.lstrip("-").isdigit() else r"\frac{1234567}{891}" for gold in sample]
    assert [g.reward for g in pool.grade([boxed(gold) for gold in sample], sample)] == [1.0] * len(sample)
    assert [g.reward for g in pool.grade([boxed(answer) for answer in wrong], sample)] == [0.0] * len(sample)
    assert (pool.timeouts, pool.crashes) == (0, 0)


def test_real_golds_in_another_spelling(pool):
    sample = [gold for gold in golds("math500") if as_integer(gold) is None][:60]
    grades = pool.grade([boxed(f"{gold.replace('frac', 'dfrac')} \\,") for gold in sample], sample)
    failed = [gold for gold, g in zip(sample, grades, strict=True) if not g.reward]
    assert failed == []


def test_real_e_notation_golds_equal_their_powers_of_ten(pool):
    sample = [gold for gold in golds("minerva_math") if re.fullmatch(r"[0-9.]+e-?[0-9]+", gold)]
    latex = ["{} \\times 10^{{{}}} \\text{{ m}}".format(*gold.split("e")) for gold in sample]
    assert len(sample) > 50
    assert [g.reward for g in pool.grade([boxed(answer) for answer in latex], sample)] == [1.0] * len(sample)
