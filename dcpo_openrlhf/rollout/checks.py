"""Values that no sound rollout or forward pass gives: one error that names step, prompt, response, field and remedy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcpo_openrlhf.rollout.tasks import Prompt

ROUNDING = 1e-4
"""Log-probabilities may exceed 0 by this much [nats] before they count as impossible."""
LARGEST = torch.finfo(torch.float32).max
LOG_PROB, ENTROPY = (-LARGEST, ROUNDING), (-ROUNDING, LARGEST)
"""Least and largest possible value [nats]."""


class ImpossibleValue(ValueError):
    """A value that is stale or cannot be; training on it would spoil the policy silently."""


def require_possible_samples(
    samples: Sequence[Any], *, step: int, prompts: Sequence[Prompt], group_size: int, versions: range | None
) -> None:
    """Raise ImpossibleValue unless `samples` are whole groups of graded, current, consistent responses.

    samples: Experiences [1, time] in prompt order. versions: of weights that may have drawn them, the policy's last;
    None accepts any (off-policy).
    """
    if len(samples) != len(prompts) * group_size:
        raise ImpossibleValue(
            f"step {step}: a group must be whole, {len(prompts)} prompts * group_size {group_size} responses, "
            f"got {len(samples)}; some were lost between engine and trainer: see the engine's log"
        )
    for i, sample in enumerate(samples):
        where = _where(step, prompts[i // group_size], i % group_size)
        if sample.prompts and sample.prompts[0] != prompts[i // group_size].text:
            raise ImpossibleValue(
                f"{where}: field prompts is that of another group ({sample.prompts[0][:60]!r}); "
                "the responses are out of order: see the generator"
            )
        _one_sample(sample, where, versions)


def _one_sample(sample: Any, where: str, versions: range | None) -> None:
    reward, mask = float(sample.rewards[0]), sample.action_mask[0].bool()
    if not math.isfinite(reward):
        raise ImpossibleValue(f"{where}: field rewards = {reward} must be finite; check the grader")
    if sample.scores is not None and float(sample.scores[0]) not in (0.0, 1.0):
        raise ImpossibleValue(f"{where}: field scores = {float(sample.scores[0])}, the success, must be 0 or 1")
    length = int(sample.response_length[0])
    if int(mask.sum()) != length or length == 0:
        raise ImpossibleValue(
            f"{where}: fields action_mask and response_length disagree, {int(mask.sum())} tokens in the mask, "
            f"length {length}; a response has at least one token and the mask marks each: see the engine's answer"
        )
    _require_log_probs("rollout_log_probs", sample.rollout_log_probs[0], mask, where)
    version = int(sample.info["weight_version"])
    if versions is not None and version not in versions:
        late = len(versions) - 1  # rollout.ahead, 0 for what is drawn from pi_old itself
        raise ImpossibleValue(
            f"{where}: field weight_version = {version} is {'stale' if version < versions[-1] else 'impossible'}, the "
            f"policy is at {versions[-1]}: not {f'within rollout.ahead = {late} of it' if late else 'on-policy'}. "
            "Look for a failed sync, or set monitor.on_policy_only=false"
        )


def require_possible_statistics(
    experiences: Sequence[Any], *, step: int, prompts: Sequence[Prompt], group_size: int
) -> None:
    """Raise ImpossibleValue where the policy's own log-probs or entropies of the step's updates cannot be."""
    row = 0
    for experience in experiences:
        if not _possible(experience, experience.mask):
            for i in range(len(experience.mask)):
                _name_impossible(experience, i, _where(step, prompts[(row + i) // group_size], (row + i) % group_size))
        row += len(experience.mask)


def _possible(experience: Any, mask: Tensor) -> bool:
    return (
        _within(experience.action_log_probs, mask, *LOG_PROB)
        and _within(experience.tempered_log_probs, mask, *LOG_PROB)
        and _within(experience.entropy, mask, *ENTROPY)
    )


def _name_impossible(experience: Any, i: int, where: str) -> None:
    """Raise ImpossibleValue where row `i` holds what cannot be."""
    mask = experience.mask[i]
    _require_log_probs("action_log_probs", experience.action_log_probs[i], mask, where)
    _require_log_probs("tempered_log_probs", experience.tempered_log_probs[i], mask, where)
    if not _within(experience.entropy[i], mask, *ENTROPY):
        raise ImpossibleValue(
            f"{where}: field entropy = {float(experience.entropy[i][mask].min())} must be finite and >= 0; "
            "look at the logits: a padded vocabulary row or a broken checkpoint"
        )


def _require_log_probs(field: str, values: Tensor, mask: Tensor, where: str) -> None:
    if not _within(values, mask, *LOG_PROB):
        inside = values[mask]
        seen = float(inside[~(torch.isfinite(inside) & (inside <= ROUNDING))].flatten()[0])
        raise ImpossibleValue(
            f"{where}: field {field} = {seen} must be finite and <= 0; it is no log-probability: "
            "look for padded vocabulary rows, a half-synced engine or weights that are not finite"
        )


def _within(values: Tensor, mask: Tensor, low: float, high: float) -> bool:
    """Whether low <= values <= high inside the mask, which NaN is not; bounds that are finite leave infinity out."""

    def bounded(some: np.ndarray) -> bool:
        return not some.size or bool(some.min() >= low and some.max() <= high)

    found = values.numpy()
    return bounded(found) or bounded(found[mask.numpy()])  # without a copy, where what is outside is sound too


def _where(step: int, prompt: Prompt, response: int) -> str:
    return f"step {step}, prompt {prompt.problem.id!r}, response {response}"
