"""Causes behind a run that goes wrong: how each shows in the metrics, and which recipe keys to turn.

docs/troubleshoot.md has a section for each. Every check reads metrics alone, so that metrics.jsonl explains the alert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpo_openrlhf.recipe.schema import Action
from dcpo_openrlhf.recipe.schema import Monitor as Bounds

if TYPE_CHECKING:  # the entry imports MonitorStop, and torch takes seconds
    from dcpo_openrlhf.methods import Method

Metrics = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One row of CAUSES."""

    meaning: str
    holds: Callable[[Metrics, Bounds], bool]
    evidence: tuple[str, ...]
    """Metrics to look at."""
    keys: tuple[str, ...]
    """Recipe keys to turn, the likeliest first."""
    applies: Callable[["Method"], bool] = lambda method: True


def band(target: float, bounds: Bounds) -> tuple[float, float]:
    """H_0 (1 - monitor.entropy_band) to H_0 (1 + monitor.entropy_band) [nats/token]."""
    return target * (1.0 - bounds.entropy_band), target * (1.0 + bounds.entropy_band)


def _side(m: Metrics, bounds: Bounds) -> int:
    """-1 below the target band, 1 above it, 0 inside."""
    low, high = band(m["entropy/target"], bounds)
    return (m["entropy/exact"] > high) - (m["entropy/exact"] < low)


def _returns(m: Metrics, bounds: Bounds, *, windows: int) -> bool:
    """From outside, the trend leads back into the band within so many windows."""
    low, high = band(m["entropy/target"], bounds)
    way = low - m["entropy/exact"] if m["entropy/exact"] < low else m["entropy/exact"] - high
    return -_side(m, bounds) * m["entropy/trend"] * windows * bounds.window >= way


def _collapse(m: Metrics, bounds: Bounds) -> bool:
    return _side(m, bounds) < 0 and not _returns(m, bounds, windows=1)


def _explosion(m: Metrics, bounds: Bounds) -> bool:
    """Above the band and rising by a quarter of its width a window: a start from above is no explosion."""
    low, high = band(m["entropy/target"], bounds)
    return _side(m, bounds) > 0 and m["entropy/trend"] * bounds.window > (high - low) / 4


def _weak_regulariser(m: Metrics, bounds: Bounds) -> bool:
    """Outside the band with alpha > 0, a whole window seen, and no way back in sight: it may take its time."""
    seen = m["monitor/window"] >= bounds.window
    return seen and m["dcpo/alpha"] > 0 and _side(m, bounds) != 0 and not _returns(m, bounds, windows=5)


def _rho_degenerate(m: Metrics, bounds: Bounds) -> bool:
    far = abs(m["dcpo/target_ratio_mean"] - 1.0) > bounds.ratio_mean_tolerance
    return m["dcpo/alpha"] > 0 and (far or m["dcpo/target_ratio_ess"] < bounds.ratio_ess_bound)


def _truncation(m: Metrics, bounds: Bounds) -> bool:
    return m["rollout/truncated_fraction"] > bounds.truncation_bound


def _mismatch(m: Metrics, bounds: Bounds) -> bool:
    return m["mismatch/prob_diff_mean"] > bounds.mismatch_bound


def _reward_hacking(m: Metrics, bounds: Bounds) -> bool:
    change = bounds.hacking_change
    worst = min(m["monitor/form_change"], m["monitor/success_change"])
    return m["monitor/reward_change"] >= change and worst <= -change


CAUSES: dict[str, Cause] = {
    "collapse": Cause(
        meaning="entropy is below its target band and does not come back",
        holds=_collapse,
        evidence=("entropy/exact", "entropy/target", "entropy/trend", "group/distinct_answers", "group/all_correct"),
        keys=("method.name", "method.alpha_max", "method.temperature_high", "optimizer.learning_rate"),
    ),
    "explosion": Cause(
        meaning="entropy is above its target band and rises",
        holds=_explosion,
        evidence=("entropy/exact", "entropy/target", "entropy/trend", "dcpo/alpha", "rollout/truncated_fraction"),
        keys=("optimizer.learning_rate", "method.alpha_max", "method.temperature_low", "method.entropy_coefficient"),
    ),
    "truncation": Cause(
        meaning="many responses are cut off before their answer",
        holds=_truncation,
        evidence=("rollout/truncated_fraction", "rollout/length_mean", "rollout/repetition", "entropy/wrong"),
        keys=("rollout.max_new_tokens", "reward.require_end", "task.template"),
    ),
    "mismatch": Cause(
        meaning="trainer and engine give the same tokens different probabilities",
        holds=_mismatch,
        evidence=(
            "mismatch/prob_diff_mean",
            "mismatch/prob_diff_max",
            "mismatch/kl",
            "entropy/gap",
            "rollout/age_mean",
        ),
        keys=(
            "rollout.dtype",
            "model.dtype",
            "weight_sync.verify",
            "rollout.top_p",
            "rollout.ahead",
            "monitor.mismatch_bound",
        ),
    ),
    "reward_hacking": Cause(
        meaning="the reward rises while fewer responses are right, or those that are lose their form",
        holds=_reward_hacking,
        evidence=(
            "monitor/reward_change",
            "monitor/success_change",
            "monitor/form_change",
            "rollout/form",
            "rollout/repetition",
        ),
        keys=("reward.require_end", "reward.extractor", "task.template"),
    ),
    "rho_degenerate": Cause(
        meaning="a few tokens carry the target ratio, or the sampled ones miss most of the target policy",
        holds=_rho_degenerate,
        evidence=("dcpo/target_ratio_mean", "dcpo/target_ratio_ess", "dcpo/target_ratio_p99", "dcpo/target_ratio_max"),
        keys=("method.temperature_high", "method.temperature_low", "rollout.top_p", "method.name"),
        applies=lambda method: method.ratio_weight == "rho",
    ),
    "weak_regulariser": Cause(
        meaning="the regulariser does not bring the entropy back to its target",
        holds=_weak_regulariser,
        evidence=("entropy/exact", "entropy/target", "entropy/trend", "dcpo/regulariser_share", "dcpo/alpha"),
        keys=("method.alpha_max", "method.temperature_high", "method.temperature_low", "method.alpha_schedule"),
        applies=lambda method: method.uses_alpha,
    ),
}


@dataclass(frozen=True)
class Alert:
    """A cause that has held for `monitor.patience` steps, as written to events.jsonl."""

    step: int
    cause: str
    action: Action
    evidence: dict[str, float]
    """Metrics of the step."""
    keys: dict[str, Any]
    """Recipe keys to turn, with their present values."""

    @classmethod
    def of(cls, name: str, *, step: int, metrics: Metrics, bounds: Bounds, settings: Mapping[str, Any]) -> "Alert":
        cause = CAUSES[name]
        evidence = {metric: metrics[metric] for metric in cause.evidence if metric in metrics}
        return cls(step, name, getattr(bounds, f"on_{name}"), evidence, {key: settings[key] for key in cause.keys})

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} = {number:.4g}" for name, number in self.evidence.items())
        keys = ", ".join(f"{key} = {setting}" for key, setting in self.keys.items())
        return (
            f"step {self.step}: {self.cause}: {CAUSES[self.cause].meaning} ({numbers}); "
            f"turn one of: {keys}; see docs/troubleshoot.md#{self.cause}"
        )


class MonitorStop(RuntimeError):
    """The run was ended by the monitor, as the recipe asks (`monitor.on_CAUSE = stop`), after it was saved."""

    def __init__(self, alerts: list[Alert], saved: str) -> None:
        super().__init__("\n".join([*map(str, alerts), saved]))
        self.alerts = alerts
