"""The method section of a recipe: what is maximised, and how its weight, temperature and target are chosen."""

from typing import Annotated, Literal

from pydantic import Field

from dcpo_openrlhf.recipe.fields import Fraction, Positive, Section


class Method(Section):
    name: str = "dcpo"
    """Row of methods.METHODS."""
    mixing: Literal["convex", "additive"] = "convex"
    """convex: (1-w) A + w rho R, w = alpha/(1+alpha) (authors' code). additive: A + alpha rho R (Eq. 7)."""
    target_entropy: Annotated[float, Field(ge=0)] = 0.25
    """H_0 [nats/token], entropy set-point (Table 5's best); of the first step where it has a schedule."""
    target_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of H_0 over train.steps (Entrocraft, arXiv 2604.26326, found linear best)."""
    target_entropy_end: Annotated[float, Field(ge=0)] | None = None
    """H_0 [nats/token] of the last step, linear and cosine alone."""
    temperature_low: Annotated[float, Field(gt=0, le=1)] = 0.8
    """T of the target policy while entropy is at or above H_0."""
    temperature_high: Annotated[float, Field(ge=1)] = 1.2
    """T of the target policy while entropy is below H_0."""
    temperature_rule: Literal["switch", "continuous"] = "switch"
    """continuous: T = clip(1 + H_0 - H, T_low, T_high) (SCOPE-RL, arXiv 2510.08141 v7), always so for scope_rl."""
    alpha_schedule: Literal["reference", "paper", "constant", "pi"] = "reference"
    alpha_max: Annotated[float, Field(ge=0)] = 0.1
    """reference: cap of |H_0 - H| before the division by the success rate. constant: alpha itself."""
    proportional_gain: Annotated[float, Field(ge=0)] = 16.0
    """[1/nat], schedule pi: alpha is alpha_max / success rate from 1 / gain nats away from H_0."""
    integral_gain: Annotated[float, Field(ge=0)] = 0.1
    """[1/(nat step)], schedule pi: how fast the remaining distance to H_0 is worked off."""
    entropy_source: Literal["exact", "lagged_sampled"] = "exact"
    """exact: this batch, over the vocabulary. lagged_sampled: the previous update's -mean log pi (authors' code)."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.015
    """lambda of entropy_reg; unused by the other methods."""
    entropy_adv_beta: Annotated[float, Field(ge=0)] = 0.4
    entropy_adv_kappa: Annotated[float, Field(gt=0)] = 2.0
    aepo_max_rows: Positive = 60
    """aepo: most rows of a step that rows drawn at T replace (authors' code)."""
    scope_weight: Annotated[float, Field(ge=0)] = 0.015625
    """scope_rl: weight of the average over the correct responses drawn at T, 1/64."""
    scope_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """scope_rl: share of a step's prompts that are answered again at T (the share of aepo's code)."""
    clip_cov_share: Fraction = 0.0002
    """clip_cov: share of an update's tokens that are left out (authors' code), at least one."""
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    """clip_cov: tokens are left out whose covariance lies between these two (authors' code)."""
    kl_cov_share: Fraction = 0.002
    """kl_cov: share of an update's tokens, those of the largest covariance, that are held (7B; 32B: 0.0002)."""
    kl_cov_coefficient: Annotated[float, Field(ge=0)] = 1.0
    """kl_cov: weight of |log pi_theta - log pi_old| on them (authors' code; verl's own default is 0.1)."""
    adaptive_entropy_step: Annotated[float, Field(ge=0)] = 0.0001
    """adaptive_entropy: what lambda gains a step below H_0 and loses above it (authors' code)."""
    adaptive_entropy_max: Annotated[float, Field(ge=0)] = 0.005
    """adaptive_entropy: largest lambda (authors' code)."""
    entropic_proportional: Annotated[float, Field(ge=0)] = 1.0
    """[1/nat], entropic: K_p (authors' code)."""
    entropic_integral: Annotated[float, Field(ge=0)] = 0.01
    """[1/(nat step)], entropic: K_i (authors' code)."""
    entropic_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """entropic: tokens are weighed to which pi_old gave more than this (authors' code)."""
