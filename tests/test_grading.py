"""From responses to grades: what graders are given, what an event says, what metrics the logs become."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf.trainer.ppo_utils.length_penalty import apply_overlong_penalty

from dcpo_openrlhf.grading import failures, grade_samples, mean_logs
from dcpo_openrlhf.recipe.schema import Reward
from dcpo_openrlhf.reward.pool import Grade, Question
from dcpo_openrlhf.rollout.tasks import Problem, Prompt

PROMPTS = [Prompt(Problem(f"p{i}", "?", "7", "mine", metadata={"more": i}), f"<user> {i}") for i in range(2)]


class FakeTokenizer:
    def decode(self, tokens: torch.Tensor, *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens.tolist())) + ("" if skip_special_tokens else " <end>")


class FakeGrader:
    def grade(self, responses: list[str], questions: list[Question], *, queries: list[str] | None) -> list[Grade]:
        self.seen = responses, questions, queries
        return [Grade(2.5, "", success=1.0) for _ in responses]


def sample(token: int, truncated: bool) -> Any:
    return SimpleNamespace(
        sequences=torch.tensor([[1, 2, token]]),
        action_mask=torch.tensor([[0, 1]]),
        labels=["7"],
        truncated=torch.tensor([truncated]),
    )


def test_graders_are_given_the_whole_problem_and_openrlhfs_queries_where_a_function_grades() -> None:
    samples, grader = [sample(5 + i, truncated=i == 3) for i in range(4)], FakeGrader()
    reward = Reward(function="a:f", require_end=True)
    texts, grades = grade_samples(
        samples, PROMPTS, tokenizer=FakeTokenizer(), grader=grader, reward=reward, max_new_tokens=8
    )  # type: ignore[arg-type]
    assert texts == ["5", "6", "7", "8"]
    first, second = (Question("7", f"<user> {i}", "mine", {"more": i}, f"p{i}") for i in range(2))
    assert grader.seen == (texts, [first, first, second, second], [f"1 2 {i} <end>" for i in range(5, 9)])
    assert [(g.reward, g.success) for g in grades] == [(2.5, 1.0)] * 3 + [(0.0, 0.0)]
    grade_samples(samples, PROMPTS, tokenizer=FakeTokenizer(), grader=grader, reward=Reward(), max_new_tokens=8)  # type: ignore[arg-type]
    assert grader.seen[2] is None


def test_what_a_function_failed_on_earns_0_however_long_it_is() -> None:
    row, grader = sample(5, truncated=True), FakeGrader()
    row.response_length = torch.tensor([8])
    grader.grade = lambda *_, **__: [Grade(0.0, None, failure="f.py:f: no")]  # type: ignore[method-assign]
    made = {
        "tokenizer": FakeTokenizer(),
        "grader": grader,
        "reward": Reward(overlong_buffer_len=4),
        "max_new_tokens": 8,
    }
    assert grade_samples([row], PROMPTS[:1], **made)[1][0].reward == 0.0  # type: ignore[arg-type]


def test_an_event_names_the_function_and_the_problems() -> None:
    bad = Grade(0.0, None, failure="f.py:f: ValueError: no")
    (event,) = failures([Grade(1.0, ""), bad, bad, bad], PROMPTS, step=4)
    assert (event["step"], event["cause"], event["responses"], event["problems"]) == (
        4,
        "reward_function",
        3,
        ["p0", "p1"],
    )
    assert event["text"] == "reward function f.py:f: ValueError: no; 3 responses earn 0, to the problems 'p0', 'p1'"
    assert list(failures([Grade(1.0, "")] * 4, PROMPTS, step=4)) == []


def test_logs_become_means_over_the_responses_that_have_them() -> None:
    grades = [Grade(1.0, "", logs={"length": 2.0, "form": 1.0}), Grade(0.0, "", logs={"length": 4.0}), Grade(0.0, None)]
    assert mean_logs(grades) == {"reward/length": 3.0, "reward/form": 1.0}


@pytest.mark.parametrize("length", [1, 60, 61, 75, 99, 100])
def test_the_overlong_penalty_is_openrlhfs_and_on_the_reward_alone(length: int) -> None:
    row = sample(5, truncated=length == 100)
    row.response_length = torch.tensor([length])
    reward = Reward(overlong_buffer_len=40, overlong_penalty_factor=0.5)
    made = {"tokenizer": FakeTokenizer(), "grader": FakeGrader(), "reward": reward, "max_new_tokens": 100}
    (grade,) = grade_samples([row], PROMPTS[:1], **made)[1]  # type: ignore[arg-type]
    theirs = SimpleNamespace(rewards=torch.tensor([2.5]), response_length=torch.tensor([length]))
    apply_overlong_penalty([theirs], max_new_tokens=100, overlong_buffer_len=40, overlong_penalty_factor=0.5)
    assert (grade.reward, grade.success) == (pytest.approx(float(theirs.rewards)), 1.0)
    assert grade.logs == {"overlong_penalty": pytest.approx(2.5 - float(theirs.rewards), abs=1e-6)}
