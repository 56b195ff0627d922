"""Statistics equal a plain float64 twin; causes are named when they are there and only then; actions, state, sinks."""

import json
import math
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from dcpo_openrlhf import methods, objectives, train_dcpo
from dcpo_openrlhf.assemble import make_cost, make_log, make_monitor
from dcpo_openrlhf.controller import ControllerDecision
from dcpo_openrlhf.experience import DCPOExperience
from dcpo_openrlhf.monitor import statistics
from dcpo_openrlhf.monitor.causes import CAUSES, Alert, MonitorStop
from dcpo_openrlhf.monitor.metrics import METRICS, unknown_metrics
from dcpo_openrlhf.monitor.sinks import progress_line
from dcpo_openrlhf.monitor.statistics import batch_metrics
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import Grade
from dcpo_openrlhf.rollout.tasks import Problem, Prompt
from dcpo_openrlhf.trainer import DCPOTrainer

ROOT = Path(__file__).parents[2]
GROUP, ALPHA = 4, 0.3


def make_recipe(folder: Path = Path("unused"), *, method: dict | None = None, **bounds: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"dir": folder},
            "model": {"path": "unused"},
            "task": {"kind": "arithmetic"},
            "method": {"target_entropy": 0.5, **(method or {})},
            "train": {"prompts_per_step": 4, "prompts_per_update": 2, "group_size": GROUP},
            "monitor": {"tensorboard": False, **bounds},
        }
    )


# --- statistics ------------------------------------------------------------------------------------------------------

Row = dict[str, Any]
"""One response as plain Python: lists of floats over its tokens, and what it earned."""


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Ragged responses, one of them of no token, some of few different tokens, every kind of group among them."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(n: int, low: float, high: float) -> list[float]:
        return (low + (high - low) * torch.rand(n, generator=draw)).tolist()

    rows = []
    for i in range(count):
        length = 0 if i == 5 else int(torch.randint(1, 40, (), generator=draw))
        rows.append(
            {
                "prompt": 2 + i // GROUP,
                "tokens": torch.randint(0, 2 if i % 3 else 1000, (length,), generator=draw).tolist(),
                "logp": uniform(length, -3, 0),
                "engine": uniform(length, -3, 0),
                "entropy": uniform(length, 0, 2),
                "ratio": uniform(length, 0.1, 3),
                "reward": [0.0, 1.0, float(i % 2)][i // GROUP % 3] + 0.25 * (i % 4) - 2.0 * (i % 3 == 1),
                "success": [0.0, 1.0, float(i % 2)][i // GROUP % 3],
                "truncated": i % 5 == 0,
                "answer": [None, "7", "8"][i % 3] if i // GROUP % 2 else "7",
            }
        )
    return rows


def experience(rows: Sequence[Row], method: str, *, padding: int = 0, alpha: float = ALPHA) -> DCPOExperience:
    """The rows padded with rubbish, and the advantages that the method gives them."""
    time = max(r["prompt"] + len(r["tokens"]) for r in rows) + padding

    def padded(name: str, rubbish: float) -> torch.Tensor:
        out = torch.full((len(rows), time - 1), rubbish)
        for i, r in enumerate(rows):
            out[i, r["prompt"] - 1 : r["prompt"] - 1 + len(r["tokens"])] = torch.tensor(r[name])
        return out

    reward = torch.tensor([r["reward"] for r in rows])
    success = torch.tensor([r["success"] for r in rows])
    ratio, entropy = padded("ratio", math.nan), padded("entropy", math.nan)
    tokens = padded("tokens", 1.0).long()
    ends = torch.tensor([r["prompt"] + len(r["tokens"]) for r in rows])
    return DCPOExperience(
        sequences=torch.cat([torch.ones(len(rows), 1, dtype=torch.long), tokens], 1),
        attention_mask=(torch.arange(time) < ends[:, None]).long(),
        action_mask=padded("entropy", math.nan).isfinite().long(),  # type: ignore[arg-type]
        action_log_probs=padded("logp", math.nan),
        rollout_log_probs=padded("engine", math.inf),
        entropy=entropy,
        target_ratio=ratio,
        rewards=reward,
        scores=success,
        response_length=torch.tensor([len(r["tokens"]) for r in rows]),
        truncated=torch.tensor([r["truncated"] for r in rows]),
        info={"weight_version": torch.tensor([r.get("version", 4) for r in rows])},
        advantage_terms=methods.method_advantage(
            methods.METHODS[method],
            group_advantage=objectives.group_advantage(reward=reward, group_size=GROUP),
            success=success,
            target_ratio=ratio,
            entropy=entropy,
            alpha=alpha,
            mixing="convex",
        ),
    )


def metrics_of(rows: Sequence[Row], method: str = "dcpo", *, split: int | None = None, padding: int = 0) -> dict:
    split = split or len(rows)
    parts = [rows[i : i + split] for i in range(0, len(rows), split)]
    return batch_metrics(
        [experience(part, method, padding=padding) for part in parts],
        grades=[Grade(r["reward"], r["answer"], success=r["success"]) for r in rows],
        prompts=[prompt(i) for i in range(len(rows) // GROUP)],
        alpha=ALPHA if methods.METHODS[method].uses_alpha else 0.0,
        mixing="convex",
    )


def prompt(i: int) -> Prompt:
    return Prompt(Problem(f"problem {i}", "", "", "", difficulty=i % 3), "")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def twin_repetition(tokens: list[int]) -> float:
    tail = tokens[-statistics.REPETITION_TAIL :]
    grams = [tuple(tail[i : i + 4]) for i in range(len(tail) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def twin_regulariser(method: str, row: Row, advantage: float, t: int) -> tuple[float, float]:
    """(advantage of token t, the regulariser's part of it), by the equations of the README."""
    w = ALPHA / (1 + ALPHA)
    ratio, success, entropy = row["ratio"][t], row["success"], row["entropy"][t]
    part = {
        "grpo": 0.0,
        "entropy_reg": 0.0,
        "dcpo": w * ratio * success,
        "j1": w * success,
        "j3": w * ratio * success,
        "dcpo_wo_reinforce": w * ratio * advantage,
        "entropy_adv": min(0.4 * entropy, abs(advantage) / 2.0),
    }[method]
    own = advantage if not methods.METHODS[method].uses_alpha else (1 - w) * advantage
    return own + part, part


def twin(rows: Sequence[Row], method: str) -> dict[str, float]:
    """batch_metrics, written as loops over Python floats."""
    groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
    tokens = [(r, t, gi) for gi, g in enumerate(groups) for r in g for t in range(len(r["tokens"]))]
    solved = [sum(r["success"] for r in g) for g in groups]
    total = part = 0.0
    for g in groups:
        spread = math.sqrt(sum((r["reward"] - mean([x["reward"] for x in g])) ** 2 for r in g) / (GROUP - 1))
        for r in g:
            advantage = (r["reward"] - mean([x["reward"] for x in g])) / (spread + 1e-6)
            for t in range(len(r["tokens"])):
                whole, regulariser = twin_regulariser(method, r, advantage, t)
                total, part = total + abs(whole), part + abs(regulariser)
    difference = [abs(math.exp(r["logp"][t]) - math.exp(r["engine"][t])) for r, t, _ in tokens]
    ratio = sorted(r["ratio"][t] for r, t, _ in tokens)
    correct = [r for r in rows if r["success"]]
    formed = [not r["truncated"] and twin_repetition(r["tokens"]) <= 0.5 for r in correct]
    rewards = [r["reward"] for r in rows]
    lengths = [len(r["tokens"]) for r in rows]
    selected = {
        "exact": tokens,
        "correct": [x for x in tokens if x[0]["success"]],
        "wrong": [x for x in tokens if not x[0]["success"]],
        "solved_none": [x for x in tokens if solved[x[2]] == 0],
        "solved_some": [x for x in tokens if 0 < solved[x[2]] < GROUP],
        "solved_all": [x for x in tokens if solved[x[2]] == GROUP],
        "difficulty_1": [x for x in tokens if x[2] % 3 == 1],
        "difficulty_2": [x for x in tokens if x[2] % 3 == 2],
        "position_0": [x for x in tokens if x[1] < 4],
        "position_4": [x for x in tokens if 4 <= x[1] < 16],
        "position_16": [x for x in tokens if x[1] >= 16],
    }
    entropy = {f"entropy/{name}": mean([r["entropy"][t] for r, t, _ in some]) for name, some in selected.items()}
    sampled = -mean([r["logp"][t] for r, t, _ in tokens])
    return {
        "rollout/reward_mean": mean(rewards),
        "rollout/reward_std": math.sqrt(sum((r - mean(rewards)) ** 2 for r in rewards) / (len(rewards) - 1)),
        "rollout/success_rate": mean([r["success"] for r in rows]),
        "rollout/length_mean": mean(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated_fraction": mean([r["truncated"] for r in rows]),
        "rollout/repetition": mean([twin_repetition(r["tokens"]) for r in rows]),
        "rollout/no_answer_fraction": mean([r["answer"] is None for r in rows]),
        "rollout/form": mean(formed),
        "group/distinct_answers": mean([len({r["answer"] for r in g}) for g in groups]),
        "group/all_correct": mean([s == GROUP for s in solved]),
        "group/all_wrong": mean([s == 0 for s in solved]),
        **entropy,
        "entropy/sampled": sampled,
        "entropy/gap": entropy["entropy/exact"] - sampled,
        "dcpo/regulariser_share": part / total,
        "dcpo/target_ratio_mean": mean(ratio),
        "dcpo/target_ratio_max": ratio[-1],
        **{f"dcpo/target_ratio_p{q:02d}": ratio[math.ceil(q / 100 * len(ratio)) - 1] for q in (1, 50, 99)},
        "dcpo/target_ratio_ess": sum(ratio) ** 2 / len(ratio) / sum(r * r for r in ratio),
        "mismatch/prob_diff_mean": mean(difference),
        "mismatch/prob_diff_max": max(difference),
        "mismatch/kl": mean([r["engine"][t] - r["logp"][t] for r, t, _ in tokens]),
    }


@pytest.mark.parametrize("method", ["grpo", "dcpo", "j1", "j3", "dcpo_wo_reinforce", "entropy_reg", "entropy_adv"])
def test_statistics_equal_the_plain_twin(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "REPETITION_TAIL", 12)
    monkeypatch.setattr(statistics, "CHUNK_ROWS", 5)
    rows = random_rows(6 * GROUP)
    found, expected = metrics_of(rows, method, split=3 * GROUP), twin(rows, method)
    quantiles = {name: found.pop(name) for name in list(found) if re.search(r"_p\d\d$", name)}
    assert quantiles == pytest.approx({name: expected.pop(name) for name in quantiles}, rel=0.0051)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["j2", "aepo", "dcpo_expected"])
def test_the_share_counts_rows_drawn_at_t_and_the_expected_regulariser(method: str) -> None:
    rows, drawn = random_rows(2 * GROUP), random_rows(GROUP, seed=1)
    found = experience(rows, method, alpha=ALPHA)
    w, advantage = ALPHA / (1 + ALPHA), objectives.group_advantage(reward=found.rewards, group_size=GROUP).tolist()
    lengths, extra = [len(r["tokens"]) for r in rows], 0.0
    if method == "dcpo_expected":
        found.expected_weight = w * found.success
        extra = sum(w * r["success"] * len(r["tokens"]) for r in rows)
    else:
        found.tempered = experience(drawn, "grpo")
        found.tempered.advantage_terms = (found.tempered.entropy,)
        extra = sum(abs(h) for r in drawn for h in r["entropy"])
    if method == "aepo":
        found.replaced = torch.tensor([i in (3, 4, 1) for i in range(2 * GROUP)])
        lengths = [n if i not in (3, 4, 1) else 0 for i, n in enumerate(lengths)]
    alpha = ALPHA if methods.METHODS[method].uses_alpha else 0.0
    own = (1 - w if alpha else 1.0) * sum(abs(a) * n for a, n in zip(advantage, lengths, strict=True))
    grades = [Grade(r["reward"], r["answer"], success=r["success"]) for r in rows]
    metrics = batch_metrics([found], grades=grades, prompts=[prompt(0), prompt(1)], alpha=alpha, mixing="convex")
    assert metrics["dcpo/regulariser_share"] == pytest.approx(extra / (own + extra), rel=1e-5)


def test_groups_that_are_left_count_everywhere_but_in_the_regularisers_share() -> None:
    rows, size = random_rows(6 * GROUP), 3 * GROUP
    grades = [Grade(r["reward"], r["answer"], success=r["success"]) for r in rows]
    prompts = [prompt(i) for i in range(6)]

    def found(updates: list[DCPOExperience]) -> dict[str, float]:
        count = sum(len(e.rewards) for e in updates)
        said = {"grades": grades[:count], "prompts": prompts[: count // GROUP]}
        return batch_metrics(updates, **said, alpha=ALPHA, mixing="convex")

    update, left = experience(rows[:size], "dcpo"), experience(rows[size:], "dcpo")
    whole, alone = found([update, left]), found([update])
    left.aside, left.advantage_terms = True, ()
    metrics = found([update, left])
    assert metrics.pop("dcpo/regulariser_share") == alone["dcpo/regulariser_share"] != whole["dcpo/regulariser_share"]
    assert metrics == {name: value for name, value in whole.items() if name != "dcpo/regulariser_share"}


def test_the_regulariser_of_a_group_that_fills_a_step_is_all_of_its_advantage() -> None:
    rows = random_rows(2 * GROUP)
    found = experience(rows, "grpo")
    found.filler = torch.arange(2 * GROUP) < GROUP
    found.advantage_terms = (found.advantage_terms[0].masked_fill(found.filler[:, None], 0.0),)
    grades = [Grade(r["reward"], r["answer"], success=r["success"]) for r in rows]
    metrics = batch_metrics([found], grades=grades, prompts=[prompt(0), prompt(1)], alpha=0.0, mixing="convex")
    assert metrics["dcpo/regulariser_share"] == 0.0


def test_corrections_are_told_by_age_where_there_is_one() -> None:
    """Against sums over the tokens of each age; rows drawn from pi_old^T have their own."""
    rows, drawn = random_rows(2 * GROUP), random_rows(GROUP, seed=1)
    for i, r in enumerate([*rows, *drawn]):
        r["version"] = 4 if i >= 2 * GROUP else 4 - i % 3
    found, tempered = experience(rows, "j2"), experience(drawn, "j2")
    found.tempered = tempered
    assert statistics.age_metrics([found], policy_version=4) == {
        "rollout/age_mean": sum(4 - r["version"] for r in rows) / len(rows),
        "rollout/age_max": 2.0,
    }
    assert statistics.correction_metrics([found], policy_version=4) == {}
    for e in (found, tempered):
        e.correction, e.outside = e.entropy + 0.5, e.entropy > 1.0
    expected = {}
    for age in (None, 0, 1, 2):
        w = [h + 0.5 for r in [*rows, *drawn] if age is None or 4 - r["version"] == age for h in r["entropy"]]
        name = "" if age is None else f"_age_{age}"
        expected[f"correction/outside{name}"] = sum(x > 1.5 for x in w) / len(w)
        expected[f"correction/weight_mean{name}"] = sum(w) / len(w)
        expected[f"correction/ess{name}"] = sum(w) ** 2 / len(w) / sum(x * x for x in w)
    metrics = statistics.correction_metrics([found], policy_version=4)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert list(unknown_metrics(list(metrics))) == []
    for r in rows:
        r["version"] = 4
    found.info = {"weight_version": torch.full((len(rows),), 4)}
    assert [name for name in statistics.correction_metrics([found], policy_version=4) if "age" in name] == []


def test_padding_split_and_order_of_groups_change_nothing() -> None:
    rows = random_rows(6 * GROUP)
    expected = metrics_of(rows)
    for other in (metrics_of(rows, padding=37), metrics_of(rows, split=GROUP), metrics_of(rows, split=2 * GROUP)):
        assert other == pytest.approx(expected, rel=1e-6)
    moved = [*rows[3 * GROUP :], *rows[: 3 * GROUP]]  # by three groups: problem difficulties repeat after three
    assert metrics_of(moved, padding=1) == pytest.approx(expected, rel=1e-6)


def test_parts_without_tokens_are_absent_and_nothing_divides_by_zero() -> None:
    wrong = [r | {"reward": 0.0, "success": 0.0} for r in random_rows(GROUP)]
    found = metrics_of(wrong, "grpo")
    assert found["dcpo/regulariser_share"] == 0.0 and found["rollout/form"] == 1.0
    assert not {"entropy/correct", "entropy/solved_all", "entropy/solved_some", "entropy/difficulty_1"} & set(found)
    assert found["entropy/wrong"] == found["entropy/solved_none"] == pytest.approx(found["entropy/exact"])
    assert all(math.isfinite(value) for value in found.values())


def test_grades_of_another_batch_are_refused() -> None:
    rows = random_rows(GROUP)
    with pytest.raises(ValueError, match="4 responses need as many grades, got 3"):
        batch_metrics(
            [experience(rows, "grpo")], grades=[Grade(1.0, "7")] * 3, prompts=[prompt(0)], alpha=0.0, mixing="convex"
        )


def test_repetition_sees_loops_at_the_end() -> None:
    loop, fresh = [1, 2, 3] * 300, list(range(900))
    rows = [random_rows(1)[0] | {"tokens": tokens} for tokens in (loop, fresh, fresh[:400] + loop, [7])]
    for row in rows:
        row |= {name: [0.5] * len(row["tokens"]) for name in ("entropy", "ratio")}
        row |= {name: [-0.5] * len(row["tokens"]) for name in ("logp", "engine")}
    found = experience(rows, "grpo")
    repetition = statistics._repetition(found.sequences[:, 1:], found.mask)
    assert repetition.tolist() == pytest.approx([1 - 3 / 509, 0, 1 - 3 / 509, 0])


# --- causes ----------------------------------------------------------------------------------------------------------

HEALTHY: Row = {
    "entropy": 0.5,
    "engine": 0.0,
    "ratio": [0.9, 1.1],
    "correct": 2,
    "truncated": 0,
    "formless": 0,
    "bonus": 0.0,
}


def step_metrics(state: Row, *, method: str = "dcpo", alpha: float = ALPHA, target: float = 0.5) -> dict[str, float]:
    """The metrics of a synthetic batch: two groups of four responses of eight tokens.

    state: entropy [nats/token], how far the engine's log-probs are off, rho of alternating tokens, correct responses
    of each group, how many of each group are cut off, and how many of the correct ones are.
    """
    rows: list[Row] = []
    for i in range(2 * GROUP):
        place = i % GROUP
        rows.append(
            {
                "prompt": 3,
                "tokens": list(range(8)),
                "logp": [-state["entropy"]] * 8,
                "engine": [-state["entropy"] - state["engine"]] * 8,
                "entropy": [state["entropy"]] * 8,
                "ratio": (state["ratio"] * 8)[:8],
                "reward": float(place < state["correct"]) + state["bonus"],
                "success": float(place < state["correct"]),
                "truncated": place < state["formless"] or place >= GROUP - state["truncated"],
                "answer": str(place),
            }
        )
    found = batch_metrics(
        [experience(rows, method, alpha=alpha)],
        grades=[Grade(r["reward"], r["answer"], success=r["success"]) for r in rows],
        prompts=[prompt(0), prompt(1)],
        alpha=alpha,
        mixing="convex",
    )
    return found | {"entropy/target": target, "dcpo/alpha": alpha}


def series(count: int = 14, **changes: Any) -> list[Row]:
    """States of `count` steps; a pair of numbers runs from the first to the second."""
    states = []
    for i in range(count):
        state = dict(HEALTHY)
        for name, value in changes.items():
            state[name] = value[0] + (value[1] - value[0]) * i / (count - 1) if isinstance(value, tuple) else value
        states.append(state)
    return states


def named(states: list[Row], *, method: str = "dcpo", alpha: float = ALPHA, **bounds: Any) -> set[str]:
    """Causes that are alerted at the last step."""
    watch = make_monitor(make_recipe(method={"name": method}, **bounds))
    counts = [watch.observe(i, step_metrics(s, method=method, alpha=alpha))[0] for i, s in enumerate(states, start=1)]
    return {name for name in CAUSES if counts[-1][f"monitor/alert_{name}"] > counts[-2][f"monitor/alert_{name}"]}


def test_the_band_follows_the_target_of_the_step() -> None:
    watch = make_monitor(make_recipe(window=3))
    found = [
        watch.observe(i, step_metrics(dict(HEALTHY, entropy=0.5), target=target))[0]["entropy/steps_to_leave"]
        for i, target in enumerate((0.5, 0.5, 0.5, 2.0), start=1)
    ]
    assert found[2] > 0 and found[3] == 0  # 0.5 lies below 1.0 to 3.0


HACKED = [dict(HEALTHY, correct=1 + i // 4, formless=min(i // 4, 3)) for i in range(14)]


@pytest.mark.parametrize(
    ("states", "method", "expected"),
    [
        (series(), "dcpo", set()),
        (series(entropy=(0.45, 0.55)), "dcpo", set()),
        (series(entropy=(0.74, 0.3)), "dcpo", set()),
        (series(entropy=(2.0, 0.9)), "dcpo", set()),  # above, but on its way
        (series(entropy=(0.05, 0.2)), "dcpo", set()),  # below, but on its way
        (series(entropy=(0.5, 0.1)), "dcpo", {"collapse", "weak_regulariser"}),
        (series(entropy=(0.5, 0.1)), "grpo", {"collapse"}),
        (series(entropy=0.1), "dcpo_wo_double_is", {"collapse", "weak_regulariser"}),
        (series(entropy=(0.5, 3.0)), "dcpo", {"explosion", "weak_regulariser"}),
        (series(entropy=(0.5, 3.0)), "entropy_reg", {"explosion"}),
        (series(entropy=1.5), "dcpo", {"weak_regulariser"}),  # stands still above the band: too weak, no explosion
        (series(9, entropy=1.5), "dcpo", set()),  # too early to tell
        (series(entropy=(1.5, 1.3)), "dcpo", set()),  # slow, but within five windows
        (series(entropy=1.5), "grpo", set()),
        (series(truncated=2), "dcpo", {"truncation"}),
        (series(truncated=1), "dcpo", set()),
        (series(engine=0.05), "dcpo", {"mismatch"}),
        (series(engine=0.01), "dcpo", set()),
        (HACKED, "dcpo", {"reward_hacking", "truncation"}),
        ([dict(s, formless=0) for s in HACKED], "dcpo", set()),  # the reward rises and the form stays
        (series(correct=(3.9, 1), bonus=(0.0, 1.0)), "dcpo", {"reward_hacking"}),  # more reward, fewer right ones
        (series(correct=2, bonus=(0.0, 1.0)), "dcpo", set()),
        ([dict(s, correct=3) for s in HACKED], "dcpo", {"truncation"}),  # the form goes and the reward stays
        (series(ratio=[0.2, 0.3]), "dcpo", {"rho_degenerate"}),
        (series(ratio=[0.01] * 7 + [7.9]), "dcpo", {"rho_degenerate"}),  # mean 1.0, effective share 1/8
        (series(ratio=[0.2, 0.3]), "j1", set()),  # rho has no part in it
        (series(ratio=[0.5, 1.5]), "dcpo", set()),
    ],
)
def test_causes_are_named_when_they_are_there_and_only_then(states: list[Row], method: str, expected: set) -> None:
    alpha = ALPHA if methods.METHODS[method].uses_alpha else 0.0
    assert named(states, method=method, alpha=alpha, ratio_ess_bound=0.15) == expected


def test_without_alpha_no_regulariser_is_called_weak() -> None:
    assert named(series(14, entropy=0.1), alpha=0.0) == {"collapse"}  # no correct answer: the controller gave 0


@pytest.mark.parametrize(
    ("run", "collapsed", "truncated"),
    [("grpo", 21, (2, 8)), ("dcpo", 0, (2, 5)), ("grpo-fp32", 25, (2, 2)), ("dcpo-fp32", 0, (0, 0))],
)
def test_the_demo_runs_collapse_and_hold(run: str, collapsed: int, truncated: tuple[int, int]) -> None:
    recipe = load_recipe(ROOT / f"recipes/{run.removesuffix('-fp32')}-smollm2-135m-cpu.yaml")
    watch, counts = make_monitor(recipe), []
    for line in (ROOT / f"docs/demo/{run}/metrics.jsonl").read_text().splitlines():
        recorded = step_metrics(HEALTHY) | json.loads(line)
        counts.append(watch.observe(recorded["step"], recorded)[0])
    assert counts[-1]["monitor/alert_collapse"] == collapsed, "steps at which the cause was there, of 40"
    assert (counts[3]["monitor/alert_truncation"], counts[-1]["monitor/alert_truncation"]) == truncated


def test_trend_and_steps_to_leave_follow_the_line() -> None:
    watch = make_monitor(make_recipe(window=4))
    found = [watch.observe(i, step_metrics(s))[0] for i, s in enumerate(series(6, entropy=(0.5, 0.3)), start=1)]
    assert [m["entropy/trend"] for m in found] == pytest.approx([0, 0, -0.04, -0.04, -0.04, -0.04], abs=1e-6)
    assert [m["entropy/steps_to_leave"] for m in found][1:] == pytest.approx(
        [1000, 0.17 / 0.04, 3.25, 2.25, 1.25], 1e-3
    )
    rising = [watch.observe(i, step_metrics(s))[0] for i, s in enumerate(series(4, entropy=(0.3, 0.6)), start=7)]
    assert rising[-1]["entropy/trend"] == pytest.approx(0.1, abs=1e-6)
    assert rising[-1]["entropy/steps_to_leave"] == pytest.approx(1.5, 1e-3)  # 0.75 is the upper bound
    outside = watch.observe(11, step_metrics(dict(HEALTHY, entropy=0.8)))[0]
    assert outside["entropy/steps_to_leave"] == 0


def test_a_cause_must_hold_for_patience_steps_in_a_row() -> None:
    watch = make_monitor(make_recipe(patience=3))
    counts = []
    for i, truncated in enumerate([2, 2, 0, 2, 2, 2, 2], start=1):
        counts.append(watch.observe(i, step_metrics(dict(HEALTHY, truncated=truncated)))[0]["monitor/alert_truncation"])
    assert counts == [0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("action", "alerts", "stops"),
    [("nothing", [0, 0, 0, 0], False), ("warn", [0, 1, 0, 0], False), ("stop", [0, 1, 1, 1], True)],
)
def test_each_action_does_what_it_says(action: str, alerts: list[int], stops: bool) -> None:
    watch = make_monitor(make_recipe(patience=2, on_truncation=action))
    seen = [watch.observe(i, step_metrics(dict(HEALTHY, truncated=2))) for i in range(1, 5)]
    assert [len(found) for _, found in seen] == alerts
    assert [m["monitor/alert_truncation"] for m, _ in seen] == [0, 1, 2, 3], "counted whatever the action"
    assert bool(watch.stopping) == stops
    watch.observe(5, step_metrics(HEALTHY))
    assert not watch.stopping


def test_an_alert_says_step_numbers_keys_and_where_to_read_on() -> None:
    watch = make_monitor(make_recipe(patience=1))
    (alert,) = watch.observe(7, step_metrics(dict(HEALTHY, truncated=2)))[1]
    assert alert.evidence["rollout/truncated_fraction"] == 0.5 and alert.keys["rollout.max_new_tokens"] == 8192
    for part in ("step 7", "truncation", "rollout/truncated_fraction = 0.5", "rollout.max_new_tokens = 8192"):
        assert part in str(alert)
    assert "docs/troubleshoot.md#truncation" in str(alert)


def test_every_cause_has_an_action_known_keys_explained_evidence_and_a_page() -> None:
    recipe = make_recipe()
    page = (ROOT / "docs/troubleshoot.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(CAUSES)
    for name, cause in CAUSES.items():
        assert getattr(recipe.monitor, f"on_{name}") == "warn"
        assert not list(unknown_metrics(cause.evidence))
        for key in cause.keys:
            assert key in recipe.settings
            assert key in sections[name], (name, key)
        for metric in cause.evidence:
            assert metric in sections[name], (name, metric)
    for key in re.findall(r"`([a-z_]+\.[a-z_]+)[`=]", page):
        if key.split(".")[0] in Recipe.model_fields:
            assert key in recipe.settings


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_resumed_monitor_sees_what_the_whole_run_sees() -> None:
    states = series(entropy=(0.5, 0.1), truncated=2)
    whole, first, resumed = (make_monitor(make_recipe()) for _ in range(3))
    expected = [whole.observe(i, step_metrics(s)) for i, s in enumerate(states, start=1)]
    for i, state in enumerate(states[:5], start=1):
        first.observe(i, step_metrics(state))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [resumed.observe(i, step_metrics(s)) for i, s in enumerate(states[5:], start=6)] == expected[5:]
    assert resumed.state_dict() == whole.state_dict()


def test_a_shorter_window_keeps_the_last_values_and_other_names_are_refused() -> None:
    whole = make_monitor(make_recipe())
    for i, state in enumerate(series(10, entropy=(0.5, 0.41)), start=1):
        whole.observe(i, step_metrics(state))
    short = make_monitor(make_recipe(window=3))
    short.load_state_dict(whole.state_dict())
    assert list(short.history["entropy/exact"]) == pytest.approx([0.43, 0.42, 0.41])
    old = whole.state_dict()  # of before success had a name: every reward was one
    del old["history"]["rollout/success_rate"]
    whole.load_state_dict(old)
    assert whole.history["rollout/success_rate"] == whole.history["rollout/reward_mean"] != deque()
    state = whole.state_dict()
    del state["streak"]["collapse"]
    with pytest.raises(ValueError, match=r"streak of .*'collapse'.*another version"):
        whole.load_state_dict(state)


# --- the trainer's part ----------------------------------------------------------------------------------------------

STATUS = {f"policy/{n}": 0.1 for n in ("loss", "clip_fraction_high", "clip_fraction_low", "approx_kl", "entropy")} | {
    "policy/grad_norm": 1.0,
    "policy/learning_rate": 1e-6,
    **{f"time/{n}": 1.0 for n in ("rollout", "checkpoint", "token_stats", "train", "weight_sync", "step")},
}


LOGS = {"mine": 2.5, "overlong_penalty": 0.5}


def alert_of(name: str, recipe: Recipe, **step: Any) -> Alert:
    return Alert.of(name, bounds=recipe.monitor, settings=recipe.settings, **step)


def make_trainer(recipe: Recipe) -> Any:
    """What DCPOTrainer.record and close read of a trainer."""
    rows = random_rows(4 * GROUP)
    return SimpleNamespace(
        recipe=recipe,
        monitor=make_monitor(recipe),
        log=make_log(recipe),
        experience_maker=SimpleNamespace(
            decision=ControllerDecision(entropy=1.0, temperature=1.2, alpha=ALPHA, target_entropy=0.5),
            method=methods.METHODS["dcpo"],
            entropy_coefficient=0.0,
            prompts=[prompt(i) for i in range(4)],
        ),
        controller=SimpleNamespace(no_success_count=2),
        cost=make_cost(recipe, 1e12),
        grader=SimpleNamespace(timeouts=1, crashes=0, failures=4),
        weights_version=5,
        ahead=SimpleNamespace(times={}),
        timeline=SimpleNamespace(close=lambda: None),
        saving=SimpleNamespace(checkpoints=SimpleNamespace(saved_step=1)),
        filtered={},
        grades=[Grade(r["reward"], r["answer"], success=r["success"], logs=LOGS) for r in rows],
        experiences=[experience(rows[: 2 * GROUP], "dcpo"), experience(rows[2 * GROUP :], "dcpo")],
    )


def test_a_step_emits_the_metrics_of_the_table_and_no_other(tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tmp_path))
    metrics = DCPOTrainer.record(trainer, 3, trainer.experiences, dict(STATUS))
    trainer.log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, **metrics}
    assert list(unknown_metrics(list(metrics))) == []
    stems = {re.sub(r"_\d+$", "_N", name).replace("reward/mine", "reward/NAME") for name in metrics}
    parts = ("correction/", "filter/")
    asked_for = {name for name, meaning in METRICS.items() if "only with" in meaning or name.startswith(parts)}
    assert set(METRICS) - asked_for == stems | (set(METRICS) & set(metrics))
    assert (metrics["reward/failures"], metrics["reward/mine"], metrics["reward/overlong_penalty"]) == (4, 2.5, 0.5)
    assert metrics["rollout/age_mean"] == metrics["rollout/age_max"] == 0.0  # version 5 came after these responses
    assert metrics["dcpo/alpha"] == ALPHA and metrics["dcpo/no_success_steps"] == 2 and metrics["weights/version"] == 5


def test_every_metric_named_in_the_package_is_in_the_table() -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "dcpo_openrlhf").rglob("*.py"))
    sections = "|".join(sorted({name.split("/")[0] for name in METRICS}))
    names = set(re.findall(rf'"((?:{sections})/[a-z0-9_]+)"', source))
    assert list(unknown_metrics(sorted(names))) == []


def test_alerts_reach_events_the_log_and_the_end_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(make_recipe(tmp_path, patience=1, on_mismatch="stop"))
    DCPOTrainer.record(trainer, 1, trainer.experiences, dict(STATUS))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e["cause"] == "mismatch"]
    assert event["step"] == 1 and event["action"] == "stop" and event["evidence"]["mismatch/prob_diff_mean"] > 0.01
    assert "mismatch" in caplog.text
    kept = rf"checkpoint step_000001 and the exported policy hf/ in {tmp_path}"
    with pytest.raises(MonitorStop, match=rf"mismatch: trainer and engine.*\n{kept}") as stop:
        DCPOTrainer.close(trainer)
    assert [alert.cause for alert in stop.value.alerts] == ["mismatch"]


def test_the_entry_ends_with_status_3_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(recipe: Recipe) -> None:
        alert = alert_of("collapse", recipe, step=9, metrics={"entropy/exact": 0.01})
        raise MonitorStop([alert], saved="saved there")

    monkeypatch.setattr(train_dcpo, "run", stop)
    monkeypatch.setattr(train_dcpo, "preflight", MagicMock())  # nothing to object to
    file = tmp_path / "recipe.yaml"
    file.write_text("{model: {path: unused}, task: {kind: arithmetic}}")
    assert train_dcpo.main(["--recipe", str(file)]) == 3
    message = capsys.readouterr().err
    assert "step 9: collapse" in message and "entropy/exact = 0.01" in message and "saved there" in message


# --- sinks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensorboard", [False, True])
def test_log_writes_one_object_a_step_with_the_step_first(tmp_path: Path, tensorboard: bool) -> None:
    log = make_log(make_recipe(tmp_path, tensorboard=tensorboard))
    for step in (1, 2):
        log.write(step, {"policy/loss": 0.5 * step, "time/step": 3})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step, "a line is there as soon as its step is done"
    log.close()
    rows = [json.loads(line) for line in lines]
    assert rows == [{"step": s, "policy/loss": 0.5 * s, "time/step": 3} for s in (1, 2)]
    assert [next(iter(row)) for row in rows] == ["step", "step"]
    assert bool(list(tmp_path.glob("tensorboard/events.*"))) == tensorboard


def test_log_of_a_resumed_run_goes_on_in_the_same_files(tmp_path: Path) -> None:
    alert = alert_of("mismatch", make_recipe(), step=1, metrics={})
    for step in (1, 2):
        log = make_log(make_recipe(tmp_path))
        log.write(step, {})
        log.event(replace(alert, step=step))
        log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [json.loads(e)["step"] for e in (tmp_path / "events.jsonl").read_text().splitlines()] == [1, 2]


def test_wandb_offline_keeps_the_metrics_of_a_run_and_of_its_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    recipe = make_recipe(tmp_path, wandb="offline", wandb_project="test")
    for step in (1, 2):
        log = make_log(recipe, done=step - 1)
        log.write(step, {"entropy/exact": 0.123456 + step})
        log.close()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{(tmp_path / 'wandb_id').read_text().split()[0]}.wandb"}
    written = b"".join(file.read_bytes() for file in files)
    for part in (b"entropy/exact", b"1.123456", b"2.123456", b"target_entropy"):
        assert part in written


def test_wandb_gets_another_run_where_steps_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    fake = MagicMock()
    fake.init = lambda **options: begun.append(options["id"]) or MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = make_recipe(tmp_path, wandb="offline", tensorboard=False)
    for done, steps in [(0, (1, 2, 3)), (3, (4,)), (2, (3, 4))]:
        log = make_log(recipe, done=done)
        for step in steps:
            log.write(step, {"x": 1.0})
        log.close()
    first, on, again = begun
    assert first == on, "nothing is made again: the same run goes on"
    assert again != first, "steps 3 and 4 are made again, and wandb cannot take its points back"


def test_wandb_that_is_missing_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    make_log(make_recipe(tmp_path)).close()
    with pytest.raises(ImportError, match=r"monitor.wandb = offline needs the package wandb.*monitor.wandb=off"):
        make_log(make_recipe(tmp_path, wandb="offline"))


def test_progress_line_tells_where_the_run_stands() -> None:
    metrics = {
        "rollout/reward_mean": -0.25,
        "rollout/success_rate": 0.125,
        "entropy/exact": 0.31234,
        "entropy/target": 0.5,
        "dcpo/temperature": 2.0,
        "dcpo/alpha": 0.18766,
        "rollout/length_mean": 7.6,
        "policy/grad_norm": 1.234,
        "time/step": 12.3,
    }
    line = progress_line(3, 30, metrics)
    for part in (
        "step 3/30",
        "reward -0.25",
        "success 0.12",
        "entropy 0.312 (target 0.5)",
        "T 2 ",
        "alpha 0.188",
        "length 8",
        "12 s",
    ):
        assert part in line, line
    assert "ends about" in line and "\n" not in line
