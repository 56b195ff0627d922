"""Numbers of a run, their means and intervals over seeds, and what a comparison lets one say."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from tools.reproduce.archive import Result
from tools.scores import pass_at_k

Verdict = Literal["reproduced", "not reproduced", "undecided", "not run yet"]
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""0.975 quantile of Student's t for 1 to 9 degrees of freedom."""
BAND = 0.1
"""Share of H_0 within which entropy counts as settled."""
SMOOTHED = 8
"""Steps whose mean counts for overshoot and settling: every step has other problems, whose entropies differ."""


class Interval(NamedTuple):
    """Mean over seeds with its 95% interval; low and high are NaN for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds == 1:
            return f"{self.mean:.3f} (one seed)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """mean +- t s / sqrt(n), two-sided 95%, Student's t with n - 1 degrees of freedom; 1 to 10 values."""
    if not 1 <= len(values) <= len(T975) + 1:
        raise ValueError(f"1 to {len(T975) + 1} values are needed, one a seed, not {len(values)}")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = T975[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def sign_of(difference: Interval) -> Verdict:
    """Is it above 0? reproduced where the whole interval is, not reproduced where all of it is below."""
    if difference.low > 0:
        return "reproduced"
    return "not reproduced" if difference.high < 0 else "undecided"


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim that needs each of these."""
    for verdict in ("not run yet", "not reproduced", "undecided"):
        if verdict in verdicts:
            return verdict
    return "reproduced"


# --- of one run ------------------------------------------------------------------------------------------------------


def last[T](values: Sequence[T], share: float = 0.25) -> list[T]:
    """The last share of the steps, at least one."""
    return list(values[-max(round(share * len(values)), 1) :])


def final_entropy(result: Result) -> float:
    """H [nats/token], mean over the last quarter of the steps."""
    return fmean(last(result.series("entropy/exact")))


def final_success(result: Result) -> float:
    """Share of right responses in training (T = 1), mean over the last quarter of the steps."""
    return fmean(last(result.series("rollout/success_rate")))


def accuracy(result: Result) -> float:
    """Held-out accuracy after the last step (T = 0.1, one sample a problem)."""
    return result.evaluations[-1]["heldout_accuracy"]


def accuracy_before(result: Result) -> float:
    return result.evaluations[0]["heldout_accuracy"]


def average_at_k(result: Result) -> float:
    """Avg@k: mean over problems and their k samples."""
    counts = result.counts["right"]
    return sum(counts) / len(counts) / result.counts["samples"]


def passed_at(result: Result, k: int) -> float:
    """Pass@k, unbiased, mean over problems."""
    n = result.counts["samples"]
    return fmean(pass_at_k(n=n, correct=c, k=k) for c in result.counts["right"])


def regulariser_share(result: Result) -> float:
    """The regulariser's mean share of the advantage over the last half."""
    return fmean(last(result.series("dcpo/regulariser_share"), 0.5))


def pull(result: Result) -> float:
    """What the regulariser can lift: its share of the advantage times 1 - 1/T, mean over the steps of the last half in
    which T is above 1; 0 without one.

    It moves the logits by alpha (pi^T - pi), which is (1/T - 1) pi (log pi - E log pi) to first order.
    """
    shares, temperatures = (result.series(f"dcpo/{name}") for name in ("regulariser_share", "temperature"))
    steps = last(list(zip(shares, temperatures, strict=True)), 0.5)
    lifts = [share * (1 - 1 / t) for share, t in steps if t > 1]
    return fmean(lifts) if lifts else 0.0


class Tracking(NamedTuple):
    """How close to H_0 [nats/token] a run kept its entropy; shares of H_0."""

    mean_error: float
    """Mean |H - H_0| / H_0 over the last half."""
    offset: float
    """(mean H - H_0) / H_0 over the last half: what is left when the steps' scatter is averaged."""
    overshoot: float
    """Farthest beyond H_0 after first reaching it, on the side away from the start."""
    settled: float
    """First step from which H stays within BAND of H_0; infinite where it does not."""


def tracking(result: Result, smoothed: int = SMOOTHED) -> Tracking:
    """Overshoot and settling are of the mean of the last `smoothed` steps."""
    entropy, target = result.series("entropy/exact"), result.series("entropy/target")
    errors = [(h - t) / t for h, t in zip(entropy, target, strict=True)]
    smooth = [fmean(errors[max(i - smoothed, 0) : i]) for i in range(1, len(errors) + 1)]
    side = 1.0 if errors[0] > 0 else -1.0
    reached = next((i for i, e in enumerate(smooth) if e * side <= 0), len(smooth))
    overshoot = max((-e * side for e in smooth[reached:]), default=0.0)
    outside = [i for i, e in enumerate(smooth) if abs(e) > BAND]
    settled = 1 if not outside else outside[-1] + 2
    return Tracking(
        mean_error=fmean(abs(e) for e in last(errors, 0.5)),
        offset=fmean(last(errors, 0.5)),
        overshoot=max(overshoot, 0.0),
        settled=settled if settled <= len(errors) else math.inf,
    )
