"""A policy that went to host memory and came back is the same to the bit, and so is its next update."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dcpo_openrlhf.policy.megatron.model import hf_tensors
from tests.distributed import run_distributed
from tests.policy.megatron.common import make_policy, make_step, random_rows
from tests.tiny import make_tiny_model


def _two_updates(rank: int, world_size: int, path: Path, dtype: str, moves: bool) -> Any:
    from dcpo_openrlhf.policy.megatron.memory import Offload

    policy = make_policy(path, rank=rank, world_size=world_size, dtype=dtype)
    step = make_step(policy)
    offload = Offload(step)
    part = [random_rows(seed=seed).part(policy.mesh.data_rank, policy.mesh.data_size) for seed in (0, 1)]
    metrics, held = [], []
    for rows in part:
        metrics.append(step.update(rows))
        if moves:
            offload.away()
            held.append(sum(p.untyped_storage().nbytes() for p in policy.chunks[0].parameters()))
            held.append(sum(b.grad_data.untyped_storage().nbytes() for b in step.models[0].buffers))
            with pytest.raises(RuntimeError, match="in host memory already"):
                offload.away()
            offload.back()
    return metrics, {name: value.clone() for name, value in hf_tensors(policy)}, held


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_away_and_back_changes_nothing(tmp_path: Path, dtype: str) -> None:
    path = make_tiny_model(tmp_path)
    stayed = run_distributed(_two_updates, 2, path, dtype, False)
    moved = run_distributed(_two_updates, 2, path, dtype, True)
    for (metrics, weights, _), (other_metrics, other_weights, held) in zip(stayed, moved, strict=True):
        assert other_metrics == metrics and held == [0, 0, 0, 0]
        assert all(torch.equal(other_weights[name], value) for name, value in weights.items())
