"""The entropy monitor: what a step's tokens and answers say, where it leads, and which cause is behind it.

Statistics (`batch_metrics`) -> windows over steps (`Monitor`) -> causes (monitor_causes) -> sinks (monitor_sinks).
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcpo_openrlhf import objectives
from dcpo_openrlhf.experience import CHUNK_ROWS, DCPOExperience
from dcpo_openrlhf.reward.pool import Grade
from dcpo_openrlhf.rollout.tasks import Prompt

POSITION_EDGES = (0, 4, 16, 64, 256, 1024, 4096)
REPETITION_TAIL, REPETITION_GRAM = 512, 4
REPETITIVE = 0.5
"""A response that repeats more of its 4-grams than this has lost its form."""
LOG_RATIO_BOUND, LOG_RATIO_BINS = 10.0, 2000
"""Histogram of log rho: bins of 0.01 make quantiles right to half a percent; beyond the bounds they saturate."""


def batch_metrics(
    experiences: Sequence[DCPOExperience],
    *,
    grades: Sequence[Grade],
    prompts: Sequence[Prompt],
    alpha: float,
    mixing: objectives.Mixing,
) -> dict[str, float]:
    """rollout/*, group/*, entropy/*, mismatch/* and dcpo/* of one step's responses, in one pass over their tokens.

    Rows of all experiences together, groups that are left aside too, follow `grades`; `prompts` has one entry a group;
    `alpha` as used, before mixing. A response is one run of tokens, padding anything; means weigh every token alike.
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
    correct = torch.cat([e.success for e in experiences]) > 0
    formed = ~truncated & (rows["repetition"] <= REPETITIVE)
    groups = correct.reshape(-1, size)
    tokens = float(rows["tokens"].sum())

    def mean(name: str) -> float:
        return float(rows[name].sum()) / max(tokens, 1.0)

    ratio, square = mean("ratio"), mean("ratio_square")
    return {
        "rollout/reward_mean": float(reward.mean()),
        "rollout/reward_std": float(reward.std()),
        "rollout/success_rate": float(correct.double().mean()),
        "rollout/length_mean": float(length.mean()),
        "rollout/length_max": float(length.max()),
        "rollout/truncated_fraction": float(truncated.double().mean()),
        "rollout/repetition": float(rows["repetition"].mean()),
        "rollout/no_answer_fraction": sum(g.extracted is None for g in grades) / len(grades),
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
    advantage = reduce(torch.add, [inside(term) for term in e.advantage_terms] or [torch.zeros_like(trainer)])
    group = advantage_weight * objectives.group_advantage(reward=e.rewards, group_size=group_size)[some]
    if e.filler is not None:
        group = group.masked_fill(e.filler[some], 0.0)
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
    replaced = torch.cat(
        [torch.full_like(n, e.aside, dtype=torch.bool) if e.replaced is None else e.replaced for e, n in parts]
    )
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


def ages(e: DCPOExperience, policy_version: int) -> Int[Tensor, " batch"]:
    """Weight versions from those that drew each response to pi_old: 0 where it is drawn from pi_old itself."""
    return policy_version - e.info["weight_version"].long()


def age_metrics(experiences: Sequence[DCPOExperience], *, policy_version: int) -> dict[str, float]:
    """rollout/age_* of one step's responses."""
    found = torch.cat([ages(e, policy_version) for e in experiences])
    return {"rollout/age_mean": float(found.double().mean()), "rollout/age_max": float(found.max())}


def correction_metrics(experiences: Sequence[DCPOExperience], *, policy_version: int) -> dict[str, float]:
    """correction/* of one step's tokens, those drawn from pi_old^T included; nothing where none are corrected.

    By age too, where any response has one above 0.
    """
    trained = [e for own in experiences for e in (own, own.tempered) if e is not None and e.correction is not None]
    if not trained:
        return {}
    weight = torch.cat([e.correction[e.mask].double() for e in trained])
    outside = torch.cat([e.outside[e.mask] for e in trained])
    age = torch.cat([ages(e, policy_version)[:, None].expand_as(e.mask)[e.mask] for e in trained])
    found = _weights(weight, outside)
    for n in age.unique().tolist() if age.any() else []:
        by_age = _weights(weight[age == n], outside[age == n])
        found |= {f"{name}_age_{n}": value for name, value in by_age.items()}
    return found


def _weights(weight: Float[Tensor, " tokens"], outside: Bool[Tensor, " tokens"]) -> dict[str, float]:
    return {
        "correction/outside": float(outside.double().mean()),
        "correction/weight_mean": float(weight.mean()),
        "correction/ess": float(weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-300)),
    }
