"""The entropy monitor: what a step's tokens and answers say, where it leads, and which cause is behind it.

Statistics (`batch_metrics`) -> windows over steps (`Monitor`) -> causes (monitor_causes) -> sinks (monitor_sinks).
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dcpo_openrlhf import methods, objectives
from dcpo_openrlhf.experience import DCPOExperience
from dcpo_openrlhf.monitor.causes import CAUSES, Alert, band
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import Grade
from dcpo_openrlhf.rollout.tasks import Prompt

FAR = 1000
"""Steps that stand for "the trend does not lead out of the band"."""

METRICS: dict[str, str] = {
    "train/step": "rollout step, from 1",
    "rollout/reward_mean": "mean reward of the responses",
    "rollout/reward_std": "standard deviation of the rewards, unbiased",
    "rollout/length_mean": "tokens of a response, mean",
    "rollout/length_max": "tokens of the longest response",
    "rollout/truncated_fraction": "share of the responses cut off at rollout.max_new_tokens",
    "rollout/repetition": "share of the 4-grams among a response's last 512 tokens that stand there earlier; mean",
    "rollout/no_answer_fraction": "share of the responses without an answer in the asked form",
    "rollout/form": "share of the correct responses that end by themselves and repeat at most half of their 4-grams; "
    "1 without a correct response",
    "group/distinct_answers": "different answers in a group (none counts as one), mean over groups",
    "group/all_correct": "share of the groups with correct responses alone: no group advantage",
    "group/all_wrong": "share of the groups without a correct response: no advantage at all",
    "entropy/exact": "H [nats/token]: over the whole vocabulary, of pi_old at T = 1, mean over tokens",
    "entropy/sampled": "-log pi_old of the sampled tokens [nats/token], mean over tokens",
    "entropy/gap": "exact - sampled [nats/token]; near 0 where the engine samples from pi_old",
    "entropy/target": "H_0 [nats/token]",
    "entropy/trend": "slope of the line through entropy/exact of the last monitor.window steps [nats/token/step]",
    "entropy/steps_to_leave": f"steps until that line leaves the target band; 0 outside it, at most {FAR}",
    "entropy/correct": "H over the tokens of correct responses [nats/token]; absent without one",
    "entropy/wrong": "H over the tokens of wrong responses [nats/token]; absent without one",
    "entropy/position_N": "H from the N-th response token to the next such N [nats/token]; absent without tokens there",
    "entropy/difficulty_N": "H on problems of difficulty N [nats/token]; only where the task names a difficulty",
    "entropy/solved_none": "H over groups without a correct response [nats/token]; absent without one",
    "entropy/solved_some": "H over groups with some correct responses [nats/token]; absent without one",
    "entropy/solved_all": "H over groups with correct responses alone [nats/token]; absent without one",
    "dcpo/temperature": "T of the target policy",
    "dcpo/alpha": "weight of the regulariser before mixing; 0 for methods without it",
    "dcpo/no_success_steps": "steps so far without any correct response: alpha was 0",
    "dcpo/regulariser_share": "mean |regulariser's part of the advantage| / mean |advantage|, over tokens trained on, "
    "those drawn from pi_old^T included; 0 for entropy_reg, whose bonus is no advantage",
    "dcpo/target_ratio_mean": "rho, mean over tokens; 1 in expectation",
    "dcpo/target_ratio_max": "rho, largest",
    "dcpo/target_ratio_p01": "rho, 1% quantile, to half a percent (histogram)",
    "dcpo/target_ratio_p50": "rho, median, to half a percent",
    "dcpo/target_ratio_p99": "rho, 99% quantile, to half a percent",
    "dcpo/target_ratio_ess": "(sum rho)^2 / (n sum rho^2): effective share of the tokens, in (0, 1]",
    "mismatch/prob_diff_mean": "|p_trainer - p_engine| of the sampled tokens, mean",
    "mismatch/prob_diff_max": "|p_trainer - p_engine| of the sampled tokens, largest",
    "mismatch/kl": "KL(engine || trainer) from the engine's samples [nats/token]; may be negative",
    "policy/loss": "loss that was minimised, mean over the step's updates (as all policy/*)",
    "policy/clip_fraction_high": "share of the tokens above 1 + loss.clip_high where that binds",
    "policy/clip_fraction_low": "share of the tokens below 1 - loss.clip_low where that binds",
    "policy/approx_kl": "log pi_old - log pi_theta of the sampled tokens [nats/token]",
    "policy/entropy": "H of pi_theta during the updates [nats/token]",
    "policy/grad_norm": "global gradient norm before clipping",
    "policy/learning_rate": "learning rate",
    "reward/timeouts": "comparisons so far that ran past reward.deadline",
    "reward/crashes": "grader processes so far that died",
    "weights/version": "version of the weights that the engines serve after this step",
    "monitor/window": "steps behind the trends, at most monitor.window",
    "monitor/reward_change": "rise of the line through rollout/reward_mean over the window",
    "monitor/form_change": "rise of the line through rollout/form over the window",
    "time/rollout": "seconds: responses and their grades",
    "time/checkpoint": "seconds: waiting for the checkpoint of the step before",
    "time/token_stats": "seconds: forward of pi_old, advantages",
    "time/train": "seconds: updates",
    "time/weight_sync": "seconds: new weights to every engine",
    "time/step": "seconds: all of the above",
    "time/monitor": "seconds: these statistics, not part of time/step",
    **{f"monitor/alert_{name}": f"steps so far with the alert: {cause.meaning}" for name, cause in CAUSES.items()},
}
"""Name in metrics.jsonl -> unit and meaning; N stands for a number."""

POSITION_EDGES = (0, 4, 16, 64, 256, 1024, 4096)
REPETITION_TAIL, REPETITION_GRAM = 512, 4
REPETITIVE = 0.5
"""A response that repeats more of its 4-grams than this has lost its form."""
LOG_RATIO_BOUND, LOG_RATIO_BINS = 10.0, 2000
"""Histogram of log rho: bins of 0.01 make quantiles right to half a percent; beyond the bounds they saturate."""
CHUNK_ROWS = 64
"""Rows looked at together: 64 x 8,192 fp32 values stay in the processor's cache over all passes."""


def batch_metrics(
    experiences: Sequence[DCPOExperience],
    *,
    grades: Sequence[Grade],
    prompts: Sequence[Prompt],
    alpha: float,
    mixing: objectives.Mixing,
) -> dict[str, float]:
    """rollout/*, group/*, entropy/*, mismatch/* and dcpo/* of one step's responses, in one pass over their tokens.

    Rows of all experiences together follow `grades`; `prompts` has one entry a group. `alpha` as used, before mixing.
    A row's response is one run of tokens; padding may hold anything. Token means weigh every token alike.
    """
    advantage_weight = objectives.mixing_weights(alpha=alpha, mixing=mixing)[0]
    responses = sum(len(e.rewards) for e in experiences)
    if len(grades) != responses or responses % len(prompts):
        raise ValueError(
            f"{responses} responses need as many grades, got {len(grades)}, and whole groups of {len(prompts)}"
            " prompts; pass grades and prompts of the same step"
        )
    size = responses // len(prompts)
    chunks = [
        _row_sums(e, slice(i, i + CHUNK_ROWS), advantage_weight=advantage_weight, group_size=size)
        for e in experiences
        for i in range(0, len(e.rewards), CHUNK_ROWS)
    ]
    rows = {name: torch.cat([chunk[name] for chunk in chunks]).double() for name in chunks[0]}
    histogram = rows.pop("ratio_histogram").reshape(len(chunks), -1).sum(0)
    reward = torch.cat([e.rewards for e in experiences]).double()
    length = torch.cat([e.response_length for e in experiences]).double()
    truncated = torch.cat([e.truncated for e in experiences]).bool()
    answered = torch.tensor([g.extracted is not None for g in grades])
    correct = reward > 0
    formed = ~truncated & (rows["repetition"] <= REPETITIVE)
    groups = correct.reshape(-1, size)
    tokens = float(rows["tokens"].sum())

    def mean(name: str) -> float:
        return float(rows[name].sum()) / max(tokens, 1.0)

    ratio, square = mean("ratio"), mean("ratio_square")
    return {
        "rollout/reward_mean": float(reward.mean()),
        "rollout/reward_std": float(reward.std()),
        "rollout/length_mean": float(length.mean()),
        "rollout/length_max": float(length.max()),
        "rollout/truncated_fraction": float(truncated.double().mean()),
        "rollout/repetition": float(rows["repetition"].mean()),
        "rollout/no_answer_fraction": 1.0 - float(answered.double().mean()),
        "rollout/form": float(formed[correct].double().mean()) if correct.any() else 1.0,
        "group/distinct_answers": _distinct_answers(grades, size),
        "group/all_correct": float(groups.all(1).double().mean()),
        "group/all_wrong": float((~groups).all(1).double().mean()),
        "entropy/exact": mean("entropy"),
        "entropy/sampled": -mean("logp"),
        "entropy/gap": mean("entropy") + mean("logp"),
        **_entropy_profile(rows, correct=correct, prompts=prompts, group_size=size),
        "dcpo/regulariser_share": _regulariser_share(experiences, rows),
        "dcpo/target_ratio_mean": ratio,
        "dcpo/target_ratio_max": float(rows["ratio_max"].max()),
        **{f"dcpo/target_ratio_p{q:02d}": _ratio_quantile(histogram, q / 100) for q in (1, 50, 99)},
        "dcpo/target_ratio_ess": ratio**2 / square if square else 0.0,
        "mismatch/prob_diff_mean": mean("prob_diff"),
        "mismatch/prob_diff_max": float(rows["prob_diff_max"].max()),
        "mismatch/kl": mean("kl"),
    }


def _row_sums(
    e: DCPOExperience, some: slice, *, advantage_weight: float, group_size: int
) -> dict[str, Float[Tensor, " rows ..."]]:
    """Sums over the tokens of each of some rows (fp32: pairwise sums of one response), and their histogram of log rho.

    The regulariser's part is advantage - weight * A of whatever `mix` the method has: 0 for GRPO.
    """
    mask = e.mask[some]
    outside = ~mask

    def inside(values: Tensor) -> Tensor:
        return values[some].masked_fill(outside, 0.0)

    trainer, engine = inside(e.action_log_probs), inside(e.rollout_log_probs)
    entropy, ratio = inside(e.entropy), inside(e.target_ratio)
    difference = (trainer.exp() - engine.exp()).abs_()
    advantage = reduce(torch.add, [inside(term) for term in e.advantage_terms])
    group = advantage_weight * objectives.group_advantage(reward=e.rewards, group_size=group_size)[some]
    regulariser = (advantage - group[:, None]).abs_().masked_fill_(outside, 0.0)
    log_ratio = ratio.log().clamp_(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).masked_fill_(outside, 2 * LOG_RATIO_BOUND)
    tokens = mask.sum(1)
    position_tokens, position_entropy = _position_sums(entropy, mask, tokens)
    return {
        "tokens": tokens,
        "entropy": entropy.sum(1),
        "logp": trainer.sum(1),
        "kl": (engine - trainer).sum(1),
        "prob_diff": difference.sum(1),
        "prob_diff_max": difference.amax(1),
        "ratio": ratio.sum(1),
        "ratio_square": ratio.square().sum(1),
        "ratio_max": ratio.amax(1),
        "ratio_histogram": torch.histc(log_ratio, LOG_RATIO_BINS, -LOG_RATIO_BOUND, LOG_RATIO_BOUND),
        "advantage": advantage.abs().sum(1),
        "regulariser": regulariser.sum(1),
        "position_tokens": position_tokens,
        "position_entropy": position_entropy,
        "repetition": _repetition(e.sequences[some, 1:], mask),
    }


def _regulariser_share(experiences: Sequence[DCPOExperience], rows: dict[str, Tensor]) -> float:
    """sum |regulariser's part| / sum |advantage| over the tokens trained on.

    On rows drawn from pi_old^T all of the advantage is the regulariser's; dcpo_expected's is its weight on each token.
    """
    parts = [(e, torch.zeros_like(e.rewards)) for e in experiences]
    replaced = torch.cat([n.bool() if e.replaced is None else e.replaced for e, n in parts])
    weight = torch.cat([n if e.expected_weight is None else e.expected_weight for e, n in parts])
    expected = weight.abs() * rows["tokens"]
    drawn = sum(
        float(reduce(torch.add, e.tempered.advantage_terms).masked_fill(~e.tempered.mask, 0.0).abs().sum())
        for e in experiences
        if e.tempered is not None
    )
    part = float((rows["regulariser"] + expected)[~replaced].sum()) + drawn
    whole = float((rows["advantage"] + expected)[~replaced].sum()) + drawn
    return part / whole if whole else 0.0


def _position_sums(values: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Float[Tensor, "rows bins"]]:
    """Tokens, and sums of `values` (0 outside the mask), from each of POSITION_EDGES to the next."""
    first = mask.to(torch.uint8).argmax(1)
    edges = torch.tensor((*POSITION_EDGES, mask.shape[1])).minimum(tokens[:, None])
    sums = F.pad(values.cumsum(1), (1, 0)).gather(1, first[:, None] + edges)
    return edges.diff(dim=1), sums.diff(dim=1)


def _repetition(tokens: Tensor, mask: Tensor) -> Float[Tensor, " rows"]:
    """1 - different n-grams / n-grams among the last tokens of each response; 0 where there is no n-gram."""
    n, time = REPETITION_GRAM, mask.shape[1]
    last = time - 1 - mask.flip(1).to(torch.uint8).argmax(1, keepdim=True)
    index = last - torch.arange(min(REPETITION_TAIL, time) - 1, -1, -1)
    inside = mask.gather(1, index.clamp(min=0)) & (index >= 0)
    tail = tokens.gather(1, index.clamp(min=0))
    count = max(tail.shape[1] - n + 1, 0)
    gram = torch.zeros(len(tail), count, dtype=torch.long)
    whole = torch.ones(len(tail), count, dtype=torch.bool)
    for k in range(n):  # a polynomial hash modulo 2^64 names a 4-gram
        gram = gram * 6364136223846793005 + tail[:, k : k + count] + 1
        whole &= inside[:, k : k + count]
    gram = gram.masked_fill(~whole, torch.iinfo(torch.long).max).sort(1).values  # what is not whole goes to the end
    total = whole.sum(1)
    repeated = (gram.diff(dim=1) == 0) & (torch.arange(1, max(count, 1)) < total[:, None])
    return repeated.sum(1) / total.clamp(min=1)


def _ratio_quantile(histogram: Float[Tensor, " bins"], share: float) -> float:
    """rho below which `share` of the tokens lie: the middle of its bin."""
    below = histogram.cumsum(0)
    index = int(torch.searchsorted(below, share * below[-1]).clamp(max=LOG_RATIO_BINS - 1))
    return math.exp(-LOG_RATIO_BOUND + (index + 0.5) * 2 * LOG_RATIO_BOUND / LOG_RATIO_BINS)


def _distinct_answers(grades: Sequence[Grade], group_size: int) -> float:
    groups = [grades[i : i + group_size] for i in range(0, len(grades), group_size)]
    return sum(len({g.extracted for g in group}) for group in groups) / len(groups)


def _entropy_profile(
    rows: dict[str, Tensor], *, correct: Tensor, prompts: Sequence[Prompt], group_size: int
) -> dict[str, float]:
    """H by position, difficulty, success of the response and of its group; parts without tokens are absent."""
    solved = correct.reshape(-1, group_size).sum(1).repeat_interleave(group_size)
    difficulty = torch.tensor([p.problem.difficulty for p in prompts]).repeat_interleave(group_size)
    parts = {
        "correct": correct,
        "wrong": ~correct,
        "solved_none": solved == 0,
        "solved_some": (solved > 0) & (solved < group_size),
        "solved_all": solved == group_size,
        **{f"difficulty_{level}": difficulty == level for level in sorted(set(difficulty.tolist()) - {0})},
    }
    sums = {name: (rows["entropy"][part].sum(), rows["tokens"][part].sum()) for name, part in parts.items()}
    for i, first in enumerate(POSITION_EDGES):
        sums[f"position_{first}"] = (rows["position_entropy"][:, i].sum(), rows["position_tokens"][:, i].sum())
    return {f"entropy/{name}": float(total / tokens) for name, (total, tokens) in sums.items() if tokens}


# --- over steps ------------------------------------------------------------------------------------------------------

HISTORY = ("entropy/exact", "rollout/reward_mean", "rollout/form")
"""Metrics whose last `monitor.window` values are kept."""


class Monitor:
    """Windows over the steps, the causes that hold, and what the recipe wants done about them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.bounds = recipe, recipe.monitor
        method = methods.METHODS[recipe.method.name]
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
        metrics = metrics | self._trends(metrics["entropy/exact"])
        alerts = []
        for name, cause in self.causes.items():
            self.streak[name] = self.streak[name] + 1 if cause.holds(metrics, self.bounds) else 0
            active = self.streak[name] >= self.bounds.patience
            self.alerted[name] += active
            action = getattr(self.bounds, f"on_{name}")
            if active and (action == "stop" or (action == "warn" and self.streak[name] == self.bounds.patience)):
                alerts.append(Alert.of(name, step=step, metrics=metrics, recipe=self.recipe))
        self.stopping = [alert for alert in alerts if alert.action == "stop"]
        return metrics | {f"monitor/alert_{name}": float(count) for name, count in self.alerted.items()}, alerts

    def _trends(self, entropy: float) -> dict[str, float]:
        trend = _slope(self.history["entropy/exact"])
        return {
            "entropy/trend": trend,
            "entropy/steps_to_leave": self._steps_to_leave(entropy, trend),
            "monitor/window": float(len(self.history["entropy/exact"])),
            "monitor/reward_change": _rise(self.history["rollout/reward_mean"]),
            "monitor/form_change": _rise(self.history["rollout/form"]),
        }

    def _steps_to_leave(self, entropy: float, trend: float) -> float:
        low, high = band(self.recipe.method.target_entropy, self.bounds)
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
        own = self.state_dict()
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


def unknown_metrics(names: Sequence[str]) -> Iterator[str]:
    """Names that METRICS does not explain."""
    for name in names:
        stem, _, number = name.rpartition("_")
        if name not in METRICS and not (number.isdigit() and f"{stem}_N" in METRICS):
            yield name
