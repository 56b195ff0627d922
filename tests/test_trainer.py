"""What the trainer does between rollout and update: grades, and refuses responses of other weights."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcpo_openrlhf.assemble import make_controller
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import Grade, GraderPool
from dcpo_openrlhf.rollout.tasks import Problem, Prompt
from dcpo_openrlhf.trainer import DCPOTrainer, Stopwatch
from tests.bounds import HANG_S

TEXTS = {5: "It is 7", 6: "It is 8", 7: "7 and on and on"}


PROMPT = Prompt(Problem("sum", "3 + 4", "7", "test"), "What is 3 + 4?")


class FakeTokenizer:
    def decode(self, tokens: torch.Tensor, *, skip_special_tokens: bool) -> str:
        return TEXTS[tokens.tolist()[-1]] + "<end>" * (not skip_special_tokens)


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
            trainer(recipe, grader), [sample(5), sample(6, truncated=True), sample(7, truncated=True)], [PROMPT], 1
        )
    assert texts == list(TEXTS.values())
    assert [g.reward for g in grades] == [g.success for g in grades] == expected


def test_what_a_reward_function_failed_on_is_told_and_the_run_goes_on(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(batch):\n    return [1.0 / (row.response != 'It is 8') for row in batch]\n"
    )
    recipe = make_recipe(reward={"function": f"{tmp_path}/mine.py:f"})
    with GraderPool(workers=1, extractor=recipe.reward.default, deadline_s=HANG_S) as grader:
        fake, events = trainer(recipe, grader), []
        fake.log = SimpleNamespace(line=events.append)
        grades = DCPOTrainer._grade(fake, [sample(5), sample(6)], [PROMPT], 12)[1]
    assert [g.reward for g in grades] == [1.0, 0.0]
    (event,) = events
    assert event["step"] == 12 and event["problems"] == ["sum"] and "mine.py:f: ZeroDivisionError" in event["text"]
    assert event["text"] in caplog.text


def test_an_evaluation_counts_successes_and_names_the_mean_reward_apart(tmp_path: Path) -> None:
    grades = [Grade(-1.5, "7", success=1.0), Grade(0.5, "8", success=0.0)]
    fake = trainer(make_recipe(run={"dir": str(tmp_path)}))
    fake.heldout, fake.heldout_grades = [object()], lambda *_, **__: grades
    assert DCPOTrainer.evaluate(fake, 4) == 0.5
    row = json.loads((tmp_path / "evaluation.jsonl").read_text())
    assert row == {"step": 4, "heldout_accuracy": 0.5, "heldout_reward": -0.5, "responses": 2}


@pytest.mark.parametrize(
    ("step", "made", "evaluated"),
    [(2, (), True), (2, ("reward_mean",), True), (2, ("heldout_accuracy",), False), (3, (), False), (4, (), False)],
)
def test_an_evaluation_between_is_made_once(step: int, made: tuple[str, ...], evaluated: bool) -> None:
    """A checkpoint that a signal saved before the evaluation of its step has no score of it."""
    calls: list[Any] = []
    fake = trainer(make_recipe(train={"steps": 4}, evaluation={"every": 2}))
    fake.evaluate = lambda step: 0.5
    fake.settle = lambda *what, **scores: calls.append((*what, scores))
    fake.saving = SimpleNamespace(
        settled=({}, {"heldout_accuracy": 0.5}), checkpoints=SimpleNamespace(score=lambda *what: calls.append(what))
    )
    DCPOTrainer.evaluate_between(fake, step, made)
    assert calls == ([(step, {"heldout_accuracy": 0.5})] * 2 if evaluated else [])


def test_a_resume_makes_the_evaluation_that_its_checkpoint_lacks(tmp_path: Path, monkeypatch: Any) -> None:
    """`start` asks for it with the checkpoint's scores, after everything else is as it was."""
    state: dict[str, Any] = dict.fromkeys(("prompts", "controller", "monitor", "heldout_before"))
    state |= {"weights_version": 3, "grader": [0, 0, 0], "history": [{"train/step": 2}], "minutes": 1.0}
    did: list[Any] = []
    part = SimpleNamespace(load_state_dict=lambda _: None, load=lambda *_, **__: None)
    fake = trainer(make_recipe())
    fake.point = SimpleNamespace(step=2, path=tmp_path, state=lambda: state, scores=lambda: {"reward_mean": 0.5})
    fake.actor_model_group = SimpleNamespace(async_run_method=lambda *_: [None])
    fake.prompts = fake.controller = fake.monitor = fake.ahead = part
    fake.grader, fake.saving, fake.begin = SimpleNamespace(), SimpleNamespace(checkpoints=SimpleNamespace()), 100.0
    fake.sync_weights = lambda: did.append("sync")
    fake.evaluate_between = lambda step, made: did.append((step, made, fake.history))
    monkeypatch.setattr("dcpo_openrlhf.trainer.ray", SimpleNamespace(get=lambda found: found))
    monkeypatch.setattr("dcpo_openrlhf.trainer.make_cost", lambda *_: None)
    assert DCPOTrainer.start(fake) == 2
    assert did == ["sync", (2, {"reward_mean": 0.5}, [{"train/step": 2}])]


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
