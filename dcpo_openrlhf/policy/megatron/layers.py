"""Layers of the local specification: attention over packed sequences, RMSNorm that allows sequence parallelism."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dcpo_openrlhf.policy.megatron import fused
from dcpo_openrlhf.policy.rows import context_share
from dcpo_openrlhf.recipe.memory import SHORT_ATTENTION

PADDING_BOUND = 1.5
"""Segments are attended to as one padded batch while its scores are at most this many times those needed."""


class PackedAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal within each packed sequence.

    Takes the place of megatron-core's DotProductAttention, which knows no packed sequences and holds the score matrix
    of the whole batch; here torch's scaled dot-product attention sees whole segments. Under context parallelism keys
    and values are gathered over its ranks (Transformer Engine, on GPUs, passes them round instead).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.context_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Float[Tensor, "tokens heads dim"],
        key: Float[Tensor, "tokens kv_heads dim"],
        value: Float[Tensor, "tokens kv_heads dim"],
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Float[Tensor, "tokens width"]:
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            raise ValueError("PackedAttention takes packed sequences only: pass PackedSeqParams with qkv_format='thd'")
        bounds = packed_seq_params.cu_seqlens_q
        if self.context_group.size() > 1:
            return self._across_ranks(query, key, value, bounds)
        lengths = bounds.diff()
        longest = int(lengths.max())
        if query.device.type == "cpu" and longest <= SHORT_ATTENTION:
            scale = self.softmax_scale or query.shape[-1] ** -0.5
            return fused.short_attention(query, key, value, tuple(lengths.tolist()), scale).flatten(1)
        if len(lengths) * longest**2 > PADDING_BOUND * int((lengths.long() ** 2).sum()):
            parts = lengths.tolist()
            segments = zip(query.split(parts), key.split(parts), value.split(parts), strict=True)
            return torch.cat([self._attend(*(t[None] for t in qkv)).squeeze(0) for qkv in segments]).flatten(1)
        row = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths)
        column = torch.arange(len(query), device=query.device) - bounds[:-1].long()[row]
        # on the right of a row, padding is never seen by a causal query of that row
        padded = (
            t.new_zeros(len(lengths), longest, *t.shape[1:]).index_put((row, column), t) for t in (query, key, value)
        )
        return self._attend(*padded)[row, column].flatten(1)

    def _across_ranks(
        self,
        query: Float[Tensor, "share heads dim"],
        key: Float[Tensor, "share kv_heads dim"],
        value: Float[Tensor, "share kv_heads dim"],
        bounds: Int[Tensor, "rows+1"],
    ) -> Float[Tensor, "share width"]:
        """The share's queries over the keys of all context ranks, of which backward sums the gradients."""
        rank, size = self.context_group.rank(), self.context_group.size()
        shares = [context_share(bounds, r, size) for r in range(size)]
        lengths = bounds.diff().long()
        longest = int(lengths.max())
        row = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths)
        column = torch.arange(len(row), device=query.device) - bounds[:-1].long()[row]
        gathered = torch.cat(shares)
        k, v = (
            t.new_zeros(len(lengths), longest, *t.shape[1:]).index_put((row[gathered], column[gathered]), t)
            for t in (gather_from_sequence_parallel_region(t, group=self.context_group) for t in (key, value))
        )
        own_row, own_column = row[shares[rank]], column[shares[rank]]
        place = torch.arange(len(query), device=query.device) - (bounds[:-1].long() // size)[own_row]
        q = query.new_zeros(len(lengths), longest // size, *query.shape[1:]).index_put((own_row, place), query)
        # where a shorter row has no query, it may see every key: what comes out is not read
        sees = torch.full(q.shape[:2], longest, device=query.device).index_put((own_row, place), own_column)
        mask = torch.arange(longest, device=query.device) <= sees[..., None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None], scale=self.softmax_scale, enable_gqa=True
        ).transpose(1, 2)
        return out[own_row, place].flatten(1)

    def _attend(self, *qkv: Float[Tensor, "rows time heads dim"]) -> Float[Tensor, "rows time heads dim"]:
        q, k, v = (t.transpose(1, 2) for t in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)


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
