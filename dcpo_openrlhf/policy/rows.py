"""Rows of responses, as they are dealt over data ranks. torch alone."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Padded responses of one rank. Action t chooses token t + 1: action tensors are one shorter than sequences."""

    sequences: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    action_mask: Bool[Tensor, "batch time-1"]
    old_logp: Float[Tensor, "batch time-1"] | None = None
    advantages: tuple[Float[Tensor, "batch time-1"], ...] = ()
    """The clipped surrogates of these are summed; one for most methods."""
    correction: Float[Tensor, "batch time-1"] | None = None
    """Factor of each token's weight in the average; None: 1."""
    reference_logp: Float[Tensor, "batch time-1"] | None = None
    """log pi_ref of the starting model; None: no KL to it."""
    scale: Float[Tensor, " batch"] | None = None
    """Factor of each row's weight in the average; None: 1."""
    entropy_coefficient: float = 0.0
    """lambda of avg H_t in the objective, with gradient."""
    expected_weight: Float[Tensor, " batch"] | None = None
    """Weight of sum_a pi^T(a) log pi_theta(a) on each row's tokens; None: no such term.

    pi^T is that of the policy in the update: pi_old^T in a step's first one, close to it in the later ones, since
    keeping pi_old's whole distribution would take the memory of the logits.
    """
    expected_temperature: float | None = None
    """T of that sum."""
    penalty_weight: Float[Tensor, "batch time-1"] | None = None
    """Weight of |log pi_theta - log pi_old| of each action, which the objective loses; None: no such term."""
    index: Int[Tensor, " batch"] | None = None
    """Where each row stands in the mini-batch that `part` was called on."""

    def __len__(self) -> int:
        return len(self.sequences)

    def part(self, index: int, parts: int) -> "Rows":
        """Share `index` of `parts`: equally many rows and about equally many tokens; `index` says which rows.

        Raises ValueError where the rows do not divide.
        """
        if len(self) % parts:
            raise ValueError(
                f"{len(self)} rows do not divide over {parts} data-parallel ranks; change the batch or the mesh"
            )
        longest_first = self.attention_mask.sum(1).argsort(descending=True, stable=True).view(-1, parts)
        longest_first[1::2] = longest_first[1::2].flip(1)  # dealt to and fro
        chosen = longest_first[:, index].sort().values
        return replace(self.take(chosen), index=chosen)

    def take(self, chosen: Int[Tensor, " rows"]) -> "Rows":
        """The chosen rows, in that order."""
        return replace(self, **{field.name: _take(getattr(self, field.name), chosen) for field in fields(self)})


def _take(value: Any, chosen: Tensor) -> Any:
    """The chosen rows of a tensor or of each tensor of a tuple; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_take(item, chosen) for item in value)
    return value[chosen] if isinstance(value, Tensor) else value


def join(first: Rows, second: Rows) -> Rows:
    """The rows of both, those of the first in front; the shorter ones are padded on the right."""

    def both(a: Any, b: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(both(x, y) for x, y in zip(a, b, strict=True))
        if not isinstance(a, Tensor):
            return a
        if a.dim() == 1:
            return torch.cat([a, b])
        time = max(a.shape[1], b.shape[1])
        return torch.cat([torch.nn.functional.pad(x, (0, time - x.shape[1])) for x in (a, b)])

    return replace(first, **{f.name: both(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)})
