"""Norms of the local specification, which allow sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dcpo_openrlhf.policy.megatron import fused


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight in fp32; marks its weight, so that Megatron sums its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        assert self.eps is not None
        if x.device.type == "cpu":
            return fused.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class ProjectionNorm(torch.nn.Module):
    """x / rms(x) * weight over all heads, of which this tensor rank has its part, but the whole weight.

    megatron-core sums the gradient of whatever is called q_layernorm or k_layernorm over the tensor ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int) -> None:
        super().__init__()
        self.width, self.eps = heads * hidden_size, eps
        self.weight = torch.nn.Parameter(torch.empty(self.width, dtype=config.params_dtype))

    def forward(self, x: Float[Tensor, "... heads dim"]) -> Float[Tensor, "... heads dim"]:
        flat = x.flatten(-2).float()
        # every rank's output depends on the sum: summed over the ranks forward, and so is its gradient backward
        square = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(flat.square().sum(-1, keepdim=True))
        )
        scaled = flat * (square / self.width + self.eps).rsqrt()  # pyright: ignore[reportOperatorIssue]
        weight = self.weight.chunk(get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()]
        return (scaled * weight.float()).to(x.dtype).view(x.shape)
