"""SIGINT and SIGTERM as an exception that is raised once, where the run can be left: not in the middle of an update."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived: everything this run started is ended on the way out.

    A KeyboardInterrupt, since Ray passes on no other exception that a handler raises while it waits; it may pass on a
    plain one, which `raising` and `limit` turn back.
    """


class OutOfTime(KeyboardInterrupt):
    """What had a limit took longer."""


class _State:
    """A process has one set of signal handlers, so there is one of these."""

    depth = 0
    """Blocks that must not be left in the middle."""
    pending: int | None = None
    """The signal that waits for their end."""
    bound = 0.0
    """Seconds that it waits at most."""
    ends = 0.0
    """When the bound is over, on the monotonic clock."""
    arrived: int | None = None
    """The first signal, once there was one."""
    expired = False
    """Has the alarm of `limit` gone off?"""


@contextlib.contextmanager
def raising(bound: float = 0.0) -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM raise Interrupted once inside; a second one is ignored. Yields what puts the handlers back.

    bound: seconds from the signal for which `held` blocks may go on.
    """

    def install() -> None:
        for name in _SIGNALS:
            signal.signal(name, _handle)
        signal.signal(signal.SIGALRM, _alarm)

    before = {name: signal.getsignal(name) for name in (*_SIGNALS, signal.SIGALRM)}
    _State.depth, _State.pending, _State.bound, _State.arrived = 0, None, bound, None
    install()
    try:
        yield install
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted | OutOfTime) or _State.arrived is None:
            raise
        raise Interrupted(_State.arrived) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in before.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal waits until this block is left, or until the bound of `raising` is over."""
    _State.depth += 1
    try:
        yield
    except BaseException:  # the run ends by this error
        signal.setitimer(signal.ITIMER_REAL, 0)
        _State.pending = None
        raise
    finally:
        _State.depth -= 1
    if _State.depth == 0 and _State.pending is not None:
        number, _State.pending = _State.pending, None
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted(number)


def leave(keep: float) -> None:
    """Leave a `held` block for the signal that waits for its end, once `keep` seconds of the bound or less are left."""
    if _State.pending is not None and seconds_left() <= keep:
        raise Interrupted(_State.pending)


def seconds_left() -> float:
    """What is left of the bound after a signal."""
    return _State.ends - time.monotonic()


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime where the block takes longer, at once where there is no time left."""
    if seconds <= 0:
        raise OutOfTime
    _State.expired = False
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        if _State.expired:
            raise OutOfTime from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _handle(number: int, _: Any) -> None:
    for name in _SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    _State.ends, _State.arrived = time.monotonic() + _State.bound, number
    if _State.depth and _State.bound > 0:
        _State.pending = number
        signal.setitimer(signal.ITIMER_REAL, _State.bound)
    else:
        raise Interrupted(number)


def _alarm(*_: Any) -> None:
    number, _State.pending = _State.pending, None
    _State.expired = number is None
    raise OutOfTime if number is None else Interrupted(number)
