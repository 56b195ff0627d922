"""Objectives: advantages, target ratio and clipped surrogate as pure functions.

Formulas: DCPO (arXiv 2601.12730, Eq. 7, 9, 10, Table 1) and its authors' code. No function here issues a collective:
each returns sums and counts, and the caller reduces them once. Reading order follows the way of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mixing = Literal["convex", "additive"]
Aggregation = Literal["sequence_mean", "token_mean"]

type Number = float | int  # at run time, beartype does not let an int pass for a float
# True or nonzero on the tokens that count; OpenRLHF's action masks come as bool, int or float.
type RowMask = Bool[Tensor, "batch time"] | Int[Tensor, "batch time"] | Float[Tensor, "batch time"]
type AnyMask = Bool[Tensor, "*shape"] | Int[Tensor, "*shape"] | Float[Tensor, "*shape"]


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------


def group_advantage(*, reward: Float[Tensor, " batch"], group_size: int, eps: Number = 1e-6) -> Float[Tensor, " batch"]:
    """A_i = (R_i - mean_group) / (std_group + eps), unbiased std; exactly 0 in a group whose rewards are all equal.

    Rows of one group are consecutive. Raises ValueError for a group size below 2, a batch of partial groups,
    or a reward that is not finite. Source: GRPO; eps as in the authors' code.
    """
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}; one sample has no group to compare with")
    if reward.numel() % group_size != 0:
        raise ValueError(f"batch of {reward.numel()} rewards is not whole groups of {group_size}; keep groups together")
    if not bool(torch.isfinite(reward).all()):
        bad = (~torch.isfinite(reward)).nonzero().flatten().tolist()
        raise ValueError(f"rewards must be finite, rows {bad[:8]} hold {reward[bad[:8]].tolist()}; check the grader")
    groups = reward.reshape(-1, group_size)
    advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, unbiased=True, keepdim=True) + eps)
    # The mean of equal floats can miss them by one bit, which eps would blow up to 1e-3 in fp32.
    all_equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return advantage.masked_fill(all_equal, 0.0).reshape(-1)


def target_ratio(
    *, old_logp: Float[Tensor, "batch time"], tempered_logp: Float[Tensor, "batch time"], mask: RowMask
) -> Float[Tensor, "batch time"]:
    """rho = pi_old^T / pi_old = exp(tempered_logp - old_logp) of the sampled tokens; 1 outside the mask.

    E_{a ~ pi_old}[rho] = 1 for every T, and rho = 1 at T = 1. Source: Eq. 7.
    """
    return (tempered_logp - old_logp).masked_fill(~mask.bool(), 0.0).exp()  # padding may hold anything, even NaN


def mixing_weights(*, alpha: Number, mixing: Mixing) -> tuple[float, float]:
    """(weight of A, weight of the regulariser): convex (1 - w, w) with w = alpha / (1 + alpha); additive (1, alpha).

    alpha >= 0 before mixing. Source: convex, the authors' code; additive, Eq. 7.
    """
    if not 0.0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be finite and >= 0, got {alpha}; T carries the direction, alpha never does")
    if mixing not in get_args(Mixing):
        raise ValueError(f"mixing must be one of {list(get_args(Mixing))}, got {mixing!r}; choose one of them")
    if mixing == "additive":
        return 1.0, alpha
    weight = alpha / (1.0 + alpha)
    return 1.0 - weight, weight


def mixed_advantage(
    *,
    group_advantage: Float[Tensor, " batch"],
    success: Float[Tensor, " batch"],
    target_ratio: Float[Tensor, "batch time"],
    alpha: Number,
    mixing: Mixing,
) -> Float[Tensor, "batch time"]:
    """(1 - w) A + w rho R, w = alpha / (1 + alpha) (convex), or A + alpha rho R (additive, Eq. 7).

    success is R in {0, 1}. alpha = 0 gives A to the bit, which is GRPO.
    """
    advantage_weight, regulariser_weight = mixing_weights(alpha=alpha, mixing=mixing)
    return advantage_weight * group_advantage[:, None] + regulariser_weight * target_ratio * success[:, None]


def token_covariance(
    *, advantage: Float[Tensor, "batch time"], logp: Float[Tensor, "batch time"], mask: RowMask
) -> Float[Tensor, "batch time"]:
    """(A_i - mean A)(log pi - mean log pi), means over the tokens of the batch, in float64; -inf outside the mask.

    Its mean is the covariance that an update takes from the entropy. Source: arXiv 2505.22617.
    """
    inside = mask.bool()
    advantage = advantage.double().masked_fill(~inside, 0.0)
    logp = logp.double().masked_fill(~inside, 0.0)
    tokens = inside.sum().clamp(min=1)
    covariance = (advantage - advantage.sum() / tokens) * (logp - logp.sum() / tokens)
    return covariance.masked_fill(~inside, -torch.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Clipped surrogate: sums that add over tokens, micro-batches and ranks
# ---------------------------------------------------------------------------------------------------------------------


def token_weight(*, mask: RowMask, aggregation: Aggregation) -> Float[Tensor, "batch time"]:
    """1 / len_i on the tokens of row i (sequence_mean) or 1 (token_mean), 0 outside the mask; at least fp32.

    loss_sum = sum(token_weight * token loss), so rows may be split, packed and flattened after this call.
    """
    tokens = mask.to(torch.promote_types(mask.dtype, torch.float32))
    if aggregation == "token_mean":
        return tokens
    if aggregation == "sequence_mean":
        return tokens / tokens.sum(1, keepdim=True).clamp(min=1.0)  # a row without tokens weighs nothing
    raise ValueError(
        f"aggregation must be one of {list(get_args(Aggregation))}, got {aggregation!r}; choose one of them"
    )


def loss_denominator(*, mask: RowMask, aggregation: Aggregation) -> Float[Tensor, ""]:
    """Rows with at least one token (sequence_mean) or tokens (token_mean); sum it over all ranks, then divide once."""
    if aggregation not in get_args(Aggregation):
        raise ValueError(
            f"aggregation must be one of {list(get_args(Aggregation))}, got {aggregation!r}; choose one of them"
        )
    present = mask.bool()
    count = present.any(1).sum() if aggregation == "sequence_mean" else present.sum()
    return count.to(torch.promote_types(mask.dtype, torch.float32))


def population_scale(
    *, mask: RowMask, tempered_rows: Bool[Tensor, " batch"], aggregation: Aggregation
) -> Float[Tensor, " batch"]:
    """N / N_population of each row, so that each population of rows is averaged by itself; 1 where one is empty.

    For rows of METHODS with `separate_averages`: token_weight * population_scale[:, None] over the common
    denominator N gives avg over rows of pi_old + avg over rows of pi_old^T. Call it on the whole mini-batch.
    """
    per_row = token_weight(mask=mask, aggregation=aggregation).sum(1)
    tempered = tempered_rows.to(per_row.dtype)
    tempered_total, policy_total = (per_row * tempered).sum(), (per_row * (1.0 - tempered)).sum()
    scale = torch.where(tempered_rows, per_row.sum() / tempered_total, per_row.sum() / policy_total)
    return torch.where((tempered_total > 0) & (policy_total > 0), scale, torch.ones_like(scale))


@dataclass(frozen=True, kw_only=True)
class SurrogateSums:
    """Scalars that add: over tokens, micro-batches (`a + b`) and ranks (one all-reduce)."""

    loss_sum: Float[Tensor, ""]
    """-sum of weight * surrogate, differentiable; loss = loss_sum / denominator is minimised."""
    clip_high_sum: Float[Tensor, ""]
    """Tokens whose ratio is above 1 + clip_high where that binds (A > 0): no gradient."""
    clip_low_sum: Float[Tensor, ""]
    """Tokens whose ratio is below 1 - clip_low where that binds (A < 0): no gradient."""
    dual_clip_sum: Float[Tensor, ""]
    """Tokens on which the dual clip binds (A < 0, ratio above dual_clip): no gradient."""
    kl_sum: Float[Tensor, ""]
    """Sum of old_logp - logp [nats]: KL(pi_old || pi_theta) from samples of pi_old, may be negative."""
    token_count: Float[Tensor, ""]
    """Tokens inside the mask."""

    @property
    def clip_fraction_high(self) -> Tensor:
        return self.clip_high_sum / self.token_count.clamp(min=1)

    @property
    def clip_fraction_low(self) -> Tensor:
        return self.clip_low_sum / self.token_count.clamp(min=1)

    @property
    def dual_clip_fraction(self) -> Tensor:
        return self.dual_clip_sum / self.token_count.clamp(min=1)

    @property
    def approx_kl(self) -> Tensor:
        """Mean of old_logp - logp [nats/token]."""
        return self.kl_sum / self.token_count.clamp(min=1)

    def __add__(self, other: SurrogateSums) -> SurrogateSums:
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate(SurrogateSums):
    """SurrogateSums with the denominator of its own rows; both add over micro-batches."""

    denominator: Float[Tensor, ""]
    """Rows with at least one token, or tokens; see `loss_denominator`."""

    @property
    def loss(self) -> Tensor:
        """loss_sum / denominator, to be minimised; 0 for a batch without tokens."""
        return self.loss_sum / self.denominator.clamp(min=1)


def surrogate_terms(
    *,
    logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    weight: Float[Tensor, "*shape"],
    mask: AnyMask,
    clip_low: Number,
    clip_high: Number,
    dual_clip: Number | None = None,
) -> SurrogateSums:
    """-sum weight * min[r A, clip(r, 1 - clip_low, 1 + clip_high) A], r = exp(logp - old_logp), and its statistics.

    Any common shape: padded [batch, time] or packed [tokens]; `weight` comes from `token_weight`.
    dual_clip c > 1 bounds the surrogate by c A below where A < 0. Outside the mask nothing is read, NaN included.
    """
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}; use None for no dual clip")
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(
            f"clip bounds need 0 <= clip_low <= 1 and clip_high >= 0, got {clip_low}, {clip_high}; see Eq. 7"
        )
    inside = mask.bool()
    log_ratio = (logp - old_logp).masked_fill(~inside, 0.0)
    advantage = advantage.masked_fill(~inside, 0.0)
    ratio = log_ratio.exp()  # r_{i,t}
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage)
    above, below = (ratio > 1.0 + clip_high) & (advantage > 0), (ratio < 1.0 - clip_low) & (advantage < 0)
    dual = torch.zeros_like(inside)
    if dual_clip is not None:
        dual = (advantage < 0) & (surrogate < dual_clip * advantage)
        surrogate = torch.where(dual, dual_clip * advantage, surrogate)
    count = log_ratio.detach().dtype
    return SurrogateSums(
        loss_sum=-(weight.masked_fill(~inside, 0.0) * surrogate).sum(),
        clip_high_sum=above.sum().to(count),
        clip_low_sum=below.sum().to(count),
        dual_clip_sum=dual.sum().to(count),
        kl_sum=-log_ratio.detach().sum(),
        token_count=inside.sum().to(count),
    )


def clipped_surrogate(
    *,
    logp: Float[Tensor, "batch time"],
    old_logp: Float[Tensor, "batch time"],
    advantage: Float[Tensor, "batch time"],
    mask: RowMask,
    clip_low: Number,
    clip_high: Number,
    dual_clip: Number | None = None,
    aggregation: Aggregation,
) -> ClippedSurrogate:
    """loss = loss_sum / denominator = -avg S(A), avg the mean over rows of row means, or the mean over tokens.

    S(A) = min[r A, clip(r, 1 - clip_low, 1 + clip_high) A], bounds linear in r. Source: Eq. 7.
    """
    mask = mask.to(torch.promote_types(logp.dtype, torch.float32))  # weights 1 / len_i as exact as the loss
    sums = surrogate_terms(
        logp=logp,
        old_logp=old_logp,
        advantage=advantage,
        weight=token_weight(mask=mask, aggregation=aggregation),
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    denominator = loss_denominator(mask=mask, aggregation=aggregation)
    return ClippedSurrogate(denominator=denominator, **{f.name: getattr(sums, f.name) for f in fields(sums)})


def objective_terms(
    *,
    logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    advantages: Sequence[Float[Tensor, "*shape"]],
    weight: Float[Tensor, "*shape"],
    mask: AnyMask,
    clip_low: Number,
    clip_high: Number,
    dual_clip: Number | None = None,
    entropy: Float[Tensor, "*shape"] | None = None,
    entropy_coefficient: Number = 0.0,
    expected_logp: Float[Tensor, "*shape"] | None = None,
    expected_weight: Float[Tensor, "*shape"] | None = None,
    kl: Float[Tensor, "*shape"] | None = None,
    kl_coefficient: Number = 0.0,
    penalty_weight: Float[Tensor, "*shape"] | None = None,
) -> SurrogateSums:
    """-sum weight * [sum_k S(A_k) + lambda H_t + alpha R sum_a pi_old^T(a) log pi_theta(a) - beta kl_t - b_t |log r|].

    Of any method; b_t is `penalty_weight`. Shapes as in `surrogate_terms`. entropy, expected_logp and kl carry
    gradients; a term that is None is absent.
    Clip counts are means over the summed surrogates, so that fractions stay fractions of the tokens.
    """
    terms = [
        surrogate_terms(
            logp=logp,
            old_logp=old_logp,
            advantage=advantage,
            weight=weight,
            mask=mask,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )
        for advantage in advantages
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    bonus = torch.zeros_like(total.loss_sum)
    inside = mask.bool()
    if entropy is not None and entropy_coefficient != 0.0:
        bonus = bonus + entropy_coefficient * (weight * entropy).masked_fill(~inside, 0.0).sum()
    if expected_logp is not None and expected_weight is not None:
        bonus = bonus + (weight * expected_weight * expected_logp).masked_fill(~inside, 0.0).sum()
    if kl is not None and kl_coefficient != 0.0:
        bonus = bonus - kl_coefficient * (weight * kl).masked_fill(~inside, 0.0).sum()
    if penalty_weight is not None:
        bonus = bonus - (weight * penalty_weight * (logp - old_logp).abs()).masked_fill(~inside, 0.0).sum()
    return SurrogateSums(
        loss_sum=total.loss_sum - bonus,
        clip_high_sum=total.clip_high_sum / len(terms),
        clip_low_sum=total.clip_low_sum / len(terms),
        dual_clip_sum=total.dual_clip_sum / len(terms),
        kl_sum=terms[0].kl_sum,
        token_count=terms[0].token_count,
    )
