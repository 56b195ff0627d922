"""What the trainer does between rollout and update: grades, and refuses responses of other weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcpo_openrlhf.assemble import make_controller
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import GraderPool
from dcpo_openrlhf.trainer import DCPOTrainer, Stopwatch

TEXTS = {5: "It is 7", 6: "It is 8", 7: "7 and on and on"}


class FakeTokenizer:
    def decode(self, tokens: torch.Tensor, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        (token,) = tokens.tolist()
        return TEXTS[token]


def make_recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "unused"}, "task": {"kind": "arithmetic"}, **sections})


def sample(token: int, *, truncated: bool = False, version: int = 3) -> SimpleNamespace:
    return SimpleNamespace(
        sequences=torch.tensor([[1, 2, token]]),
        action_mask=torch.tensor([[0, 1]]),
        labels=["7"],
        truncated=torch.tensor([truncated]),
        info={"weight_version": torch.tensor([version])},
    )


def trainer(recipe: Recipe, grader: GraderPool | None = None) -> Any:
    return SimpleNamespace(recipe=recipe, tokenizer=FakeTokenizer(), grader=grader, weights_version=3)


@pytest.mark.parametrize(("require_end", "expected"), [(False, [1.0, 0.0, 1.0]), (True, [1.0, 0.0, 0.0])])
def test_a_response_that_was_cut_off_earns_nothing_where_the_end_is_required(require_end: bool, expected: list) -> None:
    recipe = make_recipe(reward={"extractor": "last_integer", "require_end": require_end})
    with GraderPool(workers=1, extractor="last_integer", deadline_s=5) as grader:
        texts, grades = DCPOTrainer._grade(
            trainer(recipe, grader), [sample(5), sample(6, truncated=True), sample(7, truncated=True)]
        )
    assert texts == list(TEXTS.values())
    assert [g.reward for g in grades] == expected


def test_stopwatch_laps_add_up_to_the_step() -> None:
    clock = Stopwatch()
    clock.lap("rollout")
    clock.lap("train")
    seconds = clock.seconds()
    assert set(seconds) == {"time/rollout", "time/train", "time/step"}
    assert seconds["time/rollout"] + seconds["time/train"] == pytest.approx(seconds["time/step"])


def test_controller_takes_every_constant_from_the_recipe() -> None:
    constants = {
        "target_entropy": 0.7,
        "temperature_low": 0.6,
        "temperature_high": 1.7,
        "alpha_schedule": "pi",
        "alpha_max": 0.3,
        "proportional_gain": 5.0,
        "integral_gain": 0.2,
        "entropy_source": "lagged_sampled",
    }
    controller = make_controller(make_recipe(method=constants))
    assert {name: getattr(controller, name) for name in constants} == constants
