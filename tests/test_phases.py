"""What a process did when: every call is a phase, one that fails too; a profiler's trace has the same names."""

from collections.abc import Iterator

import pytest
import torch

from dcpo_openrlhf import phases
from dcpo_openrlhf.phases import phase


@pytest.fixture(autouse=True)
def nothing_before() -> Iterator[None]:
    phases.take()
    yield
    phases.take()


@phase("square")
def square(x: int) -> int:
    """x * x."""
    if x < 0:
        raise ValueError(x)
    return x * x


def test_blocks_and_calls_are_phases_in_the_order_of_their_ends() -> None:
    before = phases.now()
    with phase("outer"):
        assert square(3) == 9
        with pytest.raises(ValueError, match="-1"):
            square(-1)
    found = phases.take()
    assert [name for name, _, _ in found] == ["square", "square", "outer"]
    (_, b1, e1), (_, b2, e2), (_, b3, e3) = found
    assert before <= b3 <= b1 <= e1 <= b2 <= e2 <= e3 <= phases.now()
    assert phases.take() == []
    assert square.__name__ == "square" and square.__doc__ == "x * x."


def test_where_nobody_asks_the_oldest_are_dropped() -> None:
    for i in range(10_003):
        phases.add(str(i), 0.0)
    found = phases.take()
    assert (len(found), found[0][0], found[-1][0]) == (10_000, "3", "10002")


def test_a_trace_names_them() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        square(2)
    assert "square" in {event.key for event in profile.key_averages()}
