"""What the page of the bench says follows from the seconds of the steps."""

import re

import pytest

from tools.bench import ahead

APART = {"rollout": 5.5, "token_stats": 1.0, "train": 3.0, "weight_sync": 0.5, "step": 10.0}
BESIDE = {"rollout": 0.5, "token_stats": 1.5, "train": 4.0, "weight_sync": 0.7, "wait": 0.2, "step": 7.0}


def rows(seconds: dict[str, float], count: int) -> list[dict[str, float]]:
    """Steps of these seconds, with a first one, a second and a last one that are not to be counted."""
    own = {f"time/{name}": value for name, value in seconds.items()}
    return [{name: 100.0 for name in own}] * 2 + [own] * count + [{name: 0.0 for name in own}]


def test_the_overlap_that_is_possible_is_what_both_sides_have_in_common() -> None:
    apart, beside = (ahead.phases(rows(seconds, 3)) for seconds in (APART, BESIDE))
    assert beside["weight_sync"] == pytest.approx(0.5) and apart["wait"] == 0.0, "the wait is a part of the sync's time"
    possible, reached = ahead.overlap(apart, beside)
    assert possible == min(5.5 - 0.5, 0.5 + 1.0 + 3.0) and reached == 3.0
    assert ahead.overlap(apart | {"train": 9.0}, beside)[0] == 5.0, "the engine is the shorter side"
    text = ahead.page(
        apart, beside, command="make bench", steps=6, rounds=1, responses="9.0 tokens a response", load=0.5
    )
    assert "4.50 s a step. Reached: 3.00 s, 67% of it; the step takes 0.70 times as long" in text
    lines = dict(re.findall(r"^\| (.*?) \| (.*) \|$", text, flags=re.M))
    assert lines["the engine draws the step's responses"] == "5.00 | 0.00"
    assert (lines["update"], lines["**step**"]) == ("3.00 | 4.00", "10.00 | 7.00")
