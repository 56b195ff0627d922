"""Engines that fail are replaced, and nothing is lost: with cheap actors in the place of vLLM."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import remove_placement_group

from dcpo_openrlhf.rollout import pool
from dcpo_openrlhf.rollout.healing import EngineError, EnginePool, SyncError
from dcpo_openrlhf.rollout.pool import device_group, shutdown_engines, wait_until_ready
from tests.bounds import ENDS_S, HANG_S
from tests.weight_sync.engines import assert_all_end, cluster

HEARTBEAT_S = 30.0
SHORT_S = 4.0
"""Where an engine hangs: should one that is well be taken for it too on a busy machine, there are restarts enough."""
REQUESTS = [{"seed": seed, "num_samples": 2} for seed in range(7)]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    with cluster(gpus=1):
        yield


def make_engine(path: str, slot: int) -> Any:
    """An actor that answers as an engine does; files in `path` say what goes wrong, once each."""

    class Engine:  # local, so that its process need not import this module
        def __init__(self) -> None:
            self.version = 0
            if self.asked_to("start"):
                raise OSError("no memory")

        def asked_to(self, what: str) -> bool:
            try:
                os.unlink(f"{path}/{what}-{slot}")
            except FileNotFoundError:
                return False
            return True

        async def health(self) -> dict[str, Any]:
            return {
                "weight_version": self.version,
                "node": ray.get_runtime_context().get_node_id(),
                "processes": [(os.getpid(), psutil.Process().create_time())],
            }

        async def generate_groups(self, requests: list[dict[str, Any]]) -> list[Any]:
            for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
                if self.asked_to(name):
                    os.kill(os.getpid(), number)
                    time.sleep(HANG_S)  # the signal may reach another thread first
            if self.asked_to("err"):
                raise ZeroDivisionError("of an engine\nand its second line")
            return [(request["seed"], self.version, slot) for request in requests]

        async def receive(self, version: int) -> None:
            if self.asked_to("sync-kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.asked_to("sync-stop"):
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(HANG_S)
            if self.asked_to("sync-err"):
                raise ValueError("half of the bytes")
            self.version = version

        async def shutdown(self) -> None:
            return None

    return ray.remote(num_cpus=0, max_concurrency=100)(Engine).remote()


def make_policy() -> Any:
    """A policy rank that sends its version number."""

    class Rank:
        def connect(self, engines: list[Any], version: int) -> None:
            self.engines, self.version = engines, version

        def broadcast_to_vllm(self) -> None:
            self.version += 1
            ray.get([engine.receive.remote(self.version) for engine in self.engines])

    class Policy:
        def __init__(self) -> None:
            self.rank: Any = ray.remote(num_cpus=0)(Rank).remote()
            self.connected = 0

        def async_run_method(self, name: str, *arguments: Any) -> list[Any]:
            self.connected += name == "connect"
            return [getattr(self.rank, name).remote(*arguments)]

    return Policy()


Make = Callable[..., tuple[EnginePool, Any]]


@pytest.fixture
def make(tmp_path: Any) -> Iterator[Make]:
    """A pool with version 1 of the policy's weights, and that policy."""
    made = []

    def pool(count: int, *, restarts: int = 1, faults: tuple[str, ...] = ()) -> Any:
        hangs = any("stop" in fault for fault in faults)

        def start(slot: int) -> Any:
            return make_engine(str(tmp_path), slot)

        engines = EnginePool(
            [start(slot) for slot in range(count)],
            start=start,
            heartbeat_s=HEARTBEAT_S,
            restarts=20 if hangs and restarts else restarts,
            startup_s=HANG_S,
        )
        made.append(engines)
        wait_until_ready(engines, HANG_S)
        policy = make_policy()
        ray.get(policy.async_run_method("connect", list(engines), 0))
        engines.sync(policy, 1)
        for fault in faults:
            (tmp_path / fault).touch()
        engines.heartbeat_s = SHORT_S if hangs else HEARTBEAT_S
        return engines, policy

    yield pool
    for engines in made:
        shutdown_engines(engines)


def generate(engines: EnginePool) -> list[Any]:
    batch = engines.begin(REQUESTS, doing="generating for step 3", timeout_s=HANG_S)
    engines.wait(batch)
    return batch.answers()


def pids(engines: EnginePool) -> list[int]:
    return [health["processes"][0][0] for health in ray.get([engine.health.remote() for engine in engines])]


def test_requests_are_dealt_to_the_engine_with_the_fewest_samples_and_come_back_in_order(make: Make) -> None:
    engines, _ = make(2)
    assert generate(engines) == [(seed, 1, seed % 2) for seed in range(7)]
    assert engines.restarted == 0


@pytest.mark.parametrize("fault", ["kill", "stop", "err"])
def test_a_lone_engine_is_replaced_brought_to_the_version_and_asked_again(fault: str, make: Make) -> None:
    engines, policy = make(1, faults=(f"{fault}-0",))
    before = pids(engines)
    assert generate(engines) == [(seed, 1, 0) for seed in range(7)]
    assert (engines.restarted, policy.connected) == (1, 2) or fault == "stop"
    assert engines.restarted
    assert_all_end(before)
    connected = policy.connected
    engines.sync(policy, 2)
    assert generate(engines) == [(seed, 2, 0) for seed in range(7)]
    assert policy.connected == connected or fault == "stop", "the same groups serve the next sync"


@pytest.mark.parametrize("fault", ["kill", "err"])
def test_others_take_the_prompts_of_a_lost_engine_which_is_back_after_a_later_sync(fault: str, make: Make) -> None:
    engines, policy = make(2, faults=(f"{fault}-1",))
    assert generate(engines) == [(seed, 1, 0) for seed in range(7)]
    ray.get(engines[1].health.remote())
    engines.sync(policy, 2)
    assert generate(engines) == [(seed, 2, seed % 2) for seed in range(7)]


def begin(engines: EnginePool) -> Any:
    return engines.begin(REQUESTS, doing="generating for step 4", timeout_s=HANG_S)


def test_engines_answer_whether_or_not_someone_waits(make: Make) -> None:
    engines, _ = make(2)
    batch, ends = begin(engines), time.monotonic() + HANG_S
    asked = list(batch.asked)
    assert len(ray.wait(asked, num_returns=len(asked), timeout=HANG_S)[0]) == 2
    first = batch.last
    while batch.last == batch.begun and time.monotonic() < ends:  # Ray tells it from another thread
        time.sleep(0.01)
    assert batch.begun < batch.last and first <= batch.last and not batch.groups
    engines.wait(batch, trained=True)
    assert batch.answers() == [(seed, 1, seed % 2) for seed in range(7)] and not batch.left


def test_while_the_policy_has_newer_weights_the_other_engine_takes_the_prompts(make: Make) -> None:
    engines, policy = make(2, faults=("kill-1",))
    batch = begin(engines)
    engines.wait(batch, trained=True)
    assert batch.answers() == [(seed, 1, 0) for seed in range(7)] and policy.connected == 1
    engines.sync(policy, 2)


@pytest.mark.parametrize("fault", ["kill", "err"])
def test_what_no_engine_is_left_for_is_drawn_after_the_next_sync(fault: str, make: Make) -> None:
    engines, policy = make(1, faults=(f"{fault}-0",))
    batch = begin(engines)
    engines.wait(batch, trained=True)
    assert batch.left == list(range(7)) and not batch.groups
    assert policy.connected == 1, "the engines' version of the weights is gone: nothing must be sent under its name"
    engines.sync(policy, 2)
    engines.wait(batch)
    assert batch.answers() == [(seed, 2, 0) for seed in range(7)]


def test_who_waits_may_look_up_and_leave(make: Make) -> None:
    engines, _ = make(1, faults=("stop-0",))
    engines.heartbeat_s = HEARTBEAT_S
    batch = begin(engines)

    def look() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engines.wait(batch, look=look, trained=True)
    assert batch.asked and not batch.groups


@pytest.mark.parametrize(
    ("fault", "said"),
    [("kill", "died while"), ("stop", "did not answer within"), ("err", "failed (ZeroDivisionError: of an engine and")],
)
def test_one_failure_too_many_is_one_error_that_names_engine_step_and_remedy(fault: str, said: str, make: Make) -> None:
    engines, _ = make(1, restarts=0, faults=(f"{fault}-0",))
    before = pids(engines)
    with pytest.raises(EngineError) as caught:
        generate(engines)
    message = str(caught.value)
    assert message.startswith(f"rollout engine 0 {said}") and "\n" not in message
    assert "generating for step 3; 0 of rollout.restarts = 0 are used; " in message
    assert "resume from the last checkpoint" in message
    assert_all_end(before)


def test_an_engine_that_fails_again_while_it_starts_uses_up_another_restart(make: Make) -> None:
    engines, _ = make(1, restarts=2, faults=("kill-0", "start-0"))
    assert len(generate(engines)) == 7
    assert engines.restarted == 2
    engines, _ = make(1, restarts=1, faults=("kill-0", "start-0"))
    with pytest.raises(EngineError, match=r"engine 0 died while starting again; 1 of rollout.restarts = 1 are used"):
        generate(engines)


@pytest.mark.parametrize("fault", ["sync-kill", "sync-stop"])
def test_an_engine_lost_in_a_sync_serves_nothing_until_it_holds_the_new_weights(fault: str, make: Make) -> None:
    engines, policy = make(2, faults=(f"{fault}-0",))
    before = pids(engines)
    engines.sync(policy, 2)
    assert policy.connected >= 2
    assert engines.restarted == 1 or fault == "sync-stop"
    engines.heartbeat_s = HEARTBEAT_S
    assert [(seed, version) for seed, version, _ in generate(engines)] == [(seed, 2) for seed in range(7)]
    assert_all_end(before[:1])
    ray.get([engine.health.remote() for engine in engines])
    engines.sync(policy, 3)
    assert generate(engines) == [(seed, 3, seed % 2) for seed in range(7)]


def test_a_sync_that_fails_is_tried_once_more_over_fresh_groups(make: Make) -> None:
    engines, policy = make(1, faults=("sync-err-0",))
    engines.sync(policy, 2)
    assert (engines.restarted, policy.connected) == (0, 2)
    assert generate(engines) == [(seed, 2, 0) for seed in range(7)]


def test_a_sync_that_fails_twice_is_one_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, policy = make(1)

    class Rank:
        def connect(self, *_: Any) -> None:
            raise RuntimeError("no way\nto the engines")

        broadcast_to_vllm = connect

    policy.rank = ray.remote(num_cpus=0)(Rank).remote()
    with pytest.raises(SyncError) as caught:
        engines.sync(policy, 2)
    assert "\n" not in str(caught.value)
    assert "weights of version 2 reached the engines neither at once nor over fresh groups" in str(caught.value)
    assert "RuntimeError: no way to the engines" in str(caught.value)


def test_an_engine_that_kept_older_weights_is_noticed(make: Make) -> None:
    engines, policy = make(1)

    class Rank:
        def connect(self, *_: Any) -> None: ...

        broadcast_to_vllm = connect

    policy.rank = ray.remote(num_cpus=0)(Rank).remote()
    with pytest.raises(SyncError, match=r"engines serve weight versions \[1\] after the sync of version 2"):
        engines.sync(policy, 2)


def test_a_dead_policy_is_no_failure_of_an_engine(make: Make) -> None:
    engines, policy = make(1)
    ray.kill(policy.rank)
    with pytest.raises(ray.exceptions.RayActorError):
        engines.sync(policy, 2)
    assert engines.restarted == 0


def test_the_end_gives_the_devices_back_and_ends_stopped_engines_too(tmp_path: Any) -> None:
    group = device_group(1, HANG_S, what="a test")
    engines = EnginePool(
        [make_engine(str(tmp_path), 0)], start=lambda _: None, own_group=group, heartbeat_s=HEARTBEAT_S
    )
    wait_until_ready(engines, HANG_S)
    (pid,) = pids(engines)
    os.kill(pid, signal.SIGSTOP)
    shutdown_engines(engines, 1.0)
    assert_all_end([pid])
    remove_placement_group(device_group(1, HANG_S, what="another test"))


def test_other_engines_get_the_devices_of_those_that_have_ended(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_start", lambda *_: make_engine(str(tmp_path), 0))
    settings: Any = {"model": "m", "dtype": "float32", "device": "cpu", "transport": "gloo", "max_model_len": 8}
    for seed in range(2):
        engines = pool.create_rollout_engines(count=1, tensor_parallel=1, seed=seed, timeout_s=ENDS_S, **settings)
        wait_until_ready(engines, HANG_S)
        shutdown_engines(engines)
