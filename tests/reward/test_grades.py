"""Reward and success are two numbers."""

import math

import pytest

from dcpo_openrlhf.reward.grades import Grade


def test_a_reward_of_0_or_1_is_the_success_where_none_is_given() -> None:
    assert [Grade(reward, "7").success for reward in (0.0, 1.0)] == [0.0, 1.0]
    grade = Grade(-2.5, "7", success=1.0)
    assert (grade.reward, grade.success) == (-2.5, 1.0)


@pytest.mark.parametrize("numbers", [(0.5, math.nan), (math.nan, 1.0), (math.inf, 0.0), (1.0, 0.5), (1.0, -1.0)])
def test_what_is_no_reward_or_no_success_is_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="a reward is finite and a success 0 or 1"):
        Grade(numbers[0], None, success=numbers[1])
