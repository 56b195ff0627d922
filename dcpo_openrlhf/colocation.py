"""Devices that policy and engines share: who has them, and how they change hands."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ray


class Colocation:
    """Moves the devices between the policy's ranks and the engines; does nothing where each has its own."""

    def __init__(self, group: Any, engines: Sequence[Any], *, shared: bool) -> None:
        self.group, self.engines, self.shared = group, list(engines), shared
        self._waking: list[Any] | None = None
        """The engines' calls to wake up, from before the policy leaves until it is back."""

    @contextlib.contextmanager
    def engines_awake(self, parts: list[str] | None = None, *, policy_away: bool) -> Iterator[None]:
        """Engines take the devices for this block, wholly or with these parts of theirs.

        vLLM goes to sleep from wholly awake alone: weights that a sync woke stay beside the policy until a rollout's
        end (recipe/memory.py counts them). Between the two there is at most a checkpoint.
        """
        if not self.shared:
            yield
            return
        self._waking = []
        if policy_away:
            ray.get(self.group.async_run_method("offload"))
        self._waking = [engine.wake_up.remote(tags=parts) for engine in self.engines]
        ray.get(self._waking)
        yield
        if parts is None:
            ray.get([engine.sleep.remote() for engine in self.engines])
        if policy_away:
            ray.get(self.group.async_run_method("onload"))
        self._waking = None

    def policy_back(self) -> None:
        """After what ended such a block, a signal or an engine's death: engines give the devices up, then the policy
        takes them, whose memory would not fit beside a KV cache.
        """
        if self._waking is None:
            return
        waking, self._waking = self._waking, None
        # one after the other; ray.wait passes on no error of an engine that died, which has given up its device as well
        if waking:
            ray.wait(waking, num_returns=len(waking))
        asleep = [engine.sleep.remote() for engine in self.engines]
        ray.wait(asleep, num_returns=len(asleep))
        ray.get(self.group.async_run_method("onload"))
