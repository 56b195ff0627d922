"""Rows of responses, and micro-batches of them packed without padding. torch alone."""

from dataclasses import dataclass

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

    def __len__(self) -> int:
        return len(self.sequences)

    def part(self, index: int, parts: int) -> "Rows":
        """Rows `index` of `parts` equal shares. Raises ValueError where the rows do not divide."""
        if len(self) % parts:
            raise ValueError(
                f"{len(self)} rows do not divide over {parts} data-parallel ranks; change the batch or the mesh"
            )
        share = slice(index * len(self) // parts, (index + 1) * len(self) // parts)
        old_logp = None if self.old_logp is None else self.old_logp[share]
        masks = self.attention_mask[share], self.action_mask[share]
        return Rows(self.sequences[share], *masks, old_logp, tuple(a[share] for a in self.advantages))


@dataclass(frozen=True)
class Packed:
    """Some rows without their padding, one after the other: one micro-batch."""

    tokens: Int[Tensor, "1 tokens"]
    positions: Int[Tensor, "1 tokens"]
    bounds: Int[Tensor, "rows+1"]
    """Where each row begins in `tokens`, and the end of the last: cu_seqlens."""
    longest: int
    """Tokens of the longest row."""
    selected: Int[Tensor, " actions"]
    """Where in `tokens` each action is taken."""
    targets: Int[Tensor, " actions"]
    """The token chosen by each action."""
    rows: slice
    """Which of the rank's rows these are."""


def pack(rows: Rows, part: slice) -> Packed:
    """Rows `part` as one packed micro-batch."""
    keep = rows.attention_mask[part].bool()
    actions = rows.action_mask[part].bool()
    lengths = keep.sum(1)
    flat = (keep.flatten().cumsum(0) - 1).view_as(keep)  # index in the pack of every kept token
    return Packed(
        tokens=rows.sequences[part][keep][None],
        positions=(keep.cumsum(1) - 1)[keep][None],
        bounds=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        longest=int(lengths.max()),
        selected=flat[:, :-1][actions],
        targets=rows.sequences[part][:, 1:][actions],
        rows=part,
    )


def micro_batches(rows: Rows, size: int) -> list[Packed]:
    """The rows in packs of at most `size` rows."""
    return [pack(rows, slice(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
