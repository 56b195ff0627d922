"""vLLM's transports between devices, nccl and ipc, with what they lack: a check of what arrived against what was sent.

The bits of every tensor are summed where they lie, on the sender as they are packed, on each worker as they are loaded.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCTrainerInitInfo,
    IPCWeightTransferEngine,
    IPCWeightTransferInitInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
)

from dcpo_openrlhf.weight_sync.buckets import MIB

BUFFER_BYTES = 256 * MIB
"""Of one message. vLLM's own GiB, in two slots beside the gathered tensors, is memory that a policy lacks."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> what its bits are read as: on a worker a tensor may begin at any multiple of them."""
CHUNK = 2**24
"""Elements summed at a time: torch makes an int64 of each."""
XOR_WEIGHT = 0x9E3779B1
"""Odd, so that no two XORs weigh the same."""


def nccl_init_info(host: str, port: int, *, rank: int, world_size: int) -> NCCLTrainerInitInfo:
    return NCCLTrainerInitInfo(
        master_address=host,
        master_port=port,
        world_size=world_size,
        rank=rank,
        packed_buffer_size_bytes=BUFFER_BYTES,  # a message ends behind it: a tensor may be larger
    )


def ipc_init_info(source: WeightSource, *, rank: int) -> IPCTrainerInitInfo:
    """Its buffer must hold the source's largest tensor; Qwen2.5-7B's embedding is larger than vLLM's default."""
    sizes = (meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in source.metadata())
    return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(BUFFER_BYTES, *sizes))


@torch.no_grad()
def bit_checksum(tensor: Tensor) -> Int64[Tensor, ""]:
    """sum + XOR_WEIGHT * XOR of the bits of the tensor's elements, modulo 2^64, on its device and in its stream."""
    words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    folded = torch.zeros_like(total)
    for chunk in words.split(CHUNK):
        total += chunk.sum(dtype=torch.int64)
        folded ^= _xor(chunk)
    return total + XOR_WEIGHT * folded


def _xor(words: Tensor) -> Tensor:
    """XOR of all words, by halves: torch reduces by sums and not by this."""
    while len(words) > 1:
        half, rest = len(words) // 2, words[len(words) // 2 * 2 :]
        words = torch.cat([words[:half] ^ words[half : 2 * half], rest])
    return words.sum(dtype=torch.int64)  # of one word, or of none


def as_ints(sums: Mapping[str, Tensor]) -> dict[str, int]:
    """The sums as numbers; waits for the device once."""
    if not sums:
        return {}
    if torch.cuda.is_available():  # each was computed in the stream that brought its tensor
        torch.cuda.synchronize()
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


class CheckedSource(WeightSource):
    """A source that keeps the checksum of every tensor it yielded last."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._sums: dict[str, Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._sums = {}
        for name, tensor in self._source:
            self._sums[name] = bit_checksum(tensor)
            yield name, tensor

    def checksums(self) -> dict[str, int]:
        return as_ints(self._sums)


class _Checked:
    """Of a worker's engine: keeps the checksum of every tensor that it gives the model."""

    model: Any
    verify = False
    _sums: Mapping[str, Tensor] = {}

    def init_transfer_engine(self, init_info: Any) -> None:
        self.verify = init_info.verify
        super().init_transfer_engine(init_info)  # type: ignore[misc]

    def start_weight_update(self) -> None:
        self._sums = {}
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        if not self.verify:
            super().receive_weights(update_info)  # type: ignore[misc]
            return
        load = self.model.load_weights

        def summed_load(weights: Iterable[tuple[str, Tensor]]) -> Any:
            weights = list(weights)
            self._sums = {**self._sums, **{name: bit_checksum(tensor) for name, tensor in weights}}
            return load(weights)

        self.model.load_weights = summed_load
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            del self.model.load_weights

    @property
    def received_checksums(self) -> dict[str, int]:
        return as_ints(self._sums)


@dataclass
class CheckedNCCLInitInfo(NCCLWeightTransferInitInfo):
    verify: bool = True


@dataclass
class CheckedIPCInitInfo(IPCWeightTransferInitInfo):
    verify: bool = True


class NCCLWorkerEngine(_Checked, NCCLWeightTransferEngine):
    init_info_cls = CheckedNCCLInitInfo


class IPCWorkerEngine(_Checked, IPCWeightTransferEngine):
    init_info_cls = CheckedIPCInitInfo
