"""The table of methods: a new method is a row, plus at most one pure function of tensors.

Formulas: DCPO (arXiv 2601.12730, Eq. 7, 9, 10, Table 1) and its authors' code; docs/methods.md has the other sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcpo_openrlhf.objectives import Mixing, Number, RowMask, mixing_weights, token_covariance

RatioWeight = Literal["rho", "one", "inverse_rho"]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What single rows read of the recipe's `method` section, under its names."""

    entropy_adv_beta: Number = 0.4
    entropy_adv_kappa: Number = 2.0
    scope_weight: Number = 1 / 64
    clip_cov_share: Number = 2e-4
    clip_cov_low: Number = 1.0
    clip_cov_high: Number = 5.0
    kl_cov_share: Number = 2e-3
    kl_cov_coefficient: Number = 1.0
    entropic_threshold: Number = 0.95

    @classmethod
    def of(cls, settings: object) -> Constants:
        """Those of a recipe's `method` section."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class MixInputs:
    """What a row's `mix` may read, each tensor [batch, time]; every row of an update for `whole_update`."""

    advantage: Float[Tensor, "batch time"]
    """A_i of `group_advantage`."""
    success: Float[Tensor, "batch time"]
    """R_i in {0, 1}."""
    ratio_weight: Float[Tensor, "batch time"]
    """rho, 1, 1 / rho, or 0 for a row without regulariser."""
    entropy: Float[Tensor, "batch time"] | None
    """H_t [nats/token], exact, detached; None where no row reads it."""
    tempered_rows: Bool[Tensor, "batch time"]
    """True on rows sampled from pi_old^T."""
    advantage_weight: Number
    """Weight of A by `mixing_weights`."""
    regulariser_weight: Number
    """Weight of the regulariser by `mixing_weights`."""
    constants: Constants
    old_logp: Float[Tensor, "batch time"] | None
    """log pi_old of the sampled tokens; None where no row reads it."""
    mask: RowMask | None
    """Nonzero on the tokens that count; None where no row reads it."""
    sample_weight: Number
    """EntroPIC's alpha, signed."""
    seed: int
    """Of what `mix` draws by lot."""


type Mix = Callable[[MixInputs], tuple[Tensor, ...]]


def _merged(x: MixInputs) -> tuple[Tensor, ...]:
    """One surrogate: S(A + alpha weight R)."""
    return (x.advantage_weight * x.advantage + x.regulariser_weight * x.ratio_weight * x.success,)


def _merged_on_advantage(x: MixInputs) -> tuple[Tensor, ...]:
    """One surrogate, the weight on A itself: S((1 + alpha weight) A)."""
    return (x.advantage_weight * x.advantage + x.regulariser_weight * x.ratio_weight * x.advantage,)


def _summed(x: MixInputs) -> tuple[Tensor, ...]:
    """Two surrogates: S(A) + alpha S(weight R)."""
    return (x.advantage_weight * x.advantage, x.regulariser_weight * x.ratio_weight * x.success)


def _by_population(x: MixInputs) -> tuple[Tensor, ...]:
    """S(A) on rows of pi_old, alpha S(weight R) on rows of pi_old^T: one advantage, since each row has one origin."""
    regulariser = x.regulariser_weight * x.ratio_weight * x.success
    return (torch.where(x.tempered_rows, regulariser, x.advantage_weight * x.advantage),)


def _replaced_rows(x: MixInputs) -> tuple[Tensor, ...]:
    """S(A), and REINFORCE with advantage 1 on the rows of pi_old^T that replaced others."""
    return (torch.where(x.tempered_rows, torch.ones_like(x.advantage), x.advantage),)


def _advantage_alone(x: MixInputs) -> tuple[Tensor, ...]:
    """S(A); the regulariser enters the loss as a term of its own."""
    return (x.advantage_weight * x.advantage,)


def _entropy_shaped(x: MixInputs) -> tuple[Tensor, ...]:
    """S(A + min(beta H_t, abs(A) / kappa)), H_t detached."""
    if x.entropy is None:
        raise ValueError("entropy_adv needs the entropy of every token, got None; pass entropy=")
    c = x.constants
    bonus = torch.minimum(c.entropy_adv_beta * x.entropy.detach(), x.advantage.abs() / c.entropy_adv_kappa)
    return (x.advantage + bonus,)


def _positive_rows(x: MixInputs) -> tuple[Tensor, ...]:
    """S(A) on rows of pi_old, S(R) / 64 on rows of pi_old^T, of which only correct ones are trained on."""
    return (torch.where(x.tempered_rows, x.constants.scope_weight * x.success, x.advantage),)


def _without_some_high_covariance(x: MixInputs) -> tuple[Tensor, ...]:
    """S(A), 0 on a few tokens chosen by lot among those whose covariance lies between two bounds."""
    if x.old_logp is None or x.mask is None:
        raise ValueError("clip_cov needs log pi_old and the mask of every token, got None; pass old_logp= and mask=")
    c, covariance = x.constants, token_covariance(advantage=x.advantage, logp=x.old_logp, mask=x.mask)
    candidates = (covariance > c.clip_cov_low) & (covariance < c.clip_cov_high)
    lots = torch.rand(candidates.shape, generator=torch.Generator().manual_seed(x.seed)).masked_fill(~candidates, 2.0)
    count = min(_count(c.clip_cov_share, covariance), int(candidates.sum()))
    left_out = torch.zeros(candidates.numel(), dtype=torch.bool)
    left_out[lots.flatten().topk(count, largest=False).indices] = True
    return (x.advantage.masked_fill(left_out.view_as(candidates), 0.0),)


def _weighed_by_sign(x: MixInputs) -> tuple[Tensor, ...]:
    """(1 + alpha) S(A) where A > 0 and (1 - alpha) S(A) where A < 0, on the tokens that pi_old was sure of."""
    if x.old_logp is None:
        raise ValueError("entropic needs log pi_old of every token, got None; pass old_logp=")
    sure = x.old_logp.exp() > x.constants.entropic_threshold
    return (x.advantage + x.sample_weight * x.advantage.abs() * sure,)


def _count(share: Number, covariance: Float[Tensor, "*shape"]) -> int:
    """That share of the update's tokens, rounded down, at least one."""
    return max(int(share * int(covariance.isfinite().sum())), 1)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table: everything that tells a method from GRPO."""

    equation: str
    """What is maximised; S is the clipped surrogate, avg the aggregation."""
    samples: Literal["policy", "policy+tempered"] = "policy"
    """Rows are drawn from pi_old, or some of them from pi_old^T (log-probs at T = 1 either way)."""
    replaces_rows: bool = False
    """Rows of pi_old^T take the place of rows of pi_old (`aepo_rows`); else each prompt has G of both."""
    ratio_weight: RatioWeight | None = None
    """What weighs R of a sampled token; None where no sampled regulariser exists."""
    mix: Mix = _merged
    """Advantages whose surrogates are summed."""
    uses_alpha: bool = False
    """False runs the same path with alpha = 0."""
    entropy_gradient: bool = False
    """lambda avg H_t enters the loss with its gradient."""
    expected_regulariser: bool = False
    """alpha R sum_a pi_old^T(a) log pi_theta(a) enters the loss in place of the sampled regulariser."""
    separate_averages: bool = False
    """Rows of pi_old and of pi_old^T are averaged apart; see `population_scale`."""
    positive_rows: bool = False
    """Of the rows of pi_old^T only correct ones are trained on, dealt over the step's updates."""
    continuous_temperature: bool = False
    """T = clip(1 + H_0 - H, T_low, T_high), whatever `method.temperature_rule` says."""
    adaptive_coefficient: bool = False
    """lambda of `entropy_gradient` is the controller's, stepped towards H_0; else the recipe's."""
    uses_sample_weight: bool = False
    """False runs with a sample weight of 0."""
    whole_update: bool = False
    """`mix` chooses among the tokens of an update, so it must see all its rows at once."""
    holds_high_covariance: bool = False
    """-beta |log r| enters the loss on the tokens of the largest covariance; see `penalty_weight`."""


METHODS: dict[str, Method] = {
    "grpo": Method(equation="avg S(A)"),
    "dcpo": Method(equation="avg S(A + α ρ R)  (Eq. 7)", ratio_weight="rho", uses_alpha=True),
    "j1": Method(equation="avg S(A) + α avg S(R)", ratio_weight="one", mix=_summed, uses_alpha=True),
    "j2": Method(
        equation="avg S(A) + α avg_T S(R), avg_T over rows of π_old^T",
        samples="policy+tempered",
        ratio_weight="one",
        mix=_by_population,
        uses_alpha=True,
        separate_averages=True,
    ),
    "j3": Method(equation="avg S(A) + α avg S(ρ R)", ratio_weight="rho", mix=_summed, uses_alpha=True),
    "j4": Method(
        equation="avg S(A) + α avg_T S(R / ρ), avg_T over rows of π_old^T",
        samples="policy+tempered",
        ratio_weight="inverse_rho",
        mix=_by_population,
        uses_alpha=True,
        separate_averages=True,
    ),
    "dcpo_wo_double_is": Method(equation="avg S(A + α R)  (Eq. 9)", ratio_weight="one", uses_alpha=True),
    "dcpo_wo_reinforce": Method(
        equation="avg S((1 + α ρ) A)  (Eq. 10)", ratio_weight="rho", mix=_merged_on_advantage, uses_alpha=True
    ),
    "entropy_reg": Method(equation="avg S(A) + λ avg H_t", entropy_gradient=True),
    "entropy_adv": Method(equation="avg S(A + min(β H_t, |A| / κ))", mix=_entropy_shaped),
    "aepo": Method(
        equation="avg S(A), A = 1 on the rows of π_old^T that replaced others",
        samples="policy+tempered",
        replaces_rows=True,
        ratio_weight="one",
        mix=_replaced_rows,
    ),
    "dcpo_expected": Method(
        # sg: no gradient; in a step's first update pi_theta is pi_old, later ones would need all its logits kept
        equation="avg S(A) + α avg R Σ_a sg[π_θ^T(a)] log π_θ(a)  (an extension, not in the paper)",
        mix=_advantage_alone,
        uses_alpha=True,
        expected_regulariser=True,
    ),
    "scope_rl": Method(
        equation="avg S(A) + avg_T S(R) / 64, avg_T over correct rows of π_old^T, T = clip(1 + H_0 - H, T_low, T_high)",
        samples="policy+tempered",
        mix=_positive_rows,
        separate_averages=True,
        positive_rows=True,
        continuous_temperature=True,
    ),
    "clip_cov": Method(
        equation="avg S(A [token not drawn]), drawn from those with low < Cov_t < high",
        mix=_without_some_high_covariance,
        whole_update=True,
    ),
    "kl_cov": Method(equation="avg S(A) - β avg |log r| [Cov_t among the largest]", holds_high_covariance=True),
    "adaptive_entropy": Method(
        equation="avg S(A) + λ_k avg H_t [H < H_0], λ stepped towards H_0",
        entropy_gradient=True,
        adaptive_coefficient=True,
    ),
    "entropic": Method(
        equation="avg (1 + α sign(A) [π_old > τ]) S(A), α = PI control of H - H_0",
        mix=_weighed_by_sign,
        uses_sample_weight=True,
    ),
}
_RATIO_WEIGHTS: dict[RatioWeight | None, Callable[[Tensor], Tensor]] = {
    "rho": lambda rho: rho,
    "one": torch.ones_like,
    "inverse_rho": torch.reciprocal,
    None: torch.zeros_like,
}


def method_advantage(
    method: Method,
    *,
    group_advantage: Float[Tensor, " batch"],
    success: Float[Tensor, " batch"],
    target_ratio: Float[Tensor, "batch time"],
    entropy: Float[Tensor, "batch time"] | None = None,
    alpha: Number,
    mixing: Mixing,
    tempered_rows: Bool[Tensor, " batch"] | None = None,
    old_logp: Float[Tensor, "batch time"] | None = None,
    mask: RowMask | None = None,
    sample_weight: Number = 0.0,
    seed: int = 0,
    constants: Constants = Constants(),
) -> tuple[Float[Tensor, "batch time"], ...]:
    """The advantages whose clipped surrogates a row of METHODS sums; one tensor for all but j1 and j3.

    Any rows of an update, all of them where the method says `whole_update`. entropy [nats/token]: exact, of pi_old at
    T = 1, for entropy_adv. tempered_rows marks the rows drawn from pi_old^T in the concatenated batch of a
    `policy+tempered` row; group_advantage has no effect on them. old_logp, mask, seed: clip_cov; old_logp,
    sample_weight: entropic.
    """
    advantage_weight, regulariser_weight = mixing_weights(alpha=alpha if method.uses_alpha else 0.0, mixing=mixing)
    if tempered_rows is None:
        tempered_rows = torch.zeros_like(success, dtype=torch.bool)
    elif method.samples == "policy" and bool(tempered_rows.any()):
        raise ValueError(
            f"{method.equation!r} takes rows of pi_old alone, got {int(tempered_rows.sum())} tempered rows"
        )
    inputs = MixInputs(
        advantage=group_advantage[:, None].expand_as(target_ratio),
        success=success[:, None].expand_as(target_ratio),
        ratio_weight=_RATIO_WEIGHTS[method.ratio_weight](target_ratio),
        entropy=entropy,
        tempered_rows=tempered_rows[:, None].expand_as(target_ratio),
        advantage_weight=advantage_weight,
        regulariser_weight=regulariser_weight,
        constants=constants,
        old_logp=old_logp,
        mask=mask,
        sample_weight=sample_weight if method.uses_sample_weight else 0.0,
        seed=seed,
    )
    return method.mix(inputs)


def rewards_solved_groups(method: Method) -> bool:
    """Whether R enters the loss where A = 0, so that a group of right responses alone is trained on all the same."""
    zeros, tempered = torch.zeros(2, 1), torch.tensor([False, method.samples == "policy+tempered"])
    terms = [
        method_advantage(
            method,
            group_advantage=torch.zeros(2),
            success=torch.full((2,), success),
            target_ratio=torch.ones(2, 1),
            entropy=zeros,
            alpha=1.0,
            mixing="additive",
            tempered_rows=tempered,
            old_logp=zeros,
            mask=torch.ones(2, 1),
        )
        for success in (0.0, 1.0)
    ]
    return method.expected_regulariser or any(not torch.equal(a, b) for a, b in zip(*terms, strict=True))


def aepo_rows(
    *, group_advantage: Float[Tensor, " batch"], above_target: bool, limit: int = 60, threshold: Number = 0.05
) -> Int[Tensor, " rows"]:
    """Indices of the tempered rows that replace as many rows of the GRPO batch: the first n with A > threshold.

    n = min(limit, rows found), half of it (rounded down) when H > H_0. Shuffle the result over the mini-batches.
    Source: the authors' code, `_select_by_advantage` and the AEPO branch of `fit`.
    """
    rows = (group_advantage > threshold).nonzero().flatten()
    count = min(limit, rows.numel())
    return rows[: count // 2 if above_target else count]


def expected_weight(
    method: Method, *, success: Float[Tensor, " batch"], alpha: Number, mixing: Mixing
) -> Float[Tensor, " batch"] | None:
    """Weight of sum_a pi_old^T(a) log pi_theta(a) on the tokens of each row: alpha R (after mixing); None if unused."""
    if not method.expected_regulariser:
        return None
    return mixing_weights(alpha=alpha, mixing=mixing)[1] * success


def penalty_weight(
    method: Method,
    *,
    group_advantage: Float[Tensor, " batch"],
    old_logp: Float[Tensor, "batch time"],
    mask: RowMask,
    constants: Constants,
) -> Float[Tensor, "batch time"] | None:
    """beta on the tokens of an update whose covariance of A and log pi_old is largest, 0 elsewhere; None if unused.

    Tokens of equal covariance are taken in the order of the rows. Takes all rows of the update.
    """
    if not method.holds_high_covariance:
        return None
    advantage = group_advantage[:, None].expand_as(old_logp)
    covariance = token_covariance(advantage=advantage, logp=old_logp, mask=mask).flatten()
    count = min(_count(constants.kl_cov_share, covariance), int(covariance.isfinite().sum()))
    held = torch.zeros_like(old_logp).flatten()
    held[covariance.topk(count).indices] = constants.kl_cov_coefficient
    return held.view_as(old_logp)
