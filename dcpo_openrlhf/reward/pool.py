"""Success of a response, in {0, 1}: extract the final answer, settle here what needs no algebra.

Algebra can hang, in Python and in C (factorials of six digits), where no signal handler of Python runs. So symbolic
comparisons run in worker processes (worker.py) that are killed at a deadline and replaced.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from dcpo_openrlhf.reward.compare import check_answers, settle
from dcpo_openrlhf.reward.extract import EXTRACTORS, Extractor
from dcpo_openrlhf.reward.grades import Grade
from dcpo_openrlhf.reward.worker import EQUAL, READY


class GraderError(RuntimeError):
    """The grader itself cannot work; never raised for a bad response, which is graded 0."""


START_LIMIT_S = 600.0  # importing mpmath takes 0.2 s, much longer where all cores are busy


class _Worker:
    """A child process that compares one pair at a time; `pair` is None while it starts and while it is idle."""

    def __init__(self, deadline_s: float):
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, os.environ.get("PYTHONPATH", "")]
        # A fresh interpreter, not a fork: the caller may hold threads, CUDA and Ray. Its __main__ is not imported.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dcpo_openrlhf.reward.worker", str(deadline_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self.ready = False
        self.pair: tuple[str, str] | None = None
        self.due = time.monotonic() + START_LIMIT_S

    @property
    def idle(self) -> bool:
        return self.ready and self.pair is None

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, pair: tuple[str, str], *, deadline_s: float) -> None:
        """Starts a comparison. Never blocks: the pipe of an idle worker is empty and holds the longest request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(pair).encode() + b"\n")
        self.pair, self.due = pair, time.monotonic() + deadline_s

    def stop(self) -> int:
        """Kills and reaps the process; its exit code."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return self.process.wait()


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


class GraderPool:
    """Grades responses; symbolic comparisons in at most `workers` processes, `deadline_s` seconds each.

    A comparison past its deadline, or one whose worker dies, earns 0 and is counted in `timeouts` or `crashes`.
    Workers start at the first comparison that needs one, so integer tasks never start any. They end with close(), at
    interpreter exit, and by themselves when the parent dies. Threads may share a pool; they take turns.
    """

    def __init__(self, *, workers: int, extractor: Extractor, deadline_s: float, batch_deadline_s: float = math.inf):
        """batch_deadline_s: seconds of one `grade`, from its first comparison on; what is left then has timed out."""
        check_answers(extractor, [])
        if workers < 1 or deadline_s <= 0:
            raise ValueError(f"a pool needs workers >= 1 and deadline_s > 0, not {workers} and {deadline_s}")
        self.timeouts = 0  # responses graded 0 since their comparison took longer than deadline_s
        self.crashes = 0  # responses graded 0 since their worker died
        self._size, self._extractor, self._deadline_s = workers, extractor, deadline_s
        self._batch_deadline_s = batch_deadline_s
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; the pool grades no more."""
        with self._lock:
            self._finalizer()

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """One Grade for each response, in order; equal (answer, extracted) pairs are compared once.

        Raises ValueError for unequal counts or answers that the extractor cannot meet, GraderError if no worker starts.
        """
        if len(responses) != len(answers):
            raise ValueError(f"one answer a response is needed, not {len(answers)} for {len(responses)}")
        check_answers(self._extractor, answers)
        extracted = [EXTRACTORS[self._extractor](response) for response in responses]
        settled = [settle(found, answer) for found, answer in zip(extracted, answers, strict=True)]
        pairs = [(a, f) for a, f, reward in zip(answers, extracted, settled, strict=True) if reward is None and f]
        with self._lock:
            if not self._finalizer.alive:
                raise GraderError("the grader pool is closed; make a new one")
            outcomes = self._compare(list(dict.fromkeys(pairs)))
        grades = []
        for answer, found, reward in zip(answers, extracted, settled, strict=True):
            outcome = None if reward is not None or found is None else outcomes[answer, found]
            reward = float(outcome == "equal") if reward is None else reward
            grades.append(Grade(reward, found, timed_out=outcome == "timed_out", crashed=outcome == "crashed"))
        self.timeouts += sum(g.timed_out for g in grades)
        self.crashes += sum(g.crashed for g in grades)
        return grades

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """pair (gold, found) -> "equal", "unequal", "timed_out" or "crashed"."""
        outcomes: dict[tuple[str, str], str] = {}
        pending, ends = deque(pairs), math.inf
        try:
            while len(outcomes) < len(pairs):
                self._hand_out(pending, outstanding=len(pairs) - len(outcomes))
                active = [w for w in self._workers if not w.idle]
                if ends == math.inf and any(w.pair for w in active):  # starting a worker is not comparing
                    ends = time.monotonic() + self._batch_deadline_s
                patience = max(0.0, min(ends, *(w.due for w in active)) - time.monotonic())
                for worker in wait(active, timeout=patience):  # type: ignore  # anything with a fileno will do
                    self._receive(worker, outcomes)  # type: ignore
                self._expire(outcomes)
                if time.monotonic() >= ends:
                    self._end_batch(pending, outcomes)
        except BaseException:
            _stop_all(self._workers)  # their answers would be taken for those of the next call
            raise
        return outcomes

    def _hand_out(self, pending: deque[tuple[str, str]], *, outstanding: int) -> None:
        """Gives each idle worker a pair, and starts workers while there are more pairs than workers."""
        for worker in [w for w in self._workers if w.idle]:
            if pending:
                try:
                    worker.send(pending[0], deadline_s=self._deadline_s)
                    pending.popleft()
                except BrokenPipeError:  # it died while idle: the pair is not to blame
                    self._discard(worker)
        while len(self._workers) < min(self._size, outstanding):
            self._workers.append(_Worker(self._deadline_s))

    def _receive(self, worker: _Worker, outcomes: dict[tuple[str, str], str]) -> None:
        reply = os.read(worker.fileno(), 1)
        if reply == READY:
            worker.ready = True
        elif reply and worker.pair is not None:
            outcomes[worker.pair] = "equal" if reply == EQUAL else "unequal"
            worker.pair = None
        else:  # end of file
            started, pair = worker.ready, worker.pair
            code = self._discard(worker)
            if not started:
                raise GraderError(
                    f"a grading worker exited with code {code} before it was ready; its error is on stderr above; "
                    f"check that `{sys.executable} -c 'import mpmath'` works"
                )
            if pair is not None:
                outcomes[pair] = "crashed"

    def _expire(self, outcomes: dict[tuple[str, str], str]) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if not w.idle and w.due <= now]:
            if worker.pair is None:
                raise GraderError(
                    f"a grading worker was not ready within {START_LIMIT_S:.0f} s; free some CPU or memory"
                )
            outcomes[worker.pair] = "timed_out"
            self._discard(worker)

    def _end_batch(self, pending: deque[tuple[str, str]], outcomes: dict[tuple[str, str], str]) -> None:
        """What is compared and what waits has timed out."""
        for worker in [w for w in self._workers if w.pair is not None]:
            assert worker.pair is not None
            outcomes[worker.pair] = "timed_out"
            self._discard(worker)
        outcomes |= dict.fromkeys(pending, "timed_out")
        pending.clear()

    def _discard(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.stop()
