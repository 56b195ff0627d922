"""Each sender yields its share of the Hugging Face folder to the bit: every tensor once, about equal bytes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcpo_openrlhf.policy.megatron.model import hf_shapes
from dcpo_openrlhf.policy.megatron.senders import sent_shapes, sent_tensors
from tests.distributed import run_distributed
from tests.policy.megatron.common import make_models, make_policy
from tests.policy.megatron.test_model import MESHES
from tests.tiny import MIXTURES

MODELS = [("llama", True), ("qwen2", False), ("qwen3_moe", True), ("glm4_moe", False)]
WAYS: dict[str, tuple[str, int]] = {
    # mesh and senders of a stage
    "pp2": ("pp2", 1),
    "interleaved": ("interleaved", 1),
    "ep2": ("ep2", 2),
    "ep2, one sender": ("ep2", 1),
    "tp2pp2": ("tp2pp2", 1),
    "pp2ep2": ("pp2ep2", 2),
    "ep4": ("ep4", 4),
    "ep4, two senders": ("ep4", 2),
    "tp2ep4, two senders": ("tp2ep4", 2),
    "tp2pp2ep2-interleaved": ("tp2pp2ep2-interleaved", 2),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "ep4": (4, {"expert": 4}),
    "tp2ep4": (4, {"tensor": 2, "sequence_parallel": True, "expert": 4}),
}
SIZE = {way: (MESHES | MORE)[mesh][0] for way, (mesh, _) in WAYS.items()}
FITS = [
    (architecture, tie, way) for way, (mesh, _) in WAYS.items() for architecture, tie in MODELS
    if architecture in MIXTURES or "expert" not in (MESHES | MORE)[mesh][1]
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    return make_models(tmp_path_factory.mktemp("models"), MODELS)


def _share(rank: int, world_size: int, models: dict[Any, Path], ways: list[str]) -> dict[Any, Any]:
    """(model, way) -> what all are to send, what the folder has, what this rank yields."""
    found = {}
    for way in ways:
        mesh, per_stage = WAYS[way]
        for key, path in models.items():
            if (*key, way) not in FITS:
                continue
            policy = make_policy(path, rank=rank, world_size=world_size, **(MESHES | MORE)[mesh][1])
            tensors = [(name, tensor.clone()) for name, tensor in sent_tensors(policy, per_stage)]
            found[(*key, way)] = list(sent_shapes(policy, per_stage)), list(hf_shapes(policy)), tensors
    return found


@pytest.fixture(scope="module")
def shares(models: dict[tuple[str, bool], Path]) -> dict[Any, list[Any]]:
    """(architecture, tie, way) -> `_share` of every rank."""
    found: dict[Any, list[Any]] = {}
    for size in sorted(set(SIZE.values())):
        for rank in run_distributed(_share, size, models, [way for way in WAYS if SIZE[way] == size]):
            for key, share in rank.items():
                found.setdefault(key, []).append(share)
    return found


@pytest.mark.parametrize(("architecture", "tie", "way"), FITS)
def test_senders_have_every_tensor_once_and_to_the_bit(
    shares: dict[Any, list[Any]], models: dict[Any, Path], architecture: str, tie: bool, way: str
) -> None:
    ranks = shares[architecture, tie, way]
    assert len(ranks) == SIZE[way]
    plan, whole, _ = ranks[0]
    assert all(rank[:2] == (plan, whole) for rank in ranks), "the same plan on every rank"
    assert sorted(meta[:3] for meta in plan) == sorted(whole), "what rank 0 alone would send"
    expected = load_file(models[architecture, tie] / "model.safetensors")
    assert Counter(name for _, _, tensors in ranks for name, _ in tensors) == Counter(expected.keys())
    for number, (_, _, tensors) in enumerate(ranks):
        declared = [(name, dtype, shape) for name, dtype, shape, sender, _ in plan if sender == number]
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors] == declared
        assert [name for name, tensor in tensors if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize(("architecture", "tie", "way"), FITS)
def test_no_sender_has_much_more_than_its_share(
    shares: dict[Any, list[Any]], architecture: str, tie: bool, way: str
) -> None:
    mesh, per_stage = WAYS[way]
    stages = (MESHES | MORE)[mesh][1].get("pipeline", 1)
    plan, _, _ = shares[architecture, tie, way][0]
    elements: Counter[tuple[int, int]] = Counter()
    for _, _, shape, sender, stage in plan:
        elements[stage, sender] += torch.Size(shape).numel()
    assert len(elements) == stages * per_stage
    assert len({sender for _, sender in elements}) == len(elements), "a sender stands in one stage"
    assert max(elements.values()) <= 1.3 * elements.total() / len(elements)


def test_experts_go_to_the_sender_of_their_share_and_the_rest_to_the_emptiest(shares: dict[Any, list[Any]]) -> None:
    plan, _, _ = shares["qwen3_moe", True, "ep4, two senders"][0]
    by_expert: dict[int, set[int]] = {}
    for name, _, _, sender, _ in plan:
        if ".experts." in name:
            by_expert.setdefault(int(name.split(".experts.")[1].split(".")[0]), set()).add(sender)
    assert by_expert == {0: {0}, 1: {0}, 2: {2}, 3: {2}}
    assert {sender for name, _, _, sender, _ in plan if ".experts." not in name} == {0, 2}
