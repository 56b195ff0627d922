"""Named tensors packed into byte buckets, with a checksum for each tensor. What our own transports move."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

MIB = 2**20
# Every tensor starts on a cache line: any dtype can view its bytes, and a checksum reads whole 8-byte words.
ALIGNMENT = 64


class TensorMeta(Protocol):
    """Name, dtype and full shape of one tensor; vLLM's ParamMeta is one."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class ChecksumError(RuntimeError):
    """What arrived is not what was sent."""


@dataclass(frozen=True)
class Bucket:
    """Which tensors lie in one buffer: plain values that an RPC can carry; offsets follow from dtype and shape."""

    index: int
    """0-based."""
    count: int
    """Buckets in this sync."""
    names: list[str]
    dtypes: list[str]
    """Names in torch, such as "bfloat16"."""
    shapes: list[list[int]]

    def __str__(self) -> str:
        return f"bucket {self.index + 1} of {self.count} ({self.names[0]} .. {self.names[-1]})"

    @property
    def nbytes(self) -> int:
        return sum(end - begin for begin, end, _ in self.slots())

    def slots(self) -> Iterator[tuple[int, int, int]]:
        """(begin, aligned end, payload bytes) of each tensor in the buffer."""
        begin = 0
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            size = nbytes_of(getattr(torch, dtype), shape)
            end = begin + aligned(size)
            yield begin, end, size
            begin = end


def plan_buckets(params: Iterable[TensorMeta], bucket_bytes: int) -> list[Bucket]:
    """`params` in their order, cut into buckets of at most `bucket_bytes`; a larger tensor gets a bucket of its own."""
    groups: list[list[TensorMeta]] = []
    room = 0
    for param in params:
        size = aligned(nbytes_of(param.dtype, param.shape))
        if not groups or size > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(param)
        room -= size
    if not groups:
        raise ValueError("the weight source declares no tensors; a sync must send at least one")
    return [
        Bucket(
            index=index,
            count=len(groups),
            names=[param.name for param in group],
            dtypes=[str(param.dtype).removeprefix("torch.") for param in group],
            shapes=[list(param.shape) for param in group],
        )
        for index, group in enumerate(groups)
    ]


def room_for(buckets: Sequence[Bucket], bucket_bytes: int) -> int:
    """Bytes of a buffer that holds two buckets, one being loaded and one being packed; a larger tensor has it alone."""
    sizes = [bucket.nbytes for bucket in buckets]
    return max(*sizes, min(sum(sizes), 2 * aligned(bucket_bytes)))


def place(nbytes: int, *, room: int, busy: range) -> int | None:
    """Where a bucket begins in a buffer of `room` bytes without touching those that are busy; None: it has to wait."""
    for begin in (0, room - nbytes):
        if begin >= busy.stop or begin + nbytes <= busy.start:
            return begin
    return None


def pack(bucket: Bucket, pairs: Iterator[tuple[str, Tensor]], buffer: UInt8[Tensor, "bytes"]) -> None:
    """Copy the bucket's tensors, the next ones of `pairs`, into `buffer` and zero the gaps between them.

    Raises ValueError where `pairs` and the declared metadata differ in name, dtype or shape.
    """
    for name, dtype, shape, (begin, end, size) in zip(
        bucket.names, bucket.dtypes, bucket.shapes, bucket.slots(), strict=True
    ):
        got, tensor = next(pairs, (None, None))
        if tensor is None:
            raise ValueError(f"the weight source ended before {name}, which its metadata declares")
        found = (got, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        if found != (name, dtype, shape):
            raise ValueError(
                f"the weight source yields {found} where its metadata declares {(name, dtype, shape)}; "
                "both must list the same tensors in the same order"
            )
        buffer[begin : begin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        if begin + size < end:
            buffer[begin + size : end].zero_()


def unpack(bucket: Bucket, buffer: UInt8[Tensor, "bytes"]) -> list[tuple[str, Tensor]]:
    """(name, view into `buffer`) of each tensor: the buffer must stay as it is while the views live."""
    return [
        (name, buffer[begin : begin + size].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, (begin, _, size) in zip(
            bucket.names, bucket.dtypes, bucket.shapes, bucket.slots(), strict=True
        )
    ]


def checksums(bucket: Bucket, buffer: UInt8[Tensor, "bytes"]) -> list[int]:
    """Sum of each tensor's 8-byte words modulo 2^64: one read of memory, which finds lost, stale and torn bytes."""
    sums = [buffer[begin:end].view(torch.int64).sum() for begin, end, _ in bucket.slots()]
    return torch.stack(sums).tolist()  # waits for a device once


def verify(bucket: Bucket, *, sent: Sequence[int], received: Sequence[int]) -> None:
    """Raise ChecksumError, which names bucket and tensor, where the checksums differ."""
    for name, want, have in zip(bucket.names, sent, received, strict=True):
        if want != have:
            raise ChecksumError(
                f"{bucket}: {name} arrived with checksum {have:#x}, sent was {want:#x}; "
                "the transport lost or mixed bytes: do not use these weights, connect again"
            )


def nbytes_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of one tensor."""
    return dtype.itemsize * torch.Size(shape).numel()


def aligned(size: int) -> int:
    """`size`, filled up to the next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
