"""What both trainers do with the logits of a micro-batch: token statistics, the loss, and the sums that are logged.

Needs neither megatron-core nor DeepSpeed. The vocabulary may be sharded over the ranks of `tp_group`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dcpo_openrlhf import objectives
from dcpo_openrlhf.divergences import kl_estimate
from dcpo_openrlhf.policy.packing import Packed
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.policy.token_stats import token_stats
from dcpo_openrlhf.recipe.schema import KL, Loss

ROUND = 8
"""Micro-batches of a forward pass, for each pipeline stage, after which ranks ask whether they are to stop."""


class Stopped(RuntimeError):
    """A forward pass was left between micro-batches, as the driver asked; the weights are as before."""


SUMS = ("loss", "count", "clip_high", "clip_low", "kl", "kl_reference", "entropy", "tokens")
"""What `policy_loss` adds up for `metrics`."""


def blank_statistics(rows: Rows, temperatures: list[float]) -> dict[str, Tensor]:
    """{"logp", "entropy"} [batch, time-1] and "tempered_logp" [batch, time-1, temperatures], all 0."""
    batch, time = rows.action_mask.shape
    return {
        "logp": torch.zeros(batch, time),
        "entropy": torch.zeros(batch, time),
        "tempered_logp": torch.zeros(batch, time, len(temperatures)),
    }


def collect_statistics(
    out: dict[str, Tensor],
    packed: Packed,
    logits: Float[Tensor, "actions shard"],
    *,
    temperatures: list[float],
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> None:
    """Put the statistics of the micro-batch's actions where they belong in `out`."""
    stats = token_stats(
        logits,
        packed.targets.to(logits.device),
        temperatures=temperatures,
        tp_group=tp_group,
        vocab_size=vocab_size,
    )
    for name, values in out.items():
        values.flatten(0, 1)[packed.actions] = getattr(stats, name).float().cpu()


def policy_loss(
    rows: Rows,
    packed: Packed,
    logits: Float[Tensor, "actions shard"],
    *,
    loss: Loss,
    kl: KL,
    entropy_coefficient: float = 0.0,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""], dict[str, Tensor]]:
    """(loss sum, count it is to be divided by, SUMS to log) of one micro-batch; overwrites the logits in backward."""
    assert rows.old_logp is not None and rows.advantages
    device = logits.device

    def of_actions(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[packed.actions].to(device)

    expected_weight = None
    if rows.expected_weight is not None:
        expected_weight = of_actions(rows.expected_weight[:, None].expand_as(rows.action_mask))
    stats = token_stats(
        logits,
        packed.targets.to(device),
        temperatures=[],
        tp_group=tp_group,
        vocab_size=vocab_size,
        entropy_grad=entropy_coefficient > 0,
        expected_temperature=rows.expected_temperature,
        overwrite_logits=True,  # nothing else reads them: their gradient takes their place
    )
    old_logp, to_reference = of_actions(rows.old_logp), None
    every = torch.ones_like(stats.logp, dtype=torch.bool)
    if rows.reference_logp is not None:
        to_reference = _to_reference(stats.logp, of_actions(rows.reference_logp), old_logp, every, kl)
    terms = objectives.objective_terms(
        logp=stats.logp,
        old_logp=old_logp,
        advantages=tuple(of_actions(advantage) for advantage in rows.advantages),
        weight=of_actions(_token_weight(rows, loss)),
        mask=every,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        entropy=stats.entropy if entropy_coefficient > 0 else None,
        entropy_coefficient=entropy_coefficient,
        expected_logp=stats.expected_logp,
        expected_weight=expected_weight,
        kl=to_reference,
        kl_coefficient=kl.coefficient if kl.use_loss else 0.0,
        penalty_weight=None if rows.penalty_weight is None else of_actions(rows.penalty_weight),
    )
    count = objectives.loss_denominator(mask=rows.action_mask[packed.rows].bool(), aggregation=loss.aggregation)
    sums = {
        "loss": terms.loss_sum.detach(),
        "count": count,
        "clip_high": terms.clip_high_sum,
        "clip_low": terms.clip_low_sum,
        "kl": terms.kl_sum,
        "kl_reference": torch.zeros(()) if to_reference is None else to_reference.detach().sum(),
        "entropy": stats.entropy.detach().sum(),
        "tokens": terms.token_count,
    }
    return terms.loss_sum, count.int().to(device), {k: v.double().cpu() for k, v in sums.items()}


def _to_reference(logp: Tensor, reference_logp: Tensor, old_logp: Tensor, mask: Tensor, kl: KL) -> Tensor:
    return kl_estimate(
        logp=logp,
        reference_logp=reference_logp,
        old_logp=old_logp,
        mask=mask,
        estimator=kl.estimator,
        unbiased_gradient=kl.unbiased_gradient,
    )


def _token_weight(rows: Rows, loss: Loss) -> Float[Tensor, "batch time-1"]:
    weight = objectives.token_weight(mask=rows.action_mask.bool(), aggregation=loss.aggregation)
    if rows.scale is not None:
        weight = weight * rows.scale[:, None]
    return weight if rows.correction is None else weight * rows.correction


def require_going_on(asked: bool, device: torch.device) -> None:
    """Raise Stopped on every rank where any was asked to stop; a collective of all ranks."""
    flag = torch.tensor(asked, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    if flag:
        raise Stopped("the forward pass was stopped between micro-batches; the weights are as before")


def total(sums: list[dict[str, Tensor]]) -> Float[Tensor, "sums"]:
    """SUMS of this rank's micro-batches, added up in float64; what is to be summed over ranks for `metrics`."""
    out = torch.zeros(len(SUMS), dtype=torch.float64)
    for micro in sums:
        out += torch.stack([micro[name] for name in SUMS])
    return out


def metrics(over_ranks: Float[Tensor, "sums"], *, reference: bool = False) -> dict[str, float]:
    """Metrics of the whole mini-batch from the SUMS of all its ranks; with the KL to the starting model if there."""
    value = dict(zip(SUMS, over_ranks.tolist(), strict=True))
    tokens = max(value["tokens"], 1.0)
    to_reference = {"policy/kl_reference": value["kl_reference"] / tokens} if reference else {}
    return to_reference | {
        "policy/loss": value["loss"] / max(value["count"], 1.0),
        "policy/clip_fraction_high": value["clip_high"] / tokens,
        "policy/clip_fraction_low": value["clip_low"] / tokens,
        "policy/approx_kl": value["kl"] / tokens,
        "policy/entropy": value["entropy"] / tokens,
    }


def require_finite(name: str, value: float, state: str) -> None:
    """Raise FloatingPointError where `value` is not finite; `state` says what the weights are then."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {name} of an update must be finite, got {value}; {state}. "
            "Look at mismatch/* and dcpo/* of the last steps, or lower optimizer.learning_rate"
        )


def greedy(
    prompts: list[list[int]], *, next_tokens: Callable[[Rows], Any], max_new_tokens: int, eos: int
) -> list[list[int]]:
    """The most likely continuation of each prompt, end token included; one forward a token, for checks alone.

    next_tokens: rows, each with one action, after its last token -> the most likely token of each row.
    """
    sequences, done = [list(p) for p in prompts], [False] * len(prompts)
    for _ in range(max_new_tokens):
        longest = max(map(len, sequences))
        tokens = torch.tensor([s + [eos] * (longest + 1 - len(s)) for s in sequences])
        ends = torch.tensor([len(s) for s in sequences])[:, None]
        columns = torch.arange(longest + 1)[None]
        chosen = next_tokens(Rows(tokens, columns < ends + 1, (columns == ends)[:, 1:]))
        for i, token in enumerate(chosen.tolist()):
            if not done[i]:
                sequences[i].append(token)
                done[i] = token == eos
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]
