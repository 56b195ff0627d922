"""The live Megatron weights as vLLM's weight transfer wants them: names and shapes, then full tensors one by one."""

from collections.abc import Iterator

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from dcpo_openrlhf.megatron.model import Policy, hf_tensors


class MegatronWeightSource(WeightSource):
    """Hugging Face tensors of the live policy; iteration is a collective of its tensor-parallel ranks."""

    def __init__(self, policy: Policy, *, tensor_size: int) -> None:
        self._policy = policy
        self._tensor_size = tensor_size

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every tensor, in the order of iteration; nothing is gathered."""
        found = []
        for entry, parameter in self._policy.entries():
            shards = [torch.empty(parameter.shape, device="meta")] * self._tensor_size
            for name, tensor in zip(entry.hf_names, entry.cut.merge(shards, self._policy.shape), strict=True):
                found.append(ParamMeta(name, parameter.dtype, tuple(tensor.shape)))
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return hf_tensors(self._policy)
