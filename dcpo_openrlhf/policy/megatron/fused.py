"""RMSNorm, SwiGLU, rotary embedding and attention over short sequences for CPU: few passes, little kept for backward.

In torch and megatron-core each is a chain of operations on CPU, each of which writes a tensor and keeps it. RMSNorm
works in fp32 and rounds once, attention has scores and softmax in fp32; the others work in the type of their input.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcpo_openrlhf.policy.packing import context_share
from dcpo_openrlhf.recipe.memory import SHARED_BLOCK


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
    groups: tuple[tuple[int, ...], ...],
    scale: float,
) -> Float[Tensor, "tokens heads dim"]:
    """softmax(scale q k^T) v, causal within each of the packed sequences.

    groups: tokens of each prompt, then of each response to it, which sees the prompt and itself; a sequence by itself
    is a group of one number. They add up to the tokens. Scores and softmax in fp32; the weights, and in backward the
    gradient of the scores, are then in the type of the values, as in flash attention. torch's fused kernel is slower
    at such lengths.
    """
    return _ShortAttention.apply(query, key, value, groups, scale)  # pyright: ignore[reportReturnType]


class _ShortAttention(torch.autograd.Function):
    """Two batched multiplies for each block, in which the heads of a group meet their keys without copies of them.

    Keeps queries, keys, values and weights. The heads of a block lie one after the other meanwhile.
    """

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[tuple[int, ...], ...], scale: float
    ) -> Tensor:
        plan = _plan(groups, query.shape[1], key.shape[1])
        q, k, v = plan.queries.gather(query), plan.keys.gather(key), plan.keys.gather(value)
        out, weights = torch.empty_like(q), []
        blocks = zip(
            plan.queries.blocks(q.float()),
            plan.keys.blocks(k.float()),
            plan.keys.blocks(v),
            plan.queries.blocks(out),
            plan.masks,
            strict=True,
        )
        for q_, k_, v_, out_, mask in blocks:
            weights.append(torch.baddbmm(mask, q_, k_.mT, alpha=scale).softmax(-1).to(v.dtype))
            torch.bmm(weights[-1], v_, out=out_)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.plan, ctx.scale = plan, scale
        return plan.queries.scatter(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, *weights = ctx.saved_tensors
        queries, keys = ctx.plan.queries, ctx.plan.keys
        of_q, of_k, of_v = (torch.empty_like(t) for t in (q, k, v))
        blocks = zip(
            *(queries.blocks(t) for t in (q, queries.gather(gradient), of_q)),
            *(keys.blocks(t) for t in (k, v, of_k, of_v)),
            strict=True,
        )
        for p, (q_, of_out_, of_q_, k_, v_, of_k_, of_v_) in zip(weights, blocks, strict=True):
            of_scores = torch.ops.aten._softmax_backward_data(of_out_ @ v_.mT, p, -1, p.dtype)
            torch.bmm(of_scores, k_, out=of_q_)
            torch.bmm(of_scores.mT, q_, out=of_k_)
            torch.bmm(p.mT, of_out_, out=of_v_)
        for t in (of_q, of_k):
            t.mul_(ctx.scale)
        return queries.scatter(of_q), keys.scatter(of_k), keys.scatter(of_v), None, None


class _Side(NamedTuple):
    """Queries or keys of a micro-batch as they lie in memory: block by block, head by head, token by token."""

    lengths: list[int]
    """Tokens of each block."""
    order: Int[Tensor, "rows"]
    """Place of each (block, head, token) among (token, head)."""
    inverse: Int[Tensor, "rows"] | None
    """The way back; None where a token lies in several blocks."""
    tokens: int
    heads: int
    groups: int
    """Heads of keys."""

    def gather(self, t: Float[Tensor, "tokens heads dim"]) -> Float[Tensor, "rows dim"]:
        return t.reshape(-1, t.shape[-1]).index_select(0, self.order)

    def scatter(self, t: Float[Tensor, "rows dim"]) -> Float[Tensor, "tokens heads dim"]:
        """The way back of `gather`, and of gradients: what several blocks say of a token is added up."""
        if self.inverse is not None:
            return t.index_select(0, self.inverse).view(self.tokens, self.heads, -1)
        total = t.new_zeros(self.tokens * self.heads, t.shape[1], dtype=torch.float32)
        # of an expanded index torch's kernel works row by row, ten times as fast as index_add
        total.scatter_add_(0, self.order[:, None].expand(-1, t.shape[1]), t.float())
        return total.to(t.dtype).view(self.tokens, self.heads, -1)

    def blocks(self, t: Float[Tensor, "rows dim"]) -> list[Float[Tensor, "groups heads*time dim"]]:
        """Views of the blocks."""
        parts = t.split([n * self.heads for n in self.lengths])
        return [part.view(self.groups, -1, t.shape[1]) for part in parts]


class _Plan(NamedTuple):
    queries: _Side
    keys: _Side
    masks: list[Float[Tensor, "1 heads*queries keys"]]
    """0 where a block's query sees a key, else -inf; one part for each head of a group."""


class _Block(NamedTuple):
    """A prompt and some of the responses to it."""

    prompt: range
    responses: list[range]
    first: bool
    """Whether the prompt's queries are here; a later block has its keys alone."""

    @property
    def tokens(self) -> list[int]:
        return [token for part in (self.prompt, *self.responses) for token in part]

    @property
    def queries(self) -> list[int]:
        return self.tokens if self.first else self.tokens[len(self.prompt) :]

    def mask(self, heads: int) -> Float[Tensor, "1 heads*queries keys"]:
        """0 where a query sees a key, else -inf."""
        parts = [self.prompt, *self.responses]
        of = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
        place = torch.arange(len(of))
        sees = ((of == 0) | (of == of[:, None])) & (place <= place[:, None])
        sees = sees[0 if self.first else len(self.prompt) :]
        return torch.zeros(sees.shape).masked_fill(~sees, -torch.inf).repeat(heads, 1)[None]


@lru_cache(maxsize=4)  # every layer of a micro-batch asks for the same
def _plan(groups: tuple[tuple[int, ...], ...], heads: int, kv_heads: int) -> _Plan:
    blocks = list(_blocks(groups))
    tokens, masks = sum(map(sum, groups)), {}
    shapes = [(block.first, len(block.prompt), *map(len, block.responses)) for block in blocks]
    for block, shape in zip(blocks, shapes, strict=True):
        if shape not in masks:
            masks[shape] = block.mask(heads // kv_heads)
    return _Plan(
        _side([block.queries for block in blocks], tokens, heads, kv_heads),
        _side([block.tokens for block in blocks], tokens, kv_heads, kv_heads),
        [masks[shape] for shape in shapes],
    )


def _blocks(groups: tuple[tuple[int, ...], ...]) -> Iterator[_Block]:
    """Each group in blocks: more tokens are fewer multiplies, of which more is not seen."""
    start = 0
    for length, *responses in groups:
        prompt, start = range(start, start + length), start + length
        block = _Block(prompt, [], True)
        for response in responses:
            own, start = range(start, start + response), start + response
            if block.responses and len(block.tokens) + response > SHARED_BLOCK:
                yield block
                block = _Block(prompt, [], False)
            block.responses.append(own)
        yield block


def _side(blocks: list[list[int]], tokens: int, heads: int, groups: int) -> _Side:
    places = torch.arange(tokens * heads).view(-1, heads)
    order = torch.cat([places[block].T.flatten() for block in blocks])
    inverse = order.argsort() if len(order) == tokens * heads else None
    return _Side([len(block) for block in blocks], order, inverse, tokens, heads, groups)
