"""Which trainer rank sends which tensors, in which buckets and in which order: one plan, the same on every rank."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

from dcpo_openrlhf.weight_sync.buckets import (
    Bucket,
    ChecksumError,
    TensorMeta,
    aligned,
    checksums,
    nbytes_of,
    room_for,
    verify,
)


class SentMeta(TensorMeta, Protocol):
    """Name, dtype and full shape of one tensor, and who sends it."""

    @property
    def sender(self) -> int:
        """Trainer rank."""
        ...

    @property
    def stage(self) -> int:
        """Of the pipeline: its ranks gather tensors together, in the order of the list."""
        ...


@dataclass(frozen=True)
class SealedBucket(Bucket):
    """A bucket that carries a seal behind its tensors: what is in it and their checksums, as its sender knows them."""

    @property
    def payload(self) -> int:
        """Bytes before the seal."""
        return sum(end - begin for begin, end, _ in self.slots())

    @property
    def nbytes(self) -> int:
        return self.payload + aligned(8 * (1 + len(self.names)))

    @property
    def contents(self) -> int:
        """A number that stands for names, dtypes and shapes."""
        text = repr((self.names, self.dtypes, self.shapes)).encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)

    def seal(self, buffer: UInt8[Tensor, "bytes"], sums: Sequence[int] | None) -> None:
        """Write the seal; without `sums` nothing but the contents is checked."""
        words = [self.contents, *(sums or [0] * len(self.names))]
        buffer[self.payload : self.payload + 8 * len(words)].view(torch.int64).copy_(torch.tensor(words))

    def opened(self, buffer: UInt8[Tensor, "bytes"], *, check: bool) -> list[int]:
        """The tensors' checksums, empty without `check`. Raises ChecksumError where the buffer holds something else."""
        words = buffer[self.payload :].view(torch.int64)[: 1 + len(self.names)].tolist()
        if words[0] != self.contents:
            raise ChecksumError(
                f"{self} was announced and other tensors arrived: sender and receiver must have the same plan; "
                "do not use these weights, connect again"
            )
        if not check:
            return []
        received = checksums(self, buffer)
        verify(self, sent=words[1:], received=received)
        return received


class Arrival(NamedTuple):
    """One bucket of one sender."""

    place: int
    """Of its sender in `Plan.senders`."""
    bucket: SealedBucket


@dataclass(frozen=True)
class Plan:
    """All of a sync's buckets."""

    senders: list[int]
    """Trainer ranks; each has a group of its own with all workers."""
    order: list[Arrival]
    """As the workers load them: a bucket of every sender, then the next of each."""
    bucket_bytes: int
    """Of tensors in a sender's bucket."""

    def buckets(self, sender: int) -> list[SealedBucket]:
        return [bucket for place, bucket in self.order if self.senders[place] == sender]

    def room(self, sender: int) -> int:
        """Bytes of the buffer that the sender packs its buckets in; 0 where it has none."""
        buckets = self.buckets(sender)
        seals = [bucket.nbytes - bucket.payload for bucket in buckets]
        return room_for(buckets, self.bucket_bytes + max(seals)) if buckets else 0

    def announced(self) -> dict[str, Any]:
        """Plain values for an RPC, of which `arrivals` makes the order again."""
        return {
            "places": [place for place, _ in self.order],
            "buckets": [asdict(bucket) for _, bucket in self.order],
        }


def arrivals(places: Sequence[int], buckets: Sequence[dict[str, Any]]) -> list[Arrival]:
    """The order of `Plan.announced`. Raises ValueError where a tensor would arrive twice."""
    order = [Arrival(place, SealedBucket(**bucket)) for place, bucket in zip(places, buckets, strict=True)]
    _require_once(name for _, bucket in order for name in bucket.names)
    return order


def plan_sends(params: Sequence[SentMeta], bucket_bytes: int) -> Plan:
    """Every sender's tensors in their order, in buckets that together hold about `bucket_bytes`.

    A larger tensor gets a bucket of its own. A stage's list is cut at one place for all its senders: they gather
    together, so none of them may be a bucket ahead of what another one waits for. Raises ValueError for a tensor that
    is declared twice.
    """
    _require_once(param.name for param in params)
    senders = sorted({param.sender for param in params})
    if not senders:
        raise ValueError("the weight source declares no tensors; a sync must send at least one")
    each = bucket_bytes // len(senders)
    stages: dict[int, list[dict[int, list[SentMeta]]]] = {}
    room: dict[int, int] = {}
    for param in params:
        cuts = stages.setdefault(param.stage, [{}])
        size = aligned(nbytes_of(param.dtype, param.shape))
        if param.sender in cuts[-1] and size > room[param.sender]:
            cuts.append({})
        if param.sender not in cuts[-1]:
            cuts[-1][param.sender], room[param.sender] = [], each
        cuts[-1][param.sender].append(param)
        room[param.sender] -= size
    rounds = zip_longest(*(stages[stage] for stage in sorted(stages)), fillvalue={})
    order = [(senders.index(s), group) for cuts in rounds for cut in cuts for s, group in sorted(cut.items())]
    return Plan(senders, _numbered(order), each)


def _numbered(order: Sequence[tuple[int, Sequence[SentMeta]]]) -> list[Arrival]:
    count, seen = Counter(place for place, _ in order), Counter[int]()
    found = []
    for place, group in order:
        bucket = SealedBucket(
            index=seen[place],
            count=count[place],
            names=[param.name for param in group],
            dtypes=[str(param.dtype).removeprefix("torch.") for param in group],
            shapes=[list(param.shape) for param in group],
        )
        seen[place] += 1
        found.append(Arrival(place, bucket))
    return found


def _require_once(names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"a weight sync must bring every tensor once; twice come {', '.join(twice[:5])}")
