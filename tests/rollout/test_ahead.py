"""Responses begun for the next step: handed over once, kept for a checkpoint as they were drawn, drawn anew if lost."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.rollout.ahead import Ahead
from dcpo_openrlhf.rollout.replay import EVALUATION_STEP, TEMPERED_STEP, Recorder, Replay, ReplayError
from dcpo_openrlhf.rollout.tasks import Problem, PromptStream
from tests.rollout.test_replay import experience, same

PROMPTS, LABELS = ["one plus one", "two plus two"], ["2", "4"]
HOW: dict[str, Any] = {"n_samples": 2, "temperature": 1.0}


@dataclass
class Engines:
    """A generator over engines that hold a version of the weights, and answer when `done` is set."""

    version: int = 1
    done: bool = True
    alive: bool = True
    plain: list[int] = field(default_factory=list)
    """Steps of calls of `generate`."""

    def begin(self, prompts: list[str], labels: list[str], *, step: int, **_: Any) -> Any:
        batch = SimpleNamespace(left=[], groups={}, begun=10.0, last=12.5, version=self.version, step=step)
        return SimpleNamespace(pool=self, batch=batch)

    def wait(self, batch: Any, *, look: Callable[[], object], trained: bool) -> None:
        assert trained
        while not self.done:
            look()
        if not self.alive:
            batch.left = [0, 1]
        else:
            batch.groups = {0: "whole", 1: "whole"}

    def finish(self, begun: Any) -> list[Any]:
        made = [experience(10 * begun.batch.step + i) for i in range(4)]
        for sample in made:
            sample.info["weight_version"] = torch.tensor([begun.batch.version])
        return made

    def generate(self, prompts: list[str], labels: list[str], *, step: int, **how: Any) -> list[Any]:
        self.plain.append(step)
        return self.finish(self.begin(prompts, labels, step=step, **how))


def look() -> None:
    pytest.fail("nothing is waited for")


def begun(step: int = 2, **engines: Any) -> tuple[Ahead, Engines]:
    generator = Engines(**engines)
    ahead = Ahead(generator)
    ahead.begin(PROMPTS, LABELS, step=step, **HOW)
    return ahead, generator


def equal(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(same(vars(a), vars(b)) for a, b in zip(one, two, strict=True))


def test_what_was_begun_is_handed_over_once_and_other_requests_are_drawn() -> None:
    ahead, engines = begun()
    ahead.wait(look)
    engines.version = 2  # the sync
    evaluated = ahead.generate(PROMPTS, LABELS, step=EVALUATION_STEP + 1, **HOW)
    assert [int(s.info["weight_version"]) for s in evaluated] == [2] * 4
    samples = ahead.generate(PROMPTS, LABELS, step=2, **HOW)
    assert [int(s.info["weight_version"]) for s in samples] == [1] * 4
    assert equal(samples, Engines().generate(PROMPTS, LABELS, step=2, **HOW))
    ahead.generate(PROMPTS, LABELS, step=TEMPERED_STEP + 2, **HOW)
    assert ahead.times["time/generation"] == 2.5 and "time/wait" not in ahead.times
    ahead.generate(PROMPTS[:1], LABELS[:1], step=2, **HOW)
    assert ahead.times["time/generation"] == 2.5, "a second request of the step is drawn beside them"
    ahead.wait(look)
    ahead.generate(PROMPTS, LABELS, step=3, **HOW)
    assert engines.plain == [EVALUATION_STEP + 1, TEMPERED_STEP + 2, 2, 3]
    assert ahead.times == {}, "of a step that nothing was begun for"


def test_another_request_for_the_step_is_refused() -> None:
    ahead, _ = begun()
    with pytest.raises(ReplayError, match="responses of step 2 were begun with other prompts, sampling; resume with"):
        ahead.generate(PROMPTS[::-1], LABELS, step=2, **HOW | {"temperature": 0.5})
    assert len(ahead.generate(PROMPTS, LABELS, step=2, **HOW)) == 4


def test_a_checkpoint_holds_the_responses_that_its_next_step_trains_on(tmp_path: Path) -> None:
    """Between the update of step 1 and that of step 2 they are step 2's, as they were drawn."""
    ahead, engines = begun()
    fresh = Engines().generate(PROMPTS, LABELS, step=2, **HOW)

    def saved(step: int) -> list[Any] | None:
        file = tmp_path / f"{time.monotonic_ns()}.pt"
        ahead.save(file, step=step)
        if not file.is_file():
            return None
        other = Ahead(Engines(version=7))
        other.load(file, step=step)
        found = other.generate(PROMPTS, LABELS, step=step, **HOW)
        assert other.times == {"time/generation": 2.5}
        return found

    ahead.wait(look)
    assert equal(saved(2) or [], fresh) and saved(1) is None
    samples = ahead.generate(PROMPTS, LABELS, step=2, **HOW)
    for sample in samples:  # what grading adds
        sample.rewards = sample.info["reward"] = torch.ones(1)
        sample.index = [3]
    ahead.begin(PROMPTS, LABELS, step=3, **HOW)
    assert equal(saved(2) or [], fresh)
    ahead.wait(look)
    assert saved(2) is None and equal(saved(3) or [], Engines().generate(PROMPTS, LABELS, step=3, **HOW))
    assert engines.plain == []


def test_loaded_responses_are_refused_for_another_request_and_saved_again(tmp_path: Path) -> None:
    ahead, _ = begun()
    ahead.wait(look)
    ahead.save(tmp_path / "a.pt", step=2)
    other = Ahead(Engines())
    other.load(tmp_path / "a.pt", step=2)
    with pytest.raises(ReplayError, match="other labels"):
        other.generate(PROMPTS, LABELS[::-1], step=2, **HOW)
    other.generate(PROMPTS, LABELS, step=2, **HOW)
    other.save(tmp_path / "b.pt", step=2)
    assert same(torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt"))
    other.load(tmp_path / "nothing.pt", step=3)
    assert other.following is None


def test_what_is_under_way_when_a_signal_ends_the_wait_is_told_to_be_lost(tmp_path: Path, caplog: Any) -> None:
    ahead, _ = begun(done=False)

    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ahead.wait(leave)
    with caplog.at_level(logging.WARNING):
        ahead.save(tmp_path / "a.pt", step=2)
    assert "responses of step 2 were under way and are not saved" in caplog.text
    assert not (tmp_path / "a.pt").exists()


def test_what_no_engine_had_drawn_is_drawn_by_the_next_weights() -> None:
    ahead, engines = begun(alive=False)
    ahead.wait(look)
    engines.version = 2
    samples = ahead.generate(PROMPTS, LABELS, step=2, **HOW)
    assert engines.plain == [2] and [int(s.info["weight_version"]) for s in samples] == [2] * 4


def stream() -> PromptStream:
    problems = [Problem(str(i), str(i), "7", "test") for i in range(5)]
    return PromptStream(problems, prompts=[f"prompt {i}" for i in range(5)], seed=1)


@pytest.mark.parametrize(
    ("rollout", "step", "asked"),
    [({"ahead": 1}, 2, True), ({}, 2, False), ({"ahead": 1}, 4, False), ({"ahead": 1, "replay": "runs/a"}, 2, False)],
)
def test_a_step_is_begun_with_the_prompts_it_will_take(rollout: dict[str, Any], step: int, asked: bool) -> None:
    values = {"model": {"path": "unused"}, "task": {"kind": "arithmetic"}, "rollout": rollout}
    train = {"steps": 3, "prompts_per_step": 4, "prompts_per_update": 4, "group_size": 2}
    recipe, prompts, ahead = Recipe.model_validate(values | {"train": train}), stream(), Ahead(Engines())
    prompts.take(4)
    before = prompts.state_dict()
    ahead.begin_step(step, prompts, recipe)
    assert prompts.state_dict() == before
    assert (ahead.following is not None) == asked
    if ahead.following is not None:
        assert ahead.following.request["prompts"] == [p.text for p in prompts.take(4)]  # into the next epoch
        sampling = {"max_new_tokens": 8192, "max_len": 10240, "n_samples": 2, "temperature": 1.0, "top_p": 1.0}
        assert ahead.following.step == 2 and ahead.following.request["sampling"] == sampling


def test_a_replay_has_nothing_to_begin(tmp_path: Path) -> None:
    ahead = Ahead(Replay(tmp_path))
    ahead.wait(look)
    with pytest.raises(ReplayError, match=r"step_000002.pt is missing"):
        ahead.generate(PROMPTS, LABELS, step=2, **HOW)


def test_a_replay_that_resumes_such_a_run_reads_every_round_of_the_step(tmp_path: Path) -> None:
    """A checkpoint's responses in place of the first round would leave the first file to the second request."""
    ahead, _ = begun()
    ahead.wait(look)
    ahead.save(tmp_path / "ahead.pt", step=2)
    recorder = Recorder(Engines(), tmp_path / "samples")
    for prompts, labels in ((PROMPTS, LABELS), (PROMPTS[:1], LABELS[:1])):
        recorder.generate(prompts, labels, step=2, **HOW)
    replay = Ahead(Replay(tmp_path))
    replay.load(tmp_path / "ahead.pt", step=2)
    assert len(replay.generate(PROMPTS, LABELS, step=2, **HOW)) == 4
    replay.generate(PROMPTS[:1], LABELS[:1], step=2, **HOW)
