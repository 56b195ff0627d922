"""connect(): one call on every trainer rank gives the object that syncs the engines' weights, under a deadline."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import ray
import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from dcpo_openrlhf.weight_sync import SENDERS, TRANSPORTS, register
from dcpo_openrlhf.weight_sync.buckets import MIB
from dcpo_openrlhf.weight_sync.client import RayWeightSyncClient, WeightSyncError
from dcpo_openrlhf.weight_sync.source import WholeWalk

if TYPE_CHECKING:
    from ray.actor import ActorHandle

# A call that overruns names the late engine itself; the watching thread waits this much longer for that better message.
GRACE_S = 2.0
_threads: list[threading.Thread] = []
"""The thread of this process's last sync."""


class WeightSync:
    """A trainer rank's end of the sync. Call `send_weights` on all ranks: senders send, the others help to gather."""

    def __init__(
        self,
        *,
        engine: TrainerWeightTransferEngine,
        client: RayWeightSyncClient,
        source: WholeWalk,
        transport: str,
        rank: int,
        version: int,
    ) -> None:
        self.engine = engine
        self.client = client
        self.source = source
        self.transport = transport
        self.rank = rank
        self.version = version
        """Version of the last finished sync."""
        self._broken: str | None = None

    def send_weights(self, version: int | None = None) -> float:
        """Seconds of a sync, after which all engines serve the source's weights and report `version` (default: next).

        Raises WeightSyncError when an engine fails or the deadline passes. The engines then refuse to generate until a
        sync succeeds, and this object refuses to sync: connect again.
        """
        if self._broken is not None:
            raise WeightSyncError(f"an earlier sync failed ({self._broken}); connect again before the next one")
        version = self.version + 1 if version is None else version
        begin = time.monotonic()
        self.client.begin(version)
        try:
            within(
                self._send,
                deadline_s=self.client.deadline_s,
                what=lambda: f"{self.client} over {self.transport}, trainer rank {self.rank}, {self.client.stage},",
            )
        except BaseException as error:
            self._broken = str(error)
            raise
        self.version = version
        return time.monotonic() - begin

    def _send(self) -> None:
        wait_for_device()
        try:
            self.engine.send_weights()
        finally:
            self.source.finish()

    @property
    def checksums(self) -> dict[str, int]:
        """name -> checksum of what this rank sent in the last sync; empty where it sends none and with checks off."""
        if self.client.sent_checksums is not None:
            return self.client.sent_checksums()
        return dict(getattr(self.engine, "sent_checksums", {}))

    def shutdown(self) -> None:
        self.engine.shutdown()


def connect(
    *,
    transport: str,
    rank: int,
    engines: Sequence["ActorHandle"],
    source: WeightSource,
    deadline_s: float,
    engine_world_size: int = 1,
    bucket_bytes: int = 64 * MIB,
    verify: bool = True,
    version: int = 0,
    host: str | None = None,
    port: int | None = None,
    instead_of: WeightSync | None = None,
) -> WeightSync:
    """The sync between this trainer rank and all `engines`; every rank calls it, with the same arguments but `rank`.

    engine_world_size: workers of one engine (its tensor-parallel size). bucket_bytes: size of one message of
    shared_memory and gloo, with several senders of one of each. verify: an engine that holds other bits than were sent
    is an error. host, port: where the engines reach trainer rank 0 over gloo or nccl (default: the address Ray uses and
    a free port). nccl and ipc are vLLM's own backends and need CUDA. Raises WeightSyncError if the handshake fails or
    takes too long.
    instead_of is shut down first, which lets go of engines that still wait for it.
    """
    if instead_of is not None:
        instead_of.shutdown()
    if transport not in TRANSPORTS:
        raise ValueError(f"weight_sync.transport must be one of {', '.join(TRANSPORTS)}, not {transport!r}")
    register()
    client = RayWeightSyncClient(engines, deadline_s, engine_world_size=engine_world_size)
    world_size = 1 + len(client.engines) * engine_world_size
    if transport in ("nccl", "ipc"):
        client.init_info = {"verify": verify}
        if verify and rank == 0:
            from dcpo_openrlhf.weight_sync.device import CheckedSource

            source = CheckedSource(source)
            client.sent_checksums = source.checksums
    walk = WholeWalk(source)

    def handshake() -> TrainerWeightTransferEngine:
        info = _init_info(
            transport,
            source=source,
            rank=rank,
            world_size=world_size,
            host=host or ray.util.get_node_ip_address(),
            port=port,
            bucket_bytes=bucket_bytes,
            verify=verify,
            deadline_s=deadline_s,
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=walk)

    engine = within(
        handshake,
        deadline_s=deadline_s,
        what=lambda: f"the weight-sync handshake over {transport}, trainer rank {rank},",
    )
    return WeightSync(engine=engine, client=client, source=walk, transport=transport, rank=rank, version=version)


def _init_info(
    transport: str,
    *,
    source: WeightSource,
    rank: int,
    world_size: int,
    host: str,
    port: int | None,
    bucket_bytes: int,
    verify: bool,
    deadline_s: float,
) -> TrainerInitInfo:
    common = {"rank": rank, "bucket_bytes": bucket_bytes, "verify": verify, "deadline_s": deadline_s}
    if transport == "shared_memory":
        from dcpo_openrlhf.weight_sync.shared_memory import SharedMemoryTrainerInitInfo

        return SharedMemoryTrainerInitInfo(**common)
    if transport == "gloo":
        from dcpo_openrlhf.weight_sync.gloo import GlooTrainerInitInfo

        return GlooTrainerInitInfo(host=host, port=port or 0, world_size=world_size, **common)
    from dcpo_openrlhf.weight_sync import device, senders

    if transport.endswith(SENDERS):
        place = {"host": host, "port": port or 0, "world_size": world_size}
        if transport == f"gloo{SENDERS}":
            return senders.GlooSendersTrainerInitInfo(**place, **common)
        common |= {"bucket_bytes": device.BUFFER_BYTES, "device": torch.device("cuda", torch.cuda.current_device())}
        return senders.NCCLSendersTrainerInitInfo(**place, **common)
    if transport == "nccl":
        return device.nccl_init_info(host, port or _free_port(), rank=rank, world_size=world_size)
    return device.ipc_init_info(source, rank=rank)


def wait_for_device() -> None:
    """Return when this rank's device has done what is queued: the optimizer's copies, the gathering of new weights.

    vLLM packs nccl's messages in streams of its own, which do not wait for the one that these are queued in.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def within[T](work: Callable[[], T], *, deadline_s: float, what: Callable[[], str]) -> T:
    """work(), run on a thread of its own without gradients.

    Raises WeightSyncError, which begins with what(), when it fails or outlasts the deadline.

    A collective that never returns blocks that thread and not the caller. Thread-local state of the caller, such as a
    TorchFunctionMode, is not set in `work`.
    """
    if _threads:  # after a deadline it may still be walking the source, in collectives that must not meet the next ones
        _threads[0].join(deadline_s)
        if _threads.pop().is_alive():
            raise WeightSyncError(f"{what()} cannot begin: an earlier sync of this policy rank still hangs")
    result: Future[T] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.no_grad():
                result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    _threads.append(threading.Thread(target=run, name="weight_sync", daemon=True))
    _threads[0].start()
    try:
        return result.result(timeout=deadline_s + GRACE_S)
    except WeightSyncError:
        raise
    except Exception as error:
        if isinstance(error, TimeoutError) and not result.done():
            raise WeightSyncError(
                f"{what()} did not end within {deadline_s:g} s; are all ranks and engines up?"
            ) from error
        raise WeightSyncError(f"{what()} failed: {error}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
