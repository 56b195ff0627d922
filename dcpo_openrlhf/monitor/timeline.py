"""RUN/timeline.jsonl: what every process of a run did when; the run page draws it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from dcpo_openrlhf import phases
from dcpo_openrlhf.monitor.sinks import JsonLines
from dcpo_openrlhf.phases import Phase

ANSWER_S = 1.0
"""Seconds that a row waits for the other processes; the phases of one that answers later are in the next row."""


class Timeline:
    """A row for the start, for every step, and for what follows the last one."""

    def __init__(self, run: Path, *, engines: Sequence[Any], ranks: Sequence[Any]) -> None:
        """The actors; one that is started again takes its predecessor's place in `engines`."""
        self._engines, self._ranks = engines, ranks
        self._file = JsonLines(run / "timeline.jsonl")
        self._asked: dict[str, ray.ObjectRef] = {}
        """Calls that have not answered yet, at most one a process."""
        self._begin = phases.now()

    def write(self, step: int, part: Literal["start", "step", "end"] = "step") -> None:
        """A row: step, part, its begin and end [seconds since 1970], and of every process what ended meanwhile.

        That is {process: [[phase, begin, end], ...]}, in seconds since the row's begin. A phase may have begun before
        it, or belong to another step: engines may generate for the next one.
        """
        begin, end = self._begin, phases.now()
        self._begin = end
        found = {
            process: [[name, round(b - begin, 4), round(e - begin, 4)] for name, b, e in done]
            for process, done in (("driver", phases.take()), *self._others())
        }
        self._file.line({"step": step, "part": part, "begin": begin, "end": end, "processes": found})

    def _others(self) -> Iterator[tuple[str, list[Phase]]]:
        """Every other process that answers, with what it did since it was last asked."""
        for kind, actors in (("engine", self._engines), ("policy", self._ranks)):
            for i, actor in enumerate(actors):
                if (process := f"{kind} {i}") not in self._asked:
                    self._asked[process] = actor.take_phases.remote()
        calls = list(self._asked.values())
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S) if calls else ([], [])
        for process, call in list(self._asked.items()):
            if call in done:
                del self._asked[process]
                try:
                    yield process, ray.get(call)
                except RayError:  # an engine that died: what it did is lost, and someone else tells of its death
                    continue

    def close(self) -> None:
        self._file.close()
