"""timeline.jsonl: a row a step with what every process did, without waiting for one that does not answer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from dcpo_openrlhf import phases
from dcpo_openrlhf.monitor import timeline
from dcpo_openrlhf.monitor.timeline import Timeline


class Actor:
    """An actor whose next answers are given; None: it does not answer yet."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), 0
        self.take_phases = SimpleNamespace(remote=self._ask)

    def _ask(self) -> "Actor":
        self.asked += 1
        return self


def wait(calls: list[Actor], *, num_returns: int, timeout: float) -> tuple[list[Actor], list[Actor]]:
    assert num_returns == len(calls) and 0 < timeout <= 1
    done = [call for call in calls if call.answers[0] is not None]
    for call in calls:
        if call not in done:
            call.answers.pop(0)
    return done, [call for call in calls if call not in done]


def get(call: Actor) -> Any:
    answer = call.answers.pop(0)
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(timeline, "ray", SimpleNamespace(wait=wait, get=get))
    monkeypatch.setattr(phases, "now", lambda: now.s)
    phases.take()
    return now


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]


def test_rows_follow_one_another_and_hold_what_ended_meanwhile(tmp_path: Path, clock: Any) -> None:
    engine = Actor([("load weights", 1000.5, 1001.0)], [("generate", 1001.25, 1003.0)], [])
    policy = Actor([], [("update", 1003.0, 1004.5)], [])
    log = Timeline(tmp_path, engines=[engine], ranks=[policy])
    for step, part in ((0, "start"), (1, "step"), (1, "end")):
        clock.s += 2
        phases.add("evaluation", clock.s - 1)
        log.write(step, part)  # type: ignore[arg-type]
    start, first, end = rows(tmp_path)
    assert [(r["step"], r["part"], r["begin"], r["end"]) for r in (start, first, end)] == [
        (0, "start", 1000.0, 1002.0),
        (1, "step", 1002.0, 1004.0),
        (1, "end", 1004.0, 1006.0),
    ]
    assert start["processes"] == {
        "driver": [["evaluation", 1.0, 2.0]],
        "engine 0": [["load weights", 0.5, 1.0]],
        "policy 0": [],
    }
    # it began before the row did, as where engines generate for a later step
    assert first["processes"]["engine 0"] == [["generate", -0.75, 1.0]]
    assert first["processes"]["policy 0"] == [["update", 1.0, 2.5]]


def test_one_that_answers_late_is_in_the_next_row_and_one_that_died_in_none(tmp_path: Path, clock: Any) -> None:
    late, dead = Actor(None, [("generate", 1000.0, 1001.0)]), Actor(RayActorError())
    engines = [late, dead]
    log = Timeline(tmp_path, engines=engines, ranks=[])
    clock.s += 2
    log.write(1)
    engines[1] = Actor([("generate", 1002.0, 1003.0)])  # started again in its place
    clock.s += 2
    log.write(2)
    first, second = (row["processes"] for row in rows(tmp_path))
    assert first == {"driver": []}
    assert second == {
        "driver": [],
        "engine 0": [["generate", -2.0, -1.0]],
        "engine 1": [["generate", 0.0, 1.0]],
    }
    assert late.asked == 1, "a call that waits is not made twice"


def test_a_replay_has_no_engines_and_generation_alone_no_policy(tmp_path: Path) -> None:
    log = Timeline(tmp_path, engines=[], ranks=[])
    log.write(1)
    log.close()
    assert rows(tmp_path)[0]["processes"] == {"driver": []}
