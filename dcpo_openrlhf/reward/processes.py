"""Worker processes for jobs that can hang, in Python and in C: each is killed at its deadline and replaced."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dcpo_openrlhf.reward.functions import environment
from dcpo_openrlhf.reward.worker import READY


class GraderError(RuntimeError):
    """The grader itself cannot work; never raised for a bad response, which is graded 0."""


START_LIMIT_S = 600.0  # importing mpmath takes 0.2 s, torch seconds, both much longer where all cores are busy
PIPE_BYTES = 60_000  # what an empty pipe surely takes at once
TIMED_OUT, CRASHED = "timed out", "crashed"


class Job:
    """One request to a worker. `reply` is what it answered; `lost` says TIMED_OUT or CRASHED where that is nothing."""

    def __init__(self, payload: Any, *, function: str | None = None, grace_s: float = 0.0) -> None:
        """grace_s: seconds beyond the deadline, for a job that keeps it by itself."""
        self.payload, self.function, self.grace_s = payload, function, grace_s
        self.reply: Any = None
        self.lost: str | None = None

    def parts(self) -> list["Job"]:
        """Smaller jobs that are to take its place after what became of it; none where this is its end."""
        return []


class _Worker:
    """A child process that does one job at a time; `job` is None while it starts and while it is idle."""

    def __init__(self, deadline_s: float, function: str | None):
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, os.environ.get("PYTHONPATH", "")]
        arguments = [str(deadline_s), *([] if function is None else [function])]
        # A fresh interpreter, not a fork: the caller may hold threads, CUDA and Ray. Its __main__ is not imported.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dcpo_openrlhf.reward.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment() | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # what it starts is killed with it
        )
        self.function, self.ready = function, False
        self.job: Job | None = None
        self.due = time.monotonic() + START_LIMIT_S
        self._read = b""

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, job: Job, *, deadline_s: float) -> None:
        """Starts a job, without waiting: a request that the pipe may not hold is written by a thread."""
        assert self.process.stdin is not None
        data = json.dumps(job.payload).encode() + b"\n"
        if len(data) <= PIPE_BYTES:
            self.process.stdin.write(data)
        elif self.process.poll() is not None:
            raise BrokenPipeError
        else:
            threading.Thread(target=_write, args=(os.dup(self.process.stdin.fileno()), data), daemon=True).start()
        self.job, self.due = job, time.monotonic() + deadline_s + job.grace_s

    def read(self) -> bytes | None:
        """A whole line of the worker's, b"" at its end, None while there is no more than a part of one."""
        part = os.read(self.fileno(), 1 << 20)
        self._read += part
        if not part or self._read.endswith(b"\n"):
            line, self._read = (self._read if part else b""), b""
            return line
        return None

    def stop(self) -> int:
        """Kills and reaps the process; its exit code."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return self.process.wait()


def _write(pipe: int, data: bytes) -> None:
    with suppress(BrokenPipeError), os.fdopen(pipe, "wb", buffering=0) as file:  # its end is told by the other pipe
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


class Workers:
    """At most `size` processes for the built-in graders and as many for each reward function.

    They start at the first job that needs one. They end with close(), at interpreter exit, and by themselves when the
    parent dies.
    """

    def __init__(self, size: int, *, deadline_s: float, batch_deadline_s: float) -> None:
        self.size, self.deadline_s, self.batch_deadline_s = size, deadline_s, batch_deadline_s
        self.active: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop_all, self.active)

    @property
    def open(self) -> bool:
        return self._finalizer.alive

    def close(self) -> None:
        self._finalizer()

    def run(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs when each has a reply or is lost; in place of one that has parts, its parts."""
        pending: defaultdict[str | None, deque[Job]] = defaultdict(deque)
        for job in jobs:
            pending[job.function].append(job)
        done, ends, busy = [], math.inf, False
        try:
            while busy or any(pending.values()):
                self._hand_out(pending)
                if ends == math.inf and any(w.job for w in self.active):  # starting a worker is not grading
                    ends = time.monotonic() + self.batch_deadline_s
                waiting = [w for w in self.active if not w.idle]
                patience = max(0.0, min(ends, *(w.due for w in waiting)) - time.monotonic())
                finished = [self._receive(w) for w in wait(waiting, timeout=patience)]  # type: ignore  # has a fileno
                finished += self._expired(everything=time.monotonic() >= ends)
                for job in filter(None, finished):
                    parts = [] if time.monotonic() >= ends else job.parts()
                    pending[job.function].extendleft(reversed(parts))
                    done += [] if parts else [job]
                if time.monotonic() >= ends:
                    for job in (job for some in pending.values() for job in some):
                        job.lost = TIMED_OUT
                        done.append(job)
                    pending.clear()
                busy = any(w.job for w in self.active)
        except BaseException:
            _stop_all(self.active)  # their answers would be taken for those of the next call
            raise
        return done

    def _hand_out(self, pending: dict[str | None, deque[Job]]) -> None:
        """Gives each idle worker a job of its kind, and starts workers while there are more jobs than workers."""
        for worker in [w for w in self.active if w.idle]:
            jobs = pending[worker.function]
            if not jobs:  # there may be fewer than idle workers
                continue
            try:
                worker.send(jobs[0], deadline_s=self.deadline_s)
                jobs.popleft()
            except BrokenPipeError:  # it died while idle: the job is not to blame
                self._discard(worker)
        for function, jobs in pending.items():
            own = [w for w in self.active if w.function == function]
            starting = sum(not w.ready for w in own)
            for _ in range(min(len(jobs) - starting, self.size - len(own))):
                self.active.append(_Worker(self.deadline_s, function))

    def _receive(self, worker: _Worker) -> Job | None:
        line, job = worker.read(), worker.job
        if line is None:
            return None
        if line == READY:
            worker.ready = True
            return None
        if line and job is not None:
            job.reply, worker.job = json.loads(line), None
            return job
        with suppress(subprocess.TimeoutExpired):  # end of file: it is ending, with an exit code of its own
            worker.process.wait(timeout=5)
        started, code = worker.ready, self._discard(worker)
        if not started:
            raise GraderError(
                f"a grading worker exited with code {code} before it was ready; its error is on stderr above; check "
                f"that `{sys.executable} -c 'import mpmath'` works"
                + (f", and {worker.function}" * bool(worker.function))
            )
        if job is not None:
            job.lost = CRASHED
        return job

    def _expired(self, *, everything: bool) -> list[Job]:
        """Jobs whose time is over; with `everything`, all that are under way."""
        now, lost = time.monotonic(), []
        for worker in [w for w in self.active if not w.idle and (w.due <= now or (everything and w.job))]:
            if worker.job is None:
                raise GraderError(
                    f"a grading worker was not ready within {START_LIMIT_S:.0f} s; free some CPU or memory"
                )
            worker.job.lost = TIMED_OUT
            lost.append(worker.job)
            self._discard(worker)
        return lost

    def _discard(self, worker: _Worker) -> int:
        self.active.remove(worker)
        return worker.stop()
