"""Transport for engines on other hosts: trainer rank 0 broadcasts each bucket to all workers over gloo."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo

from dcpo_openrlhf.weight_sync.base import BucketTrainerEngine, BucketTrainerInitInfo, BucketWorkerEngine
from dcpo_openrlhf.weight_sync.buckets import Bucket
from dcpo_openrlhf.weight_sync.channels import SENDER, gloo_broadcast, gloo_group

GROUP = "dcpo_weights"
"""Its name in the store."""


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    host: str
    port: int
    rank_offset: int
    """Rank of this engine's first worker; trainer rank 0 is rank 0."""
    world_size: int
    timeout_s: float


@dataclass
class GlooTrainerInitInfo(BucketTrainerInitInfo):
    backend = "gloo"
    host: str = field(kw_only=True)
    """Address of trainer rank 0 that the engines can reach."""
    port: int = field(kw_only=True, default=0)
    """Of the store there; 0: a free one."""
    world_size: int = field(kw_only=True)
    """1 + engines * workers of one engine."""


class GlooWorkerEngine(BucketWorkerEngine[GlooInitInfo]):
    init_info_cls = GlooInitInfo
    _store: TCPStore | None = None
    _group: ProcessGroupGloo | None = None
    _buffer: Tensor | None = None
    """Of the largest bucket so far: a new one for each would be page faults, slower than what arrives."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_s)
        self._store = TCPStore(init_info.host, init_info.port, timeout=timeout)
        self._group = gloo_group(self._store, GROUP, rank=rank, world_size=init_info.world_size, timeout=timeout)

    def receive_bucket(self, bucket: Bucket, begin: int) -> UInt8[Tensor, "bytes"]:
        if self._group is None:
            raise RuntimeError(f"{bucket} announced before the gloo group was formed; connect first")
        if self._buffer is None or self._buffer.numel() < bucket.nbytes:
            self._buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        buffer = self._buffer[: bucket.nbytes]
        # Bounded by the group's timeout, which is the sync's deadline.
        gloo_broadcast(self._group, buffer).wait()
        return buffer

    def shutdown(self) -> None:
        self._group = self._store = self._buffer = None


class GlooTrainerEngine(BucketTrainerEngine):
    init_info_cls = GlooTrainerInitInfo
    init_info: GlooTrainerInitInfo
    _store: TCPStore | None = None
    _group: ProcessGroupGloo | None = None

    def rendezvous(self, nbytes: int) -> None:
        self.room = torch.empty(nbytes, dtype=torch.uint8)
        info = self.init_info
        timeout = timedelta(seconds=info.deadline_s)
        self._store = TCPStore(info.host, info.port, is_master=True, wait_for_workers=False, timeout=timeout)
        joined = self.client.post_init(
            {
                "host": info.host,
                "port": self._store.port,
                "rank_offset": 1,
                "world_size": info.world_size,
                "timeout_s": info.deadline_s,
            }
        )
        self._group = gloo_group(self._store, GROUP, rank=SENDER, world_size=info.world_size, timeout=timeout)
        self.client.wait(joined)

    def send_bucket(self, update_info: dict[str, Any], buffer: UInt8[Tensor, "bytes"]) -> Callable[[], object]:
        if self._group is None:
            raise RuntimeError("the gloo group is closed; connect again")
        # The broadcast runs in gloo's own threads, so an engine that fails is seen at once and not at the timeout.
        received = self.client.post_update(update_info)
        sent = gloo_broadcast(self._group, buffer)

        def wait() -> None:
            self.client.wait(received)
            sent.wait()

        return wait

    def shutdown(self) -> None:
        self._group = self._store = None
        vars(self).pop("room", None)  # the sender alone has one
