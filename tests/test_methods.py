"""Every row of METHODS trains for real: one engine, one policy, two steps of each method one after the other."""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from dcpo_openrlhf import local_ray, train_dcpo
from dcpo_openrlhf.methods import METHODS
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.grades import Grade, Question
from dcpo_openrlhf.reward.pool import GraderPool
from dcpo_openrlhf.rollout import chat, tasks
from dcpo_openrlhf.rollout.replay import TEMPERED_STEP
from dcpo_openrlhf.trainer import DCPOTrainer
from tests.tiny import make_biased_model

GROUP, PROMPTS = 4, 4


def make_recipe(folder: Path, model: Path, name: str, *, steps: int = 2, ahead: int = 0) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"dir": folder / (f"{name}-ahead" if ahead else name), "device": "cpu", "logical_devices": 2},
            "model": {"path": model, "dtype": "fp32"},
            "task": {"kind": "arithmetic", "template": "plain"},
            "reward": {"extractor": "last_integer", "workers": 1},
            "method": {"name": name, "target_entropy": 9.0, "alpha_max": 1.0},
            "optimizer": {"learning_rate": 1e-4, "eps": 1e-3},
            "correction": {"level": "token", "mode": "clip"} if ahead else {},
            "train": {"steps": steps, "prompts_per_step": PROMPTS, "prompts_per_update": 2, "group_size": GROUP},
            "parallel": {"devices_per_node": 1},
            "rollout": {
                "engines": 1,
                "max_prompt_tokens": 200,
                "max_new_tokens": 16,
                "cpu_kv_cache_gb": 0.1,
                "ahead": ahead,
            },
            "evaluation": {"problems": 0},
            "checkpoint": {"export_hf": False},
            "monitor": {"tensorboard": False},
        }
    )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What all methods share; `version` is the one that engine and policy have come to."""
    folder = tmp_path_factory.mktemp("methods")
    model = make_biased_model(folder / "model")
    recipe = make_recipe(folder, model, "dcpo")
    with contextlib.ExitStack() as exits:
        local_ray.start(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
        exits.callback(ray.shutdown)
        grader = exits.enter_context(GraderPool(workers=1, extractor="last_integer", deadline_s=10.0))
        engines, group = train_dcpo._start_actors(recipe, RecipeStrategy(recipe), exits)
        yield {"folder": folder, "model": model, "grader": grader, "engines": engines, "group": group, "version": 0}


def prompt_stream(recipe: Recipe, tokenizer: Any) -> tasks.PromptStream:
    """Problems whose answer is the model's favourite, so that groups hold right and wrong answers."""
    problems = [tasks.Problem(f"sum-{n}", f"What is {n} + {7 - n}?", "7", "test") for n in range(8)]
    template = tasks.prompt_template(recipe.task.template)
    texts = [chat.render(p, tokenizer=tokenizer, template=template) for p in problems]
    return tasks.PromptStream(problems, prompts=texts, seed=1)


def make_trainer(stack: dict[str, Any], recipe: Recipe) -> DCPOTrainer:
    recipe.run.dir.mkdir()
    tokenizer = train_dcpo._tokenizer(recipe)
    trainer = DCPOTrainer(
        RecipeStrategy(recipe),
        stack["group"],
        stack["engines"],
        tokenizer,
        prompts=prompt_stream(recipe, tokenizer),
        heldout=[],
        grader=stack["grader"],
    )
    trainer.weights_version = stack["version"]
    return trainer


def metrics_of(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (recipe.run.dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_method_trains(stack: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(stack["folder"], stack["model"], name)
    trainer = make_trainer(stack, recipe)
    requests = []  # (temperature, responses) of every call for rollouts
    generate = trainer.generator.generate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        samples = generate(*args, **kwargs)
        requests.append((kwargs["temperature"], len(samples)))
        return samples

    monkeypatch.setattr(trainer.generator, "generate", recorded)
    before = ray.get(stack["engines"][0].weight_checksums.remote()) if stack["version"] else None
    trainer.fit()
    stack["version"] = trainer.weights_version
    assert ray.get(stack["engines"][0].weight_checksums.remote()) != before  # the policy moved, and the engine with it

    metrics = metrics_of(recipe)
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert all(math.isfinite(value) for value in m.values())
        assert 0 < m["rollout/reward_mean"] < 1 and m["policy/grad_norm"] > 0
        assert (m["dcpo/alpha"] > 0) == METHODS[name].uses_alpha
    extra = {"j2": PROMPTS * GROUP, "j4": PROMPTS * GROUP, "aepo": GROUP, "scope_rl": GROUP}  # a quarter of the prompts
    per_step = [(1.0, PROMPTS * GROUP)] + ([(1.2, extra[name])] if name in extra else [])
    assert requests == per_step * 2


class ByProblem:
    """A grader: two of the eight problems are always failed, two always solved, the others by every other response."""

    timeouts = crashes = failures = 0

    def grade(self, texts: list[str], questions: list[Question], **_: Any) -> list[Grade]:
        kinds = (int(q.id.removeprefix("sum-")) % 4 for q in questions)
        right = [float(kind == 1 or (kind > 1 and i % 2 == 0)) for i, kind in enumerate(kinds)]
        return [Grade(r, text, success=r) for r, text in zip(right, texts, strict=True)]


@pytest.mark.parametrize(("name", "kind"), [("dcpo", "all_wrong"), ("j2", "all_wrong"), ("grpo", "uniform")])
def test_a_filtered_method_trains_and_its_record_replays(stack: dict[str, Any], name: str, kind: str) -> None:
    made = make_recipe(stack["folder"], stack["model"], f"{name}-{kind}").model_dump()
    made["train"] |= {"filter": kind, "filter_rounds": 3}
    made["method"]["name"], made["rollout"]["record"] = name, True
    made["reward"]["require_end"] = False
    recipe = Recipe.model_validate(made)
    graded = stack | {"grader": ByProblem()}
    trainer = make_trainer(graded, recipe)
    trainer.fit()
    stack["version"] = trainer.weights_version
    metrics = metrics_of(recipe)
    assert any(m["filter/rounds"] > 1 for m in metrics) and len(metrics) == 2
    for m in metrics:
        assert m["filter/kept"] + m["filter/short"] == PROMPTS <= m["filter/drawn"] and m["policy/grad_norm"] > 0
        rate = m["group/all_wrong"] + (m["group/all_correct"] if kind == "uniform" else 0.0)
        assert m["filter/drawn"] * (1 - rate) == pytest.approx(m["filter/kept"] + m["filter/surplus"])
        assert rate > 0 or m["filter/rounds"] == 1, "metrics are of all that was drawn"
    assert trainer.prompts.epoch * 8 + trainer.prompts.position == sum(m["filter/drawn"] for m in metrics)

    again = recipe.model_dump()
    again["run"]["dir"] = stack["folder"] / f"{name}-{kind}-again"
    again["rollout"] |= {"record": False, "replay": recipe.run.dir}
    replayed = make_trainer(graded, Recipe.model_validate(again))
    for step in (1, 2):
        replayed.weights_version = metrics[step - 1]["weights/version"] - 1
        samples = replayed.rollout(step)
        assert replayed.filtered == {name: value for name, value in metrics[step - 1].items() if "filter/" in name}
        rate = float(torch.cat([s.scores for s in samples]).double().mean())
        assert rate == metrics[step - 1]["rollout/success_rate"]


@pytest.mark.parametrize(("name", "kind"), [("dcpo", "none"), ("j2", "none"), ("aepo", "none"), ("grpo", "uniform")])
def test_method_trains_on_responses_drawn_while_the_step_before_trained(
    stack: dict[str, Any], name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights are one version old. What a step draws further, at T or for train.filter, is drawn by pi_old's,
    before the next step's are begun."""
    made = make_recipe(stack["folder"], stack["model"], name, steps=3, ahead=1).model_dump()
    made["train"] |= {"filter": kind, "filter_rounds": 3}
    recipe = Recipe.model_validate(made)
    trainer = make_trainer(stack, recipe)
    told: list[Any] = []

    def tell(owner: Any, method: str, what: Callable[..., Any]) -> None:
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            told.append((method, what(*args, **kwargs)))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, wrapped)

    tell(trainer.generator, "generate", lambda **kwargs: kwargs["step"] % TEMPERED_STEP)
    tell(trainer.ahead, "begin", lambda **kwargs: kwargs["step"])
    tell(trainer, "ppo_train", lambda step: step)
    tell(stack["engines"], "sync", lambda _, version: version - stack["version"])
    trainer.fit()
    stack["version"] = trainer.weights_version

    expected: list[Any] = [("sync", 1)]
    for step in (1, 2, 3):
        expected += [("generate", step)] + [("begin", step + 1)] * (step < 3)
        expected += [("ppo_train", step), ("sync", step + 1)]
    assert [each for each, _ in itertools.groupby(told)] == expected, "each kind of call once or several times"
    assert len(told) == len(expected) + (0 if name == "dcpo" else 3) or kind != "none"

    metrics = [json.loads(line) for line in (recipe.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [m["rollout/age_max"] for m in metrics] == [0, 1, 1]
    if kind == "none":
        assert [m["rollout/age_mean"] for m in metrics] == [0, 1, 1]
    else:
        assert any(m["filter/rounds"] > 1 for m in metrics[1:]), "more groups were drawn, by the weights of the step"
        for m in metrics[1:]:
            assert m["rollout/age_mean"] == pytest.approx(PROMPTS / m["filter/drawn"])
    assert [("correction/ess_age_1" in m, "time/generation" in m, "time/wait" in m) for m in metrics] == [
        (False, False, True),
        (True, True, True),
        (True, True, False),
    ]
    if name == "dcpo":
        differences = [m["mismatch/prob_diff_max"] for m in metrics]
        assert differences[0] < 1e-4 < min(differences[1:]), "fp32: one policy at first, then one update apart"
        assert all(m["correction/ess_age_1"] == m["correction/ess"] < 1 for m in metrics[1:])
    if name == "j2":
        assert all("correction/ess_age_0" in m for m in metrics[1:]), "of the rows that are drawn at T"
