"""The trainer's calls to the rollout engines during a weight sync, each bounded by the sync's deadline."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle


class WeightSyncError(RuntimeError):
    """A weight sync failed or ran out of time; the engines' weights are not to be used until one succeeds."""


class RayWeightSyncClient:
    """vLLM's weight-sync client protocol over Ray actors.

    Every call goes to all engines; it fails at the first error and at the deadline, and names the engine.
    """

    def __init__(self, engines: Sequence["ActorHandle"], deadline_s: float, *, engine_world_size: int = 1) -> None:
        self.engines = list(engines)
        self.deadline_s = deadline_s
        self.engine_world_size = engine_world_size
        self.stage = "connecting"
        """What the sync is doing, for error messages."""
        self.init_info: dict[str, Any] = {}
        """What a handshake tells the engines beside the transport's own."""
        self.sent_checksums: Callable[[], dict[str, int]] | None = None
        """Where the transport compares nothing: name -> checksum of what was sent, asked for before a sync ends."""
        self._version: int | None = None
        self._ends = time.monotonic() + deadline_s

    def begin(self, version: int | None = None) -> None:
        """Start the clock of a sync; `version` is what the engines report once it is finished."""
        self.stage = "reading the source"
        self._version = version
        self._ends = time.monotonic() + self.deadline_s

    # The four methods of vLLM's VLLMWeightSyncClient protocol.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.wait(self.post_init(init_info))

    def start_weight_update(self) -> None:
        self.stage = "start_weight_update"
        self.wait([engine.start_weight_update.remote() for engine in self.engines])

    def update_weights(self, update_info: Any) -> None:
        self.wait(self.post_update(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.sent_checksums is not None:
            self.stage = "comparing checksums"
            self.compare(self.sent_checksums())
        self.stage = "finish_weight_update"
        if weight_version is None and self._version is not None:
            weight_version = str(self._version)
        self.wait([engine.finish_weight_update.remote(weight_version) for engine in self.engines])

    # The same without waiting, for transports that must send while the engines receive.

    def post_init(self, init_info: dict[str, Any]) -> list["ObjectRef"]:
        """One handshake call an engine; `rank_offset`, where a transport has it, counts on over the engines."""
        requests = []
        for index, engine in enumerate(self.engines):
            info = init_info | self.init_info
            if "rank_offset" in info:
                info["rank_offset"] += index * self.engine_world_size
            requests.append(engine.init_weight_transfer_engine.remote(WeightTransferInitRequest(init_info=info)))
        return requests

    def post_update(self, update_info: Any) -> list["ObjectRef"]:
        request = ray.put(WeightTransferUpdateRequest(update_info=update_info))
        return [engine.update_weights.remote(request) for engine in self.engines]

    def compare(self, sent: dict[str, int]) -> None:
        """Raise WeightSyncError, which names worker and tensors, where a worker loaded other bits than were sent."""
        received = self.wait([engine.weight_checksums.remote() for engine in self.engines])
        for engine, workers in enumerate(received):
            for worker, sums in enumerate(workers):
                wrong = [name for name in sent.keys() | sums.keys() if sent.get(name) != sums.get(name)]
                if wrong:
                    raise WeightSyncError(
                        f"{self}: every worker must load the bits that were sent, but worker {worker} of engine "
                        f"{engine} has others in {len(wrong)} of {len(sent)} tensors: {', '.join(sorted(wrong)[:3])}; "
                        "do not use these weights, connect again"
                    )

    def wait(self, calls: Sequence["ObjectRef"]) -> list[Any]:
        """Every engine's answer. Raises WeightSyncError at the first failure or at the deadline."""
        pending = list(calls)
        answers: dict[Any, Any] = {}
        while pending:
            remaining = max(self._ends - time.monotonic(), 0.0)
            done, pending = ray.wait(pending, num_returns=1, timeout=remaining)
            if not done:
                late = ", ".join(f"engine {calls.index(call)}" for call in pending)
                raise WeightSyncError(
                    f"{self} took more than {self.deadline_s:g} s while {self.stage}: {late} did not answer"
                )
            answers[done[0]] = self._answer(calls, done[0])
        return [answers[call] for call in calls]

    def look(self, calls: Sequence["ObjectRef"]) -> None:
        """Raise WeightSyncError where one of the calls has failed by now."""
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=0.01)[0]:
            self._answer(calls, call)

    def _answer(self, calls: Sequence["ObjectRef"], call: "ObjectRef") -> Any:
        try:
            return ray.get(call)
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # Ray's own error repeats the remote traceback
            raise WeightSyncError(f"{self} failed while {self.stage}: engine {calls.index(call)}: {cause}") from error

    def __str__(self) -> str:
        return "the weight-sync handshake" if self._version is None else f"the weight sync to version {self._version}"
