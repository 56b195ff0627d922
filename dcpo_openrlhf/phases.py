"""What this process does when: its phases, for the run's timeline; a profiler's trace names them too."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch

Phase = tuple[str, float, float]
"""(name, begin, end) [seconds since 1970, by this host's clock]."""

_EPOCH = time.time() - time.monotonic()  # a clock that is set during the run moves no phase
_ended: deque[Phase] = deque(maxlen=10_000)
"""Phases that are over and that nobody took; a process has one of these. Where nobody asks, the oldest are dropped."""


def now() -> float:
    return _EPOCH + time.monotonic()


def add(name: str, begin: float) -> None:
    """A phase that ends now."""
    _ended.append((name, begin, now()))


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """The block, or as a decorator every call of the function, is a phase of this process."""
    begin = now()
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        add(name, begin)


def take() -> list[Phase]:
    """Phases that ended since the last call, in the order of their ends."""
    return [_ended.popleft() for _ in range(len(_ended))]


class Stopwatch:
    """Seconds of each phase of a step, as time/* metrics."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[f"time/{name}"] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"time/step": self._last - self._begin}
