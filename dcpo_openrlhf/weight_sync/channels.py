"""How one sender reaches all workers: a process group of its own, over gloo or nccl, in which the sender is rank 0.

Different senders' groups share nothing but the store in which their members met: their broadcasts run side by side.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

SENDER = 0
"""Rank of the sender in its group; the workers count on from 1."""
POLL_S, ASK_S, LOOK_S = 0.0005, 0.02, 0.25
"""Seconds between two questions: to a broadcast of this process, to the store, whether another member has failed."""
_BROKEN_OFF = "broken off"


class BrokenOff(RuntimeError):
    """Another sender or worker has failed; says why."""


class Meeting:
    """The store on trainer rank 0's host where senders and workers meet, and where the first that fails says why."""

    def __init__(self, host: str, port: int, *, timeout_s: float, leads: bool = False) -> None:
        self.host, self.timeout_s = host, timeout_s
        timeout = timedelta(seconds=timeout_s)
        self.store = TCPStore(host, port, is_master=leads, wait_for_workers=False, timeout=timeout)

    @property
    def port(self) -> int:
        return self.store.port

    def broken_off(self, why: str = "") -> str | None:
        """Why the first member broke off: what it has said, else `why`, which from now on all others hear."""
        try:
            if why:
                return self.store.compare_set(_BROKEN_OFF, "", why).decode()
            return self.store.get(_BROKEN_OFF).decode() if self.store.check([_BROKEN_OFF]) else None
        except RuntimeError as error:  # its host's process has ended, or closed it
            return why or f"trainer rank 0 is gone: {error}"

    def wait_for(self, key: str) -> None:
        """Return when a member has set `key`. Raises as `wait`."""
        self.wait(lambda: self.store.check([key]), poll_s=ASK_S)

    def wait(
        self, done: Callable[[], bool], look: Callable[[], object] = lambda: None, *, poll_s: float = POLL_S
    ) -> None:
        """Return when `done`. Raises BrokenOff once a member has broken off, TimeoutError, and what `look` raises.

        No member is left waiting for one that failed: neither gloo nor nccl would tell it.
        """
        begin = looked = time.monotonic()
        while not done():
            time.sleep(poll_s)
            now = time.monotonic()
            if now - looked < LOOK_S:
                continue
            if why := self.broken_off():
                raise BrokenOff(why)
            if now - begin > self.timeout_s:
                raise TimeoutError(f"nothing arrived for {self.timeout_s:g} s")
            look()
            looked = time.monotonic()


class Channel(Protocol):
    """Made by every member at once, with the same `name`."""

    def __init__(self, meeting: Meeting, name: str, *, rank: int, world_size: int) -> None: ...

    def broadcast(self, buffer: UInt8[Tensor, "bytes"]) -> Callable[[], bool]:
        """Begin to bring the sender's bytes into every member's buffer; what is returned says whether it is done."""
        ...

    def close(self) -> None:
        """Let go of the other members, whatever is under way."""
        ...


def gloo_group(store: TCPStore, name: str, *, rank: int, world_size: int, timeout: timedelta) -> ProcessGroupGloo:
    return ProcessGroupGloo(PrefixStore(name, store), rank, world_size, timeout)


def gloo_broadcast(group: ProcessGroupGloo, buffer: UInt8[Tensor, "bytes"]) -> torch.distributed.Work:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = SENDER, 0
    return group.broadcast([buffer], options)  # type: ignore[attr-defined]


class GlooChannel:
    """In the host's memory. A broadcast runs in gloo's own threads and ends with the meeting's timeout."""

    def __init__(self, meeting: Meeting, name: str, *, rank: int, world_size: int) -> None:
        timeout = timedelta(seconds=meeting.timeout_s)
        self._group = [gloo_group(meeting.store, name, rank=rank, world_size=world_size, timeout=timeout)]

    def broadcast(self, buffer: UInt8[Tensor, "bytes"]) -> Callable[[], bool]:
        if not self._group:
            raise RuntimeError("the sender's group is closed; connect again")
        work = gloo_broadcast(self._group[0], buffer)

        def done() -> bool:
            return work.is_completed() and (work.wait() or True)  # wait raises what the broadcast ended with

        return done

    def close(self) -> None:
        # A group that is let go of waits for its broadcasts, which nobody may answer any more.
        threading.Thread(target=self._group.clear, name="close_gloo", daemon=True).start()
        self._group = []


class NCCLChannel:
    """Between devices, in a stream of its own. Never run.

    A worker is in one such group for each sender; all of them begin their broadcasts in the order of the plan, without
    which groups that share devices wait for each other for ever.
    """

    def __init__(self, meeting: Meeting, name: str, *, rank: int, world_size: int) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        device = torch.device("cuda", torch.cuda.current_device())
        members = StatelessProcessGroup(rank, world_size, PrefixStore(name, meeting.store))
        self._communicator, self._stream = PyNcclCommunicator(members, device), torch.cuda.Stream(device)

    def broadcast(self, buffer: UInt8[Tensor, "bytes"]) -> Callable[[], bool]:
        self._stream.wait_stream(torch.cuda.current_stream())  # what packs the buffer, or still loads from it
        self._communicator.broadcast(buffer, SENDER, self._stream)
        return self._stream.record_event().query

    def close(self) -> None:
        self._communicator.destroy()  # aborts what is under way
