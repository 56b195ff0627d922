"""A signal raises once, not in the middle of an update, and what follows it is bounded."""

import os
import signal
import threading
import time

import pytest
import ray

from dcpo_openrlhf import local_ray, signals
from dcpo_openrlhf.signals import Interrupted, OutOfTime
from tests.bounds import HANG_S


def send(number: int = signal.SIGTERM) -> None:
    signal.raise_signal(number)
    time.sleep(0.01)  # the handler runs between two instructions of this thread


def test_a_signal_raises_at_once_and_a_second_is_ignored() -> None:
    with signals.raising():
        with pytest.raises(Interrupted) as caught:
            send()
        assert caught.value.args == (signal.SIGTERM,)
        send()
        send(signal.SIGINT)


def test_a_signal_waits_for_the_end_of_a_held_block() -> None:
    done = []
    with signals.raising(5.0), pytest.raises(Interrupted), signals.held():
        with signals.held():
            send(signal.SIGINT)
        done.append("the outer block goes on")
    assert done


def test_a_held_block_is_left_when_the_bound_is_over() -> None:
    with signals.raising(0.1), pytest.raises(Interrupted), signals.held():
        send()
        time.sleep(30)
        pytest.fail("the block went on")


def test_a_held_block_may_leave_early_for_a_signal_that_waits() -> None:
    with signals.raising(HANG_S):
        with signals.held():
            signals.leave(keep=2 * HANG_S)  # there is none
        with pytest.raises(Interrupted) as caught, signals.held():
            send()
            signals.leave(keep=1.0)  # time enough
            signals.leave(keep=2 * HANG_S)
            pytest.fail("the block went on")
        assert caught.value.args == (signal.SIGTERM,) and signals.seconds_left() > 0


def test_without_a_bound_nothing_is_held() -> None:
    with signals.raising(), pytest.raises(Interrupted), signals.held():
        send()
        pytest.fail("the block went on")


def test_what_follows_a_signal_has_the_rest_of_the_bound() -> None:
    with signals.raising(2.0):
        with pytest.raises(Interrupted):
            send()
        with signals.limit(signals.seconds_left()):
            pass
        with pytest.raises(OutOfTime), signals.limit(signals.seconds_left()):
            time.sleep(30)
        with pytest.raises(OutOfTime), signals.limit(signals.seconds_left()):
            pytest.fail("nothing is left of the bound")


def test_an_error_in_a_held_block_is_the_error_that_is_seen() -> None:
    with signals.raising(2.0):
        with pytest.raises(ValueError, match="mine"), signals.held():
            send()
            raise ValueError("mine")
        time.sleep(2.5)  # no alarm is left


def test_handlers_come_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with signals.raising():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before


def test_a_signal_ends_a_wait_for_ray_at_once() -> None:
    """Ray passes on a KeyboardInterrupt alone: another exception comes as a SystemError when the wait is over."""
    context = local_ray.start(num_cpus=1, include_dashboard=False, log_to_driver=False)
    assert context is not None
    try:
        forever = ray.remote(lambda: time.sleep(HANG_S)).remote()
        for wait in (lambda: ray.get(forever), lambda: ray.wait([forever], timeout=HANG_S)):
            with pytest.raises(Interrupted), signals.raising():
                threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
                wait()
    finally:
        ray.shutdown()
