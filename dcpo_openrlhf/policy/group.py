"""The policy's ranks together: OpenRLHF's actor group, which deals rows to the data ranks."""

import math
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch

from dcpo_openrlhf.local_ray import StartupError
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy, make_importable

make_importable()

from openrlhf.trainer.ray.launcher import RayActorGroup  # noqa: E402

from dcpo_openrlhf.policy.wire import dealt, in_order  # noqa: E402


class PolicyActorGroup(RayActorGroup):
    """OpenRLHF's actor group; it deals rows by data-parallel rank, of which a place in the list says nothing."""

    data_ranks: list[int]
    """Data-parallel rank of each actor; set by `finish_init`."""

    def __init__(self, *args: Any, timeout_s: float | None = None, bundles: Any = None, **kwargs: Any) -> None:
        """OpenRLHF's arguments; seconds until the ranks must have devices and processes; each rank's bundle of `pg`."""
        self._timeout_s, self._bundles = timeout_s, bundles
        super().__init__(*args, **kwargs)

    def _initiate_actors(self, pg: Any, num_gpus_per_actor: float) -> None:
        """As OpenRLHF's, which waits for devices and for rank 0 without an end. Raises StartupError."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from dcpo_openrlhf.rollout.devices import device_group

        nodes, each = self._num_nodes, self._num_gpus_per_node
        size, begin = nodes * each, time.monotonic()
        self.devices = pg or device_group(size, self._timeout_s, what=f"training, {nodes} nodes * {each}")
        bundle = self._bundles or range(size)

        def start(rank: int, address: str | None, port: int | None) -> Any:
            place = PlacementGroupSchedulingStrategy(self.devices, bundle[rank])
            share = {"num_cpus": num_gpus_per_actor, "num_gpus": num_gpus_per_actor}
            actor: Any = self.ray_actor_type
            return actor.options(**share, scheduling_strategy=place).remote(size, rank, address, port)

        self._actor_handlers = [start(0, None, None)]
        if size > 1:
            left = None if self._timeout_s is None else max(self._timeout_s - (time.monotonic() - begin), 0.0)
            call = self._actor_handlers[0].get_master_addr_port.remote()
            ((address, port),) = self._wait([call], timeout=left, doing="starting its process")
            self._actor_handlers += [start(rank, address, port) for rank in range(1, size)]

    def _wait(self, calls: Sequence[ray.ObjectRef], *, timeout: float | None, doing: str) -> list[Any]:
        """Results of a call to each rank. Raises StartupError that names the ranks which died or are late."""
        from dcpo_openrlhf.rollout.pool import gather

        return gather(
            calls,
            list(range(len(calls))),
            timeout_s=math.inf if timeout is None else timeout,
            doing=doing,
            remedy="see its log in Ray's session folder (logs/worker-*.err), or with run.worker_logs=true; raise "
            "run.startup_timeout if it was still at work",
            who="policy rank",
            error=StartupError,
        )

    def begin_init(self, strategy: RecipeStrategy, max_steps: int) -> None:
        """Let every actor build its model in the background; `finish_init` waits for it."""
        self._share_prompts = strategy.recipe.shares_prompts
        self._building = self.async_init_model_from_pretrained(strategy, str(strategy.recipe.model.path), max_steps)

    def finish_init(self, engines: Sequence[Any], *, timeout: float) -> None:
        """Return when every model is built and connected to the engines, which are ready; a replay has none.

        Raises StartupError after `timeout` seconds for either.
        """
        self.data_ranks = self._wait(self._building, timeout=timeout, doing="building its model")
        if engines:
            self._wait(self.async_run_method("connect", engines), timeout=timeout, doing="connecting to the engines")

    def async_run_method_batch(self, method_name: str, **kwargs: Any) -> list[ray.ObjectRef]:
        """Each item of each list is one mini-batch of rows, dealt over the data ranks; one ref an actor."""
        parts = max(self.data_ranks) + 1
        refs = []
        shares = {k: [dealt(item, parts, groups=self._share_prompts) for item in v] for k, v in kwargs.items()}
        cut = {r: ray.put({k: [share[r] for share in v] for k, v in shares.items()}) for r in range(parts)}
        length = len(next(iter(kwargs.values())))
        for actor, data_rank in zip(self._actor_handlers, self.data_ranks, strict=True):
            refs.append(actor.execute_batch.remote(method_name, cut[data_rank], 0, length))
        return refs

    def gather(self, refs: list[ray.ObjectRef]) -> list[dict[str, torch.Tensor]]:
        """`token_statistics` of all data ranks in the order of the rows: one dict of [batch, ...] a mini-batch."""
        answers = zip(self.data_ranks, ray.get(refs), strict=True)
        by_rank = {rank: results for rank, results in answers if results[0] is not None}
        return [in_order(parts) for parts in zip(*by_rank.values(), strict=True)]
