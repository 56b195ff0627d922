"""A policy that went to host memory and came back is the same to the bit, and so is its next update."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dcpo_openrlhf.policy.megatron.model import hf_tensors
from dcpo_openrlhf.policy.reference import Reference
from tests.distributed import run_distributed
from tests.policy.megatron.common import make_policy, make_step, random_rows
from tests.tiny import make_tiny_model


def _starting_model(rank: int, world_size: int, path: Path, sizes: dict[str, Any]) -> bool:
    """Are the reference's statistics those of the start, and the policy's own the same before and after it?"""
    from dcpo_openrlhf.policy.megatron.memory import Offload

    policy = make_policy(path, rank=rank, world_size=world_size, **sizes)
    step, rows = make_step(policy), random_rows()
    part = rows.part(policy.mesh.data_rank, policy.mesh.data_size)
    start = step.token_statistics(part, temperatures=[0.8])
    reference, offload = Reference(weight for _, weight in policy.entries()), Offload(step)
    step.update(part)
    offload.away()  # as beside a colocated engine
    offload.back()
    trained = step.token_statistics(part, temperatures=[0.8])
    with pytest.raises(KeyError), reference.in_place():
        raise KeyError
    with reference.in_place():
        found = step.token_statistics(part, temperatures=[0.8])
    again = step.token_statistics(part, temperatures=[0.8])
    moved = policy.mesh.is_data_leader and not torch.equal(trained["logp"], start["logp"])
    same = all(torch.equal(found[n], start[n]) and torch.equal(again[n], trained[n]) for n in start)
    return same and (moved or not policy.mesh.is_data_leader)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_the_starting_model_takes_the_policys_place_for_one_forward(tmp_path: Path, sizes: dict[str, Any]) -> None:
    assert run_distributed(_starting_model, 2, make_tiny_model(tmp_path), sizes) == [True, True]


def _two_updates(rank: int, world_size: int, path: Path, dtype: str, moves: bool) -> Any:
    from dcpo_openrlhf.policy.megatron.memory import Offload

    policy = make_policy(path, rank=rank, world_size=world_size, dtype=dtype)
    step = make_step(policy)
    offload = Offload(step)
    part = [random_rows(seed=seed).part(policy.mesh.data_rank, policy.mesh.data_size) for seed in (0, 1)]
    metrics, held, taken = [], [], []
    step.update(part[0])  # the optimizer has its state from then on
    for rows in part:
        metrics.append(step.update(rows))
        if moves:
            offload.away()
            held.append(sum(p.untyped_storage().nbytes() for p in policy.chunks[0].parameters()))
            held.append(sum(b.grad_data.untyped_storage().nbytes() for b in step.models[0].buffers))
            with pytest.raises(RuntimeError, match="in host memory already"):
                offload.away()
            taken.append({host.data_ptr() for _, host in offload._host if not isinstance(host, int)})
            offload.back()
    assert not moves or (taken[0] and taken[0] <= taken[1]), "host memory is taken once"
    return metrics, {name: value.clone() for name, value in hf_tensors(policy)}, held


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_away_and_back_changes_nothing(tmp_path: Path, dtype: str) -> None:
    path = make_tiny_model(tmp_path)
    stayed = run_distributed(_two_updates, 2, path, dtype, False)
    moved = run_distributed(_two_updates, 2, path, dtype, True)
    for (metrics, weights, _), (other_metrics, other_weights, held) in zip(stayed, moved, strict=True):
        assert other_metrics == metrics and held == [0, 0, 0, 0]
        assert all(torch.equal(other_weights[name], value) for name, value in weights.items())
