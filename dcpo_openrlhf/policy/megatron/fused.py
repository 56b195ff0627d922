"""RMSNorm, SwiGLU, rotary embedding and attention over short sequences for CPU: few passes, little kept for backward.

In torch and megatron-core each is a chain of operations on CPU, each of which writes a tensor and keeps it. RMSNorm
works in fp32 and rounds once, attention has scores and softmax in fp32; the others work in the type of their input.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcpo_openrlhf.policy.rows import context_share


def rms_norm(x: Float[Tensor, "... hidden"], weight: Float[Tensor, " hidden"], eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the type of x."""
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1 / rms(x); x is scaled again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore
        rows = _fp32_copy(x)
        inverse = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return rows.mul_(inverse).mul_(weight.float()).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        x, weight, inverse = ctx.saved_tensors
        scaled, g = _fp32_copy(x).mul_(inverse), _fp32_copy(gradient)
        of_weight = torch.mul(g, scaled).sum(0)
        g.mul_(weight.float())
        along = torch.linalg.vecdot(g, scaled).div_(x.shape[-1])[:, None]
        g.addcmul_(scaled, along, value=-1).mul_(inverse)  # rms(x) does not change along x
        return g.to(x.dtype).view(x.shape), of_weight.to(weight.dtype), None


def _fp32_copy(x: Float[Tensor, "... hidden"]) -> Float[Tensor, "rows hidden"]:
    rows = x.reshape(-1, x.shape[-1])
    return rows.to(torch.float32, copy=True)


class SwiGLU(MegatronModule):
    """`swiglu` as megatron-core's MLP takes an activation."""

    def forward(self, x: Float[Tensor, "... twice"]) -> Float[Tensor, "... half"]:
        return swiglu(x)


def swiglu(x: Float[Tensor, "... twice"]) -> Float[Tensor, "... half"]:
    """silu(x[:half]) * x[half:] along the last dimension."""
    return _SwiGLU.apply(x)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    """Keeps x alone; backward writes both halves of the gradient into one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        of_gate, of_up = out.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=of_gate)
        torch.mul(of_gate, gradient, out=of_up)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return out


def packed_rotary(
    t: Float[Tensor, "tokens heads dim"],
    cu_seqlens: Int[Tensor, "rows+1"],
    freqs: Float[Tensor, "longest 1 1 dim"],
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> Float[Tensor, "tokens heads dim"]:
    """Rotary embedding: each token turned by the angles of its place in its own sequence, as far as they reach.

    Takes the place of Transformer Engine's in megatron-core. Both halves of `freqs` are the same; `interleaved` angles,
    as of deepseek, are not.
    """
    if interleaved:
        raise ValueError("rotary embedding of interleaved pairs is not fused; set apply_rope_fusion=False")
    cos, sin = _angles(cu_seqlens, freqs, cp_size, cp_rank, t.dtype)
    if (turned := freqs.shape[-1]) < t.shape[-1]:
        return torch.cat([_Rotate.apply(t[..., :turned], cos, sin), t[..., turned:]], -1)  # pyright: ignore
    return _Rotate.apply(t, cos, sin)  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=1)  # every layer asks twice; tensors are told apart by identity
def _angles(cu_seqlens: Tensor, freqs: Tensor, cp_size: int, cp_rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, 1, dim / 2]"""
    place = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    if cp_size > 1:
        place = place[context_share(cu_seqlens, cp_rank, cp_size)]
    half = freqs[:, 0, :, : freqs.shape[-1] // 2][place]
    return half.cos().to(dtype), half.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """Backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(cos, sin)
        return _rotate(t, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, sin, -1), None, None


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """[a cos - b sin, b cos + a sin] of the halves a and b of t; direction -1: the turn back."""
    out = torch.empty_like(t)
    (a, b), (left, right) = t.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=right).addcmul_(a, sin, value=direction)
    return out


def short_attention(
    query: Float[Tensor, "tokens heads dim"],
    key: Float[Tensor, "tokens kv_heads dim"],
    value: Float[Tensor, "tokens kv_heads dim"],
    lengths: tuple[int, ...],
    scale: float,
) -> Float[Tensor, "tokens heads dim"]:
    """softmax(scale q k^T) v, causal within each of the packed sequences, whose lengths add up to the tokens.

    Scores and softmax in fp32; the weights, and in backward the gradient of the scores, are then in the type of the
    values, as in flash attention. torch's fused kernel is slower at such lengths.
    """
    return _ShortAttention.apply(query, key, value, lengths, scale)  # pyright: ignore[reportReturnType]


class _ShortAttention(torch.autograd.Function):
    """Two batched multiplies for each sequence, in which the heads of a group meet their keys without copies of them.

    Keeps queries, keys, values and weights. The heads of a sequence lie one after the other meanwhile.
    """

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        q, k, v = (_by_head(t, lengths) for t in (query, key, value))
        groups, out, weights = key.shape[1], torch.empty_like(q), []
        for q_, k_, v_, out_ in zip(
            *(_blocks(t, lengths, groups) for t in (q.float(), k.float(), v, out)), strict=True
        ):
            later = _later(k_.shape[1], q_.shape[1] // k_.shape[1])
            weights.append(torch.baddbmm(later, q_, k_.mT, alpha=scale).softmax(-1).to(v.dtype))
            torch.bmm(weights[-1], v_, out=out_)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.lengths, ctx.groups, ctx.scale = lengths, groups, scale
        return _by_token(out, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, *weights = ctx.saved_tensors
        lengths, groups = ctx.lengths, ctx.groups
        of_out = _by_head(gradient, lengths)
        found = [torch.empty_like(t) for t in (q, k, v)]
        blocks = zip(*(_blocks(t, lengths, groups) for t in (q, k, v, of_out, *found)), strict=True)
        for p, (q_, k_, v_, of_out_, of_q_, of_k_, of_v_) in zip(weights, blocks, strict=True):
            of_scores = torch.ops.aten._softmax_backward_data(of_out_ @ v_.mT, p, -1, p.dtype)
            torch.bmm(of_scores, k_, out=of_q_)
            torch.bmm(of_scores.mT, q_, out=of_k_)
            torch.bmm(p.mT, of_out_, out=of_v_)
        for t in found[:2]:
            t.mul_(ctx.scale)
        return *(_by_token(t, lengths) for t in found), None, None


def _by_head(t: Float[Tensor, "tokens heads dim"], lengths: tuple[int, ...]) -> Float[Tensor, "tokens*heads dim"]:
    """Sequence by sequence, head by head, token by token."""
    return t.reshape(-1, t.shape[-1]).index_select(0, _order(lengths, t.shape[1])[0])


def _by_token(t: Float[Tensor, "tokens*heads dim"], lengths: tuple[int, ...]) -> Float[Tensor, "tokens heads dim"]:
    heads = len(t) // sum(lengths)
    return t.index_select(0, _order(lengths, heads)[1]).view(-1, heads, t.shape[1])


def _blocks(
    t: Float[Tensor, "tokens*heads dim"], lengths: tuple[int, ...], groups: int
) -> list[Float[Tensor, "groups heads*time dim"]]:
    """Views of the sequences."""
    heads = len(t) // sum(lengths)
    return [part.view(groups, -1, t.shape[1]) for part in t.split([n * heads for n in lengths])]


@lru_cache(maxsize=4)  # queries and keys of a micro-batch, of which every layer asks for the same
def _order(lengths: tuple[int, ...], heads: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Places of (sequence, head, token) among (token, head), and the way back."""
    places = torch.arange(sum(lengths) * heads).view(-1, heads)
    order = torch.cat([part.T.flatten() for part in places.split(lengths)])
    return order, order.argsort()


@lru_cache(maxsize=32)
def _later(time: int, heads: int) -> Float[Tensor, "1 heads*time time"]:
    """-inf where a key comes after its query, else 0; one block of queries for each head of a group."""
    return torch.full((time, time), -torch.inf).triu(1).repeat(heads, 1)[None]
