"""Responses to one prompt carry it once: where every token stands, what it sees, and who gets which group."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpo_openrlhf.policy.packing import Layout, Packed, micro_batches, pack
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.policy.shared_prompts import Segments, Spans, deal, groups_of, within_rows, within_tokens

# (prompt, response) of each row; the last one has its own prompt, rows 0 and 3 and rows 1, 2 and 4 share theirs
ROWS = [
    ([1, 2, 3], [4, 5, 6]),
    ([7], [8]),
    ([7], [9, 10]),
    ([1, 2, 3], [11]),
    ([7], [8, 12, 13]),
    ([1, 2], [3, 14]),
]


def rows_of(content: list[tuple[list[int], list[int]]] = ROWS, *, left: bool = False, longest: int = 8) -> Rows:
    sequences = torch.zeros(len(content), longest, dtype=torch.long)
    attention = torch.zeros(len(content), longest, dtype=torch.bool)
    actions = torch.zeros(len(content), longest - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(content):
        tokens = prompt + response
        start = longest - len(tokens) if left else 0
        sequences[row, start : start + len(tokens)] = torch.tensor(tokens)
        attention[row, start : start + len(tokens)] = True
        actions[row, start + len(prompt) - 1 : start + len(tokens) - 1] = True
    return Rows(sequences, attention, actions)


def of_lengths(lengths: list[tuple[int, list[int]]]) -> Rows:
    """(prompt, responses) of each group, by their lengths; every group has a prompt of its own."""
    content = [([100 + g] * prompt, [1] * n) for g, (prompt, responses) in enumerate(lengths) for n in responses]
    return rows_of(content, longest=max(len(p) + len(r) for p, r in content))


LEFT = pytest.mark.parametrize("left", [False, True], ids=["right", "left"])


@LEFT
def test_rows_with_equal_prompts_are_a_group(left: bool) -> None:
    rows = rows_of(left=left)
    spans = Spans.of(rows)
    assert groups_of(rows, spans) == [[0, 3], [1, 2, 4], [5]]
    assert spans.prompts == [3, 1, 1, 3, 1, 2]
    assert spans.ends == [5, 1, 2, 3, 3, 3], "the last token predicts nothing"
    assert [spans.tokens(group) for group in groups_of(rows, spans)] == [5, 4, 3]


@LEFT
def test_a_shared_prompt_is_packed_once_before_its_responses(left: bool) -> None:
    packed = pack(rows_of(left=left), [[0, 3], [1, 2, 4], [5]])
    #                                 prompt   4 5 of row 0   prompt, 9 of row 2, 8 12 of row 4, row 5 by itself
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 7, 9, 8, 12, 1, 2, 3]]
    assert packed.segments is not None
    assert packed.segments.groups == ((3, 2), (1, 1, 2), (3,)), "responses of one token need none of their own"
    assert packed.bounds.tolist() == [0, 3, 5, 6, 7, 9, 12]
    assert packed.rows.tolist() == [0, 3, 1, 2, 4, 5]
    assert packed.targets.tolist() == [4, 5, 6, 11, 8, 9, 10, 8, 12, 13, 3, 14]
    assert packed.selected.tolist() == [2, 3, 4, 2, 5, 5, 6, 5, 7, 8, 10, 11]


@LEFT
def test_actions_of_shared_rows_say_where_values_belong(left: bool) -> None:
    rows = rows_of(left=left)
    packed = pack(rows, [[4, 1], [0, 3]])
    assert torch.equal(rows.sequences[:, 1:].flatten()[packed.actions], packed.targets)
    assert torch.equal(rows.sequences[:, :-1].flatten()[packed.actions], packed.tokens[0, packed.selected])


def test_segments_see_their_prompt_and_themselves() -> None:
    segments = Segments(((3, 2, 1), (2,), (1, 2)))
    assert segments.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 2]
    assert segments.bounds.tolist() == [0, 3, 5, 6, 8, 9, 11]
    assert segments.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 8, 9, 10]
    assert segments.key_bounds.tolist() == [0, 3, 8, 12, 14, 15, 18]
    assert (segments.longest, segments.longest_row) == (3, 5)


def test_a_shared_pack_is_filled_up_by_a_segment_without_actions() -> None:
    packed = pack(rows_of(), [[0, 3]], Layout(sequence_split=4))
    assert packed.segments is not None and packed.segments.groups == ((3, 2), (3,))
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    equal = micro_batches(rows_of(), size=3, layout=Layout(equal=True, share_prompts=True))
    assert len({int(p.bounds[-1]) for p in equal}) == 1


def test_rows_that_share_nothing_are_packed_as_ever() -> None:
    rows = rows_of()
    ever, now = pack(rows, [[5], [0]]), micro_batches(rows.take(torch.tensor([5, 0])), size=2)[0]
    assert ever.segments is None and torch.equal(ever.tokens, now.tokens)


def _covered(packs: list[Packed]) -> list[int]:
    return sorted(row for packed in packs for row in packed.rows.tolist())


@pytest.mark.parametrize(("size", "expected"), [(1, 6), (2, 3), (3, 3), (5, 2), (6, 1)])
def test_micro_batches_of_rows_hold_whole_groups_where_they_fit(size: int, expected: int) -> None:
    packs = micro_batches(rows_of(), size=size, layout=Layout(share_prompts=True))
    assert _covered(packs) == list(range(6)) and len(packs) == expected
    assert all(len(packed.rows) <= size for packed in packs)
    assert within_rows([[0, 1, 2], [3], [4, 5]], 4) == [[[0, 1, 2], [3]], [[4, 5]]]


def test_a_group_above_the_cap_is_split_in_parts_that_repeat_its_prompt() -> None:
    rows = of_lengths([(10, [6, 5, 4, 3]), (2, [3])])
    spans = Spans.of(rows)
    parts = within_tokens(groups_of(rows, spans), spans, 18)
    assert sorted(row for part in parts for row in part) == list(range(5))
    assert all(spans.tokens(part) <= 18 for part in parts) and len(parts) == 3
    packs = micro_batches(rows, size=1, token_cap=18, layout=Layout(share_prompts=True))
    assert _covered(packs) == list(range(5)) and all(int(p.bounds[-1]) <= 18 for p in packs)
    with pytest.raises(ValueError, match="micro_batch_tokens = 15 is less than a response of 16 tokens"):
        micro_batches(rows, size=1, token_cap=15, layout=Layout(share_prompts=True))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=6)), min_size=1, max_size=6),
    st.integers(18, 60),
    st.integers(1, 4),
)
def test_every_row_is_dealt_and_packed_once(lengths: Any, cap: int, parts: int) -> None:
    rows = of_lengths(lengths)
    dealt = deal(rows, parts, groups=True)
    index = torch.cat([part.index for part in dealt if part.index is not None])
    assert sorted(index.tolist()) == list(range(len(rows)))
    for part in dealt:
        assert part.index is not None and torch.equal(part.sequences, rows.sequences[part.index])
        packs = micro_batches(part, size=1, token_cap=cap, layout=Layout(share_prompts=True))
        assert _covered(packs) == list(range(len(part))) and all(int(p.bounds[-1]) <= cap for p in packs)


def test_groups_are_dealt_whole_where_that_leaves_the_ranks_even() -> None:
    rows = of_lengths([(30, [5] * 4), (30, [5] * 4), (10, [10] * 4), (10, [10] * 4)])
    for part in deal(rows, 2, groups=True):
        assert len(groups_of(part, Spans.of(part))) == 2 and len(part) == 8
    alone = deal(of_lengths([(4, [20] * 8)]), 2, groups=True)
    assert [len(part) for part in alone] == [4, 4], "one group for two ranks is halved"
    three = deal(of_lengths([(4, [20] * 8)] * 1 + [(5, [20] * 8), (6, [20] * 8)]), 2, groups=True)
    tokens = [sum(Spans.of(p).tokens(g) for g in groups_of(p, Spans.of(p))) for p in three]
    assert max(tokens) <= 1.15 * sum(tokens) / 2


def test_without_sharing_each_rank_has_equally_many_rows() -> None:
    assert [len(part) for part in deal(rows_of(), 3, groups=False)] == [2, 2, 2]
    with pytest.raises(ValueError, match="6 rows do not divide over 4"):
        deal(rows_of(), 4, groups=False)
