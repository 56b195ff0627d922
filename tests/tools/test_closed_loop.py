"""The closed loop: every row of METHODS runs in it, the same twice, and what holds the entropy holds it there."""

import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from dcpo_openrlhf.methods import METHODS
from tools import closed_loop

PAGE = Path(__file__).parents[2] / "docs" / "closed_loop.md"
STRONG_LAMBDA = {**closed_loop.STRONG_LAMBDA, "adaptive_entropy_step": 0.01}


def entropies(name: str, *, steps: int, **changes: Any) -> list[float]:
    (curve,) = closed_loop.curves(name, changes, steps=steps, seeds=1)
    return [entropy for entropy, _ in curve]


def test_the_page_has_every_line_of_the_tool() -> None:
    rows = re.findall(r"^\| (\w+) \| (.*?) \| \d", PAGE.read_text(), flags=re.M)
    assert [name for name, _ in rows] == [name for name, _ in closed_loop.cases()]
    assert {name for name, _ in rows} == set(METHODS)
    assert PAGE.read_text().startswith(next(closed_loop.page()))


ACTING: dict[str, dict[str, Any]] = {
    "adaptive_entropy": {"target_entropy": 3.0},  # nothing acts above H_0
    "entropic": {"entropic_threshold": 0.0},  # the first policy is sure of no token
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_runs_alike(name: str) -> None:
    first, second = (entropies(name, steps=4, **ACTING.get(name, {})) for _ in range(2))
    assert first == second and first[3] != first[0]
    assert (first == entropies("grpo", steps=4)) == (name == "grpo")


def test_lambda_holds_the_entropy_where_the_policy_gradient_takes_it() -> None:
    target = 1.6
    free = entropies("grpo", steps=120)
    held = entropies("adaptive_entropy", steps=120, **STRONG_LAMBDA, target_entropy=target)
    assert statistics.fmean(free[-20:]) < 0.75 * target
    assert statistics.fmean(held[-20:]) == pytest.approx(target, rel=0.15)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("clip_cov", {"clip_cov_share": 0.2, "clip_cov_low": 0.1}), ("kl_cov", {"kl_cov_share": 0.2})],
)
def test_the_covariance_methods_slow_the_fall(name: str, changes: dict[str, Any]) -> None:
    assert entropies(name, steps=60, **changes)[-1] > entropies("grpo", steps=60)[-1] + 0.1


def test_entropic_follows_the_error_in_both_directions() -> None:
    settings = {"entropic_threshold": 0.0, "entropic_integral": 0.0}
    free = entropies("grpo", steps=40)
    above = entropies("entropic", steps=40, target_entropy=3.4, **settings)
    below = entropies("entropic", steps=40, target_entropy=0.0, **settings)
    assert above[-1] > free[-1] + 0.1 and free[-1] > below[-1] + 0.05
