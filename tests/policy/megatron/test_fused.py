"""CPU's fused operations against the plain formulas in float64: values and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcpo_openrlhf.policy.megatron import fused
from dcpo_openrlhf.policy.megatron.attention import PackedAttention
from dcpo_openrlhf.policy.packing import context_share
from dcpo_openrlhf.policy.shared_prompts import Segments

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
"""Of the largest value; bf16 has 8 bits, and rotary embedding rounds three times."""


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compare(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values, and gradients of every input under random cotangents, with `plain` computed in float64."""
    dtype = inputs[0].dtype
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    value, expected = ours(*leaves), plain(*exact)
    cotangent = random(*value.shape, seed=9, dtype=dtype)
    value.backward(cotangent)
    expected.backward(cotangent.double())
    assert value.dtype == dtype
    for seen, wanted in [(value, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]:
        assert seen is not None and wanted is not None
        torch.testing.assert_close(seen.double() / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0,
                                   atol=TOLERANCE[dtype])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1, 24), (5, 3, 8)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, seed=0, dtype=dtype), random(shape[-1], seed=1, dtype=dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight

    compare(lambda x, weight: fused.rms_norm(x, weight, 0.1), plain, [x, weight])
    # a slice of a wider tensor, as attention's queries are
    wide = random(*shape[:-1], 2 * shape[-1], seed=2, dtype=dtype)
    torch.testing.assert_close(
        fused.rms_norm(wide[..., : shape[-1]], weight, 0.1),
        fused.rms_norm(wide[..., : shape[-1]].contiguous(), weight, 0.1),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    x = random(6, 1, 20, seed=0, dtype=dtype)
    compare(fused.swiglu, lambda x: F.silu(x[..., :10]) * x[..., 10:], [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_rotary_embedding_counts_places_in_each_sequence(ranks: int, dtype: torch.dtype) -> None:
    lengths, dim = [8, 4, 12], 6
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    angles = torch.outer(torch.arange(12), 0.3 ** torch.arange(dim // 2))
    freqs = torch.cat([angles, angles], 1)[:, None, None].float()
    place = torch.cat([torch.arange(n) for n in lengths])
    queries = random(24, 2, dim, seed=0, dtype=dtype)
    for rank in range(ranks):
        mine = context_share(bounds, rank, ranks) if ranks > 1 else torch.arange(24)

        def plain(t: Tensor, mine: Tensor = mine) -> Tensor:
            turn = torch.polar(torch.ones(len(mine), dim // 2).double(), angles[place[mine]].double())[:, None]
            turned = torch.complex(t[..., : dim // 2], t[..., dim // 2 :]) * turn
            return torch.cat([turned.real, turned.imag], -1)

        compare(lambda t, rank=rank: fused.packed_rotary(t, bounds, freqs, ranks, rank), plain, [queries[mine]])


def test_rotary_embedding_forgets_the_angles_of_another_micro_batch() -> None:
    angles = torch.outer(torch.arange(4), torch.ones(1))
    freqs = torch.cat([angles, angles], 1)[:, None, None]
    t = torch.ones(4, 1, 2)
    whole, cut = (fused.packed_rotary(t, torch.tensor(b).int(), freqs) for b in ([0, 4], [0, 2, 4]))
    torch.testing.assert_close(cut[:2], whole[:2])
    torch.testing.assert_close(cut[2:], whole[:2])


GROUPS = ((5,), (4, 3, 1, 2), (1,), (2, 7, 5))


def tree_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of GROUPS, token by token: each sees its prompt and its own response up to itself."""
    sees = torch.zeros(30, 30, dtype=torch.bool)
    start = 0
    for prompt, *responses in GROUPS:
        own = start
        for length, before in [(prompt, 0), *((n, prompt) for n in responses)]:
            for t in range(length):
                sees[own + t, start : start + before] = True
                sees[own + t, own : own + t + 1] = True
            own += length
        start = own
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("block", [4, 9, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
def test_short_attention_of_responses_sees_their_prompt(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(fused, "SHARED_BLOCK", block)
    fused._plan.cache_clear()
    qkv = [random(30, h, 8, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]
    compare(
        lambda q, k, v: fused.short_attention(q, k, v, GROUPS, 0.3), lambda q, k, v: tree_attention(q, k, v, 0.3), qkv
    )
    fused._plan.cache_clear()


def test_long_attention_of_responses_sees_their_prompt() -> None:
    """Responses longer and shorter than their prompt, which take different ways."""
    attention = PackedAttention.__new__(PackedAttention)
    attention.softmax_scale = 0.3
    qkv = [random(30, h, 8, seed=i, dtype=torch.float32) for i, h in enumerate((6, 2, 2))]
    compare(
        lambda q, k, v: attention._shared(q, k, v, Segments(GROUPS)).view(30, 6, 8),
        lambda q, k, v: tree_attention(q, k, v, 0.3),
        qkv,
    )


def test_segments_over_their_keys_are_the_same_attention() -> None:
    """What Transformer Engine is asked for: every segment's queries are the last of its keys."""
    s = Segments(GROUPS)
    q, k, v = (random(30, 3, 8, seed=i, dtype=torch.float32) for i in range(3))
    out = []
    for i in range(len(s.lengths)):
        keys = s.keys[s.key_bounds[i] : s.key_bounds[i + 1]]
        mask = torch.ones(s.lengths[i], len(keys)).tril(len(keys) - s.lengths[i]).bool()
        own = q[s.bounds[i] : s.bounds[i + 1]]
        scores = torch.einsum("qhd,khd->hqk", own, k[keys]).masked_fill(~mask, -torch.inf) * 0.3
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys]))
    torch.testing.assert_close(torch.cat(out), tree_attention(q, k, v, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
def test_short_attention_sees_its_own_sequence_up_to_itself(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    lengths, dim, scale = (5, 1, 9), 8, 0.3
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    sees = (row[:, None] == row) & torch.ones(15, 15).tril().bool()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)

    qkv = [random(15, h, dim, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]
    compare(lambda q, k, v: fused.short_attention(q, k, v, tuple((n,) for n in lengths), scale), plain, qkv)
