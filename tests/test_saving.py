"""What a run saves: the last finished step, once, and in an order that the devices allow."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dcpo_openrlhf import signals
from dcpo_openrlhf.checkpoint import checkpoints
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.saving import Saving

WRITE = "save_checkpoint"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """checkpoint's keys -> (saving, what it did in order); ranks write one file at once, and finish when asked."""
    did: list[str] = []

    def method(name: str, *folder: str) -> list[dict[str, Any]]:
        did.append(name)
        if name == WRITE:
            (Path(folder[0]) / "rank0.bin").write_bytes(b"weights")
        return [{}]

    def make(**checkpoint: Any) -> tuple[Saving, list[str]]:
        values = {"model": {"path": "unused"}, "task": {"kind": "arithmetic"}, "checkpoint": checkpoint}
        recipe = Recipe.model_validate(values | {"run": {"dir": str(tmp_path)}})
        ahead = SimpleNamespace(save=lambda file, step: did.append(f"ahead {step}"))
        group = SimpleNamespace(async_run_method=method)
        back: dict[str, Any] = {name: lambda name=name: did.append(name) for name in ("stop_forward", "policy_back")}
        return Saving(recipe, group, ahead, **back), did  # type: ignore[arg-type]

    monkeypatch.setattr("dcpo_openrlhf.saving.ray", SimpleNamespace(get=lambda found: found))
    with signals.raising():
        yield make


def whole(folder: Path) -> list[int]:
    return [c.step for c in checkpoints(folder / "checkpoints")]


def test_before_exit_the_last_finished_step_is_saved_with_the_policy_back_on_its_devices(made, tmp_path: Path) -> None:
    saving, did = made()
    saving.settle({"step": 3}, {"reward_mean": 0.5})
    saving.before_exit()
    assert did == ["stop_forward", "policy_back", "ahead 4", WRITE, "finish_checkpoint"]
    (point,) = checkpoints(tmp_path / "checkpoints")
    assert point.state() == {"step": 3} and point.scores() == {"reward_mean": 0.5}


def test_before_exit_a_checkpoint_in_flight_is_made_whole_and_made_once(made, tmp_path: Path) -> None:
    saving, did = made(asynchronous=True)
    saving.settle({"step": 3}, {})
    saving.begin()
    assert whole(tmp_path) == []
    saving.before_exit()
    assert whole(tmp_path) == [3] and did == ["ahead 4", WRITE, "stop_forward", "finish_checkpoint"]


def test_before_exit_a_run_without_a_finished_step_saves_nothing(made, tmp_path: Path) -> None:
    saving, did = made()
    saving.before_exit()
    assert did == ["stop_forward"] and whole(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_is_whole_at_once_or_after_the_next_rollout(made, tmp_path: Path, asynchronous: bool) -> None:
    saving, _ = made(asynchronous=asynchronous)
    saving.settle({"step": 1}, {})
    saving.begin()
    assert whole(tmp_path) == ([] if asynchronous else [1])
    saving.finish()
    assert whole(tmp_path) == [1]


def test_an_update_is_in_hand_until_its_step_is_settled(made) -> None:
    saving, _ = made()
    saving.in_hand = 2
    saving.settle({"step": 2}, {})
    assert saving.in_hand is None
