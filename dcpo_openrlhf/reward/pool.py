"""Success of a response, in {0, 1}: extract the final answer, compare integers, leave the rest to math-verify.

math-verify can hang, in Python and in C, and its own timeouts need the main thread's SIGALRM. So symbolic comparisons
run in worker processes (`python -m dcpo_openrlhf.rewards`) that are killed at a deadline and replaced.
"""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

Extractor = Literal["boxed", "last_integer"]

# A final answer is short: anything longer is wrong, not worth a worker's time, and might not fit into a pipe at once.
MAX_ANSWER_CHARS = 2000


class GraderError(RuntimeError):
    """The grader itself cannot work; never raised for a bad response, which is graded 0."""


@dataclass(frozen=True)
class Grade:
    """What one response earned."""

    reward: float
    """1.0 or 0.0."""
    extracted: str | None
    """The final answer as found in the response; None where the asked form is absent."""
    timed_out: bool = False
    crashed: bool = False


# --- extraction: linear in the length of the response ----------------------------------------------------------------

_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance; None where there is none.

    `\{` and `\}` are letters, not braces. `\boxed 5`, without braces, is not accepted: prompts ask for `\boxed{}`.
    """
    opened: list[int | None] = []  # one for each open brace: where the content starts if it is a box
    last: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    return None if last is None else text[last[0] : last[1]].strip()


_MINUS = "\u2212-"  # typographic and ASCII; the latter last, so that a character class does not read it as a range
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
# A sign counts only where it cannot be a subtraction or a range: 5-3 ends in 3.
_SIGN = rf"(?:(?<![\w)\]}}])(?P<sign>[+{_MINUS}]))?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?P<digits>{_DIGITS})(?P<fraction>\.[0-9]+)?|(?<![\w.])\.[0-9]+)")
_INTEGER = re.compile(rf"(?P<sign>[+{_MINUS}])?\s*(?P<digits>{_DIGITS})(?P<fraction>\.0*)?")
_LATEX_SPACE = re.compile(r"\\[,!]\s*|\\?\$")  # 32,\! 348 and \$5


def _canonical_integer(match: re.Match[str]) -> str:
    """Sign and digits without separators and leading zeros. Text, since int() refuses more than 4300 digits."""
    digits = match["digits"].replace(",", "").lstrip("0") or "0"
    negative = match["sign"] is not None and match["sign"] in _MINUS
    return f"-{digits}" if negative and digits != "0" else digits


def last_integer(text: str) -> str | None:
    """The last number in the text, if it is an integer, without thousands separators: "-1,234." gives "-1234".

    None where there is no number or the last one has a fraction: 12.5 is not the integer 5 (nor 12), but 7.0 is 7.
    """
    last = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    if last is None or last["digits"] is None or (last["fraction"] or "").strip(".0"):
        return None
    return _canonical_integer(last)


def as_integer(text: str) -> str | None:
    r"""The integer that the whole text is, in canonical digits; None where it is anything else. `1{,}234` is 1234."""
    match = _INTEGER.fullmatch(_LATEX_SPACE.sub("", text.replace("{,}", ",")).strip())
    return None if match is None else _canonical_integer(match)


_MANTISSA = rf"[+{_MINUS}]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_E_NOTATION = re.compile(rf"(?P<mantissa>{_MANTISSA})[eE](?P<exponent>[+-]?[0-9]+)")
_DECIMAL = re.compile(
    rf"(?P<mantissa>{_MANTISSA})(?:(?:[eE]|\s*(?:\\times|\\cdot|\*|\u00d7)\s*10\s*\^)(?P<exponent>[+-]?[0-9]+))?"
)


def as_decimal(text: str) -> float | None:
    r"""The number that the whole text is, as 0.12, 1.2e-5 or 1.2 \times 10^{-5}; None where it is anything else."""
    plain = _LATEX_SPACE.sub("", re.sub(r"\{([+-]?[0-9]+)\}", r"\1", text)).strip()
    match = _DECIMAL.fullmatch(plain)
    return None if match is None else float(f"{match['mantissa']}e{match['exponent'] or 0}".replace(_MINUS[0], "-"))


EXTRACTORS = {"boxed": extract_boxed, "last_integer": last_integer}

# --- comparison ------------------------------------------------------------------------------------------------------


def _settle(extracted: str | None, answer: str) -> float | None:
    """The reward where it needs no algebra; None where only a symbolic comparison can tell."""
    if not extracted or len(extracted) > MAX_ANSWER_CHARS:
        return 0.0
    if extracted == answer.strip():
        return 1.0
    gold, found = as_integer(answer), as_integer(extracted)
    if gold is not None and found is not None:
        return float(gold == found)
    gold_value, value = as_decimal(answer), as_decimal(extracted)
    if gold_value is None or value is None:
        return None
    # math-verify rounds to six decimals, and so takes 2e-19 for 1e-27. Six significant digits hold at every scale.
    return float(math.isclose(gold_value, value, rel_tol=1e-6 if gold is None else 1e-12))


def _check(extractor: str, answers: Sequence[str]) -> None:
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {sorted(EXTRACTORS)}, not {extractor!r}")
    for answer in answers:
        if extractor == "last_integer" and as_integer(answer) is None:
            raise ValueError(f'extractor "last_integer" needs integer answers, not {answer!r}; use "boxed"')
        if len(answer) > MAX_ANSWER_CHARS:
            raise ValueError(f"an answer has at most {MAX_ANSWER_CHARS} characters, not {len(answer)}: {answer[:60]!r}")


_BARE_POINT = re.compile(r"(?<=[0-9])\.(?![0-9])")


def _forms(text: str) -> list[str]:
    """The text without a bare point ("D.", "1./3") and, for e-notation, its power of ten: LaTeX reads e33 as e * 33."""
    text = _BARE_POINT.sub("", text.strip()).removesuffix(".")
    match = _E_NOTATION.fullmatch(text)
    return [text] if match is None else [text, f"{match['mantissa']} \\cdot 10^{{{match['exponent']}}}"]


def _symbolic_equal(gold: str, found: str) -> bool:
    """Whether math-verify finds the two equal. It has no time limit: only for a process that can be killed.

    Only the box is read ("first_match"): by default math-verify falls back to any number in a text it cannot parse.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        config = [LatexExtractionConfig(boxed_match_priority=0)]
        return parse(f"\\boxed{{{text}}}", config, extraction_mode="first_match", parsing_timeout=None)  # type: ignore

    found_forms = [read(form) for form in _forms(found)]
    golds = [read(form) for form in _forms(gold)]
    return any(verify(g, f, timeout_seconds=None) for g in golds for f in found_forms)


def grade(response: str, answer: str, *, extractor: Extractor) -> float:
    """1.0 if the response's final answer equals `answer`, else 0.0, in this process and without a deadline.

    For tests and single items: a hostile response can hang it or take all memory. Use GraderPool for a policy's output.
    """
    _check(extractor, [answer])
    extracted = EXTRACTORS[extractor](response)
    reward = _settle(extracted, answer)
    if reward is None and extracted is not None:
        reward = float(_symbolic_equal(answer, extracted))
    return reward or 0.0


# --- the pool --------------------------------------------------------------------------------------------------------

START_LIMIT_S = 600.0  # importing sympy takes 3 s, much longer where all cores are busy
READY, EQUAL, UNEQUAL = b"r", b"1", b"0"  # a worker's replies are single bytes: no partial reads


class _Worker:
    """A child process that compares one pair at a time; `pair` is None while it starts and while it is idle."""

    def __init__(self, deadline_s: float):
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        # A fresh interpreter, not a fork: the caller may hold threads, CUDA and Ray. Its __main__ is not imported.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dcpo_openrlhf.reward.pool", str(deadline_s)],
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

    def __init__(self, *, workers: int, extractor: Extractor, deadline_s: float):
        _check(extractor, [])
        if workers < 1 or deadline_s <= 0:
            raise ValueError(f"a pool needs workers >= 1 and deadline_s > 0, not {workers} and {deadline_s}")
        self.timeouts = 0  # responses graded 0 since their comparison took longer than deadline_s
        self.crashes = 0  # responses graded 0 since their worker died
        self._size, self._extractor, self._deadline_s = workers, extractor, deadline_s
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
        _check(self._extractor, answers)
        extracted = [EXTRACTORS[self._extractor](response) for response in responses]
        settled = [_settle(found, answer) for found, answer in zip(extracted, answers, strict=True)]
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
        pending = deque(pairs)
        try:
            while len(outcomes) < len(pairs):
                self._hand_out(pending, outstanding=len(pairs) - len(outcomes))
                active = [w for w in self._workers if not w.idle]
                patience = max(0.0, min(w.due for w in active) - time.monotonic())
                for worker in wait(active, timeout=patience):  # type: ignore  # anything with a fileno will do
                    self._receive(worker, outcomes)  # type: ignore
                self._expire(outcomes)
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
                    f"check that `{sys.executable} -c 'import math_verify'` works"
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

    def _discard(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.stop()


# --- the worker process ----------------------------------------------------------------------------------------------

WORKER_MEMORY_BYTES = 4 * 2**30  # address space; sympy needs 0.3 GiB, 10^(10^10) would take all there is


def _worker_main(deadline_s: float) -> None:
    """Reads pairs [gold, found] as JSON lines from stdin, answers each with one byte, ends with the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not a reply
    import math_verify  # noqa: F401  # before READY, so that no comparison pays for it

    logging.disable(logging.WARNING)  # math-verify warns that it has no time limit
    os.write(replies, READY)
    for line in sys.stdin:
        # The kernel ends this process even inside C code, should the parent die before the deadline.
        signal.alarm(math.ceil(deadline_s) + 5)
        equal = _symbolic_equal(*json.loads(line))
        signal.alarm(0)
        os.write(replies, EQUAL if equal else UNEQUAL)


if __name__ == "__main__":
    _worker_main(float(sys.argv[1]))
