"""Transports with several senders: one trainer rank for each pipeline stage and share of its experts.

Each sender has a channel of its own to all workers. Rank 0 announces the whole plan to the engines in one call; their
workers receive from every sender at once and load in the plan's order. Which tensors come is in `plan`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from dcpo_openrlhf.weight_sync.base import (
    BucketTrainerEngine,
    BucketTrainerInitInfo,
    BucketUpdateInfo,
    ReloadingWorkerEngine,
)
from dcpo_openrlhf.weight_sync.channels import SENDER, Channel, GlooChannel, Meeting, NCCLChannel
from dcpo_openrlhf.weight_sync.client import WeightSyncError
from dcpo_openrlhf.weight_sync.plan import Arrival, Plan, SealedBucket, arrivals, plan_sends


def _name(place: int) -> str:
    """Of a sender's group in the store."""
    return f"dcpo_weights/{place}"


@dataclass
class SendersInitInfo(WeightTransferInitInfo):
    host: str
    port: int
    """Of the store on the host of trainer rank 0."""
    senders: int
    rank_offset: int
    """Rank of this engine's first worker in every sender's group."""
    world_size: int
    timeout_s: float
    verify: bool


@dataclass
class SendersUpdateInfo(WeightTransferUpdateInfo):
    """`Plan.announced`."""

    places: list[int]
    buckets: list[dict[str, Any]]


class SendersWorkerEngine(ReloadingWorkerEngine[SendersInitInfo, SendersUpdateInfo]):
    """Engine side. The next bucket of every sender is on its way while one is loaded."""

    init_info_cls = SendersInitInfo
    update_info_cls = SendersUpdateInfo
    channel: ClassVar[type[Channel]]
    _meeting: Meeting | None = None
    _channels: Sequence[Channel] = ()
    _verify = True
    _worker = 0
    """Of all engines' workers."""

    def init_transfer_engine(self, init_info: SendersInitInfo) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._verify, self._worker = init_info.verify, rank - 1
        self._meeting = Meeting(init_info.host, init_info.port, timeout_s=init_info.timeout_s)
        # one after the other, in the same order on every worker: groups are formed by all of their members together
        self._channels = [
            self.channel(self._meeting, _name(place), rank=rank, world_size=init_info.world_size)
            for place in range(init_info.senders)
        ]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            super().update_weights(update_info)
        except BaseException as error:
            if self._meeting is not None:  # the senders wait no longer
                self._meeting.broken_off(f"engines' worker {self._worker} failed: {error}")
            self.shutdown()
            raise

    def receive_weights(self, update_info: SendersUpdateInfo) -> None:
        if self._meeting is None:
            raise RuntimeError("weights announced before the senders' groups were formed; connect first")
        for bucket, buffer in self._arrive(self._meeting, arrivals(update_info.places, update_info.buckets)):
            sums = bucket.opened(buffer, check=self._verify)
            self.received_checksums.update(zip(bucket.names, sums, strict=self._verify))
            self.load(bucket, buffer)

    def _arrive(
        self, meeting: Meeting, order: Sequence[Arrival]
    ) -> Iterator[tuple[SealedBucket, UInt8[Tensor, "bytes"]]]:
        """(bucket, its bytes) in `order`, in which broadcasts are begun too, one at a time of each sender.

        A buffer is used again for its sender's next bucket but one.
        """
        ahead = deque(order)
        rooms: dict[int, list[Tensor]] = {place: [torch.empty(0)] * 2 for place, _ in order}
        coming: dict[int, tuple[Tensor, Callable[[], bool]]] = {}

        def begin() -> None:
            while ahead and ahead[0].place not in coming:
                place, bucket = ahead.popleft()
                room, other = rooms[place]
                if room.numel() < bucket.nbytes:
                    room = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self.device)
                rooms[place] = [other, room]
                buffer = room[: bucket.nbytes]
                coming[place] = buffer, self._channels[place].broadcast(buffer)

        begin()
        for place, bucket in order:
            buffer, here = coming[place]
            meeting.wait(here)
            del coming[place]
            begin()
            yield bucket, buffer

    def shutdown(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels, self._meeting = (), None


@dataclass
class SendersTrainerInitInfo(BucketTrainerInitInfo):
    backend = "senders"
    host: str = field(kw_only=True)
    """Address of trainer rank 0 that engines and senders can reach."""
    port: int = field(kw_only=True, default=0)
    """Of the store there; 0: a free one."""
    world_size: int = field(kw_only=True)
    """Of a sender's group: 1 + engines * workers of one engine."""
    device: torch.device = field(kw_only=True, default=torch.device("cpu"))


class SendersTrainerEngine(BucketTrainerEngine):
    """Trainer side, on every rank: rank 0 leads, those that the plan names send, all walk the source."""

    init_info_cls = SendersTrainerInitInfo
    init_info: SendersTrainerInitInfo
    channel: ClassVar[type[Channel]]
    plan: Plan
    _meeting: Meeting | None = None
    _channel: Channel | None = None
    _call: Any = None
    """The engines' update, which rank 0 asked for."""
    _syncs = 0

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> "SendersTrainerEngine":
        engine = cls(init_info, client=client, source=source)
        engine.plan = plan_sends(engine.source.metadata(), init_info.bucket_bytes)  # type: ignore[arg-type]
        engine.is_sender = init_info.rank in engine.plan.senders
        engine.rendezvous(engine.plan.room(init_info.rank))
        return engine

    @property
    def leads(self) -> bool:
        return self.init_info.rank == 0

    def rendezvous(self, nbytes: int) -> None:
        """A collective of the trainer's ranks: they learn where to meet, then senders and workers form groups."""
        info = self.init_info
        self._meeting = meeting = self._meet()
        settings = {"host": meeting.host, "port": meeting.port, "senders": len(self.plan.senders), "rank_offset": 1}
        settings |= {"world_size": info.world_size, "timeout_s": info.deadline_s, "verify": info.verify}
        joined = self.client.post_init(settings) if self.leads else []
        if self.is_sender:
            name = _name(self.plan.senders.index(info.rank))
            self._channel = self.channel(meeting, name, rank=SENDER, world_size=info.world_size)
            self.room = torch.empty(nbytes, dtype=torch.uint8, device=info.device)
        self.client.wait(joined)

    def _meet(self) -> Meeting:
        info, meeting = self.init_info, None
        told: list[Any] = [None]
        if self.leads:
            try:
                meeting = Meeting(info.host, info.port, timeout_s=info.deadline_s, leads=True)
                told = [(info.host, meeting.port)]
            except Exception as error:  # the others must not wait for it
                told = [error]
        dist.broadcast_object_list(told, src=0)
        if isinstance(told[0], Exception):
            raise told[0]
        return meeting or Meeting(*told[0], timeout_s=info.deadline_s)

    def send_weights(self) -> None:
        plan = plan_sends(self.source.metadata(), self.init_info.bucket_bytes)  # type: ignore[arg-type]
        if plan.senders != self.plan.senders:
            raise ValueError(
                f"trainer ranks {plan.senders} are to send, {self.plan.senders} are connected; connect again"
            )
        if self._meeting is None:
            raise RuntimeError("the senders' groups are closed; connect again")
        self.plan, self.sent_checksums = plan, {}
        try:
            self._begin(self._meeting)
            pairs = iter(self.source)
            for bucket in plan.buckets(self.init_info.rank):
                self._send(bucket, pairs)
            self._settle()
            self.require_end(pairs)
            self._end(self._meeting)
        except BaseException as error:
            why = self._meeting.broken_off(f"trainer rank {self.init_info.rank}: {error}")
            self._let_go()  # and stay in the meeting, where the others hear it
            raise WeightSyncError(f"broken off by {why}") from error
        if self.leads:
            self.client.finish_weight_update()

    def _begin(self, meeting: Meeting) -> None:
        """Return when the engines are ready to receive."""
        self._syncs += 1
        self.client.stage = "waiting for the engines"
        begun = f"begun/{self._syncs}"
        if self.leads:
            self.client.start_weight_update()
            self._call = self.client.post_update(self.plan.announced())
            meeting.store.set(begun, "")
        elif self.is_sender:
            meeting.wait_for(begun)

    def _end(self, meeting: Meeting) -> None:
        """Return when the engines have loaded what all senders sent."""
        arrived = f"arrived/{self._syncs}"
        self.client.stage = "loading"
        if self.leads:
            self.client.wait(self._call)
            meeting.store.set(arrived, "")
        elif self.is_sender:
            meeting.wait_for(arrived)

    def send_bucket(self, update_info: dict[str, Any], buffer: UInt8[Tensor, "bytes"]) -> Callable[[], object]:
        assert self._meeting is not None and self._channel is not None
        info = BucketUpdateInfo(**update_info)
        SealedBucket(**asdict(info.bucket)).seal(buffer, info.checksums)
        meeting, there = self._meeting, self._channel.broadcast(buffer)
        # an engine that dies says nothing in the meeting
        look = partial(self.client.look, self._call) if self.leads else lambda: None
        return lambda: meeting.wait(there, look)

    def _let_go(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._loading = None
        vars(self).pop("room", None)  # senders alone have one

    def shutdown(self) -> None:
        self._let_go()
        self._meeting = None


class GlooSendersWorkerEngine(SendersWorkerEngine):
    channel = GlooChannel


class NCCLSendersWorkerEngine(SendersWorkerEngine):
    channel = NCCLChannel


@dataclass
class GlooSendersTrainerInitInfo(SendersTrainerInitInfo):
    backend = "gloo_senders"


@dataclass
class NCCLSendersTrainerInitInfo(SendersTrainerInitInfo):
    backend = "nccl_senders"


class GlooSendersTrainerEngine(SendersTrainerEngine):
    channel = GlooChannel


class NCCLSendersTrainerEngine(SendersTrainerEngine):
    channel = NCCLChannel
