"""Rows of responses, dealt over data ranks, and micro-batches of them packed without padding. torch alone."""

from collections.abc import Callable
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


@dataclass(frozen=True)
class Layout:
    """How the ranks of one replica share the tokens of a micro-batch."""

    context_rank: int = 0
    context_size: int = 1
    """Each row is cut in 2 * context_size chunks; rank r holds chunks r and 2 * context_size - 1 - r."""
    sequence_split: int = 1
    """Tensor ranks that share the tokens of a context rank (sequence parallelism)."""
    equal: bool = False
    """Every micro-batch is filled up to the longest: the interleaved schedule exchanges tensors of one size."""

    @property
    def row_multiple(self) -> int:
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def multiple(self) -> int:
        """What the length of a micro-batch is a multiple of."""
        return self.row_multiple * self.sequence_split


@dataclass(frozen=True)
class Packed:
    """Some rows without their padding, one after the other: one micro-batch, as one context rank sees it.

    Only what `Layout` needs is filled up: a row to its row_multiple, the whole by a row of which no action is taken.
    """

    tokens: Int[Tensor, "1 tokens"]
    """Those of this context rank."""
    bounds: Int[Tensor, "rows+1"]
    """Where each row begins among the tokens of all context ranks, and the end of the last: cu_seqlens."""
    longest: int
    """Tokens of the longest row."""
    selected: Int[Tensor, " actions"]
    """Where in `tokens` each action is taken."""
    targets: Int[Tensor, " actions"]
    """The token chosen by each action."""
    actions: Int[Tensor, " actions"]
    """Where each action stands in the flattened [batch, time-1] tensors of the rows."""
    rows: Int[Tensor, " rows"]
    """Which of the rank's rows these are."""


def context_share(bounds: Int[Tensor, "rows+1"], rank: int, size: int) -> Int[Tensor, " tokens"]:
    """Positions, among the tokens of all context ranks, of those that `rank` of `size` holds, in its order."""
    lengths = bounds.diff().long()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=bounds.device), lengths)
    chunk = (torch.arange(len(row), device=bounds.device) - bounds[:-1][row]) // (lengths // (2 * size))[row]
    return ((chunk == rank) | (chunk == 2 * size - 1 - rank)).nonzero()[:, 0]


def pack(rows: Rows, chosen: list[int], layout: Layout = Layout(), *, least: int = 1) -> Packed:
    """The chosen rows (maybe none) as one packed micro-batch of at least `least` tokens."""
    which = torch.tensor(chosen, dtype=torch.long)
    keep, actions = rows.attention_mask[which].bool(), rows.action_mask[which].bool()
    lengths = keep.sum(1)
    lengths += -lengths % layout.row_multiple
    total = max(int(lengths.sum()), least)
    if tail := total + -total % layout.multiple - int(lengths.sum()):
        lengths = torch.cat([lengths, torch.tensor([tail])])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    place = bounds[: len(which), None] + keep.cumsum(1) - 1  # of every kept token among those of all context ranks
    tokens = torch.zeros(int(bounds[-1]), dtype=rows.sequences.dtype)
    tokens[place[keep]] = rows.sequences[which][keep]
    selected = place[:, :-1][actions]
    targets = rows.sequences[which][:, 1:][actions]
    flat = (which[:, None] * actions.shape[1] + torch.arange(actions.shape[1]))[actions]
    if layout.context_size > 1:
        share = context_share(bounds, layout.context_rank, layout.context_size)
        local = torch.full((len(tokens),), -1).index_copy(0, share, torch.arange(len(share)))[selected]
        tokens, here = tokens[share], local >= 0
        selected, targets, flat = local[here], targets[here], flat[here]
    return Packed(tokens[None], bounds.int(), int(lengths.max()), selected, targets, flat, which)


def micro_batches(
    rows: Rows,
    *,
    size: int,
    token_cap: int | None = None,
    layout: Layout = Layout(),
    agree: Callable[[int], int] = lambda count: count,
) -> list[Packed]:
    """The rows in packs of at most `size` rows, or, where `token_cap` is given, of at most that many tokens.

    agree: the count of packs that all ranks can live with, given this rank's. Packs of no rows fill it up.
    """
    if token_cap is None:
        bins = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        bins += [[] for _ in range(agree(len(bins)) - len(bins))]
    else:
        lengths = rows.attention_mask.sum(1)
        lengths += -lengths % layout.row_multiple
        count = 0
        while (needed := agree(len(bins := fill(lengths.tolist(), token_cap, at_least=count)))) > count:
            count = needed
    packs = [pack(rows, chosen, layout) for chosen in bins]
    if layout.equal:
        most = max(int(packed.bounds[-1]) for packed in packs)
        packs = [pack(rows, chosen, layout, least=most) for chosen in bins]
    return packs


def fill(lengths: list[int], cap: int, *, at_least: int = 1) -> list[list[int]]:
    """Indices of `lengths` in bins whose sums are at most `cap` and about equal; no fewer than `at_least` bins.

    Longest first, each into the emptiest bin. Raises ValueError for a length above the cap.
    """
    if lengths and max(lengths) > cap:
        raise ValueError(f"train.micro_batch_tokens = {cap} is less than a response of {max(lengths)} tokens; raise it")
    count = max(at_least, -(-sum(lengths) // cap), 1)
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        sums = [0] * count
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            emptiest = sums.index(min(sums))
            bins[emptiest].append(index)
            sums[emptiest] += lengths[index]
        if max(sums) <= cap:
            return [sorted(chosen) for chosen in bins]
        count += 1
