"""Slow twin of the objectives: plain Python floats and loops, written from the equations of arXiv 2601.12730 and,
for the rows from other papers, those of docs/methods.md.

It shares no code with the package. Gradients are analytic, with respect to the logits:
d log pi(a) / d z_b = [a = b] - pi(b),  d H / d z_b = -pi(b) (log pi(b) + H),
d sum_a q(a) log pi(a) / d z_b = q(b) - pi(b).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Rows = list[list[float]]


@dataclass
class Batch:
    logits: list[Rows]
    """[row][token][vocabulary] of pi_theta."""
    old_logits: list[Rows]
    """The same of pi_old."""
    tokens: list[list[int]]
    mask: Rows
    reward: list[float]
    tempered: list[bool]
    """Rows drawn from pi_old^T."""
    group_size: int
    temperature: float
    lots: Rows
    """A number in [0, 1) for each token; clip_cov leaves out the tokens with the smallest."""


@dataclass
class Settings:
    alpha: float = 0.3
    mixing: str = "convex"
    aggregation: str = "sequence_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coefficient: float = 0.015
    beta: float = 0.4
    kappa: float = 2.0
    scope_weight: float = 1 / 64
    clip_cov: tuple[float, float, float] = (0.1, 0.1, 0.8)
    """(share, low, high)"""
    kl_cov: tuple[float, float] = (0.1, 1.3)
    """(share, beta)"""
    sample_weight: float = 0.4
    threshold: float = 0.3


def softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    top = max(z)
    e = [math.exp((x - top) / temperature) for x in z]
    return [x / sum(e) for x in e]


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0.0)


def group_advantages(reward: list[float], group_size: int) -> list[float]:
    """(R - mean) / (std + 1e-6) with the unbiased standard deviation of the group."""
    out = []
    for start in range(0, len(reward), group_size):
        group = reward[start : start + group_size]
        mean = sum(group) / group_size
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (group_size - 1))
        out += [0.0 if max(group) == min(group) else (r - mean) / (std + 1e-6) for r in group]
    return out


def surrogate(ratio: float, advantage: float, s: Settings) -> tuple[float, float]:
    """(S, dS / d log r) with S = min[r A, clip(r) A], bounded by dual_clip * A below where A < 0."""
    clipped = min(max(ratio, 1.0 - s.clip_low), 1.0 + s.clip_high)
    value, slope = ratio * advantage, ratio * advantage
    if clipped * advantage < value:
        value, slope = clipped * advantage, 0.0
    if s.dual_clip is not None and advantage < 0.0 and value < s.dual_clip * advantage:
        value, slope = s.dual_clip * advantage, 0.0
    return value, slope


def advantages_of(name: str, a: float, r: float, rho: float, h: float, tempered: bool, s: Settings) -> list[float]:
    """The advantages of one token whose surrogates are summed, method by method."""
    keep, add = 1.0, s.alpha
    if s.mixing == "convex":
        w = s.alpha / (1.0 + s.alpha)
        keep, add = 1.0 - w, w
    if name in ("grpo", "entropy_reg", "adaptive_entropy", "kl_cov", "clip_cov"):
        return [a]
    if name == "dcpo":
        return [keep * a + add * rho * r]
    if name == "dcpo_wo_double_is":
        return [keep * a + add * r]
    if name == "dcpo_wo_reinforce":
        return [keep * a + add * rho * a]
    if name == "j1":
        return [keep * a, add * r]
    if name == "j3":
        return [keep * a, add * rho * r]
    if name == "j2":
        return [add * r] if tempered else [keep * a]
    if name == "j4":
        return [add * r / rho] if tempered else [keep * a]
    if name == "entropy_adv":
        return [a + min(s.beta * h, abs(a) / s.kappa)]
    if name == "aepo":
        return [1.0] if tempered else [a]
    if name == "dcpo_expected":
        return [keep * a]
    if name == "scope_rl":
        return [s.scope_weight * r] if tempered else [a]
    raise KeyError(name)


def kl_to_reference(logp: float, start: float, old: float, estimator: str, unbiased: bool) -> tuple[float, float]:
    """(estimate, its slope in log pi_theta) of one sampled token, by the formulas of the estimators."""
    d = logp - start
    value, slope = {
        "k1": (d, 1.0),
        "k2": (d * d / 2, d),
        "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    }[estimator]
    return value, math.exp(logp - old) * d if unbiased else slope


def chosen_tokens(name: str, batch: Batch, advantage: list[float], s: Settings) -> set[tuple[int, int]]:
    """(row, token) of those that clip_cov leaves out or kl_cov holds: by (A - mean A)(log pi_old - mean log pi_old)."""
    values = []
    for i, row in enumerate(batch.mask):
        for t, inside in enumerate(row):
            if inside:
                old = softmax(batch.old_logits[i][t])
                values.append((i, t, advantage[i], math.log(old[batch.tokens[i][t]])))
    mean_a = sum(v[2] for v in values) / len(values)
    mean_logp = sum(v[3] for v in values) / len(values)
    covariance = {(i, t): (a - mean_a) * (logp - mean_logp) for i, t, a, logp in values}
    if name == "clip_cov":
        share, low, high = s.clip_cov
        some = [token for token, value in covariance.items() if low < value < high]
        return set(sorted(some, key=lambda token: batch.lots[token[0]][token[1]])[: max(int(share * len(values)), 1)])
    if name == "kl_cov":
        return set(sorted(covariance, key=lambda token: -covariance[token])[: max(int(s.kl_cov[0] * len(values)), 1)])
    return set()


def averaging_weights(name: str, batch: Batch, s: Settings) -> Rows:
    """d objective / d token value: avg over rows of row means, or over tokens; some average each origin apart."""
    apart = name in ("j2", "j4", "scope_rl")
    weights = []
    for i, row in enumerate(batch.mask):
        peers = [m for j, m in enumerate(batch.mask) if not apart or batch.tempered[j] == batch.tempered[i]]
        if s.aggregation == "token_mean":
            weights.append([m / sum(sum(p) for p in peers) for m in row])
        else:
            rows = sum(1 for p in peers if sum(p) > 0)
            weights.append([m / sum(row) / rows if m else 0.0 for m in row])
    return weights


def loss_and_gradient(name: str, batch: Batch, s: Settings) -> tuple[float, list[Rows]]:
    """Loss (minimised, minus the objective) and its gradient with respect to every logit of pi_theta."""
    advantage = group_advantages(batch.reward, batch.group_size)
    weights = averaging_weights(name, batch, s)
    chosen = chosen_tokens(name, batch, advantage, s)
    loss, gradient = 0.0, []
    for i, row in enumerate(batch.logits):
        gradient.append([[0.0] * len(z) for z in row])
        for t, z in enumerate(row):
            if not batch.mask[i][t]:
                continue
            a, p = batch.tokens[i][t], softmax(z)
            old = softmax(batch.old_logits[i][t])
            target = softmax(batch.old_logits[i][t], batch.temperature)  # pi_old^T
            rho, ratio = target[a] / old[a], p[a] / old[a]
            r, h = batch.reward[i], entropy(p)
            coefficient = 1.0
            if name == "entropic":  # a coefficient of the loss of positive and of negative samples
                values, sure = [advantage[i]], old[a] > s.threshold
                coefficient += s.sample_weight * sure * ((advantage[i] > 0) - (advantage[i] < 0))
            else:
                values = advantages_of(name, advantage[i], r, rho, entropy(old), batch.tempered[i], s)
            if name == "clip_cov" and (i, t) in chosen:
                coefficient = 0.0
            for value, slope in (surrogate(ratio, x, s) for x in values):
                loss -= weights[i][t] * coefficient * value
                for b in range(len(z)):
                    gradient[i][t][b] -= weights[i][t] * coefficient * slope * ((a == b) - p[b])
            if name == "kl_cov" and (i, t) in chosen:
                loss += weights[i][t] * s.kl_cov[1] * abs(math.log(ratio))
                for b in range(len(z)):
                    sign = (ratio > 1.0) - (ratio < 1.0)
                    gradient[i][t][b] += weights[i][t] * s.kl_cov[1] * sign * ((a == b) - p[b])
            if name in ("entropy_reg", "adaptive_entropy"):
                loss -= weights[i][t] * s.entropy_coefficient * h
                for b in range(len(z)):
                    gradient[i][t][b] += weights[i][t] * s.entropy_coefficient * p[b] * (math.log(p[b]) + h)
            if name == "dcpo_expected":
                add = s.alpha / (1.0 + s.alpha) if s.mixing == "convex" else s.alpha
                loss -= weights[i][t] * add * r * sum(q * math.log(x) for q, x in zip(target, p, strict=True))
                for b in range(len(z)):
                    gradient[i][t][b] -= weights[i][t] * add * r * (target[b] - p[b])
    return loss, gradient
