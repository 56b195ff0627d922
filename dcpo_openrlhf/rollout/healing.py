"""Engines that heal: one that dies, hangs or errs is killed and started again; meanwhile others take its prompts."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from vllm.v1.engine.exceptions import EngineDeadError

from dcpo_openrlhf.errors import RunError, one_line
from dcpo_openrlhf.local_ray import out_of_memory

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)
POLL_S = 2.0
KILL_S = 20.0
"""Killed processes must be gone after this long; their devices are needed for the next ones."""
REMEDY = "see its log in Ray's session folder (logs/worker-*.err); resume from the last checkpoint"


class EngineError(RunError):
    """A rollout engine failed and is not started again; names it, what it did, and what to do."""


class SyncError(RunError):
    """The weights did not reach the engines, twice; names the cause, and what to do."""


@dataclass
class Batch:
    """Requests to the engines, and what has come of them."""

    requests: Sequence[dict[str, Any]]
    doing: str
    """For error messages."""
    timeout_s: float
    left: list[int]
    """Requests that no engine has."""
    asked: dict[ray.ObjectRef, tuple[int, list[int]]] = field(default_factory=dict)
    """Call -> (its engine's slot, its requests)."""
    groups: dict[int, Any] = field(default_factory=dict)
    ends: float = math.inf
    """When the engines are late, on the monotonic clock."""
    begun: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    """When the last answer came in, whether or not someone waited for it."""

    def answered(self, _: object) -> None:
        """A call has ended; Ray says so from a thread of its own."""
        self.last = time.monotonic()

    def answers(self) -> list[Any]:
        """A group of responses to each request, in their order."""
        return [self.groups[i] for i in range(len(self.requests))]


class EnginePool(Sequence["ActorHandle"]):
    """The actors of a run's engines, each in its slot, whether it serves or starts again.

    heartbeat_s: seconds within which an engine that is at work answers, else it counts as hung. restarts: engines that
    are started again in all; without `start` none is. own_group: devices that are given back at the end.
    """

    def __init__(
        self,
        engines: Sequence["ActorHandle"],
        *,
        start: "Callable[[int], ActorHandle] | None" = None,
        heartbeat_s: float = math.inf,
        restarts: int = 0,
        startup_s: float = math.inf,
        own_group: "PlacementGroup | None" = None,
    ) -> None:
        self.engines, self._start, self._own_group = list(engines), start, own_group
        self.heartbeat_s, self.startup_s = heartbeat_s, startup_s
        self.restarts, self.restarted = restarts if start else 0, 0
        self.serving = list(range(len(self.engines)))
        """Slots whose engine may be asked for responses: it holds the current weights."""
        self.failures: list[str] = []
        """What was mended so far: restarts, and syncs that were tried again."""
        self._starting: dict[int, tuple[ray.ObjectRef, float]] = {}
        """Slot -> (the new engine's first sign of life, when it was started)."""
        self._connected = list(self.engines)
        """The engines that the policy's weights reach; at the start of a run all of them."""
        self._policy: tuple[Any, int] | None = None
        """The policy and its version, as the last sync named them."""
        self._known: dict[int, dict[str, Any]] = {}
        """Slot -> `health` of its engine when it came up: node and processes."""
        self._beats: dict[int, tuple[ray.ObjectRef, float]] = {}

    @classmethod
    def of(cls, engines: Sequence["ActorHandle"]) -> "EnginePool":
        """`engines` itself, or actors without a pool as one that starts none again."""
        return engines if isinstance(engines, EnginePool) else cls(engines)

    def __len__(self) -> int:
        return len(self.engines)

    def __getitem__(self, slot: Any) -> Any:
        return self.engines[slot]

    def came_up(self, slot: int, health: dict[str, Any]) -> None:
        """Remember where the slot's engine runs."""
        self._known[slot] = health

    # Responses.

    def begin(self, requests: Sequence[dict[str, Any]], *, doing: str, timeout_s: float) -> "Batch":
        """The requests, dealt to engines that answer them whether or not someone waits."""
        batch = Batch(requests, doing, timeout_s, left=list(range(len(requests))))
        self._deal(batch)
        return batch

    def wait(self, batch: "Batch", *, look: Callable[[], object] = lambda: None, trained: bool = False) -> None:
        """Return when every request is answered; those of an engine that fails are dealt out again.

        trained: the policy has newer weights than the engines, so no other engine can be brought to theirs; where none
        is left to serve, requests stay in `batch.left` until after the next sync. `look` is called while it waits.
        Raises EngineError for one failure more than `restarts`, or batch.timeout_s after requests were last dealt out.
        """
        self._beats.clear()
        while batch.left or batch.asked:
            if batch.left:
                if trained and not self.serving:
                    return
                self._deal(batch)
            answers, failed = self._next({call: slot for call, (slot, _) in batch.asked.items()})
            for call, answer in answers.items():
                batch.groups.update(zip(batch.asked.pop(call)[1], answer, strict=True))
            for call in [call for call, (slot, _) in batch.asked.items() if slot in failed]:
                batch.left += batch.asked.pop(call)[1]
            for slot, why in failed.items():
                self._restart(slot, why, batch.doing)
            if batch.asked and time.monotonic() >= batch.ends:
                late = ", ".join(str(slot) for slot in sorted({slot for slot, _ in batch.asked.values()}))
                raise EngineError(
                    f"rollout engines took more than rollout.timeout = {batch.timeout_s:g} s while {batch.doing}: "
                    f"engine {late} is alive and not done; {REMEDY}, and raise rollout.timeout if it was only slow"
                )
            if batch.asked:
                look()

    def _deal(self, batch: "Batch") -> None:
        """Give each request of `batch.left` to an engine: always the one with the fewest samples in hand."""
        if not self.serving and self._policy is not None:
            self.sync(*self._policy)
        elif self._policy is None:
            self._admit(wait=not self.serving)
        load = dict.fromkeys(self.serving, 0)
        for slot, indices in batch.asked.values():
            load[slot] += sum(batch.requests[i]["num_samples"] for i in indices)
        dealt: dict[int, list[int]] = {}
        for i in sorted(batch.left):
            slot = min(load, key=lambda slot: (load[slot], slot))
            load[slot] += batch.requests[i]["num_samples"]
            dealt.setdefault(slot, []).append(i)
        batch.left, batch.ends = [], time.monotonic() + batch.timeout_s
        for slot, indices in dealt.items():
            call = self.engines[slot].generate_groups.remote([batch.requests[i] for i in indices])
            call.future().add_done_callback(batch.answered)
            batch.asked[call] = slot, indices

    def _next(self, calls: Mapping[ray.ObjectRef, int]) -> tuple[dict[ray.ObjectRef, Any], dict[int, str]]:
        """Answers that have come in, and the engines that have failed, each with what it did."""
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=min(POLL_S, self.heartbeat_s / 8))
        answers, failed = {}, {}
        for call in done:
            try:
                answers[call] = ray.get(call)
            except RayError as error:
                failed[calls[call]] = what_it_did(error)
        working = {slot for call, slot in calls.items() if call not in answers}
        return answers, self._hearts_that_stopped(working - failed.keys()) | failed

    def _hearts_that_stopped(self, slots: Sequence[int] | set[int]) -> dict[int, str]:
        """Of these engines those that died or did not answer in time. Each is asked four times a heartbeat."""
        stopped, now = {}, time.monotonic()
        for slot in slots:
            call, asked = self._beats.get(slot, (None, -math.inf))
            if call is not None:
                late = now - asked >= 0.75 * self.heartbeat_s
                if ray.wait([call], timeout=1.0 if late else 0.0)[0]:  # this process may have slept itself
                    try:
                        ray.get(call)
                    except RayError as error:
                        stopped[slot] = what_it_did(error)
                        continue
                elif late:
                    stopped[slot] = f"did not answer within rollout.heartbeat = {self.heartbeat_s:g} s"
                    continue
                else:
                    continue
            if now - asked >= self.heartbeat_s / 4 or call is None:
                self._beats[slot] = self.engines[slot].health.remote(), now
        return stopped

    # Weights.

    def sync(self, policy: Any, version: int) -> None:
        """Every engine that is up serves the policy's weights and reports `version`.

        A failed sync is tried once more over fresh groups, without the engines that failed. Raises SyncError.
        """
        self._policy = policy, version
        doing = f"receiving weights of version {version}"
        self._admit(wait=not self.serving)
        for again in (False, True):
            failure = self._sync_once(policy, version, doing)
            versions = {health["weight_version"] for health in self._examine(doing)}
            if failure is None and versions == {version}:
                return
            failure = failure or f"engines serve weight versions {sorted(versions)} after the sync of version {version}"
            if again:
                raise SyncError(
                    f"weights of version {version} reached the engines neither at once nor over fresh groups: {failure}"
                    "; see the engines' logs in Ray's session folder (logs/worker-*.err), raise weight_sync.deadline "
                    "if it was only slow, and resume from the last checkpoint"
                )
            self.failures.append(failure)
            logger.warning("%s: once more over fresh groups", failure)
            self._connected = []
            self._admit(wait=not self.serving)

    def _sync_once(self, policy: Any, version: int, doing: str) -> str | None:
        """What went wrong, or None."""
        engines = [self.engines[slot] for slot in self.serving]
        if engines != self._connected:
            failure = self._by_policy(policy.async_run_method("connect", engines, version - 1), doing)
            if failure is not None:
                return failure
            self._connected = engines
        return self._by_policy(policy.async_run_method("broadcast_to_vllm"), doing)

    def _by_policy(self, calls: list[ray.ObjectRef], doing: str) -> str | None:
        """Wait for a call to every policy rank: what the first one that failed said, or None.

        An engine that fails meanwhile is killed, which ends the policy's wait for it.
        """
        failure, self._beats = None, {}
        while calls:
            done, calls = ray.wait(calls, num_returns=len(calls), timeout=min(POLL_S, self.heartbeat_s / 8))
            for call in done:
                try:
                    ray.get(call)
                except RayTaskError as error:
                    failure = failure or one_line(error)
            if calls:
                for slot, why in self._hearts_that_stopped(self.serving).items():
                    failure = failure or f"rollout engine {slot} {why}"
                    self._restart(slot, why, doing)
        return failure

    def _examine(self, doing: str) -> list[dict[str, Any]]:
        """`health` of the engines that serve; those that do not answer or are dead are started again."""
        calls: dict[ray.ObjectRef, int] = {self.engines[slot].health.remote(): slot for slot in self.serving}
        bound = None if math.isinf(self.heartbeat_s) else self.heartbeat_s
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=bound) if calls else ([], [])
        found, failed = [], {calls[call]: f"did not answer within rollout.heartbeat = {bound:g} s" for call in late}
        for call in done:
            try:
                found.append(ray.get(call))
            except RayError as error:
                failed[calls[call]] = what_it_did(error)
        for slot, why in failed.items():
            self._restart(slot, why, doing)
        return found

    # Restarts.

    def _restart(self, slot: int, why: str, doing: str) -> None:
        """Kill the slot's engine and start another one in the background. Raises EngineError where none is left."""
        failure = f"rollout engine {slot} {why} while {doing}"
        if self._start is not None:  # an actor of someone else's is left to him
            self._kill(slot)
        if self._start is None or self.restarted >= self.restarts:
            raise EngineError(f"{failure}; {self.restarted} of rollout.restarts = {self.restarts} are used; {REMEDY}")
        self.restarted += 1
        self.failures.append(failure)
        logger.warning("%s: it is started again (%d of rollout.restarts = %d)", failure, self.restarted, self.restarts)
        self.serving = [other for other in self.serving if other != slot]
        self.engines[slot] = self._start(slot)
        self._starting[slot] = self.engines[slot].health.remote(), time.monotonic()

    def _admit(self, *, wait: bool) -> None:
        """Let engines that have come up serve; with `wait`, return when one does."""
        while self._starting:
            calls = [call for call, _ in self._starting.values()]
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=POLL_S if wait else 0.1)  # 0 misses what is there
            for slot, (call, begun) in list(self._starting.items()):
                why = None
                if call in done:
                    try:
                        self.came_up(slot, ray.get(call))
                    except RayError as error:
                        why = what_it_did(error)
                elif time.monotonic() - begun >= self.startup_s:
                    why = f"was not ready within run.startup_timeout = {self.startup_s:g} s"
                else:
                    continue
                del self._starting[slot]
                if why is None:
                    logger.info("rollout engine %d is up again after %.0f s", slot, time.monotonic() - begun)
                    self.serving = sorted([*self.serving, slot])
                else:
                    self._restart(slot, why, "starting again")
            if self.serving or not wait:
                return

    def _kill(self, slot: int) -> None:
        """The slot's actor and all of its processes are gone, stopped ones too."""
        self._beats.pop(slot, None)
        ray.kill(self.engines[slot])
        if (health := self._known.pop(slot, None)) is not None:
            kill_processes(health["node"], health["processes"])

    def shutdown(self, timeout_s: float) -> None:
        """End every engine, which is asked first and killed where it does not answer, and give their devices back."""
        calls: dict[ray.ObjectRef, int] = {engine.shutdown.remote(): slot for slot, engine in enumerate(self.engines)}
        late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)[1] if calls else []
        for call, slot in calls.items():
            if call in late:
                self._kill(slot)
            else:
                ray.kill(self.engines[slot])
        if self._own_group is not None:
            remove_placement_group(self._own_group)


def kill_processes(node: str, processes: Sequence[tuple[int, float]]) -> None:
    """Kill these (process id, start time) on a node of the cluster, and wait until they are gone.

    Ray ends an actor, but not the processes below it that are stopped, nor a stopped actor at once.
    """

    def kill(processes: Sequence[tuple[int, float]], wait_s: float) -> None:  # by value: its process needs no vLLM
        import psutil

        found = []
        for pid, begun in processes:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == begun:
                    process.kill()
                    found.append(process)
        psutil.wait_procs(found, timeout=wait_s)

    if node == ray.get_runtime_context().get_node_id():
        kill(processes, KILL_S)
        return
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    call = ray.remote(num_cpus=0)(kill).options(scheduling_strategy=there).remote(processes, KILL_S)
    ray.wait([call], timeout=2 * KILL_S)  # where the node is gone, so are they


def what_it_did(error: RayError) -> str:
    """ "died", or what an engine raised, on one line."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, EngineDeadError):
        return "died: vLLM's worker behind it is gone"
    if isinstance(error, RayActorError):
        return "died"
    if (killed := out_of_memory(error)) is not None:
        return killed
    return f"failed ({one_line(error)})"
