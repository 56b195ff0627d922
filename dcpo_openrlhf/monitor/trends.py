"""Over the steps: windows, the line through them, and the causes that have held for long enough."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcpo_openrlhf.methods import Method
from dcpo_openrlhf.monitor.causes import CAUSES, Alert, band
from dcpo_openrlhf.monitor.metrics import FAR
from dcpo_openrlhf.recipe.schema import Monitor as Bounds

HISTORY = ("entropy/exact", "rollout/reward_mean", "rollout/success_rate", "rollout/form")
"""Metrics whose last `monitor.window` values are kept."""


class Monitor:
    """Windows over the steps, the causes that hold, and what the recipe wants done about them."""

    def __init__(self, bounds: Bounds, *, method: Method, settings: Mapping[str, Any]) -> None:
        """settings: every "section.key" of the recipe with its value, of which an alert names those to turn."""
        self.bounds, self.settings = bounds, settings
        self.causes = {name: cause for name, cause in CAUSES.items() if cause.applies(method)}
        self.history = {name: deque[float](maxlen=self.bounds.window) for name in HISTORY}
        self.streak = dict.fromkeys(CAUSES, 0)
        """Steps in a row for which each cause has held."""
        self.alerted = dict.fromkeys(CAUSES, 0)
        """Steps so far at which each cause was alerted."""
        self.stopping: list[Alert] = []
        """Alerts of the last step for which the recipe says stop."""

    def observe(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], list[Alert]]:
        """The metrics with trends and alert counters, and the alerts that begin or stop the run.

        A cause is alerted from the `monitor.patience`-th step in a row for which it holds.
        """
        for name, values in self.history.items():
            values.append(metrics[name])
        metrics = metrics | self._trends(metrics["entropy/exact"], target=metrics["entropy/target"])
        alerts = []
        for name, cause in self.causes.items():
            self.streak[name] = self.streak[name] + 1 if cause.holds(metrics, self.bounds) else 0
            active = self.streak[name] >= self.bounds.patience
            self.alerted[name] += active
            action = getattr(self.bounds, f"on_{name}")
            if active and (action == "stop" or (action == "warn" and self.streak[name] == self.bounds.patience)):
                alerts.append(Alert.of(name, step=step, metrics=metrics, bounds=self.bounds, settings=self.settings))
        self.stopping = [alert for alert in alerts if alert.action == "stop"]
        return metrics | {f"monitor/alert_{name}": float(count) for name, count in self.alerted.items()}, alerts

    def _trends(self, entropy: float, *, target: float) -> dict[str, float]:
        trend = _slope(self.history["entropy/exact"])
        return {
            "entropy/trend": trend,
            "entropy/steps_to_leave": self._steps_to_leave(entropy, trend, target),
            "monitor/window": float(len(self.history["entropy/exact"])),
            "monitor/reward_change": _rise(self.history["rollout/reward_mean"]),
            "monitor/success_change": _rise(self.history["rollout/success_rate"]),
            "monitor/form_change": _rise(self.history["rollout/form"]),
        }

    def _steps_to_leave(self, entropy: float, trend: float, target: float) -> float:
        low, high = band(target, self.bounds)
        if not low <= entropy <= high:
            return 0.0
        way = high - entropy if trend > 0 else entropy - low
        return min(way / abs(trend), float(FAR)) if trend else float(FAR)

    def state_dict(self) -> dict[str, Any]:
        """Floats, integers and lists: fit for JSON, so that a resumed run sees the same trends."""
        history = {name: list(values) for name, values in self.history.items()}
        return {"history": history, "streak": dict(self.streak), "alerted": dict(self.alerted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; a shorter window keeps its last values. Other names are a ValueError."""
        own, history = self.state_dict(), state.get("history", {})
        if "rollout/success_rate" not in history and "rollout/reward_mean" in history:
            # of before reward and success were two numbers
            state = state | {"history": history | {"rollout/success_rate": history["rollout/reward_mean"]}}
        for part, names in own.items():
            if set(state.get(part, ())) != set(names):
                raise ValueError(
                    f"the monitor's state needs {part} of {sorted(names)}, got {sorted(state.get(part, ()))}; "
                    "it is of another version of this program: resume with that one"
                )
        for name, values in state["history"].items():
            self.history[name] = deque(values, maxlen=self.bounds.window)
        self.streak, self.alerted = dict(state["streak"]), dict(state["alerted"])


def _slope(values: Sequence[float] | deque[float]) -> float:
    """Least-squares slope a step; 0 for fewer than three values, which any noise would tilt."""
    if len(values) < 3:
        return 0.0
    return float(np.polyfit(np.arange(len(values)), np.asarray(values), 1)[0])


def _rise(values: deque[float]) -> float:
    """What the least-squares line gains from the first to the last value."""
    return _slope(values) * (len(values) - 1)
