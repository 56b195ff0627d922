"""One update is the same on every mesh and for every split into micro-batches."""

from pathlib import Path

import pytest
import torch

from dcpo_openrlhf.megatron.model import hf_tensors
from tests.distributed import run_distributed
from tests.megatron.common import make_policy, make_step, random_rows
from tests.tiny import make_tiny_model


def _two_updates(rank: int, world_size: int, path: Path, mesh_sizes: dict, micro_batch_size: int, options: dict):
    policy, mesh = make_policy(path, rank=rank, world_size=world_size, **mesh_sizes)
    step = make_step(policy, mesh, micro_batch_size=micro_batch_size, **options)
    metrics = [
        step.update(random_rows(seed=seed).part(mesh.data_rank, mesh.data_size), entropy_coefficient=0.1)
        for seed in (0, 1)
    ]
    return metrics, {name: value.clone() for name, value in hf_tensors(policy)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), kv_heads=4)


@pytest.fixture(scope="module", params=["sequence_mean", "token_mean"])
def single(request: pytest.FixtureRequest, model: Path):
    return request.param, run_distributed(_two_updates, 1, model, {}, 8, {"aggregation": request.param})[0]


@pytest.mark.parametrize(
    ("world_size", "mesh_sizes", "micro_batch_size"),
    [(1, {}, 3), (2, {"tensor": 2}, 8), (4, {"tensor": 4}, 8), (2, {}, 2), (4, {"tensor": 2}, 1)],
    ids=["split", "tp2", "tp4", "dp2", "tp2dp2"],
)
def test_update_equals_that_of_one_process(
    single, model: Path, world_size: int, mesh_sizes: dict, micro_batch_size: int
) -> None:
    aggregation, (metrics, weights) = single
    results = run_distributed(
        _two_updates, world_size, model, mesh_sizes, micro_batch_size, {"aggregation": aggregation}
    )
    for other_metrics, other_weights in results:
        for step, other in zip(metrics, other_metrics, strict=True):
            assert other == pytest.approx(step, rel=1e-5, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, atol=1e-5, rtol=1e-5, msg=name)
