"""Packing drops padding and nothing else: wherever the padding stands, the pack is the same."""

import dataclasses

import pytest
import torch

from dcpo_openrlhf.megatron.batch import Rows, micro_batches, pack

# (prompt, response) of each row
RAGGED = [([11, 12, 13], [14, 15]), ([21], [22]), ([31, 32], [33, 34, 35, 36])]
TOKENS = [prompt + response for prompt, response in RAGGED]


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
@pytest.mark.parametrize("part", [slice(0, 3), slice(1, 3), slice(0, 1)])
def test_pack_holds_the_rows_without_padding(left: bool, part: slice) -> None:
    packed = pack(padded(left=left), part)
    rows = TOKENS[part]
    assert packed.tokens.tolist() == [[token for row in rows for token in row]]
    assert packed.positions.tolist() == [[i for row in rows for i in range(len(row))]]
    bounds = [sum(map(len, rows[:i])) for i in range(len(rows) + 1)]
    assert packed.bounds.tolist() == bounds
    assert packed.bounds.dtype == torch.int32
    assert packed.longest == max(map(len, rows))
    assert packed.rows == part


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_selected_positions_predict_the_targets(left: bool) -> None:
    packed = pack(padded(left=left), slice(0, 3))
    assert packed.targets.tolist() == [token for _, response in RAGGED for token in response]
    # an action is taken where the token before its target stands
    before = [row[len(prompt) - 1 + i] for row, (prompt, r) in zip(TOKENS, RAGGED, strict=True) for i in range(len(r))]
    assert packed.tokens[0, packed.selected].tolist() == before
    assert packed.tokens[0, packed.selected + 1].tolist() == packed.targets.tolist()


def test_padding_side_width_and_token_do_not_matter() -> None:
    reference = pack(padded(left=False), slice(0, 3))
    for rows in (padded(left=True), padded(left=False, longest=9), padded(left=True, longest=12, pad=99)):
        packed = pack(rows, slice(0, 3))
        for field in dataclasses.fields(packed):
            a, b = getattr(packed, field.name), getattr(reference, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_masked_actions_are_neither_selected_nor_targets() -> None:
    rows = padded(left=False)
    rows.action_mask[2, 3] = False  # the third token of row 2's response
    packed = pack(rows, slice(0, 3))
    assert packed.targets.tolist() == [14, 15, 22, 33, 34, 36]
    assert packed.tokens.shape[1] == sum(map(len, TOKENS)), "the token itself stays: later ones see it"


@pytest.mark.parametrize(("size", "slices"), [(1, [(0, 1), (1, 2), (2, 3)]), (2, [(0, 2), (2, 3)]), (5, [(0, 3)])])
def test_micro_batches_cover_every_row_once(size: int, slices: list[tuple[int, int]]) -> None:
    packs = micro_batches(padded(left=True), size)
    assert [(p.rows.start, p.rows.stop) for p in packs] == slices
    assert [t for p in packs for t in p.targets.tolist()] == [token for _, response in RAGGED for token in response]


def test_parts_are_equal_shares_in_order() -> None:
    rows = padded(left=False)
    parts = [rows.part(index, 3) for index in range(3)]
    assert [len(part) for part in parts] == [1, 1, 1]
    for name in ("sequences", "attention_mask", "action_mask", "old_logp"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(rows, name))
    for term in range(2):
        assert torch.equal(torch.cat([part.advantages[term] for part in parts]), rows.advantages[term])
    assert len(rows.part(0, 1)) == 3


def test_part_without_old_policy_keeps_none() -> None:
    rows = padded(left=False)
    bare = Rows(rows.sequences, rows.attention_mask, rows.action_mask)
    part = bare.part(2, 3)
    assert part.old_logp is None and part.advantages == ()


@pytest.mark.parametrize("parts", [2, 4])
def test_rows_that_do_not_divide_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match=f"3 rows do not divide over {parts} data-parallel ranks; change"):
        padded(left=False).part(0, parts)
