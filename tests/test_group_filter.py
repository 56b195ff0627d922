"""train.filter: which groups a step keeps, how often it draws, what fills a short one, what the trainer asks for."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcpo_openrlhf.group_filter import KEEPS, Draw, Group, draw_step
from dcpo_openrlhf.monitor.metrics import unknown_metrics
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import Grade
from dcpo_openrlhf.rollout.ahead import Ahead
from dcpo_openrlhf.rollout.replay import Recorder, Replay, ReplayError
from dcpo_openrlhf.rollout.tasks import Problem, Prompt, PromptStream
from dcpo_openrlhf.trainer import DCPOTrainer

SIZE = 2


def group(name: int, right: int, *, reward: float = 0.0) -> Group:
    """Two responses, of which so many are right; `reward` is added to the last one's."""
    success = [float(i < right) for i in range(SIZE)]
    grades = [Grade(s + reward * i, None, success=s) for i, s in enumerate(success)]
    return Group(Prompt(Problem(f"{name}", "", "", ""), ""), [f"{name}.{i}" for i in range(SIZE)], ["", ""], grades)


class Engines:
    """Answers prompts in order, `right` of two responses rightly."""

    def __init__(self, right: list[int]) -> None:
        self.right, self.asked = right, []

    def __call__(self, count: int, drawn: int) -> list[Group]:
        self.asked.append((count, drawn))
        return [group(i, self.right[i]) for i in range(drawn, drawn + count)]


def names(drawn: Draw) -> list[int]:
    return [int(p.problem.id) for p in drawn.prompts]


def test_success_decides_and_not_the_reward() -> None:
    kept = {name: [right for right in range(4) if keeps(right, 3)] for name, keeps in KEEPS.items()}
    assert kept == {"none": [0, 1, 2, 3], "all_wrong": [1, 2, 3], "uniform": [1, 2]}
    shaped = [group(0, 0, reward=-0.5), group(1, 2, reward=-0.5), group(2, 1, reward=-1.0)]  # the last: 1 and -1
    for name, expected in (("all_wrong", [1, 2]), ("uniform", [2])):
        drawn = draw_step(lambda *_: shaped, prompts=3, group_filter=name, rounds=1)  # type: ignore[arg-type]
        assert [i for place, i in enumerate(names(drawn)) if place not in drawn.fillers] == expected


def test_without_a_filter_a_step_is_one_round_as_it_comes() -> None:
    engines = Engines([0, 1, 2, 0])
    drawn = draw_step(engines, prompts=4, group_filter="none", rounds=9)
    assert engines.asked == [(4, 0)] and names(drawn) == [0, 1, 2, 3]
    assert (drawn.fillers, drawn.metrics, drawn.shortage) == ([], {}, "")


def test_refills_ask_for_what_is_missing_over_the_share_that_was_kept() -> None:
    engines = Engines([0, 1, 0, 2, 0, 1, 2, 0] + [0] * 8 + [1] * 30)
    drawn = draw_step(engines, prompts=8, group_filter="all_wrong", rounds=4)
    # 4 of 8 kept: 4 / (4 / 8); then 4 of 16: 4 / (4 / 16) is above 8; then all: 4 too many
    assert engines.asked == [(8, 0), (8, 8), (8, 16)]
    assert names(drawn)[:8] == [1, 3, 5, 6, 16, 17, 18, 19]
    assert names(drawn)[8:] == [20, 21, 22, 23, 0, 2, 4, 7, *range(8, 16)]
    assert (drawn.fillers, drawn.shortage) == ([], "")
    expected = {"drawn": 24, "kept": 8, "surplus": 4, "rounds": 3, "short": 0}
    assert drawn.metrics == {f"filter/{name}": value for name, value in expected.items()}
    assert list(unknown_metrics(list(drawn.metrics))) == []
    assert drawn.samples[:4] == ["1.0", "1.1", "3.0", "3.1"] and len(drawn.grades) == len(drawn.texts) == 48


def test_a_short_step_is_filled_up_evenly_with_dropped_groups_and_says_why() -> None:
    engines = Engines([2, 0, 1, 1, 1, 0, 2, 0, 1, 1] + [0, 2] * 20)
    drawn = draw_step(engines, prompts=8, group_filter="uniform", rounds=2)
    assert engines.asked == [(8, 0), (8, 8)]  # 3 of 8 kept: 5 / (3 / 8) is above 8
    assert drawn.fillers == [1, 4, 6] and names(drawn)[:8] == [2, 0, 3, 4, 1, 8, 5, 9]
    assert names(drawn)[8:] == [6, 7, *range(10, 16)]
    assert drawn.metrics["filter/kept"] == 5 and drawn.metrics["filter/short"] == 3
    assert "kept 5 of 8 groups in 2 rounds" in drawn.shortage
    assert "of 16 drawn, 6 have no right response and 5 right ones alone; 3 of these fill" in drawn.shortage


def test_where_every_group_is_dropped_the_step_is_what_was_drawn_first() -> None:
    engines = Engines([0] * 20)
    drawn = draw_step(engines, prompts=4, group_filter="all_wrong", rounds=3)
    assert engines.asked == [(4, 0), (4, 4), (4, 8)]
    assert drawn.fillers == [0, 1, 2, 3] and names(drawn) == list(range(12))


@pytest.mark.parametrize("seed", range(40))
def test_every_group_is_there_once_and_the_step_is_whole(seed: int) -> None:
    draw = random.Random(seed)
    prompts, rounds, name = draw.randint(1, 9), draw.randint(1, 4), draw.choice(["all_wrong", "uniform"])
    engines = Engines([draw.choice([0, 0, 1, 2]) for _ in range(prompts * rounds)])
    drawn = draw_step(engines, prompts=prompts, group_filter=name, rounds=rounds)  # type: ignore[arg-type]
    total = sum(count for count, _ in engines.asked)
    assert sorted(names(drawn)) == list(range(total)) and drawn.metrics["filter/drawn"] == total
    passed = [i for i in range(total) if 0 < engines.right[i] < (SIZE if name == "uniform" else SIZE + 1)]
    step = [i for place, i in enumerate(names(drawn)[:prompts]) if place not in drawn.fillers]
    assert step == passed[:prompts] and len(set(drawn.fillers)) == len(drawn.fillers) == prompts - len(step)
    assert all(names(drawn)[place] not in passed for place in drawn.fillers)
    assert len(drawn.fillers) == 0 or len(engines.asked) == rounds
    first_half = sum(place < prompts // 2 for place in drawn.fillers)
    assert prompts % 2 or abs(2 * first_half - len(drawn.fillers)) <= 1, "the updates share the fillers"


# --- the trainer -----------------------------------------------------------------------------------------------------


class FakeEngines:
    """Responses whose text says which request made them; the problem's answer says how many of a group are right."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def generate(self, prompts: list[str], labels: list[str], **request: Any) -> list[Any]:
        from openrlhf.trainer.ppo_utils.experience import Experience

        self.requests.append(request | {"prompts": prompts})
        return [
            Experience(
                sequences=torch.tensor([[1, 2, int(label) > k]]),
                attention_mask=torch.ones(1, 3, dtype=torch.bool),  # type: ignore[arg-type]
                action_mask=torch.tensor([[False, True]]),  # type: ignore[arg-type]
                rollout_log_probs=torch.tensor([[0.0, -0.5]]),
                prompts=[prompt],
                response_length=torch.tensor([1]),
                truncated=torch.tensor([False]),
                info={"weight_version": torch.tensor([3])},
            )
            for prompt, label in zip(prompts, labels, strict=True)
            for k in range(request["n_samples"])
        ]


def make_trainer(folder: Path, generator: Any, **train: Any) -> Any:
    """As much of a trainer as a rollout takes: 6 problems, of which two are never, two once and two always right."""
    folder.mkdir(exist_ok=True)
    settings = {"prompts_per_step": 2, "prompts_per_update": 1, "group_size": SIZE, "filter": "uniform", **train}
    recipe = Recipe.model_validate(
        {
            "run": {"dir": folder},
            "model": {"path": "unused"},
            "task": {"kind": "arithmetic"},
            "train": settings,
            "parallel": {"devices_per_node": 1},
        }
    )
    problems = [Problem(f"{i}", f"{i}", str(i % 3), "") for i in range(6)]
    made = SimpleNamespace(
        recipe=recipe,
        prompts=PromptStream(problems, prompts=[f"{i}" for i in range(6)], seed=1),
        generator=generator,
        ahead=Ahead(generator),
        experience_maker=SimpleNamespace(draws_again=False),
        weights_version=3,
        events=[],
    )
    made.log = SimpleNamespace(line=made.events.append)

    def generate(prompts: list[Prompt], **sampling: Any) -> list[Any]:
        return made.generator.generate([p.text for p in prompts], [p.problem.answer for p in prompts], **sampling)

    def grade(samples: list[Any], *_: Any) -> tuple[list[str], list[Grade]]:
        return [f"{s.sequences[0, 2]}" for s in samples], [Grade(float(s.sequences[0, 2]), None) for s in samples]

    made._generate, made._grade = generate, grade
    made._rollout = lambda *args, **request: DCPOTrainer._rollout(made, *args, **request)
    return made


def steps(made: Any, first: int, last: int) -> list[Any]:
    """What each step trains on: prompts of the updates, the rest, fillers, metrics."""
    found = []
    for step in range(first, last + 1):
        samples = DCPOTrainer.rollout(made, step)
        ids = [p.problem.id for p in made.experience_maker.prompts]
        assert [s.prompts[0] for s in samples] == [i for i in ids for _ in range(SIZE)]
        assert [float(s.scores) for s in samples] == [g.success for g in made.grades]
        found.append((ids[:2], ids[2:], list(made.experience_maker.fillers), made.filtered))
    return found


def test_a_refill_asks_for_the_next_prompts_with_seeds_of_their_own(tmp_path: Path) -> None:
    engines = FakeEngines()
    made = make_trainer(tmp_path, engines, filter_rounds=2)
    ((update, _, fillers, metrics),) = steps(made, 1, 1)
    asked = [text for request in engines.requests for text in request["prompts"]]
    fresh = make_trainer(tmp_path, engines).prompts
    assert asked == [p.text for p in fresh.take(len(asked))] and fresh.state_dict() == made.prompts.state_dict()
    assert {request["step"] for request in engines.requests} == {1}
    firsts = [request.get("first", 0) for request in engines.requests]
    assert firsts == [sum(len(r["prompts"]) for r in engines.requests[:i]) for i in range(len(firsts))]
    assert metrics["filter/rounds"] == len(firsts) and metrics["filter/drawn"] == len(asked)
    rows = [json.loads(line) for line in (tmp_path / "samples/step_000001.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows[: 2 * SIZE]] == [i for i in update for _ in range(SIZE)]
    assert [event["cause"] for event in made.events] == ["filter"] * bool(fillers)


def test_a_step_without_a_filter_asks_as_it_always_did(tmp_path: Path) -> None:
    engines = FakeEngines()
    made = make_trainer(tmp_path, engines, filter="none")
    assert [found[3] for found in steps(made, 1, 2)] == [{}, {}] and made.events == []
    assert all(set(r) == {"prompts", "step", "n_samples", "temperature", "top_p"} for r in engines.requests)
    assert len(engines.requests) == 2


def test_a_resumed_run_draws_what_the_whole_run_draws(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", FakeEngines())
    expected = steps(whole, 1, 2)
    state = json.loads(json.dumps(whole.prompts.state_dict()))
    expected += steps(whole, 3, 6)
    resumed = make_trainer(tmp_path / "resumed", FakeEngines())
    resumed.prompts.load_state_dict(state)
    assert steps(resumed, 3, 6) == expected[2:]
    assert resumed.generator.requests == whole.generator.requests[-len(resumed.generator.requests) :]
    assert any(found[3]["filter/rounds"] > 1 for found in expected) and resumed.prompts.epoch > 0


def test_refills_are_recorded_and_replayed(tmp_path: Path) -> None:
    recorded = make_trainer(tmp_path / "first", Recorder(FakeEngines(), tmp_path / "first/samples"))
    expected = steps(recorded, 1, 3)
    assert any(found[3]["filter/rounds"] > 1 for found in expected)
    assert list((tmp_path / "first/samples").glob("step_*.2.pt"))
    assert steps(make_trainer(tmp_path / "again", Replay(tmp_path / "first")), 1, 3) == expected
    other = make_trainer(tmp_path / "other", Replay(tmp_path / "first"), filter_rounds=1)
    with pytest.raises(ReplayError, match="other prompts"):  # without its refills, the next step's prompts are others
        steps(other, 1, 3)
