"""Log-probability, tempered log-probabilities and exact entropy of every token, from one pass over the logits.

The vocabulary may be sharded over tensor-parallel ranks: equal slices in rank order, padded at the end. Nothing of the
size of the logits is made but their gradient: the work is done on blocks of rows, on a CPU small enough for its cache.
"""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

_CPU_BLOCK = 2**18
"""Elements of a block per CPU thread: two fp32 buffers of it are 2 MiB, a core's L2 cache; far more is far slower."""
_GPU_BLOCK = 2**26
"""Elements of a block on a GPU: two fp32 buffers of 256 MiB, enough work to fill the device."""

_LOWEST = -1e30
"""What -inf becomes, in logits and peaks: exp of it is 0 too, but 0 times it is not NaN. Leaves room for products."""


class TokenStats(NamedTuple):
    """Statistics of each token in fp32 (float64 for float64 logits), the same on every tensor-parallel rank."""

    logp: Float[Tensor, "tokens"]
    """log pi(target) [nats]; differentiable."""
    tempered_logp: Float[Tensor, "tokens temperatures"]
    """log pi^T(target) [nats], pi^T = softmax(logits / T); without gradient."""
    entropy: Float[Tensor, "tokens"]
    """H = -sum_a pi(a) log pi(a) [nats]; differentiable where entropy_grad was asked for, else without gradient."""
    expected_logp: Float[Tensor, "tokens"] | None
    """sum_a pi^T(a) log pi(a) [nats], pi^T constant: its gradient in the logits is pi^T - pi. None unless asked for."""


class _Plan(NamedTuple):
    """What to compute, and which columns of the vocabulary this rank holds."""

    temperatures: tuple[float, ...]
    """1 (for logp and entropy), those of tempered_logp, then the expectation's."""
    expected: bool
    entropy_grad: bool
    overwrite_logits: bool
    tp_group: ProcessGroup | None
    first: int
    """Global id of this rank's first column."""
    columns: int
    """Columns of this rank that are no padding; they come first."""
    chunk_tokens: int

    def blocks(self, logits: Tensor) -> Iterator[slice]:
        elements = _CPU_BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else _GPU_BLOCK
        rows = min(self.chunk_tokens, max(1, elements // max(1, self.columns)))
        return (slice(start, start + rows) for start in range(0, logits.shape[0] if self.columns else 0, rows))

    def columns_of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this rank's slice, and whether it lies there at all (column 0 if not)."""
        column = targets.long() - self.first
        here = (column >= 0) & (column < self.columns)
        return column.where(here, 0), here


def token_stats(
    logits: Float[Tensor, "tokens shard"],
    targets: Integer[Tensor, "tokens"],
    *,
    temperatures: Sequence[float],
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
    entropy_grad: bool = False,
    expected_temperature: float | None = None,
    overwrite_logits: bool = False,
) -> TokenStats:
    """log pi(target), log pi^T(target) for every T, H(pi) and, if asked for, sum_a pi^T(a) log pi(a), of every token.

    logits: this rank's slice of the vocabulary in any floating type; kept by reference, not to be changed before
    backward, which makes the gradient of this slice in their type and needs no collective. targets: global ids.
    vocab_size: unpadded; later columns count as absent and get gradient 0. chunk_tokens: most rows worked on at once.
    overwrite_logits: backward writes the gradient over the logits, for callers with no other use of them.
    Raises ValueError for a temperature <= 0, an impossible vocab_size or a target outside [0, vocab_size).
    """
    shards, rank = (1, 0) if tp_group is None else (dist.get_world_size(tp_group), dist.get_rank(tp_group))
    shard = logits.shape[1]
    vocab_size = shard * shards if vocab_size is None else vocab_size
    expected = () if expected_temperature is None else (expected_temperature,)
    plan = _Plan(
        temperatures=(1.0, *temperatures, *expected),
        expected=bool(expected),
        entropy_grad=entropy_grad,
        overwrite_logits=overwrite_logits,
        tp_group=tp_group if shards > 1 else None,
        first=rank * shard,
        columns=min(max(vocab_size - rank * shard, 0), shard),
        chunk_tokens=chunk_tokens,
    )
    _check(plan, targets, vocab_size=vocab_size, all_columns=shard * shards)
    return TokenStats(*_TokenStatistics.apply(logits, targets, plan))  # pyright: ignore[reportGeneralTypeIssues]


def _check(plan: _Plan, targets: Tensor, *, vocab_size: int, all_columns: int) -> None:
    if not all(isfinite(temperature) and temperature > 0 for temperature in plan.temperatures):
        raise ValueError(f"temperatures must be finite and > 0, got {plan.temperatures[1:]}")
    if not 0 < vocab_size <= all_columns:
        raise ValueError(f"vocab_size = {vocab_size} must be in [1, {all_columns}], the columns of all shards together")
    if plan.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {plan.chunk_tokens} must be at least 1")
    if ((targets < 0) | (targets >= vocab_size)).any():
        seen = f"{targets.min().item()} to {targets.max().item()}"
        raise ValueError(
            f"targets must be in [0, vocab_size = {vocab_size}), got {seen}; give masked tokens any valid id"
        )


class _TokenStatistics(torch.autograd.Function):
    """Keeps a reference to the logits and a few numbers per token; backward makes the softmax again, block by block."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, plan: _Plan):  # pyright: ignore[reportIncompatibleMethodOverride]
        peak, target, sums, moments = _merge_shards(*_shard_sums(logits, targets, plan), plan)
        log_sums = sums.log()
        scale = sums.new_tensor(plan.temperatures)[:, None]
        all_logp = target / scale - log_sums  # one row for each temperature
        logp, tempered_logp = all_logp[0], all_logp[1 : len(sums) - plan.expected].T.contiguous()
        entropy = (log_sums[0] - moments[0] / sums[0]).clamp_(min=0)  # rounding may leave -1e-7
        expected_logp = moments[1] / sums[-1] - log_sums[0] if plan.expected else None

        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tempered_logp, *(() if plan.entropy_grad else (entropy,)))
        kept_sums = sums[[0, -1]] if plan.expected else sums[:1].clone()
        ctx.save_for_backward(logits, targets, peak, kept_sums, entropy if plan.entropy_grad else None)
        return logp.clone(), tempered_logp, entropy, expected_logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, _, grad_entropy, grad_expected):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, peak, sums, entropy = ctx.saved_tensors
        grads = (grad_logp, grad_entropy, grad_expected)
        return _logit_gradient(ctx.plan, logits, targets, peak, sums, entropy, *grads), None, None


def _buffers(logits: Tensor, plan: _Plan, count: int) -> list[Tensor]:
    """Room for `count` blocks, in the type that everything is computed in."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = next(plan.blocks(logits), slice(0, 0)).stop
    return [torch.empty(min(rows, len(logits)), plan.columns, dtype=dtype, device=logits.device) for _ in range(count)]


def _centre(logits: Tensor, peak: Tensor, out: Tensor) -> Tensor:
    """logits - peak in `out`, at least _LOWEST."""
    return out.copy_(logits).sub_(peak[:, None]).clamp_(min=_LOWEST)


def _weigh(centred: Tensor, temperature: float, out: Tensor) -> Tensor:
    """exp(centred / T) in `out`."""
    return torch.exp(centred, out=out) if temperature == 1 else torch.mul(centred, 1 / temperature, out=out).exp_()


def _shard_sums(logits: Tensor, targets: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over this rank's columns, per token: m = max z; z(target), 0 if elsewhere; for each T sum exp((z - m) / T);
    for T = 1 and the expectation's T also sum exp((z - m) / T) (z - m)."""
    centred, weight = _buffers(logits, plan, 2)
    peak = centred.new_full((len(logits),), _LOWEST)  # stays so in a shard that is all padding
    sums = centred.new_zeros(len(plan.temperatures), len(logits))
    moments = centred.new_zeros(1 + plan.expected, len(logits))
    moment_of = {0: moments[0], len(sums) - 1: moments[-1]} if plan.expected else {0: moments[0]}
    for rows in plan.blocks(logits):
        block = logits[rows, : plan.columns]
        peak[rows] = block.amax(1).clamp_(min=_LOWEST)
        z = _centre(block, peak[rows], centred[: len(block)])
        for index, temperature in enumerate(plan.temperatures):
            w = _weigh(z, temperature, weight[: len(block)])
            torch.sum(w, 1, out=sums[index, rows])
            if index in moment_of:
                torch.sum(w.mul_(z), 1, out=moment_of[index][rows])
    column, here = plan.columns_of(targets)
    target = logits.gather(1, column[:, None])[:, 0].to(peak.dtype).where(here, 0)
    return peak, target, sums, moments


def _merge_shards(
    peak: Tensor, target: Tensor, sums: Tensor, moments: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same over the whole vocabulary, target relative to the peak: one MAX and one SUM all-reduce over shards."""
    if plan.tp_group is None:
        return peak, target - peak, sums, moments
    local_peak, peak = peak, peak.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=plan.tp_group)
    shift = local_peak - peak
    scale = (shift / sums.new_tensor(plan.temperatures)[:, None]).exp_()
    sums = sums * scale
    which = [0, -1] if plan.expected else [0]
    moments = moments * scale[which] + shift * sums[which]  # exp(shift / T) * sum w (z - m + shift)
    together = torch.cat([target[None], sums, moments])
    dist.all_reduce(together, dist.ReduceOp.SUM, group=plan.tp_group)
    target, sums, moments = together[0], together[1 : 1 + len(sums)], together[1 + len(sums) :]
    return peak, target - peak, sums, moments


def _logit_gradient(
    plan: _Plan,
    logits: Tensor,
    targets: Tensor,
    peak: Tensor,
    sums: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_expected: Tensor | None,
) -> Tensor | None:
    """g_logp (onehot - pi) - g_entropy pi (log pi + H) + g_expected (pi^T - pi), in the type of the logits."""
    if grad_logp is None and grad_entropy is None and grad_expected is None:
        return None
    zero = torch.zeros_like(peak)
    grad_logp = zero if grad_logp is None else grad_logp
    # With z = logits - peak: exp(z) * (constant + slope * z) + tempered * exp(z / T) + the target's own g_logp
    constant = -(grad_logp + (zero if grad_expected is None else grad_expected))
    slope = tempered = None
    if grad_entropy is not None and entropy is not None:
        constant = constant + grad_entropy * (sums[0].log() - entropy)
        slope = (-grad_entropy / sums[0])[:, None]
    constant = (constant / sums[0])[:, None]
    if grad_expected is not None:
        tempered = (grad_expected / sums[-1])[:, None]
    column, here = plan.columns_of(targets)
    onehot = grad_logp.where(here, 0)[:, None]

    gradient = logits.detach() if plan.overwrite_logits else torch.empty_like(logits)
    gradient[:, plan.columns :] = 0
    centred, weight, *spare = _buffers(logits, plan, 2 if tempered is None else 3)
    for rows in plan.blocks(logits):
        block = logits[rows, : plan.columns]
        z = _centre(block, peak[rows], centred[: len(block)])
        extra = None if tempered is None else _weigh(z, plan.temperatures[-1], spare[0][: len(block)])
        w = _weigh(z, 1.0, weight[: len(block)])
        w.mul_(constant[rows] if slope is None else z.mul_(slope[rows]).add_(constant[rows]))
        if extra is not None and tempered is not None:
            w.add_(extra.mul_(tempered[rows]))
        w.scatter_add_(1, column[rows, None], onehot[rows])
        gradient[rows, : plan.columns] = w
    return gradient
