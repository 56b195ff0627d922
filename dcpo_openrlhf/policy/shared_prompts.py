"""Responses to one prompt that carry it once: [prompt][response 1]...[response G]. torch alone.

A response's positions go on from its prompt's end, it sees the prompt and itself, and the hidden state of the prompt's
last token predicts the first token of every response. Prefix Grouper (arXiv 2506.05433) has the idea.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dcpo_openrlhf.policy.balance import fill, fullest, share_out
from dcpo_openrlhf.policy.rows import Rows

UNEVEN = 1.1
"""Groups are halved where whole ones would give a data rank more than this times the mean of the tokens."""

Group = list[int]
"""Rows of one prompt."""


class Spans(NamedTuple):
    """Where each row's tokens begin in its padded sequence, and how many of them are its prompt and are computed."""

    starts: list[int]
    prompts: list[int]
    """Tokens up to the one at which the first action is taken."""
    ends: list[int]
    """Tokens up to the one at which the last action is taken: what comes after it predicts nothing."""

    @staticmethod
    def of(rows: Rows) -> "Spans":
        keep, actions = rows.attention_mask.bool(), rows.action_mask.bool()
        starts, kept = _first(keep), keep.sum(1)
        acts = actions.any(1)
        prompts = torch.where(acts, _first(actions) - starts + 1, kept)
        ends = torch.where(acts, actions.shape[1] - _first(actions.flip(1)) - starts, kept)
        return Spans(starts.tolist(), prompts.tolist(), ends.tolist())

    def tokens(self, group: Group) -> int:
        """Those of the group, its prompt counted once."""
        return self.prompts[group[0]] + sum(self.ends[row] - self.prompts[row] for row in group)


def _first(mask: Tensor) -> Tensor:
    return mask.byte().argmax(1)


def groups_of(rows: Rows, spans: Spans) -> list[Group]:
    """Rows with the same prompt, whoever drew them, in the order of their first rows."""
    found: dict[bytes, Group] = {}
    sequences = rows.sequences.numpy()
    for row, (start, prompt) in enumerate(zip(spans.starts, spans.prompts, strict=True)):
        found.setdefault(sequences[row, start : start + prompt].tobytes(), []).append(row)
    return list(found.values())


def deal(rows: Rows, parts: int, *, groups: bool) -> list[Rows]:
    """The rows of each of `parts` data ranks, of about equally many tokens; `index` says which rows they are.

    groups: rows that share a prompt stay together where that leaves the shares even. Else each share has equally many
    rows, and rows that do not divide are a ValueError.
    """
    if not groups:
        return [rows.part(index, parts) for index in range(parts)]
    shares = _shares(rows, parts)
    return [replace(rows.take(which), index=which) for which in shares]


def _shares(rows: Rows, parts: int) -> list[Int[Tensor, " rows"]]:
    spans = Spans.of(rows)
    groups = groups_of(rows, spans)
    costs = [spans.tokens(group) for group in groups]
    mean = sum(costs) / parts
    shares = share_out(costs, parts)
    if fullest(costs, shares) > UNEVEN * mean:
        pieces = [piece for group in groups for piece in _halved(group, spans, mean / 4)]
        halves = [spans.tokens(piece) for piece in pieces]
        shares_of_halves = share_out(halves, parts)
        if fullest(halves, shares_of_halves) < fullest(costs, shares):
            groups, shares = pieces, shares_of_halves
    return [torch.tensor(sorted(row for i in share for row in groups[i]), dtype=torch.long) for share in shares]


def _halved(group: Group, spans: Spans, limit: float) -> list[Group]:
    """Parts of the group, none with more tokens than `limit` but of single rows."""
    if len(group) == 1 or spans.tokens(group) <= limit:
        return [group]
    halves = share_out([spans.ends[row] for row in group], 2)
    return [piece for half in halves for piece in _halved([group[i] for i in half], spans, limit)]


def within_rows(groups: Sequence[Group], size: int) -> list[list[Group]]:
    """Micro-batches of at most `size` rows, of whole groups where they are no larger."""
    bins: list[list[Group]] = []
    free = 0
    for group in groups:
        for piece in (group[i : i + size] for i in range(0, len(group), size)):
            if len(piece) > free:
                bins.append([])
                free = size
            bins[-1].append(piece)
            free -= len(piece)
    return bins


def within_tokens(groups: Sequence[Group], spans: Spans, cap: int) -> list[Group]:
    """Groups of at most `cap` tokens; a larger one in parts, each of which repeats the prompt.

    No row, prompt included, is longer than `cap`.
    """
    found: list[Group] = []
    for group in groups:
        room = cap - spans.prompts[group[0]]
        responses = [spans.ends[row] - spans.prompts[row] for row in group]
        parts = fill(responses, room) if sum(responses) > room else [list(range(len(group)))]
        found += [[group[i] for i in part] for part in parts]
    return found


@dataclass(frozen=True)
class Segments:
    """A micro-batch as segments of tokens, each of which sees what the prompt before it, if any, and itself hold."""

    groups: tuple[tuple[int, ...], ...]
    """Tokens of each group's prompt, then of each response to it; a row by itself is all prompt."""

    @cached_property
    def lengths(self) -> list[int]:
        return [length for group in self.groups for length in group]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    @cached_property
    def longest_row(self) -> int:
        """Tokens of the longest row, prompt included."""
        return max(group[0] + max(group[1:], default=0) for group in self.groups)

    @cached_property
    def bounds(self) -> Int[Tensor, "segments+1"]:
        """Where each segment begins, and the end of the last: cu_seqlens of the queries."""
        return _bounds(self.lengths)

    @cached_property
    def key_bounds(self) -> Int[Tensor, "segments+1"]:
        """cu_seqlens of `keys`."""
        return _bounds([length + seen for length, seen in zip(self.lengths, self._seen, strict=True)])

    @cached_property
    def positions(self) -> Int[Tensor, " tokens"]:
        """Of each token in its row."""
        seen, starts = torch.tensor(self._seen), self.bounds[:-1].long()
        return torch.arange(sum(self.lengths)) + torch.repeat_interleave(seen - starts, torch.tensor(self.lengths))

    @cached_property
    def keys(self) -> Int[Tensor, " keys"]:
        """The tokens that each segment sees, its prompt's first. Its own are the last, causally."""
        seen, starts = torch.tensor(self._seen), self.bounds[:-1].long()
        prompts = torch.repeat_interleave(
            torch.tensor([0, *accumulate(map(sum, self.groups))][:-1]), torch.tensor([len(g) for g in self.groups])
        )
        segment = torch.repeat_interleave(torch.arange(len(seen)), self.key_bounds.diff().long())
        place = torch.arange(len(segment)) - self.key_bounds[:-1].long()[segment]
        own = place - seen[segment]
        return torch.where(own < 0, prompts[segment] + place, starts[segment] + own)

    @cached_property
    def _seen(self) -> list[int]:
        """Tokens of the prompt before each segment; 0 for a prompt."""
        return [group[0] * (i > 0) for group in self.groups for i in range(len(group))]


def _bounds(lengths: Sequence[int]) -> Int[Tensor, "segments+1"]:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
