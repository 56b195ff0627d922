"""The recipe's section about the monitor: bounds, what is done about each cause, where metrics go."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dcpo_openrlhf.recipe.fields import Fraction, Positive, Section

Action = Literal["warn", "stop", "nothing"]
"""warn: log and events.jsonl. stop: also save, export and end the run. nothing: counted in metrics.jsonl alone."""


class Monitor(Section):
    on_policy_only: bool = True
    """Refuse rollouts that were made with other weights than the trainer's, or those up to rollout.ahead versions
    before."""
    window: Annotated[int, Field(ge=3)] = 10
    """Steps that trends and changes are taken over."""
    patience: Positive = 3
    """Steps in a row for which a cause must hold before it is an alert."""
    entropy_band: Fraction = 0.5
    """The target band is H_0 (1 - entropy_band) to H_0 (1 + entropy_band)."""
    truncation_bound: Fraction = 0.25
    """Alert above this share of responses cut off at rollout.max_new_tokens."""
    mismatch_bound: Annotated[float, Field(gt=0)] = 0.01
    """Alert above this mean |p_trainer - p_engine| (verl: < 0.005 is normal, > 0.01 is bad)."""
    ratio_mean_tolerance: Annotated[float, Field(gt=0)] = 0.5
    """Alert where the mean of rho is farther than this from 1, its expectation."""
    ratio_ess_bound: Fraction = 0.1
    """Alert below this effective share of the tokens, (sum rho)^2 / (n sum rho^2)."""
    hacking_change: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alert where, over the window, the reward rises and the form of correct answers falls by at least this."""
    on_collapse: Action = "warn"
    on_explosion: Action = "warn"
    on_truncation: Action = "warn"
    on_mismatch: Action = "warn"
    on_reward_hacking: Action = "warn"
    on_rho_degenerate: Action = "warn"
    on_weak_regulariser: Action = "warn"
    tensorboard: bool = True
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(lambda v: "off" if v is False else v)] = "off"
    """Weights & Biases; offline writes to RUN/wandb, for `wandb sync`. (YAML reads a bare off as false.)"""
    wandb_project: str = "dcpo_openrlhf"
    samples_per_step: Annotated[int, Field(ge=0)] = 8
    """Responses written to samples/ at each step."""
