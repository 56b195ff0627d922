"""Impossible and stale values: the error names step, prompt, response and field."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dcpo_openrlhf.experience import DCPOExperience
from dcpo_openrlhf.rollout.checks import ImpossibleValue, require_possible_samples, require_possible_statistics
from dcpo_openrlhf.rollout.tasks import Problem, Prompt

PROMPTS = [Prompt(Problem(f"sum-{i}", "1 + 1", "2", "test"), f"What is 1 + {i}?") for i in range(2)]


def sample(prompt: int, **changed: Any) -> DCPOExperience:
    fields = {
        "sequences": torch.tensor([[1, 2, 3, 4]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "action_mask": torch.tensor([[0, 1, 1]]),
        "rollout_log_probs": torch.tensor([[0.0, -0.5, -1.0]]),
        "rewards": torch.tensor([1.0]),
        "response_length": torch.tensor([2]),
        "prompts": [PROMPTS[prompt].text],
        "info": {"weight_version": torch.tensor([3])},
    }
    return DCPOExperience(**fields | changed)


POLICY = range(3, 4)


def check(*, second: dict[str, Any] | None = None, versions: range | None = POLICY, rows: int = 4) -> None:
    rows_of = [sample(0), sample(0, **(second or {})), sample(1), sample(1)]
    require_possible_samples(rows_of[:rows], step=9, prompts=PROMPTS, group_size=2, versions=versions)


def test_sound_samples_pass() -> None:
    check()
    check(second={"rollout_log_probs": torch.tensor([[5.0, 1e-6, -1.0]])})  # rounding, and a value outside the mask


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"rewards": torch.tensor([NAN])}, r"field rewards = nan must be finite"),
        ({"rewards": torch.tensor([INF])}, r"field rewards = inf must be finite"),
        ({"scores": torch.tensor([0.5])}, r"field scores = 0\.5, the success, must be 0 or 1"),
        ({"rollout_log_probs": torch.tensor([[0.0, 0.25, -1.0]])}, r"field rollout_log_probs = 0\.25 must be .* <= 0"),
        ({"rollout_log_probs": torch.tensor([[0.0, NAN, -1.0]])}, r"field rollout_log_probs = nan"),
        (
            {"response_length": torch.tensor([3])},
            r"fields action_mask and response_length disagree, 2 tokens.*length 3",
        ),
        (
            {"response_length": torch.tensor([0]), "action_mask": torch.zeros(1, 3)},
            r"fields action_mask and response_length disagree, 0 tokens in the mask, length 0",
        ),
        ({"prompts": [PROMPTS[1].text]}, r"field prompts is that of another group \('What is 1 \+ 1\?'\)"),
        ({"info": {"weight_version": torch.tensor([2])}}, r"field weight_version = 2 is stale, the policy is at 3"),
    ],
)
def test_impossible_sample_is_named(second: dict[str, Any], message: str) -> None:
    with pytest.raises(ImpossibleValue, match=r"step 9, prompt 'sum-0', response 1: " + message):
        check(second=second)


def test_other_weights_pass_where_the_recipe_allows_them() -> None:
    check(second={"info": {"weight_version": torch.tensor([2])}}, versions=None)


@pytest.mark.parametrize(("version", "said"), [(2, ""), (3, ""), (4, "impossible"), (1, "stale")])
def test_weights_that_are_older_pass_up_to_the_bound(version: int, said: str) -> None:
    def checked() -> None:
        check(second={"info": {"weight_version": torch.tensor([version])}}, versions=range(2, 4))

    if not said:
        return checked()
    text = rf"weight_version = {version} is {said}, the policy is at 3: not within rollout.ahead = 1 of it\. Look"
    with pytest.raises(ImpossibleValue, match=text):
        checked()


def test_a_group_that_is_not_whole_is_an_error() -> None:
    with pytest.raises(ImpossibleValue, match=r"step 9: a group must be whole, 2 prompts \* group_size 2.*got 3"):
        check(rows=3)


def statistics(**changed: Any) -> DCPOExperience:
    fields = {
        "sequences": torch.ones(4, 4, dtype=torch.long),
        "action_mask": torch.tensor([[0, 1, 1]]).expand(4, 3),
        "action_log_probs": torch.full((4, 3), -0.5),
        "tempered_log_probs": torch.full((4, 3, 2), -0.5),
        "entropy": torch.full((4, 3), 0.5),
    }
    return replace(DCPOExperience(**fields), **changed)


def spoiled(shape: tuple[int, ...], value: float, good: float) -> torch.Tensor:
    values = torch.full(shape, good)
    values[2, 1] = value
    return values


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("action_log_probs", spoiled((4, 3), 0.1, -0.5)),
        ("tempered_log_probs", spoiled((4, 3, 2), INF, -0.5)),
        ("entropy", spoiled((4, 3), -0.2, 0.5)),
        ("entropy", spoiled((4, 3), NAN, 0.5)),
    ],
)
def test_impossible_statistic_is_named(field: str, values: torch.Tensor) -> None:
    require_possible_statistics([statistics()], step=9, prompts=PROMPTS, group_size=2)
    with pytest.raises(ImpossibleValue, match=rf"step 9, prompt 'sum-1', response 0: field {field} = "):
        require_possible_statistics([statistics(**{field: values})], step=9, prompts=PROMPTS, group_size=2)


def test_a_row_of_a_later_update_is_named() -> None:
    sound, spoilt = statistics(), statistics(entropy=spoiled((4, 3), NAN, 0.5))
    prompts = [Prompt(Problem(f"sum-{i}", "", "", ""), "") for i in range(4)]
    with pytest.raises(ImpossibleValue, match=r"step 9, prompt 'sum-3', response 0: field entropy = nan"):
        require_possible_statistics([sound, spoilt], step=9, prompts=prompts, group_size=2)


def test_what_stands_outside_the_mask_is_not_looked_at() -> None:
    outside = {name: getattr(statistics(), name).clone() for name in ("action_log_probs", "entropy")}
    for values in outside.values():
        values[:, 0] = NAN
    require_possible_statistics([statistics(**outside)], step=9, prompts=PROMPTS, group_size=2)
