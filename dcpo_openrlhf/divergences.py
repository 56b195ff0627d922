"""How far the policy is from who drew its samples, and from the model that it started from: functions of log-probs."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dcpo_openrlhf.objectives import AnyMask, Number, RowMask

KLEstimator = Literal["k1", "k2", "k3"]
CorrectionLevel = Literal["token", "sequence"]
CorrectionMode = Literal["mask", "clip"]
CorrectionGating = Literal["ratio", "binary_kl", "tv"]

SURE = 1e-6
"""Least and, from 1, most probability that a divergence is taken of, so that its logarithms stay finite; OpenRLHF's."""


def correction_weight(
    *,
    old_logp: Float[Tensor, "batch time"],
    sampler_logp: Float[Tensor, "batch time"],
    mask: RowMask,
    level: CorrectionLevel,
    mode: CorrectionMode,
    gating: CorrectionGating,
    low: Number,
    high: Number,
) -> tuple[Float[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """(w = pi_old / mu of each token, masked or clipped; which tokens were outside [low, high]); 1 outside the mask.

    A gate reads w, or a divergence of mu and pi_old at the sampled token: binary_kl = KL of Bernoulli(mu) and
    Bernoulli(pi_old) [nats], tv = |mu - pi_old|; at level sequence its mean over the response, geometric for w. mask
    gives weight 0 outside [low, high] and w inside; clip, of tokens by w alone, clamps w. E_mu[w f] = E_pi_old[f]
    where nothing is outside. Source: OpenRLHF 0.11.2 (TIS, IcePop, sequence masks).
    """
    if mode == "clip" and (level == "sequence" or gating != "ratio"):
        raise ValueError(f"mode=clip clamps the ratio of a token: level={level} and gating={gating} take mode=mask")
    inside = mask.bool()
    log_ratio = (old_logp - sampler_logp).masked_fill(~inside, 0.0)
    if gating == "ratio":
        statistic = log_ratio
    else:
        p, q = (x.masked_fill(~inside, 0.0).exp().clamp(SURE, 1 - SURE) for x in (sampler_logp, old_logp))
        binary_kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        statistic = (p - q).abs() if gating == "tv" else binary_kl
    if level == "sequence":
        mean = (statistic * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)
        statistic = mean.expand_as(statistic)
    if gating == "ratio":
        statistic = statistic.exp()
    outside = ((statistic < low) | (statistic > high)) & inside
    ratio = log_ratio.exp()
    weight = ratio.clamp(low, high) if mode == "clip" else ratio.masked_fill(outside, 0.0)
    return torch.where(inside, weight, torch.ones_like(weight)), outside


KL_BOUND = 10.0
"""Of the estimate of a token [nats] and, where the gradient is the unbiased one, of its weight; OpenRLHF's."""


def kl_estimate(
    *,
    logp: Float[Tensor, "*shape"],
    reference_logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    mask: AnyMask,
    estimator: KLEstimator,
    unbiased_gradient: bool = False,
) -> Float[Tensor, "*shape"]:
    """KL(pi_theta || pi_ref) estimated at each sampled token [nats], within +-KL_BOUND; 0 outside the mask.

    With d = logp - reference_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. Each has its own formula's gradient,
    which for k1 is 0 on average; unbiased_gradient gives all of them that of the divergence, w d grad log pi with
    w = pi_theta / pi_old. Source: Schulman 2020, http://joschu.net/blog/kl-approx.html; OpenRLHF 0.11.2.
    """
    inside = mask.bool()
    d = (logp - reference_logp).masked_fill(~inside, 0.0)
    if estimator == "k1":
        value = d
    elif estimator == "k2":
        value = d.square() / 2
    elif estimator == "k3":
        bounded = d.clamp(min=-KL_BOUND)  # k3 is above the bound there, and exp would overflow
        value = (-bounded).exp() - 1 + bounded
    else:
        raise ValueError(
            f"estimator must be one of {list(get_args(KLEstimator))}, got {estimator!r}; choose one of them"
        )
    value = value.clamp(-KL_BOUND, KL_BOUND)
    if not unbiased_gradient:
        return value
    weight = (logp - old_logp).masked_fill(~inside, 0.0).exp().clamp(max=KL_BOUND).detach()
    slope = weight * d.square() / 2
    return value.detach() + slope - slope.detach()
