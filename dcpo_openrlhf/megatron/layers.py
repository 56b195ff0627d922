"""Layers of the local specification: attention over packed sequences, RMSNorm that allows sequence parallelism."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal within each packed sequence.

    Takes the place of megatron-core's DotProductAttention, which knows no packed sequences and holds the score matrix
    of the whole batch; here each segment is one call of torch's scaled dot-product attention.
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
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        segments = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._segment(q, k, v) for q, k, v in segments]).flatten(1)

    def _segment(self, *qkv: Tensor) -> Float[Tensor, "tokens heads dim"]:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight in fp32; marks its weight, so that Megatron sums its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
