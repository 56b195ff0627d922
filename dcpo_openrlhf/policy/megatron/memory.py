"""Weights, optimizer state and gradient buffers moved to host memory while a colocated engine generates, and back."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dcpo_openrlhf.policy.megatron.step import PolicyStep


class Offload:
    """Empties the storages in place, so that every view of them (parameters, shards, buckets) is whole again after.

    Host memory is taken once, pinned where the policy is on a GPU, and kept: copies then run at the bus's speed, each
    behind the last, and the host waits for all of them at once.
    """

    def __init__(self, step: PolicyStep) -> None:
        self.step = step
        self._host: list[tuple[torch.UntypedStorage, torch.UntypedStorage | int]] = []
        self._free: dict[int, list[torch.UntypedStorage]] = {}
        """Bytes -> host memory of that size which nothing lies in."""

    def away(self) -> None:
        """Free the device memory of the policy; gradients are not kept, an update begins with zeros."""
        if self._host:
            raise RuntimeError("the policy is in host memory already: bring it back before it is moved there again")
        gradients = {_key(t): t.untyped_storage() for t in self._gradients()}
        kept = {_key(t): t.untyped_storage() for t in self._kept()}
        for storage in kept.values():
            host = self._take(storage.nbytes())
            self._host.append((storage, host.copy_(storage, non_blocking=True)))
        self._wait()
        for storage in kept.values():
            storage.resize_(0)
        for storage in gradients.values():
            self._host.append((storage, storage.nbytes()))
            storage.resize_(0)

    def back(self) -> None:
        """Give the policy its device memory and numbers again; its gradients are zero."""
        for storage, host in self._host:
            if isinstance(host, int):
                storage.resize_(host)
                storage.fill_(0)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                storage.resize_(host.nbytes())
                storage.copy_(host, non_blocking=True)
        self._wait()
        for _, host in self._host:
            if not isinstance(host, int):
                self._free.setdefault(host.nbytes(), []).append(host)
        self._host = []

    def _take(self, nbytes: int) -> torch.UntypedStorage:
        """Host memory, that of an earlier time where one of this size is free."""
        if free := self._free.get(nbytes):
            return free.pop()
        host = torch.UntypedStorage(nbytes, device="cpu")
        if self.step.mesh.device.type == "cuda":
            # torch's pin_memory would round up to a power of two, up to twice the bytes
            runtime: Any = torch.cuda.cudart()
            status = int(runtime.cudaHostRegister(host.data_ptr(), nbytes, 0))
            if status:
                raise RuntimeError(
                    f"cudaHostRegister of {nbytes} bytes gave error {status}: the policy's host copy must be pinned; "
                    "let containers lock memory (ulimit -l unlimited), or give the run more host memory"
                )
        return host

    def _wait(self) -> None:
        if self.step.mesh.device.type == "cuda":
            torch.cuda.synchronize()

    def _gradients(self) -> Iterator[Tensor]:
        for model in self.step.models:
            for buffer in (*model.buffers, *model.expert_parallel_buffers):
                yield buffer.grad_data

    def _kept(self) -> Iterator[Tensor]:
        """What lies on the device: an offloaded optimizer's state is in host memory already."""
        device = self.step.mesh.device.type
        yield from (tensor for tensor in self._state() if tensor.device.type == device and tensor.numel())

    def _state(self) -> Iterator[Tensor]:
        for chunk in self.step.policy.chunks:
            yield from (parameter.data for parameter in chunk.parameters())
        whole: Any = self.step.optimizer
        for optimizer in getattr(whole, "chained_optimizers", [whole]):
            for group in optimizer.optimizer.param_groups:
                yield from (parameter.data for parameter in group["params"])
            for state in optimizer.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
