"""The page of tools.bench.rollout says what was measured; its workloads are recipes that load."""

from pathlib import Path

from dcpo_openrlhf.recipe.load import load_recipe
from tools.bench import rollout
from tools.bench.rollout import OFFLINE, OURS, TOKENS_ALONE, Result, Workload

PARTS = {"the engine's actor at work": 1.75, "grading": 0.125, "tokenising, transfer, experiences, checks": 0.125}
RESULT = Result(
    tokens={OURS: 600, OFFLINE: 610, TOKENS_ALONE: 610},
    same={OURS: 1.0, OFFLINE: 0.875, TOKENS_ALONE: 0.875},
    seconds={OURS: 2.0, OFFLINE: 1.9, TOKENS_ALONE: 1.8},
    parts=PARTS,
)


def test_the_page_gives_speeds_shares_and_parts() -> None:
    text = rollout.page({Workload(16, 4, 12): RESULT}, "python -m tools.bench.rollout", (0.25, 2.0))
    rows = {cells[1].strip(): cells[2].strip() for line in text.splitlines() if len(cells := line.split("|")) > 3}
    assert rows["generated tokens a second"] == "16 prompts x 4, at most 12 tokens"
    assert rows[rollout.TITLES[OURS]] == "300" and rows["the same without log-probs"] == "339"
    assert rows["ours / vLLM's"] == f"{300 / (610 / 1.9):.3f}"
    assert rows["ours / vLLM's without log-probs"] == f"{300 / (610 / 1.8):.3f}"
    assert rows["tokens of a turn: ours, vLLM's"] == "600, 610"
    assert rows["responses that are the same, token by token"] == "0.875"
    assert rows["ours"] == "2.000" and rows["ours: grading"] == "0.125"
    assert "load average before the start 0.2, at the end 2.0. " in text
    busy = rollout.page({Workload(16, 4, 12): RESULT}, "python -m tools.bench.rollout", (3.0, 2.0))
    assert "load average before the start 3.0, at the end 2.0: other work ran beside it. " in busy


def test_responses_are_compared_one_by_one() -> None:
    assert rollout.same([[[1, 2], [3]], [[4], [5]]], [[[1, 2], [3]], [[4], [6]]]) == 0.75


def test_every_workload_is_a_recipe_that_generates_alone(tmp_path: Path) -> None:
    for text in rollout.WORKLOADS:
        workload = Workload.of(text)
        recipe = load_recipe(rollout.RECIPE, workload.settings(str(tmp_path)))
        assert recipe.train.rollout_only and recipe.rollout.max_new_tokens == workload.new_tokens
        assert (recipe.train.prompts_per_step, recipe.train.group_size) == workload[:2]
