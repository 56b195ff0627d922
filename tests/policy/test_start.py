"""The policy's start on a cluster that others use: what it waits for is told, and its deadline ends it."""

import logging
import os
import re
import signal
from collections.abc import Iterator

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from dcpo_openrlhf.local_ray import StartupError
from dcpo_openrlhf.policy import deaths
from dcpo_openrlhf.policy.group import PolicyActorGroup
from dcpo_openrlhf.rollout import pool
from tests.bounds import HANG_S
from tests.weight_sync.engines import cluster


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster(gpus=2):
        yield


@ray.remote(num_gpus=1, num_cpus=0)
class Rank:
    """Stands for a policy rank: a single one dies while it builds its model, of several the second hangs."""

    def __init__(self, world_size: int, rank: int, address: str | None, port: int | None) -> None:
        self.place = (world_size, rank, address, port)

    def get_master_addr_port(self) -> tuple[str, int]:
        return "127.0.0.1", 1234

    def init_model_from_pretrained(self) -> int:
        if self.place[0] == 1:
            os._exit(1)
        if self.place[1] == 1:
            signal.pause()
        return self.place[1]

    def where(self) -> tuple[int, int, str | None, int | None]:
        return self.place


def end(group: PolicyActorGroup) -> None:
    for actor in group._actor_handlers:
        ray.kill(actor)
    remove_placement_group(group.devices)


@pytest.mark.parametrize(("ranks", "holder"), [(2, 1), (1, 2)])
def test_devices_that_another_job_holds(ranks: int, holder: int, caplog: pytest.LogCaptureFixture) -> None:
    others = [Rank.remote(1, 0, None, None) for _ in range(holder)]
    ray.get([other.where.remote() for other in others], timeout=HANG_S)
    caplog.set_level(logging.INFO)
    said = rf"{ranks} devices for training, 1 nodes \* {ranks} must fit .* run.startup_timeout = 3 s: the cluster has"
    with pytest.raises(StartupError, match=said) as caught:
        PolicyActorGroup(1, ranks, Rank, timeout_s=3.0)
    assert re.search(rf"2 GPUs, {2 - holder} of them free .*; wait for other jobs to end", str(caught.value))
    (waiting,) = caplog.messages
    assert waiting.startswith(f"waiting for {ranks} devices for training, 1 nodes * {ranks}: the cluster has 2 GPUs")
    for other in others:
        ray.kill(other)


def test_a_rank_that_never_answers_is_named_and_the_others_know_each_other() -> None:
    group = PolicyActorGroup(1, 2, Rank, timeout_s=HANG_S)
    places = ray.get(group.async_run_method("where"), timeout=HANG_S)
    assert places == [(2, 0, None, None), (2, 1, "127.0.0.1", 1234)]
    group._building = [actor.init_model_from_pretrained.remote() for actor in group._actor_handlers]
    with pytest.raises(
        StartupError, match=r"policy ranks took more than 2 s while building its model: rank 1 \(1 calls\) did not"
    ):
        group.finish_init([], timeout=2.0)
    end(group)


def test_dead_ranks_are_told_from_those_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    group = PolicyActorGroup(1, 2, Rank, timeout_s=HANG_S)
    ray.get(group.async_run_method("where"), timeout=HANG_S)
    group._actor_handlers[1].init_model_from_pretrained.remote()  # at work for ever
    monkeypatch.setattr(deaths, "DEAD_S", 5.0)
    assert deaths.dead_ranks(group) == []
    failure = ray.exceptions.RayTaskError("all_reduce", "the rank's traceback", RuntimeError("connection closed"))
    assert deaths.told(failure, group) is None, "no rank is dead: its own error is told"
    ray.kill(group._actor_handlers[0])
    with pytest.raises(ray.exceptions.RayActorError):
        while True:  # until it is
            ray.get(group._actor_handlers[0].where.remote(), timeout=HANG_S)
    assert deaths.dead_ranks(group) == [0]
    assert "a process of this run died: policy rank 0\n" in str(deaths.told(failure, group))
    end(group)


def test_a_rank_that_dies_is_named() -> None:
    group = PolicyActorGroup(1, 1, Rank, timeout_s=HANG_S)
    group._building = group.async_run_method("init_model_from_pretrained")
    with pytest.raises(StartupError, match="policy rank 0 died while building its model; see its log"):
        group.finish_init([], timeout=HANG_S)


def test_what_ray_kills_for_want_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is neither that of an actor that died nor that of a task that raised."""
    low = ray.exceptions.OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: 9f) was "
        "22.39GB / 23.54GB (0.951242), which exceeds the memory usage threshold of 0.950000; Object store memory ..."
    )

    def get(*_: object, **__: object) -> None:
        raise low

    group, call = PolicyActorGroup(1, 1, Rank, timeout_s=HANG_S), ray.put(0)
    with monkeypatch.context() as patched:
        patched.setattr(ray, "get", get)
        said = r"killed by Ray, which saw 22\.39GB of 23\.54GB of its host's memory in use \(let other work .*\) while"
        with pytest.raises(StartupError, match=rf"policy rank 0 was {said} building its model; see its log"):
            group._wait([call], timeout=HANG_S, doing="building its model")
        with pytest.raises(StartupError, match=rf"rollout engine 3 was {said} starting; r$"):
            pool.gather([call], [3], timeout_s=HANG_S, doing="starting", remedy="r", error=StartupError)
        assert deaths.dead_ranks(group) == [0]
    told = str(deaths.told(low, group))
    assert "died: it was killed by Ray, which saw 22.39GB of 23.54GB" in told and "Object store" not in told
    end(group)
