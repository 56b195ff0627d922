"""Micro-batches of rows packed without padding, as the ranks of a replica share them. torch alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dcpo_openrlhf.policy.balance import fill
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.policy.shared_prompts import Group, Segments, Spans, groups_of, within_rows, within_tokens


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
    share_prompts: bool = False
    """Rows of one prompt carry it once; for a context size of 1."""

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
    segments: Segments | None = None
    """Prompts and responses, where some of them share a prompt; `bounds` are then those of the segments."""


def context_share(bounds: Int[Tensor, "rows+1"], rank: int, size: int) -> Int[Tensor, " tokens"]:
    """Positions, among the tokens of all context ranks, of those that `rank` of `size` holds, in its order."""
    lengths = bounds.diff().long()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=bounds.device), lengths)
    chunk = (torch.arange(len(row), device=bounds.device) - bounds[:-1][row]) // (lengths // (2 * size))[row]
    return ((chunk == rank) | (chunk == 2 * size - 1 - rank)).nonzero()[:, 0]


def pack(rows: Rows, groups: list[Group], layout: Layout = Layout(), *, least: int = 1) -> Packed:
    """These groups of rows (maybe none) as one packed micro-batch of at least `least` tokens.

    Rows of a group have the same prompt, which they share; rows by themselves are groups of one.
    """
    if any(len(group) > 1 for group in groups):
        return _pack_shared(rows, groups, layout, least)
    which = torch.tensor([row for group in groups for row in group], dtype=torch.long)
    keep = rows.attention_mask[which].bool()
    lengths = keep.sum(1)
    lengths += -lengths % layout.row_multiple
    if tail := _tail(int(lengths.sum()), layout, least):
        lengths = torch.cat([lengths, torch.tensor([tail])])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    place = bounds[: len(which), None] + keep.cumsum(1) - 1  # of every kept token among those of all context ranks
    tokens = torch.zeros(int(bounds[-1]), dtype=rows.sequences.dtype)
    tokens[place[keep]] = rows.sequences[which][keep]
    selected, targets, flat = _actions(rows, which, place)
    if layout.context_size > 1:
        share = context_share(bounds, layout.context_rank, layout.context_size)
        local = torch.full((len(tokens),), -1).index_copy(0, share, torch.arange(len(share)))[selected]
        tokens, here = tokens[share], local >= 0
        selected, targets, flat = local[here], targets[here], flat[here]
    return Packed(tokens[None], bounds.int(), int(lengths.max()), selected, targets, flat, which)


def _pack_shared(rows: Rows, groups: list[Group], layout: Layout, least: int) -> Packed:
    which = torch.tensor([row for group in groups for row in group], dtype=torch.long)
    spans = Spans.of(rows.take(which))
    lengths: list[tuple[int, ...]] = []
    prompt_starts, response_starts, prompts = [], [], []  # of each row
    at = row = 0
    for group in groups:
        alone = len(group) == 1
        prompt = (spans.ends if alone else spans.prompts)[row]
        responses = [spans.ends[i] - prompt for i in range(row, row + len(group))]
        lengths.append((prompt, *(n for n in responses if n)))
        prompt_starts += [at] * len(group)
        prompts += [prompt] * len(group)
        response_starts += [at + prompt + sum(responses[:i]) for i in range(len(group))]
        at += prompt + sum(responses)
        row += len(group)
    if tail := _tail(at, layout, least):
        lengths.append((tail,))
    keep = rows.attention_mask[which].bool()
    place = keep.cumsum(1) - 1  # of every kept token in its row, then among all tokens
    computed = keep & (place < torch.tensor(spans.ends)[:, None])
    prompt, from_prompt = torch.tensor(prompts)[:, None], torch.tensor(prompt_starts)[:, None]
    place = torch.where(place < prompt, from_prompt + place, torch.tensor(response_starts)[:, None] + place - prompt)
    tokens = torch.zeros(at + tail, dtype=rows.sequences.dtype)
    tokens[place[computed]] = rows.sequences[which][computed]
    segments = Segments(tuple(lengths))
    selected, targets, flat = _actions(rows, which, place)
    return Packed(tokens[None], segments.bounds, segments.longest, selected, targets, flat, which, segments)


def _tail(tokens: int, layout: Layout, least: int) -> int:
    """What fills a micro-batch of that many tokens up."""
    total = max(tokens, least)
    return total + -total % layout.multiple - tokens


def _actions(
    rows: Rows, which: Int[Tensor, " rows"], place: Int[Tensor, "rows time"]
) -> tuple[Int[Tensor, " actions"], Int[Tensor, " actions"], Int[Tensor, " actions"]]:
    """Of each action of these rows: where it is taken, its target, where it stands in the flattened tensors."""
    actions = rows.action_mask[which].bool()
    flat = which[:, None] * actions.shape[1] + torch.arange(actions.shape[1])
    return place[:, :-1][actions], rows.sequences[which][:, 1:][actions], flat[actions]


def micro_batches(
    rows: Rows,
    *,
    size: int,
    token_cap: int | None = None,
    layout: Layout = Layout(),
    agree: Callable[[int], int] = lambda count: count,
) -> list[Packed]:
    """The rows in packs of at most `size` rows, or, where `token_cap` is given, of at most that many tokens.

    agree: the count of packs that all ranks can live with, given this rank's. Packs of no rows fill it up. A group of
    rows that share their prompt is whole where it is within the limit. Raises ValueError for a row above the cap.
    """
    spans = Spans.of(rows) if layout.share_prompts else None
    groups = groups_of(rows, spans) if spans else [[row] for row in range(len(rows))]
    if token_cap is None:
        bins = within_rows(groups, size)
        bins += [[] for _ in range(agree(len(bins)) - len(bins))]
    else:
        lengths = rows.attention_mask.sum(1)
        lengths += -lengths % layout.row_multiple
        _require_room(int(lengths.max()) if len(rows) else 0, token_cap)
        groups = within_tokens(groups, spans, token_cap) if spans else groups
        whole = lengths.tolist()  # what a row by itself takes where no other of its pack shares a prompt
        costs = [spans.tokens(group) if spans and len(group) > 1 else whole[group[0]] for group in groups]
        count = 0
        while (needed := agree(len(full := fill(costs, token_cap, at_least=count)))) > count:
            count = needed
        bins = [[groups[i] for i in chosen] for chosen in full]
    packs = [pack(rows, chosen, layout) for chosen in bins]
    if layout.equal:
        most = max(int(packed.bounds[-1]) for packed in packs)
        packs = [pack(rows, chosen, layout, least=most) for chosen in bins]
    return packs


def _require_room(longest: int, cap: int) -> None:
    if longest > cap:
        raise ValueError(f"train.micro_batch_tokens = {cap} is less than a response of {longest} tokens; raise it")
