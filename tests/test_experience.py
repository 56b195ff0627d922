"""The experience maker: one forward of pi_old, then the controller, the target ratio and the mixed advantage."""

from typing import Any

import pytest
import torch

from dcpo_openrlhf import objectives
from dcpo_openrlhf.config import Recipe
from dcpo_openrlhf.experience import DCPOExperienceMaker, batch_entropies
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.trainer import make_controller

from openrlhf.trainer.ppo_utils.experience import Experience  # isort: skip  (dcpo_openrlhf installs the stub it needs)


class FakeTokenizer:
    pad_token_id = 0


class FakeGroup:
    """Stands for the policy actors: statistics are a function of the token ids and the temperature."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def async_run_method_batch(self, method_name: str, rows: list, temperatures: list) -> list[Any]:
        assert method_name == "token_statistics"
        self.calls.append(temperatures[0])
        results = []
        for row in rows:
            logp = -(row.sequences[:, 1:].float() / 10) * row.action_mask
            tempered = torch.stack([logp / t for t in temperatures[0]], -1)
            results.append({"logp": logp, "entropy": 0.5 - logp, "tempered_logp": tempered})
        return results

    def gather(self, refs: list[Any]) -> list[Any]:
        return refs


def make_maker(**method: Any) -> DCPOExperienceMaker:
    recipe = Recipe.model_validate(
        {
            "model": {"path": "unused"},
            "task": {"kind": "arithmetic"},
            "method": {"target_entropy": 5.0, "alpha_max": 1.0, **method},
            "train": {"prompts_per_step": 4, "prompts_per_update": 2, "group_size": 2, "steps": 1},
            "parallel": {"devices_per_node": 1},
        }
    )
    strategy = RecipeStrategy(recipe)
    return DCPOExperienceMaker(
        FakeGroup(), None, None, None, None, strategy, FakeTokenizer(), controller=make_controller(recipe)
    )


def samples(rewards: list[float]) -> list[Experience]:
    """One ragged response a reward: two prompt tokens, then i % 3 + 1 tokens."""
    found = []
    for i, reward in enumerate(rewards):
        length = 2 + i % 3 + 1
        actions = torch.arange(1, length) >= 2
        found.append(
            Experience(
                sequences=torch.arange(1, length + 1)[None] + i,
                attention_mask=torch.ones(1, length, dtype=torch.long),
                action_mask=actions.long()[None],
                rollout_log_probs=-(torch.arange(2, length + 1).float()[None] + i) / 10,
                rewards=torch.tensor([reward]),
                response_length=torch.tensor([int(actions.sum())]),
                truncated=torch.tensor([i == 0]),
                total_length=torch.tensor([float(length)]),
                info={"reward": torch.tensor([reward])},
            )
        )
    return found


REWARDS = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_advantages_are_those_of_the_maths_with_the_batch_own_entropy() -> None:
    maker = make_maker()
    updates = maker.make_experience_batch(samples(REWARDS))
    assert [len(u.sequences) for u in updates] == [4, 4]
    assert maker.actor_model_group.calls == [[0.8, 1.2]]  # both temperatures, one forward

    every_logp = torch.cat([u.action_log_probs[u.mask] for u in updates])
    exact, sampled = batch_entropies(updates)
    assert exact == pytest.approx(float((0.5 - every_logp).mean())) and sampled == pytest.approx(
        -float(every_logp.mean())
    )
    assert maker.decision == (pytest.approx(exact), 1.2, pytest.approx(1.0 / 0.5))  # H < H_0; alpha_max / success rate

    for update, rewards in zip(updates, (REWARDS[:4], REWARDS[4:]), strict=True):
        reward = torch.tensor(rewards)
        expected = objectives.mixed_advantage(
            group_advantage=objectives.group_advantage(reward=reward, group_size=2),
            success=reward,
            target_ratio=(update.action_log_probs / 1.2 - update.action_log_probs).exp(),
            alpha=2.0,
            mixing="convex",
        )
        torch.testing.assert_close(update.advantages[update.mask], expected[update.mask])


def test_grpo_is_the_same_path_with_alpha_zero() -> None:
    updates = make_maker(name="grpo").make_experience_batch(samples(REWARDS))
    for update, rewards in zip(updates, (REWARDS[:4], REWARDS[4:]), strict=True):
        group = objectives.group_advantage(reward=torch.tensor(rewards), group_size=2)
        assert torch.equal(update.advantages, group[:, None].expand_as(update.advantages))


def test_a_temperature_between_the_two_costs_a_second_forward() -> None:
    maker = make_maker(target_entropy=1.05, temperature_rule="continuous", temperature_low=0.5, temperature_high=2.0)
    maker.make_experience_batch(samples(REWARDS))
    assert maker.decision is not None and 0.5 < maker.decision.temperature < 2.0
    assert maker.actor_model_group.calls == [[0.5, 2.0], [maker.decision.temperature]]


def test_responses_that_went_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"whole updates of 4 responses.*got 7"):
        make_maker().make_experience_batch(samples(REWARDS[:7]))
