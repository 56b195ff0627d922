"""The live Megatron weights as vLLM's weight transfer wants them: names and shapes, then full tensors one by one."""

from collections.abc import Iterator

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from dcpo_openrlhf.megatron.model import Policy, hf_shapes, hf_tensors


class MegatronWeightSource(WeightSource):
    """Hugging Face tensors of the live policy; iteration is a collective of the ranks of the mesh."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every tensor, in the order of iteration; nothing is gathered."""
        dtype = self._policy.config.params_dtype
        return [ParamMeta(name, dtype, shape) for name, shape in hf_shapes(self._policy)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return hf_tensors(self._policy)
