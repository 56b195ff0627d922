"""Who sends which bucket when: every tensor once, in buckets of one size, and no sender ahead of its stage."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dcpo_openrlhf.weight_sync.buckets import ChecksumError, checksums, pack
from dcpo_openrlhf.weight_sync.plan import Plan, SealedBucket, arrivals, plan_sends
from dcpo_openrlhf.weight_sync.source import SentTensor

SENDERS = {0: (0, 1), 1: (4, 5)}
"""Stage -> its senders."""


def tensors(sizes: list[int]) -> list[SentTensor]:
    """Of `sizes` elements, dealt to the stages' senders in turn."""
    found = []
    for i, size in enumerate(sizes):
        stage = i % 2
        sender = SENDERS[stage][i // 2 % 2]
        found.append(SentTensor(f"w{i}", torch.float32, (size,), sender, stage))
    return found


SIZES = {
    "equal": [64] * 40,
    "one larger than a bucket": [64] * 9 + [5000] + [64] * 9,
    "ragged": [(7 * i) % 300 + 1 for i in range(50)],
    "one sender has most": [300 if i % 4 == 0 else 1 for i in range(40)],
}


def of_sender(plan: Plan, params: list[SentTensor]) -> dict[int, list[str]]:
    return {
        sender: [name for bucket in plan.buckets(sender) for name in bucket.names]
        for sender in {p.sender for p in params}
    }


@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_comes_once_from_its_sender_in_order(name: str) -> None:
    params = tensors(SIZES[name])
    plan = plan_sends(params, 4096)
    assert plan.senders == [0, 1, 4, 5]
    wanted = {sender: [p.name for p in params if p.sender == sender] for sender in plan.senders}
    assert of_sender(plan, params) == wanted
    for sender in plan.senders:
        buckets = plan.buckets(sender)
        assert [(bucket.index, bucket.count) for bucket in buckets] == [(i, len(buckets)) for i in range(len(buckets))]
        assert all(bucket.payload <= 4096 // 4 or len(bucket.names) == 1 for bucket in buckets)
        largest_two = sorted(bucket.nbytes for bucket in buckets)[-2:]
        assert plan.room(sender) >= largest_two[-1]
        assert plan.room(sender) >= sum(largest_two) or largest_two[-1] > 1024 + 64
    assert plan.room(2) == 0


@pytest.mark.parametrize("name", SIZES)
def test_all_senders_of_a_stage_are_cut_at_one_place(name: str) -> None:
    """What the k-th bucket of one of them needs comes before anything that a later bucket of another needs."""
    params = tensors(SIZES[name])
    place = {p.name: i for i, p in enumerate(params)}
    for senders in SENDERS.values():
        plan = plan_sends([p for p in params if p.sender in senders], 2048)
        order = [(place[bucket.names[0]], place[bucket.names[-1]]) for _, bucket in plan.order]
        rounds: list[list[tuple[int, int]]] = []
        for (at, _), span in zip(plan.order, order, strict=True):
            if not rounds or at in seen:
                rounds.append([])
                seen: set[int] = set()
            rounds[-1].append(span)
            seen.add(at)
        for before, after in pairwise(rounds):
            assert max(last for _, last in before) < min(first for first, _ in after)


def test_stages_take_turns_until_the_longer_one_is_alone() -> None:
    params = [SentTensor(f"a{i}", torch.float32, (64,), 0, 0) for i in range(3)]
    params += [SentTensor(f"b{i}", torch.float32, (64,), 2, 1) for i in range(5)]
    plan = plan_sends(params, 512)
    assert [name for _, bucket in plan.order for name in bucket.names] == [
        "a0",
        "b0",
        "a1",
        "b1",
        "a2",
        "b2",
        "b3",
        "b4",
    ]


def test_a_tensor_from_two_senders_is_refused_by_trainer_and_worker() -> None:
    twice = SentTensor("w", torch.float32, (4,), 0, 0), SentTensor("w", torch.float32, (4,), 1, 1)
    with pytest.raises(ValueError, match="every tensor once; twice come w"):
        plan_sends(twice, 4096)
    announced = plan_sends([twice[0], replace(twice[1], name="v")], 4096).announced()
    assert [bucket.names for _, bucket in arrivals(**announced)] == [["w"], ["v"]]
    announced["buckets"][1]["names"] = ["w"]
    with pytest.raises(ValueError, match="every tensor once; twice come w"):
        arrivals(**announced)
    with pytest.raises(ValueError, match="declares no tensors"):
        plan_sends([], 4096)


def sealed(check: bool = True) -> tuple[SealedBucket, torch.Tensor]:
    params = [SentTensor("odd", torch.bfloat16, (7,), 0, 0), SentTensor("float", torch.float32, (3, 5), 0, 0)]
    (bucket,) = plan_sends(params, 4096).buckets(0)
    buffer = torch.full((bucket.nbytes,), 255, dtype=torch.uint8)
    pack(bucket, iter([("odd", torch.randn(7).bfloat16()), ("float", torch.randn(3, 5))]), buffer)
    bucket.seal(buffer, checksums(bucket, buffer) if check else None)
    return bucket, buffer


def test_a_seal_tells_other_tensors_and_other_bytes() -> None:
    bucket, buffer = sealed()
    assert bucket.opened(buffer, check=True) == checksums(bucket, buffer)
    for other in (replace(bucket, names=["float", "odd"]), replace(bucket, shapes=[[7], [5, 3]])):
        with pytest.raises(ChecksumError, match="other tensors arrived"):
            other.opened(buffer, check=True)
    for i, name in ((3, "odd"), (70, "float")):
        wrong = buffer.clone()
        wrong[i] += 1
        with pytest.raises(ChecksumError, match=f"{name} arrived with checksum"):
            bucket.opened(wrong, check=True)


def test_without_checks_a_seal_still_tells_other_tensors() -> None:
    bucket, buffer = sealed(check=False)
    assert bucket.opened(buffer, check=False) == []
    with pytest.raises(ChecksumError, match="other tensors arrived"):
        replace(bucket, names=["odd", "double"]).opened(buffer, check=False)
