"""Attention over packed sequences, which may share their prompts: for local layers, and for Transformer Engine's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence

from dcpo_openrlhf.policy.megatron import fused
from dcpo_openrlhf.policy.packing import Packed, context_share
from dcpo_openrlhf.policy.shared_prompts import Segments
from dcpo_openrlhf.recipe.memory import SHORT_ATTENTION

PADDING_BOUND = 1.5
"""Segments are attended to as one padded batch while its scores are at most this many times those needed."""


@dataclass
class SharedPromptParams(PackedSeqParams):
    """One long sequence to megatron-core and its rotary embedding, which has the angles of `positions`.

    The attention alone knows the segments, and what each of them sees.
    """

    segments: Segments | None = None
    positions: Tensor | None = None
    keys: Tensor | None = None
    """`Segments.keys` and, below, its bounds, on the device."""
    bounds: Tensor | None = None
    key_bounds: Tensor | None = None


def sequence_params(packed: Packed, device: torch.device) -> PackedSeqParams:
    """What megatron-core's layers are told of a micro-batch."""
    bounds, longest = packed.bounds.to(device), packed.longest
    if packed.segments is None:
        return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    whole, longest, segments = bounds[[0, -1]], packed.segments.longest_row, packed.segments
    return SharedPromptParams(
        *("thd", whole, whole),
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        segments=segments,
        positions=segments.positions.to(device),
        keys=segments.keys.to(device),
        bounds=bounds,
        key_bounds=segments.key_bounds.to(device),
    )


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
        segments = getattr(packed_seq_params, "segments", None)
        if segments is not None:
            if query.device.type == "cpu" and segments.longest_row <= SHORT_ATTENTION:
                return self._short(query, key, value, segments.groups)
            return self._shared(query, key, value, segments)
        bounds = packed_seq_params.cu_seqlens_q
        if self.context_group.size() > 1:
            return self._across_ranks(query, key, value, bounds)
        lengths: list[int] = bounds.diff().tolist()
        if query.device.type == "cpu" and max(lengths) <= SHORT_ATTENTION:
            return self._short(query, key, value, tuple((n,) for n in lengths))
        rows = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
        return torch.cat(self._causal(list(rows))).flatten(1)

    def _short(
        self, query: Tensor, key: Tensor, value: Tensor, groups: tuple[tuple[int, ...], ...]
    ) -> Float[Tensor, "tokens width"]:
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        return fused.short_attention(query, key, value, groups, scale).flatten(1)

    def _shared(
        self,
        query: Float[Tensor, "tokens heads dim"],
        key: Float[Tensor, "tokens kv_heads dim"],
        value: Float[Tensor, "tokens kv_heads dim"],
        segments: Segments,
    ) -> Float[Tensor, "tokens width"]:
        """Each prompt over itself, each response over its prompt and itself.

        A response that is no shorter than its prompt stands behind it in a row of its own: a square is causal without a
        mask, in which nothing is skipped on cpu. The prompt's own part of it is its output too.
        """
        parts = list(zip(*(t.split(segments.lengths) for t in (query, key, value)), strict=True))
        out: dict[int, Tensor] = {}
        behind: dict[int, int] = {}
        prompt = 0
        for length, *responses in segments.groups:
            for i, own in enumerate(responses, prompt + 1):
                if own < length:
                    (q, *kv), (_, *before) = parts[i], parts[prompt]
                    out[i] = self._attend(q[None], *(torch.cat(pair)[None] for pair in zip(before, kv, strict=True)))[0]
                else:
                    behind[i] = prompt
            prompt += 1 + len(responses)
        rows = [tuple(torch.cat(pair) for pair in zip(parts[p], parts[i], strict=True)) for i, p in behind.items()]
        for (i, p), row in zip(behind.items(), self._causal(rows), strict=True):
            out[p], out[i] = row.split([segments.lengths[p], segments.lengths[i]])
        alone = [p for p in range(len(parts)) if p not in out]
        out.update(zip(alone, self._causal([parts[p] for p in alone]), strict=True))
        return torch.cat([out[i] for i in range(len(parts))]).flatten(1)

    def _causal(self, rows: Sequence[tuple[Tensor, ...]]) -> list[Float[Tensor, "time heads dim"]]:
        """Each row's queries over its own keys and values; one batch of them where padding adds little to it."""
        if not rows:
            return []
        lengths = [len(q) for q, *_ in rows]
        if len(rows) * max(lengths) ** 2 > PADDING_BOUND * sum(n**2 for n in lengths):
            return [self._attend(*(t[None] for t in row))[0] for row in rows]
        # on the right of a row, padding is never seen by a causal query of that row
        out = self._attend(*(pad_sequence(list(t), batch_first=True) for t in zip(*rows, strict=True)))
        return [row[:n] for row, n in zip(out, lengths, strict=True)]

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
        """Queries over as many keys or more: the last of one is that of the other."""
        q, k, v = (t.transpose(1, 2) for t in qkv)
        time, seen = q.shape[2], k.shape[2]
        mask: Any = None if time == seen else causal_lower_right(time, seen)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)


def te_attention() -> type:
    """megatron-core's attention of Transformer Engine, which also takes SharedPromptParams."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TEPackedAttention(TEDotProductAttention):
        def forward(
            self,
            query: Float[Tensor, "tokens heads dim"],
            key: Float[Tensor, "tokens kv_heads dim"],
            value: Float[Tensor, "tokens kv_heads dim"],
            attention_mask: Tensor | None,
            attn_mask_type: AttnMaskType,
            attention_bias: Tensor | None = None,
            packed_seq_params: PackedSeqParams | None = None,
            num_splits: int | None = None,
        ) -> Float[Tensor, "tokens width"]:
            if not isinstance(packed_seq_params, SharedPromptParams):
                return super().forward(
                    query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, num_splits
                )
            p = packed_seq_params
            assert p.segments is not None and p.keys is not None
            # a segment's queries are the last of its keys: prompts and responses alike in one call
            return super(TEDotProductAttention, self).forward(
                query,
                key[p.keys],
                value[p.keys],
                None,
                qkv_format="thd",
                cu_seqlens_q=p.bounds,
                cu_seqlens_kv=p.key_bounds,
                max_seqlen_q=p.segments.longest,
                max_seqlen_kv=p.segments.longest_row,
                attn_mask_type="padding_causal_bottom_right",
            )

    return TEPackedAttention
