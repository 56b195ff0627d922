"""What a grader may know of a response, and what the response earned: reward and success, two numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Question(NamedTuple):
    """What was asked, as far as graders may read it."""

    answer: str
    prompt: str = ""
    """The text that the policy read."""
    source: str = ""
    metadata: Mapping[str, Any] = {}
    """Every further key of the problem's line."""
    id: str = ""


@dataclass(frozen=True)
class Grade:
    """What one response earned."""

    reward: float
    """Any finite number: what the group advantage is made of."""
    extracted: str | None
    """The final answer as found in the response; None where the asked form is absent."""
    timed_out: bool = False
    crashed: bool = False
    success: float = math.nan
    """R in {0, 1}, DCPO's, and what counts as right. Not given: the reward, which must be 0 or 1 then."""
    logs: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of this response; their means are metrics, reward/NAME."""
    failure: str = ""
    """Why a reward function gave nothing that can be used, with its name: the grade is 0 then. Empty for all else."""

    def __post_init__(self) -> None:
        if math.isnan(self.success):
            object.__setattr__(self, "success", float(self.reward))
        if not math.isfinite(self.reward) or self.success not in (0.0, 1.0):
            raise ValueError(
                f"a reward is finite and a success 0 or 1, got reward = {self.reward} and success = {self.success}; "
                "name the success of a response whose reward is neither 0 nor 1"
            )
