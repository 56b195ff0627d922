"""Entropy controller: the entropy of the batch and its success rate -> temperature T and weight alpha.

Floats and the standard library only; formulas: DCPO (arXiv 2601.12730, Table 6) and its authors' code. Beside it, what
other methods make of the same entropy: lambda of Skywork-OR1 (2505.22312), the sample weight of EntroPIC (2511.15248).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

AlphaSchedule = Literal["reference", "paper", "constant", "pi"]
TemperatureRule = Literal["switch", "continuous"]
EntropySource = Literal["exact", "lagged_sampled"]
Course = Literal["constant", "linear", "cosine"]
type Number = float | int  # at run time, beartype does not let an int pass for a float


@dataclass(frozen=True, kw_only=True)
class Target:
    """H_0 [nats/token] over the steps of a run: from `start` at step 1 to `end` at step `steps`, and `end` after it."""

    start: Number
    end: Number | None = None
    """None: that of the start."""
    course: Course = "constant"
    steps: int = 1

    def at(self, step: int) -> float:
        """H_0 of a step, from 1."""
        if self.course == "constant" or self.end is None:
            return self.start
        done = min(max(step - 1, 0) / max(self.steps - 1, 1), 1.0)
        share = done if self.course == "linear" else (1.0 - math.cos(math.pi * done)) / 2.0
        return (1.0 - share) * self.start + share * self.end


@dataclass(kw_only=True)
class SteppedCoefficient:
    """lambda of adaptive_entropy: a step up while H < H_0, a step down else, within [0, largest]; used below H_0 alone.

    Source: `EntController` of SkyworkAI/Skywork-OR1, whose lambda looks at the entropy of the step before.
    """

    change: Number = 1e-4
    """What it gains or loses at each step."""
    largest: Number = 0.005
    value: float = 0.0

    def step(self, error: float) -> float:
        """lambda of this step, error = H_0 - H [nats/token]; 0 above H_0. Steps it for the next one."""
        used = self.value if error > 0.0 else 0.0
        self.value = min(max(self.value + (self.change if error > 0.0 else -self.change), 0.0), self.largest)
        return used


@dataclass(kw_only=True)
class SampleWeight:
    """EntroPIC's alpha in [-1, 1]: clip(K_p (H - H_0) + K_i sum of (H - H_0) of earlier steps, -1, 1).

    Positive: the entropy is to fall. Source: yk7333/EntroPIC, dp_actor.py; there it is one of each micro-batch.
    """

    proportional: Number = 1.0
    """K_p [1/nat]."""
    integral: Number = 0.01
    """K_i [1/(nat step)]."""
    error_sum: float = 0.0
    """Of earlier steps [nat step]; not bounded, as in the authors' code."""

    def step(self, error: float) -> float:
        """alpha of this step, error = H_0 - H [nats/token]; adds it up for the next one."""
        weight = -self.proportional * error + self.integral * self.error_sum
        self.error_sum -= error
        return min(max(weight, -1.0), 1.0)


class ControllerDecision(NamedTuple):
    """What one training step uses."""

    entropy: float
    """H the decision rests on [nats/token]; not the exact entropy of this batch under `lagged_sampled`."""
    temperature: float
    """T of the tempered policy."""
    alpha: float
    """Weight of the regulariser before mixing, >= 0."""
    target_entropy: float
    """H_0 of this step [nats/token]."""
    entropy_coefficient: float = 0.0
    """lambda of adaptive_entropy."""
    sample_weight: float = 0.0
    """EntroPIC's alpha in [-1, 1], signed."""


class EntropyController:
    """T = T_high if H < H_0 else T_low, and alpha(abs(H_0 - H), success rate) >= 0.

    T alone carries the direction: T > 1 raises the entropy and T < 1 lowers it for alpha > 0, so a signed alpha
    would be a double negation that runs away from H_0.
    `temperature` and `alpha` answer for a given entropy; `step` also advances the state (lag, integral).
    """

    def __init__(
        self,
        *,
        target_entropy: Number | Target,
        temperature_low: Number,
        temperature_high: Number,
        alpha_schedule: AlphaSchedule = "reference",
        alpha_max: Number = 0.1,
        temperature_rule: TemperatureRule = "switch",
        proportional_gain: Number = 16.0,
        integral_gain: Number = 0.1,
        entropy_source: EntropySource = "exact",
        coefficient: SteppedCoefficient | None = None,
        sample_weight: SampleWeight | None = None,
    ) -> None:
        """Values are checked, never changed; raises ValueError with the rule, the values and the remedy.

        target_entropy: H_0 [nats/token], or its course.  alpha_max: cap of `reference` and `pi` before the division by
        the success rate; alpha itself for `constant`; `paper` has none.
        proportional_gain [1/nat], integral_gain [1/(nat step)]: `pi` alone; 16 saturates 1/16 nat away from H_0.
        """
        self.target = target_entropy if isinstance(target_entropy, Target) else Target(start=target_entropy)
        numbers = {
            "target_entropy": self.target.start,
            "target_entropy_end": self.target.start if self.target.end is None else self.target.end,
            "alpha_max": alpha_max,
            "proportional_gain": proportional_gain,
            "integral_gain": integral_gain,
        }
        _require_numbers(numbers, temperature_low, temperature_high)
        _require_choice("alpha_schedule", alpha_schedule, get_args(AlphaSchedule))
        _require_choice("temperature_rule", temperature_rule, get_args(TemperatureRule))
        _require_choice("entropy_source", entropy_source, get_args(EntropySource))
        _require_choice("target_schedule", self.target.course, get_args(Course))
        if alpha_schedule == "pi" and temperature_rule != "switch":
            raise ValueError(
                f"alpha_schedule 'pi' needs temperature_rule 'switch', got {temperature_rule!r}: the continuous rule "
                "has T = 1 at H_0, where no alpha can hold the entropy; use 'switch'"
            )

        self.temperature_low = temperature_low
        self.temperature_high = temperature_high
        self.alpha_schedule: AlphaSchedule = alpha_schedule
        self.alpha_max = alpha_max
        self.temperature_rule: TemperatureRule = temperature_rule
        self.proportional_gain = proportional_gain
        self.integral_gain = integral_gain
        self.entropy_source: EntropySource = entropy_source
        self.coefficient, self.sample_weight = coefficient or SteppedCoefficient(), sample_weight or SampleWeight()

        self.steps_done = 0
        """Calls of `step`; H_0 is that of the next one."""
        self.no_success_count = 0
        """Calls of `alpha` without a single correct answer; alpha was 0 there."""
        self.lagged_entropy = 0.0
        """Sampled entropy of the previous step [nats/token]; 0 before the first, as in the authors' code."""
        self.integral = 0.0
        """I of `pi`, within [-1, 1]: the drive that holds H_0 against the policy gradient's own pull."""

    @property
    def target_entropy(self) -> float:
        """H_0 [nats/token] of the step that comes next."""
        return self.target.at(self.steps_done + 1)

    def temperature(self, entropy: Number) -> float:
        """T_high if H < H_0 else T_low; continuous: clip(1 + H_0 - H, T_low, T_high); pi: the sign of its output.

        entropy [nats/token].  Raises ValueError unless it is finite.
        Source: the authors' code; continuous: SCOPE-RL (arXiv 2510.08141 v7); pi: ours.
        """
        error = self._error(entropy)
        if self.temperature_rule == "continuous":
            return min(max(1.0 + error, self.temperature_low), self.temperature_high)
        drive = self._drive(error) if self.alpha_schedule == "pi" else error
        return self.temperature_high if drive > 0.0 else self.temperature_low

    def alpha(self, entropy: Number, success_rate: Number) -> float:
        """alpha >= 0 before mixing: reference min(abs(H_0 - H), alpha_max) / success_rate; see `_SCHEDULES`.

        entropy [nats/token], success_rate in [0, 1].  No correct answer: 0.0, counted in `no_success_count`
        (the authors' code divides by zero).  Raises ValueError for values out of range or not finite.
        """
        error = self._error(entropy)
        if not 0.0 <= success_rate <= 1.0:
            raise ValueError(f"success_rate must lie in [0, 1], got {success_rate}; it is the mean of R in {{0, 1}}")
        if success_rate == 0.0:
            self.no_success_count += 1
            return 0.0
        return _SCHEDULES[self.alpha_schedule](self, error, success_rate)

    def step(self, exact_entropy: Number, sampled_entropy: Number, success_rate: Number) -> ControllerDecision:
        """What this training step uses; advances everything that is carried to the next one. Call once a step.

        Both entropies [nats/token]: the exact one of pi_old, and -mean log pi of the sampled tokens.
        """
        for value in (exact_entropy, sampled_entropy):
            self._error(value)  # a value that is not finite must not enter the state
        entropy = exact_entropy if self.entropy_source == "exact" else self.lagged_entropy
        error, temperature, alpha = self._error(entropy), self.temperature(entropy), self.alpha(entropy, success_rate)
        decision = ControllerDecision(
            entropy=entropy,
            temperature=temperature,
            alpha=alpha,
            target_entropy=self.target_entropy,
            entropy_coefficient=self.coefficient.step(error),
            sample_weight=self.sample_weight.step(error),
        )
        self.lagged_entropy = sampled_entropy
        if self.alpha_schedule == "pi" and success_rate > 0.0:
            self.integral = self._next_integral(error)
        self.steps_done += 1
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Everything `step` carries from one call to the next."""
        own = {name: getattr(self, name) for name in _STATE}
        return own | {"coefficient": self.coefficient.value, "error_sum": self.sample_weight.error_sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; raises ValueError when its keys differ."""
        if set(state) != (names := set(self.state_dict())):
            raise ValueError(
                f"controller state must have the keys {sorted(names)}, got {sorted(state)}; "
                "load a checkpoint of this version"
            )
        for name, kind in _STATE.items():
            setattr(self, name, kind(state[name]))
        self.coefficient.value, self.sample_weight.error_sum = float(state["coefficient"]), float(state["error_sum"])

    def _error(self, entropy: Number) -> float:
        """H_0 - H [nats/token]."""
        if not math.isfinite(entropy):
            raise ValueError(f"entropy must be finite, got {entropy}; look at the logits of the batch it came from")
        return self.target_entropy - entropy

    def _drive(self, error: float) -> float:
        """u = clip(k_p e + I', -1, 1), e = H_0 - H: sign(u) chooses T, abs(u) alpha."""
        return min(max(self.proportional_gain * error + self._next_integral(error), -1.0), 1.0)

    def _next_integral(self, error: float) -> float:
        """I' = clip(I + k_i e, -1, 1), or I while that would push a saturated u further (anti-windup)."""
        proposed = self.integral + self.integral_gain * error
        unclipped = self.proportional_gain * error + proposed
        if abs(unclipped) > 1.0 and unclipped * error > 0.0:
            return self.integral  # growing on, it would take an overshoot to unwind
        return min(max(proposed, -1.0), 1.0)


def _reference_alpha(controller: EntropyController, error: float, success_rate: float) -> float:
    """min(abs(H_0 - H), alpha_max) / success_rate (the authors' code)."""
    return min(abs(error), controller.alpha_max) / success_rate


def _paper_alpha(controller: EntropyController, error: float, success_rate: float) -> float:
    """0.1 abs(H_0 - H) / success_rate (Table 6, in absolute value; 0.1 per nat is the paper's)."""
    return 0.1 * abs(error) / success_rate


def _constant_alpha(controller: EntropyController, error: float, success_rate: float) -> float:
    """alpha_max, whatever the entropy."""
    return controller.alpha_max


def _pi_alpha(controller: EntropyController, error: float, success_rate: float) -> float:
    """alpha_max abs(u) / success_rate, u = clip(k_p e + I, -1, 1) (ours: no steady-state error)."""
    return controller.alpha_max * abs(controller._drive(error)) / success_rate


_SCHEDULES: dict[str, Callable[[EntropyController, float, float], float]] = {
    "reference": _reference_alpha,
    "paper": _paper_alpha,
    "constant": _constant_alpha,
    "pi": _pi_alpha,
}
_STATE: dict[str, type] = {"steps_done": int, "no_success_count": int, "lagged_entropy": float, "integral": float}


def _require_numbers(numbers: dict[str, Number], temperature_low: Number, temperature_high: Number) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and >= 0, got {value}; give a number >= 0")
    if not (0.0 < temperature_low <= 1.0 <= temperature_high < math.inf):
        raise ValueError(
            "temperatures must satisfy 0 < temperature_low <= 1 <= temperature_high < inf, got "
            f"temperature_low = {temperature_low}, temperature_high = {temperature_high}; "
            "above 1 raises the entropy and below 1 lowers it, so keep one on each side"
        )


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}; choose one of them")
