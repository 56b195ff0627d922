"""Packing drops padding and nothing else: wherever the padding stands, the pack is the same."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpo_openrlhf.policy.balance import fill
from dcpo_openrlhf.policy.packing import Layout, Packed, micro_batches
from dcpo_openrlhf.policy.packing import pack as pack_groups
from dcpo_openrlhf.policy.rows import Rows

# (prompt, response) of each row
RAGGED = [([11, 12, 13], [14, 15]), ([21], [22]), ([31, 32], [33, 34, 35, 36])]
TOKENS = [prompt + response for prompt, response in RAGGED]


def pack(rows: Rows, chosen: list[int], layout: Layout = Layout()) -> Packed:  # noqa: B008
    """The chosen rows, each by itself."""
    return pack_groups(rows, [[row] for row in chosen], layout)


def padded(*, left: bool, longest: int = 7, pad: int = 0) -> Rows:
    """RAGGED with `pad` on the left or right up to `longest`; old log-probs and advantages say row and column."""
    sequences = torch.full((len(RAGGED), longest), pad)
    attention = torch.zeros(len(RAGGED), longest, dtype=torch.bool)
    actions = torch.zeros(len(RAGGED), longest - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(RAGGED):
        tokens = prompt + response
        start = longest - len(tokens) if left else 0
        end = start + len(tokens)
        sequences[row, start:end] = torch.tensor(tokens)
        attention[row, start:end] = True
        actions[row, start + len(prompt) - 1 : end - 1] = True
    numbers = 10.0 * torch.arange(len(RAGGED))[:, None] + torch.arange(longest - 1)
    return Rows(sequences, attention, actions, -numbers, (numbers, numbers + 100))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [1, 2], [2, 0]])
def test_pack_holds_the_rows_without_padding(left: bool, chosen: list[int]) -> None:
    packed = pack(padded(left=left), chosen)
    rows = [TOKENS[i] for i in chosen]
    assert packed.tokens.tolist() == [[token for row in rows for token in row]]
    bounds = [sum(map(len, rows[:i])) for i in range(len(rows) + 1)]
    assert packed.bounds.tolist() == bounds
    assert packed.bounds.dtype == torch.int32
    assert packed.longest == max(map(len, rows))
    assert packed.rows.tolist() == chosen


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_selected_positions_predict_the_targets(left: bool) -> None:
    packed = pack(padded(left=left), [0, 1, 2])
    assert packed.targets.tolist() == [token for _, response in RAGGED for token in response]
    # an action is taken where the token before its target stands
    before = [row[len(prompt) - 1 + i] for row, (prompt, r) in zip(TOKENS, RAGGED, strict=True) for i in range(len(r))]
    assert packed.tokens[0, packed.selected].tolist() == before
    assert packed.tokens[0, packed.selected + 1].tolist() == packed.targets.tolist()


def test_padding_side_width_and_token_do_not_matter() -> None:
    reference = pack(padded(left=False), [0, 1, 2])
    for rows in (padded(left=True), padded(left=False, longest=9), padded(left=True, longest=12, pad=99)):
        packed = pack(rows, [0, 1, 2])
        for field in dataclasses.fields(packed):
            a, b = getattr(packed, field.name), getattr(reference, field.name)
            if field.name != "actions":  # where they stand among the padding
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_masked_actions_are_neither_selected_nor_targets() -> None:
    rows = padded(left=False)
    rows.action_mask[2, 3] = False  # the third token of row 2's response
    packed = pack(rows, [0, 1, 2])
    assert packed.targets.tolist() == [14, 15, 22, 33, 34, 36]
    assert packed.tokens.shape[1] == sum(map(len, TOKENS)), "the token itself stays: later ones see it"


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_actions_say_where_values_belong(left: bool) -> None:
    rows = padded(left=left)
    packed = pack(rows, [2, 0])
    assert rows.old_logp is not None
    assert torch.equal(rows.old_logp.flatten()[packed.actions], rows.old_logp[[2, 0]][rows.action_mask[[2, 0]]])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("size", [2, 3])
def test_context_ranks_share_rows_by_pairs_of_chunks(left: bool, size: int) -> None:
    """Row 0 of 5 tokens is filled up to 8 for two ranks: rank 0 holds its tokens 0, 1, 6, 7, rank 1 2, 3, 4, 5."""
    rows, chosen = padded(left=left), [0, 2]
    packs = [pack(rows, chosen, Layout(context_rank=r, context_size=size)) for r in range(size)]
    lengths = [-(-len(TOKENS[i]) // (2 * size)) * 2 * size for i in chosen]
    for rank, packed in enumerate(packs):
        assert packed.bounds.tolist() == [0, lengths[0], sum(lengths)]
        expected = []
        for i, length in zip(chosen, lengths, strict=True):
            whole, c = TOKENS[i] + [0] * (length - len(TOKENS[i])), length // (2 * size)
            for chunk in (rank, 2 * size - 1 - rank):
                expected += whole[chunk * c : (chunk + 1) * c]
        assert packed.tokens.tolist() == [expected]
        before = rows.sequences[:, :-1].flatten()[packed.actions]
        assert torch.equal(packed.tokens[0, packed.selected], before), "an action is where its token is"
        assert torch.equal(packed.targets, rows.sequences[:, 1:].flatten()[packed.actions])
    together = torch.cat([packed.actions for packed in packs]).sort().values
    assert torch.equal(together, pack(rows, chosen).actions.sort().values), "every action on one rank"


def test_packs_are_filled_up_by_a_row_without_actions() -> None:
    rows = padded(left=False)
    packed = pack(rows, [1, 0], Layout(sequence_split=4))
    assert packed.tokens.tolist() == [[*TOKENS[1], *TOKENS[0], 0]] and packed.bounds.tolist() == [0, 2, 7, 8]
    assert packed.targets.tolist() == [22, 14, 15]
    empty = pack(rows, [], Layout(context_size=2, sequence_split=2))
    assert empty.tokens.shape == (1, 4) and empty.bounds.tolist() == [0, 8] and not len(empty.targets)
    packs = micro_batches(rows, size=2, layout=Layout(equal=True))
    assert [int(p.bounds[-1]) for p in packs] == [7, 7] and packs[1].bounds.tolist() == [0, 6, 7]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(50, 200), st.integers(0, 8))
def test_fill_covers_every_row_once_below_the_cap(lengths: list[int], cap: int, at_least: int) -> None:
    bins = fill(lengths, cap, at_least=at_least)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chosen) <= cap for chosen in bins)
    assert at_least <= len(bins) <= max(at_least, 1 + 2 * sum(lengths) // cap)


def test_row_longer_than_the_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens = 5 is less than a response of 6 tokens; raise it"):
        micro_batches(padded(left=True), size=1, token_cap=5)


def test_ranks_agree_on_a_count_of_micro_batches() -> None:
    rows = padded(left=False)
    packs = micro_batches(rows, size=3, agree=lambda count: max(count, 2))
    assert [p.rows.tolist() for p in packs] == [[0, 1, 2], []]
    packs = micro_batches(rows, size=1, token_cap=100, agree=lambda count: -(-count // 2) * 2)
    assert [p.rows.tolist() for p in packs] == [[2], [0, 1]], "a second pack takes its part of the rows"


@pytest.mark.parametrize(("size", "expected"), [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (5, [[0, 1, 2]])])
def test_micro_batches_cover_every_row_once(size: int, expected: list[list[int]]) -> None:
    packs = micro_batches(padded(left=True), size=size)
    assert [p.rows.tolist() for p in packs] == expected
    assert [t for p in packs for t in p.targets.tolist()] == [token for _, response in RAGGED for token in response]


def test_parts_hold_equally_many_rows_and_about_equally_many_tokens() -> None:
    lengths = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4])
    mask = torch.arange(10) < lengths[:, None]
    rows = Rows(torch.arange(80).view(8, 10), mask, mask[:, 1:], torch.rand(8, 9), (torch.rand(8, 9), torch.rand(8, 9)))
    parts = [rows.part(index, 4) for index in range(4)]
    assert [len(part) for part in parts] == [2] * 4
    assert [int(part.attention_mask.sum()) for part in parts] == [10] * 4
    index = torch.cat([part.index for part in parts if part.index is not None])
    assert sorted(index.tolist()) == list(range(8))
    for name in ("sequences", "attention_mask", "action_mask", "old_logp"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(rows, name)[index])
    for term in range(2):
        assert torch.equal(torch.cat([part.advantages[term] for part in parts]), rows.advantages[term][index])
    whole = padded(left=False).part(0, 1)
    assert whole.index is not None and whole.index.tolist() == [0, 1, 2]


def test_part_without_old_policy_keeps_none() -> None:
    rows = padded(left=False)
    bare = Rows(rows.sequences, rows.attention_mask, rows.action_mask)
    part = bare.part(2, 3)
    assert part.old_logp is None and part.advantages == ()


@pytest.mark.parametrize("parts", [2, 4])
def test_rows_that_do_not_divide_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match=f"3 rows do not divide over {parts} data-parallel ranks; change"):
        padded(left=False).part(0, parts)
