"""What responses earn: each is graded by the grader of its source, built-in or a function of the user's.

What needs no algebra is settled here. Symbolic comparisons, tests and reward functions can hang, in Python and in C,
where no signal handler of Python runs: they run in worker processes (processes.py) that are killed at a deadline.
"""

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from dcpo_openrlhf.reward.cases import Checks, checks_of, program_of
from dcpo_openrlhf.reward.compare import check_answers, settle
from dcpo_openrlhf.reward.extract import EXTRACTORS
from dcpo_openrlhf.reward.grades import Grade, Question
from dcpo_openrlhf.reward.processes import CRASHED, TIMED_OUT, GraderError, Job, Workers

__all__ = ["BUILT_IN", "Grade", "GraderError", "GraderPool", "Question", "check_question", "chosen_grader"]

logger = logging.getLogger(__name__)
PYTHON_TESTS = "python_tests"
BUILT_IN = (*EXTRACTORS, PYTHON_TESTS)


def chosen_grader(source: str, *, default: str, by_source: Mapping[str, str]) -> str:
    """The grader of a problem's source: by its name, else the first pattern (fnmatch) that fits, else the default."""
    fits = (grader for pattern, grader in by_source.items() if fnmatchcase(source, pattern))
    return by_source.get(source) or next(fits, default)


def check_question(grader: str, question: Question) -> None:
    """Raise ValueError for an unknown grader, or a question that a built-in one cannot grade. For a run's start."""
    if grader == PYTHON_TESTS:
        checks_of(question)
    elif ":" not in grader:
        check_answers(grader, [question.answer])


class GraderPool:
    """Grades responses, in at most `workers` processes, `deadline_s` seconds for each comparison, test or call.

    What is past its deadline, or whose worker dies, earns 0 and is counted in `timeouts` or `crashes`; what a function
    answers wrongly in `failures`. Workers start at the first response that needs one, so integer tasks never start any.
    They end with close(), at interpreter exit, and by themselves when the parent dies. Threads may share a pool; they
    take turns.
    """

    def __init__(
        self,
        *,
        workers: int,
        extractor: str = "boxed",
        deadline_s: float,
        batch_deadline_s: float = math.inf,
        by_source: Mapping[str, str] | None = None,
        batch_size: int | None = None,
        success_threshold: float = 0.5,
    ):
        """extractor: a built-in grader or a function's name, for sources that `by_source` (pattern -> grader) leaves.

        batch_deadline_s: seconds of one `grade`, from its first job on; what is left then has timed out.
        batch_size: responses of one call of a function, whole groups; None: all that it grades at a time.
        success_threshold: where a function names no success, it is 1 from this reward on.
        """
        self._default, self._by_source = extractor, dict(by_source or {})
        for grader in (extractor, *self._by_source.values()):
            if ":" not in grader and grader not in BUILT_IN:
                raise ValueError(f"extractor must be one of {', '.join(BUILT_IN)}, or FILE.py:NAME, not {grader!r}")
        if workers < 1 or deadline_s <= 0:
            raise ValueError(f"a pool needs workers >= 1 and deadline_s > 0, not {workers} and {deadline_s}")
        self.timeouts = 0  # responses graded 0 since their grading took longer than deadline_s
        self.crashes = 0  # responses graded 0 since their worker died
        self.failures = 0  # responses graded 0 since a reward function raised, or gave no number for them
        self._batch_size, self._threshold = batch_size, success_threshold
        self._workers = Workers(workers, deadline_s=deadline_s, batch_deadline_s=batch_deadline_s)
        self._lock, self._told = threading.Lock(), set[str]()

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; the pool grades no more."""
        with self._lock:
            self._workers.close()

    def grade(
        self,
        responses: Sequence[str],
        questions: Sequence[str | Question],
        *,
        queries: Sequence[str] | None = None,
    ) -> list[Grade]:
        """One Grade for each response, in order; a question may be its answer alone.

        queries: prompt and response as one text, for functions of OpenRLHF's form; None: the one behind the other.
        Raises ValueError for unequal counts or answers that a grader cannot meet, GraderError if no worker starts.
        """
        if len(responses) != len(questions):
            raise ValueError(f"one answer a response is needed, not {len(questions)} for {len(responses)}")
        asked = [Question(q) if isinstance(q, str) else q for q in questions]
        queries = queries or [q.prompt + response for q, response in zip(asked, responses, strict=True)]
        rows: dict[str, list[int]] = {}
        for i, question in enumerate(asked):
            grader = chosen_grader(question.source, default=self._default, by_source=self._by_source)
            rows.setdefault(grader, []).append(i)
        grades: dict[int, Grade] = {}
        jobs: list[Any] = []
        for grader, some in rows.items():
            if ":" in grader:
                batches = _batches(some, asked, self._batch_size)
                jobs += [_Call(grader, batch, asked, responses, queries, self._threshold) for batch in batches]
                continue
            if grader == PYTHON_TESTS:
                tested = [(i, program_of(responses[i]), checks_of(asked[i])) for i in some]
                jobs += [_Tested(i, program, tests) for i, program, tests in tested if program is not None]
                grades |= {i: Grade(0.0, None) for i, program, _ in tested if program is None}
                continue
            check_answers(grader, [asked[i].answer for i in some])
            comparisons: dict[tuple[str, str], _Comparison] = {}
            for i in some:
                found, answer = EXTRACTORS[grader](responses[i]), asked[i].answer
                reward = settle(found, answer)
                if reward is not None or found is None:
                    grades[i] = Grade(reward or 0.0, found)
                else:  # equal pairs are compared once
                    comparisons.setdefault((answer, found), _Comparison(answer, found)).rows.append(i)
            jobs += comparisons.values()
        with self._lock:
            if not self._workers.open:
                raise GraderError("the grader pool is closed; make a new one")
            for job in self._workers.run(jobs):
                grades |= job.grades()  # type: ignore[attr-defined]
                if isinstance(job, _Tested):
                    self._tell(job.lacking)
        self.timeouts += sum(g.timed_out for g in grades.values())
        self.crashes += sum(g.crashed for g in grades.values())
        self.failures += sum(bool(g.failure) and not g.timed_out and not g.crashed for g in grades.values())
        return [grades[i] for i in range(len(responses))]

    def _tell(self, lacking: Sequence[str]) -> None:
        """What programs under test can do here that they should not, once."""
        for what in lacking:
            if what not in self._told:
                self._told.add(what)
                logger.warning("python_tests: this kernel lets no process give up %s", what)


class _Tested(Job):
    """Whether a program passes its tests; the worker ends it at its deadline by itself."""

    def __init__(self, row: int, program: str, tests: Checks) -> None:
        super().__init__({"program": program, "code": tests.code, "cases": tests.cases}, grace_s=4.0)
        self._row, self._program = row, program

    @property
    def lacking(self) -> Sequence[str]:
        return self.reply["lacking"] if self.lost is None else ()

    def grades(self) -> dict[int, Grade]:
        found = {"passed": False, "timed_out": self.lost == TIMED_OUT} if self.lost is not None else self.reply
        passed, timed_out, crashed = bool(found["passed"]), found["timed_out"], self.lost == CRASHED
        return {self._row: Grade(float(passed), self._program, timed_out, crashed)}


class _Comparison(Job):
    """Whether two answers are equal, for all responses that gave this one."""

    def __init__(self, gold: str, found: str) -> None:
        super().__init__({"gold": gold, "found": found})
        self.found, self.rows = found, list[int]()

    def grades(self) -> dict[int, Grade]:
        timed_out, crashed = self.lost == TIMED_OUT, self.lost == CRASHED
        return dict.fromkeys(self.rows, Grade(float(self.reply is True), self.found, timed_out, crashed))


class _Call(Job):
    """A reward function on some rows. Where it raises, hangs or dies, halves are tried: one row costs itself."""

    def __init__(self, function: str, rows: Sequence[int], *batch: Any) -> None:
        asked, responses, queries, threshold = batch
        of_rows = [(q.prompt, responses[i], q.answer, q.source, q.metadata) for i, q in ((i, asked[i]) for i in rows)]
        payload = {"rows": of_rows, "queries": [queries[i] for i in rows], "threshold": threshold}
        super().__init__(payload, function=function)
        self.rows, self._batch = rows, batch

    @property
    def _raised(self) -> str | None:
        """Why the call gave no answer at all."""
        if self.lost is not None:
            return {TIMED_OUT: "ran past reward.deadline", CRASHED: "its process died"}[self.lost]
        return self.reply.get("raised") if isinstance(self.reply, dict) else None

    def parts(self) -> list[Job]:
        if self._raised is None or len(self.rows) == 1:
            return []
        middle = len(self.rows) // 2
        assert self.function is not None
        return [_Call(self.function, rows, *self._batch) for rows in (self.rows[:middle], self.rows[middle:])]

    def grades(self) -> dict[int, Grade]:
        reply: Any = self.reply
        failure = self._raised or (reply.get("wrong") if isinstance(reply, dict) else None)
        answers = [{"failure": failure}] * len(self.rows) if failure else reply
        return {i: self._grade(answer) for i, answer in zip(self.rows, answers, strict=True)}

    def _grade(self, answer: dict[str, Any]) -> Grade:
        if "failure" in answer:
            failure = f"{self.function}: {answer['failure']}"
            return Grade(0.0, None, self.lost == TIMED_OUT, self.lost == CRASHED, failure=failure)
        return Grade(answer["reward"], answer["extracted"], success=answer["success"], logs=answer["logs"])


def _batches(rows: Sequence[int], asked: Sequence[Question], size: int | None) -> Sequence[Sequence[int]]:
    """The rows in batches of `size`, or a little more where a group, the responses to one problem, would be cut."""
    if size is None:
        return [rows]
    batches: list[list[int]] = [[]]
    for row in rows:
        if len(batches[-1]) >= size and asked[row].id != asked[batches[-1][-1]].id:
            batches.append([])
        batches[-1].append(row)
    return batches
