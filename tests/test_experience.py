"""The experience maker: one forward of pi_old, then the controller, the target ratio and the mixed advantage."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcpo_openrlhf import experience, experience_maker, objectives
from dcpo_openrlhf.assemble import make_controller
from dcpo_openrlhf.experience import batch_entropies, padded, put
from dcpo_openrlhf.experience_maker import DCPOExperienceMaker
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.rollout.tasks import Problem, Prompt

from openrlhf.trainer.ppo_utils.experience import Experience  # isort: skip  (dcpo_openrlhf installs the stub it needs)


class FakeTokenizer:
    pad_token_id = 0


class FakeGroup:
    """Stands for the policy actors: statistics are a function of the token ids and the temperature."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def async_run_method_batch(self, method_name: str, rows: list, temperatures: list, reference: list) -> list[Any]:
        assert method_name == "token_statistics"
        self.calls.append(temperatures[0])
        results = []
        for row in rows:
            logp = -(row.sequences[:, 1:].float() / 10) * row.action_mask * (0.5 if reference[0] else 1.0)
            tempered = torch.stack([logp / t for t in temperatures[0]], -1) if temperatures[0] else logp[..., None]
            results.append({"logp": logp, "entropy": 0.5 - logp, "tempered_logp": tempered})
        return results

    def gather(self, refs: list[Any]) -> list[Any]:
        return refs


def make_maker(
    *, kl: dict[str, Any] | None = None, correction: dict[str, Any] | None = None, **method: Any
) -> DCPOExperienceMaker:
    recipe = Recipe.model_validate(
        {
            "model": {"path": "unused"},
            "task": {"kind": "arithmetic"},
            "method": {"target_entropy": 5.0, "alpha_max": 1.0, **method},
            "kl": kl or {},
            "correction": correction or {},
            "train": {"prompts_per_step": 4, "prompts_per_update": 2, "group_size": 2, "steps": 1},
            "parallel": {"devices_per_node": 1},
        }
    )
    strategy = RecipeStrategy(recipe)
    maker = DCPOExperienceMaker(
        FakeGroup(), None, None, None, None, strategy, FakeTokenizer(), controller=make_controller(recipe)
    )
    maker.prompts = [Prompt(Problem(f"sum-{i}", "", "", ""), "") for i in range(4)]
    return maker


def samples(rewards: list[float], success: list[float] | None = None) -> list[Experience]:
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
                scores=None if success is None else torch.tensor([success[i]]),
                response_length=torch.tensor([int(actions.sum())]),
                truncated=torch.tensor([i == 0]),
                total_length=torch.tensor([float(length)]),
                info={"reward": torch.tensor([reward])},
            )
        )
    return found


def test_padded_is_openrlhf_concat_with_small_tokens_and_masks() -> None:
    made = samples([1.0, 0.0, 1.0, 1.0])
    for i, sample in enumerate(made):
        sample.index, sample.labels, sample.info["weight_version"] = [i], [f"label {i}"], torch.tensor([3])
    theirs = Experience.concat_experiences(made, 9)
    ours = padded(made, 9)
    assert (ours.sequences.dtype, ours.attention_mask.dtype, ours.action_mask.dtype) == (torch.int32, *[torch.bool] * 2)
    assert ours.sequences[0].tolist() == [1, 2, 3, 9, 9]
    for name, value in vars(theirs).items():
        found = getattr(ours, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(found.to(value.dtype), value), name
        elif isinstance(value, dict):
            assert found.keys() == value.keys() and all(torch.equal(found[k], v) for k, v in value.items())
        else:
            assert found == value, name
    small = [
        Experience(**vars(s) | {"sequences": s.sequences.int(), "action_mask": s.action_mask.bool()}) for s in made
    ]
    assert torch.equal(padded(small, 9).sequences, ours.sequences)
    assert torch.equal(padded(small, 9).action_mask, ours.action_mask)


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
    assert maker.decision is not None
    assert maker.decision[:4] == (
        pytest.approx(exact),
        1.2,
        pytest.approx(1.0 / 0.5),
        5.0,
    )  # H < H_0; alpha_max / success rate

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


@pytest.mark.parametrize("name", ["dcpo", "j1", "entropy_adv"])
def test_rows_taken_a_few_at_a_time_give_the_same_advantages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_maker(name=name).make_experience_batch(samples(REWARDS))
    monkeypatch.setattr(experience_maker, "CHUNK_ROWS", 3)
    for one, other in zip(make_maker(name=name).make_experience_batch(samples(REWARDS)), whole, strict=True):
        assert len(one.advantage_terms) == len(other.advantage_terms)
        pairs = zip((one.target_ratio, *one.advantage_terms), (other.target_ratio, *other.advantage_terms), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_reward_makes_the_group_advantage_and_the_success_all_else() -> None:
    rewards = [2.5, -1.0, 0.25, 0.75, 0.0, 0.0, -3.0, 1.0]  # of which none says what is right
    success = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    maker = make_maker()
    updates = maker.make_experience_batch(samples(rewards, success))
    assert maker.decision is not None and maker.decision.alpha == pytest.approx(1.0 / 0.375)
    for update, some in zip(updates, (slice(0, 4), slice(4, 8)), strict=True):
        expected = objectives.mixed_advantage(
            group_advantage=objectives.group_advantage(reward=torch.tensor(rewards[some]), group_size=2),
            success=torch.tensor(success[some]),
            target_ratio=(update.action_log_probs / 1.2 - update.action_log_probs).exp(),
            alpha=1.0 / 0.375,
            mixing="convex",
        )
        torch.testing.assert_close(update.advantages[update.mask], expected[update.mask])


def test_samples_without_a_success_have_their_reward_as_one_where_it_is_0_or_1() -> None:
    with pytest.raises(ValueError, match=r"success must be 0 or 1, got \[2\.5, 0\.0, 1\.0"):
        make_maker().make_experience_batch(samples([2.5, *REWARDS[1:]]))


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


def test_kl_to_the_starting_model_costs_a_forward_of_it_and_goes_to_the_loss_or_off_the_reward() -> None:
    maker = make_maker(name="grpo")
    (plain, _) = maker.make_experience_batch(samples(REWARDS))
    assert plain.rows().reference_logp is None and maker.actor_model_group.calls == [[0.8, 1.2]]
    for use_loss in (True, False):
        kl = {"coefficient": 0.5, "use_loss": use_loss, "estimator": "k1"}
        maker = make_maker(name="grpo", kl=kl)
        (first, _) = maker.make_experience_batch(samples(REWARDS))
        assert maker.actor_model_group.calls == [[0.8, 1.2], []]
        starting = first.rows().reference_logp
        assert starting is not None
        torch.testing.assert_close(starting, first.action_log_probs / 2)  # FakeGroup's starting model
        reward = torch.tensor(REWARDS[:4])
        if not use_loss:
            reward = reward - 0.5 * (first.action_log_probs - starting).sum(1)
        expected = objectives.group_advantage(reward=reward, group_size=2)[:, None] * first.mask
        torch.testing.assert_close(first.advantages * first.mask, expected)


def test_correction_weighs_tokens_by_trainer_over_engine_and_tells_how_many_were_outside() -> None:
    maker = make_maker(correction={"level": "token", "mode": "clip", "low": 0.9, "high": 1.1})
    for e in maker.make_experience_batch(samples(REWARDS)):
        expected = (e.action_log_probs - e.rollout_log_probs).exp().clamp(0.9, 1.1)
        assert e.rows().correction is not None
        torch.testing.assert_close(e.rows().correction[e.mask], expected[e.mask])
        assert torch.equal(e.outside & e.mask, e.outside)
    (plain, _) = make_maker().make_experience_batch(samples(REWARDS))
    assert plain.rows().correction is None


def test_tempered_rows_are_corrected_by_the_tempered_policy_that_drew_them() -> None:
    maker = make_maker(name="j4", correction={"level": "token", "low": 0.0, "high": 100.0})
    maker.resample = lambda temperature, prompts: samples(REWARDS)
    for e in maker.make_experience_batch(samples(REWARDS)):
        assert e.tempered is not None and maker.decision is not None
        drawn = e.tempered.action_log_probs / maker.decision.temperature  # FakeGroup's log pi^T
        expected = (drawn - e.tempered.rollout_log_probs).exp()
        torch.testing.assert_close(e.tempered.correction[e.tempered.mask], expected[e.tempered.mask])
        assert len(e.rows().correction) == 2 * len(e.sequences)


def test_entropy_reg_and_dcpo_expected_hand_their_terms_to_the_loss() -> None:
    (first, _) = make_maker(name="entropy_reg", entropy_coefficient=0.25).make_experience_batch(samples(REWARDS))
    assert first.rows().entropy_coefficient == 0.25 and first.rows().expected_weight is None
    maker = make_maker(name="dcpo_expected")
    for update, rewards in zip(maker.make_experience_batch(samples(REWARDS)), (REWARDS[:4], REWARDS[4:]), strict=True):
        rows = update.rows()
        assert rows.entropy_coefficient == 0.0 and rows.expected_temperature == 1.2
        assert rows.expected_weight is not None
        torch.testing.assert_close(rows.expected_weight, torch.tensor(rewards) * 2.0 / 3.0)  # w = alpha / (1 + alpha)


@pytest.mark.parametrize(("name", "weight"), [("j2", lambda rho: torch.ones_like(rho)), ("j4", lambda rho: 1 / rho)])
def test_j2_and_j4_train_on_rows_of_both_policies_and_average_them_apart(name: str, weight: Any) -> None:
    maker, asked = make_maker(name=name), []

    def resample(temperature: float, count: int) -> list[Experience]:
        asked.append((temperature, count))
        return samples([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0])

    maker.resample = resample
    first, _ = maker.make_experience_batch(samples(REWARDS))
    assert asked == [(1.2, 4)]
    assert maker.actor_model_group.calls == [[0.8, 1.2], [1.2]]
    rows = first.rows()
    assert len(rows) == 8 and first.tempered is not None and rows.old_logp is not None
    torch.testing.assert_close(rows.old_logp[4:, : first.tempered.mask.shape[1]], first.tempered.action_log_probs)
    (advantage,) = rows.advantages
    group = objectives.group_advantage(reward=torch.tensor(REWARDS[:4]), group_size=2) / 3.0  # 1 - w
    torch.testing.assert_close(advantage[:4], group[:, None].expand_as(advantage[:4]))
    rho = (first.tempered.action_log_probs / 1.2 - first.tempered.action_log_probs).exp()
    expected = 2.0 / 3.0 * weight(rho) * torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None]
    torch.testing.assert_close(advantage[4:][first.tempered.mask], expected[first.tempered.mask])
    assert rows.scale is not None
    torch.testing.assert_close(rows.scale, torch.full((8,), 2.0))  # 8 rows of which 4 are averaged by themselves
    assert first.rewards.tolist() == REWARDS[:4]  # the metrics are those of pi_old's own responses


def test_aepo_replaces_rows_over_all_updates_by_the_best_of_the_drawn_ones() -> None:
    maker, asked = make_maker(name="aepo"), []
    maker.step = 5

    def resample(temperature: float, count: int) -> list[Experience]:
        asked.append((temperature, count))
        drawn = samples([1.0, 0.0])
        for sample in drawn:
            sample.sequences = sample.sequences + 50
        return drawn

    maker.resample = resample
    updates = maker.make_experience_batch(samples(REWARDS))
    assert asked == [(1.2, 1)]  # a quarter of four prompts
    assert sum(int(u.replaced.sum()) for u in updates if u.replaced is not None) == 1
    for u in updates:
        rows = u.rows()
        assert len(rows) == 4
        drawn = rows.sequences[:, 0] > 50
        assert int(drawn.sum()) == (0 if u.tempered is None else 1)
        assert rows.scale is None and (rows.advantages[0][drawn][rows.action_mask[drawn]] == 1.0).all()


def test_aepo_trains_on_its_own_rows_where_no_drawn_row_is_better() -> None:
    maker = make_maker(name="aepo")
    maker.resample = lambda temperature, count: samples([1.0, 1.0])
    assert [u.tempered for u in maker.make_experience_batch(samples(REWARDS))] == [None, None]


def test_scope_rl_deals_correct_rows_alone_over_the_updates() -> None:
    maker, asked = make_maker(name="scope_rl", target_entropy=1.05, scope_share=0.5), []
    maker.recipe = maker.recipe.model_copy(
        update={"parallel": maker.recipe.parallel.model_copy(update={"devices_per_node": 4})}
    )

    def resample(temperature: float, count: int) -> list[Experience]:
        asked.append((temperature, count))
        drawn = samples([1.0, 0.0, 1.0, 1.0])
        for sample in drawn:
            sample.sequences = sample.sequences + 50
        return drawn

    maker.resample = resample
    updates = maker.make_experience_batch(samples(REWARDS))
    assert maker.decision is not None
    temperature = 1.0 + 1.05 - maker.decision.entropy
    assert asked == [(pytest.approx(temperature), 2)] and 0.8 < temperature < 1.2  # half of four prompts
    # no second forward of the step's own rows for T: the method weighs nothing by rho
    assert maker.actor_model_group.calls == [[0.8, 1.2], [maker.decision.temperature]]
    for update, correct in zip(updates, (2, 1), strict=True):
        rows = update.rows()
        assert len(rows) == 8 and int((rows.sequences[:, 0] > 50).sum()) == 4  # filled up to four data ranks
        alive = rows.action_mask.any(1)
        assert alive.tolist() == [True] * (4 + correct) + [False] * (4 - correct)
        assert rows.scale is not None
        total = float(alive.sum())
        torch.testing.assert_close(
            rows.scale[alive], torch.tensor([total / 4] * 4 + [total / correct] * correct)
        )  # each kind averaged by itself
        assert (rows.advantages[0][4:][rows.action_mask[4:]] == 1 / 64).all()


def test_scope_rl_without_a_correct_row_is_grpo() -> None:
    maker = make_maker(name="scope_rl")
    maker.resample = lambda temperature, count: samples([0.0, 0.0])
    updates, grpo = (m.make_experience_batch(samples(REWARDS)) for m in (maker, make_maker(name="grpo")))
    for update, other in zip(updates, grpo, strict=True):
        assert update.tempered is None and update.rows().scale is None
        assert torch.equal(update.advantages, other.advantages)


def test_kl_cov_holds_tokens_of_each_update_and_clip_cov_leaves_some_out() -> None:
    (first, second) = make_maker(name="kl_cov", kl_cov_share=0.3).make_experience_batch(samples(REWARDS))
    for update in (first, second):
        held = update.rows().penalty_weight
        assert held is not None and int((held > 0).sum()) == int(0.3 * update.mask.sum())
        assert not held[~update.mask].any()
    bounds = {"clip_cov_share": 0.2, "clip_cov_low": -99.0, "clip_cov_high": 99.0}  # a lot over all tokens
    left_out = []
    for step in (1, 1, 2):
        maker = make_maker(name="clip_cov", **bounds)
        maker.step = step
        updates = maker.make_experience_batch(samples(REWARDS))
        left_out.append([(u.advantages == 0) & u.mask for u in updates])
    assert all(int(lost.sum()) > 0 for lost in left_out[0])
    assert all(torch.equal(a, b) for a, b in zip(left_out[0], left_out[1], strict=True))  # a resume draws the same


def test_adaptive_entropy_and_entropic_take_the_controllers_numbers() -> None:
    maker = make_maker(name="adaptive_entropy", adaptive_entropy_step=0.1, adaptive_entropy_max=0.15)
    found = [maker.make_experience_batch(samples(REWARDS))[0].rows().entropy_coefficient for _ in range(3)]
    assert found == [0.0, 0.1, 0.15]  # H < H_0 = 5
    maker = make_maker(name="entropic", target_entropy=0.0, entropic_proportional=0.1, entropic_threshold=0.5)
    (update, _) = maker.make_experience_batch(samples(REWARDS))
    assert maker.decision is not None and 0 < maker.decision.sample_weight < 1  # H > H_0: positive rows count for more
    group = objectives.group_advantage(reward=torch.tensor(REWARDS[:4]), group_size=2)[:, None]
    sure = update.action_log_probs.exp() > 0.5
    assert sure[update.mask].any() and not sure[update.mask].all()
    expected = group + maker.decision.sample_weight * group.abs() * sure
    torch.testing.assert_close(update.advantages[update.mask], expected[update.mask])


def make_filtered(left: int, fillers: list[int], **settings: Any) -> DCPOExperienceMaker:
    """A maker whose step left that many groups, and has fillers at these places."""
    maker = make_maker(**settings)
    maker.prompts = [Prompt(Problem(f"sum-{i}", "", "", ""), "") for i in range(4 + left)]
    maker.fillers = fillers
    return maker


@pytest.mark.parametrize("kl", [{}, {"coefficient": 0.5}, {"coefficient": 0.5, "use_loss": False}])
def test_groups_that_are_left_are_in_entropy_and_success_rate_and_in_no_update(
    kl: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experience.ray, "get", lambda refs: refs)
    left = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]  # three groups: more than one update's
    maker = make_filtered(3, [], kl=kl)
    *updates, first, second = maker.make_experience_batch(samples([*REWARDS, *left]))
    assert [e.aside for e in (*updates, first, second)] == [False, False, True, True]
    assert [len(e.sequences) for e in (*updates, first, second)] == [4, 4, 4, 2]
    logp = torch.cat([e.action_log_probs[e.mask] for e in (*updates, first, second)])
    assert maker.decision is not None
    assert maker.decision.entropy == pytest.approx(float((0.5 - logp).mean()))
    assert maker.decision.alpha == pytest.approx(1.0 / (6 / 14))  # alpha_max / success rate, of all 14
    for e in (first, second):
        torch.testing.assert_close(e.target_ratio, (e.action_log_probs / 1.2 - e.action_log_probs).exp())
        assert e.base_action_log_probs is None, "no forward of the starting model"

    sent: list[Any] = []
    put(
        [*updates, first, second], SimpleNamespace(async_run_method_batch=lambda _, experience: sent.extend(experience))
    )
    assert [len(rows) for rows in sent] == [4, 4]
    for update, rewards in zip(updates, (REWARDS[:4], REWARDS[4:]), strict=True):
        expected = objectives.mixed_advantage(
            group_advantage=objectives.group_advantage(
                reward=torch.tensor(rewards) - maker._penalty(update), group_size=2
            ),
            success=torch.tensor(rewards),
            target_ratio=update.target_ratio,
            alpha=maker.decision.alpha,
            mixing="convex",
        )
        torch.testing.assert_close(update.advantages[update.mask], expected[update.mask])


@pytest.mark.parametrize("kl", [{}, {"coefficient": 0.5, "use_loss": False}])
def test_a_group_that_fills_a_step_has_no_advantage_whatever_its_rewards(kl: dict[str, Any]) -> None:
    rewards, success = [1.0, 0.0, -0.5, 0.0, -0.25, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    first, second = make_filtered(0, [1, 2], kl=kl).make_experience_batch(samples(rewards, success))
    assert first.filler is not None and first.filler.tolist() == [False, False, True, True]
    assert second.filler is not None and second.filler.tolist() == [True, True, False, False]
    assert not first.advantages[2:].any() and not second.advantages[:2].any()
    plain = make_filtered(0, [], kl=kl).make_experience_batch(samples(rewards, success))
    assert plain[0].filler is None and plain[0].advantages[2:].any() and plain[1].advantages[:2].any()
    assert torch.equal(first.advantages[:2], plain[0].advantages[:2]), "the others weigh what they weigh without"
    assert torch.equal(second.advantages[2:], plain[1].advantages[2:])
    assert len(first.rows()) == 4, "the update keeps its size"


@pytest.mark.parametrize("name", ["j2", "aepo", "scope_rl"])
def test_rows_of_the_tempered_policy_are_of_the_updates_prompts_alone(name: str) -> None:
    maker, asked = make_filtered(2, [], name=name), []

    def resample(temperature: float, count: int) -> list[Experience]:
        asked.append(count)
        return samples([1.0, 0.0] * count)

    maker.resample = resample
    *updates, left = maker.make_experience_batch(samples([*REWARDS, 0.0, 0.0, 0.0, 0.0]))
    assert len(updates) == 2 and left.aside and left.tempered is None and left.replaced is None
    assert asked == [4 if name == "j2" else 1] and any(e.tempered is not None for e in updates)


def test_statistics_of_rows_that_do_not_divide_over_the_data_ranks_are_filled_up() -> None:
    maker = make_maker()
    maker.recipe = maker.recipe.model_copy(
        update={"parallel": maker.recipe.parallel.model_copy(update={"devices_per_node": 3})}
    )
    (update, _) = maker.split_rollout_samples(samples(REWARDS))
    sent = []
    gather = maker.actor_model_group.gather
    maker.actor_model_group.gather = lambda refs: sent.extend(len(r["logp"]) for r in refs) or gather(refs)
    (stats,) = maker.statistics([update.rows()], [1.2])
    assert sent == [6] and len(stats["logp"]) == 4


def test_responses_that_went_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"whole updates of 4 responses.*got 7"):
        make_maker().make_experience_batch(samples(REWARDS[:7]))
