"""Shared devices change hands in an order in which both never hold them, also where a signal comes between."""

from types import SimpleNamespace
from typing import Any

import pytest

from dcpo_openrlhf import colocation
from dcpo_openrlhf.colocation import Colocation
from dcpo_openrlhf.signals import Interrupted


class Fakes:
    """Two engines and a policy group that write down what they are told, and Ray that gives what it is given."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.engines = [SimpleNamespace(wake_up=self.call(f"wake {n}"), sleep=self.call(f"sleep {n}")) for n in (0, 1)]
        self.dead = False

    def call(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda **options: self.say(" ".join([name, *(options.get("tags") or [])])))

    def say(self, text: str) -> str:
        self.said.append(text)
        return text

    def async_run_method(self, name: str) -> list[str]:
        return [self.say(name)]

    def get(self, calls: Any) -> Any:
        if self.dead and any("sleep" in call for call in calls):
            raise RuntimeError("the engine died")
        return calls

    def wait(self, calls: list[str], *, num_returns: int) -> None:
        self.said.append(f"wait {num_returns}")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr(colocation, "ray", made)
    return made


def test_devices_go_to_the_engines_and_back(fakes: Fakes) -> None:
    devices = Colocation(fakes, fakes.engines, shared=True)
    with devices.engines_awake(["weights"], policy_away=False):
        fakes.say("sync")
    assert fakes.said == ["wake 0 weights", "wake 1 weights", "sync"], "vLLM would not sleep from half awake"
    fakes.said.clear()
    with devices.engines_awake(policy_away=True):
        fakes.say("generate")
    devices.policy_back()
    assert fakes.said == ["offload", "wake 0", "wake 1", "generate", "sleep 0", "sleep 1", "onload"]


@pytest.mark.parametrize("dead", [False, True])
def test_engines_sleep_before_the_policy_comes_back_after_a_signal(fakes: Fakes, dead: bool) -> None:
    fakes.dead = dead
    devices = Colocation(fakes, fakes.engines, shared=True)
    with pytest.raises(Interrupted), devices.engines_awake(policy_away=True):
        fakes.said.clear()
        raise Interrupted(15)
    devices.policy_back()
    devices.policy_back()
    assert fakes.said == ["wait 2", "sleep 0", "sleep 1", "wait 2", "onload"]


def test_a_signal_while_the_policy_leaves(fakes: Fakes) -> None:
    devices = Colocation(fakes, fakes.engines, shared=True)
    fakes.async_run_method = lambda name: [][1]  # type: ignore[method-assign]
    with pytest.raises(IndexError), devices.engines_awake(policy_away=True):
        pass
    del fakes.async_run_method
    devices.policy_back()
    assert fakes.said == ["sleep 0", "sleep 1", "wait 2", "onload"]


def test_own_devices_stay_where_they_are(fakes: Fakes) -> None:
    devices = Colocation(fakes, fakes.engines, shared=False)
    with devices.engines_awake(policy_away=True):
        pass
    devices.policy_back()
    assert fakes.said == []


def test_vllm_sleeps_from_wholly_awake_alone() -> None:
    """What engines_awake relies on; where this fails, vLLM has learnt to sleep, and a sync can put its weights away."""
    from vllm.v1.executor.abstract import Executor

    calls: list[str] = []
    half = SimpleNamespace(
        is_sleeping=True, sleeping_tags={"kv_cache"}, collective_rpc=lambda name, **_: calls.append(name)
    )
    Executor.sleep(half)  # type: ignore[arg-type]
    assert calls == []
    Executor.wake_up(half, ["weights"])  # type: ignore[arg-type]
    Executor.wake_up(half, ["kv_cache"])  # type: ignore[arg-type]
    assert calls == ["wake_up"] and not half.is_sleeping
