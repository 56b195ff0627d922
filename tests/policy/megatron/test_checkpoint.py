"""A checkpoint of the policy: k updates + save + load + the rest equal all updates, on its own mesh and on another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpo_openrlhf.policy.megatron.checkpoint import PolicyCheckpoint
from dcpo_openrlhf.policy.megatron.model import hf_tensors
from tests.distributed import run_distributed
from tests.policy.megatron.common import make_policy, make_step, random_rows
from tests.tiny import make_tiny_model

BEFORE, AFTER = (0, 1), (2, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), kv_heads=4)


def _update(step: Any, seeds: tuple[int, ...]) -> list[dict[str, float]]:
    mesh = step.mesh
    return [step.update(random_rows(seed=seed).part(mesh.data_rank, mesh.data_size)) for seed in seeds]


def _random_number() -> float:
    return float(torch.rand(()))


def _weights(policy: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in hf_tensors(policy)}


def _save(rank: int, world_size: int, path: Path, folder: Path, sizes: dict, dtype: str):
    """Metrics and weights of updates after a save; the first of them runs while the thread still writes."""
    step = make_step(make_policy(path, rank=rank, world_size=world_size, dtype=dtype, **sizes))
    _update(step, BEFORE)
    checkpoint = PolicyCheckpoint(step)
    checkpoint.save(folder)
    number = _random_number()
    metrics = _update(step, AFTER)
    return metrics, _weights(step.policy), number, checkpoint.finish()


def _load(rank: int, world_size: int, path: Path, folder: Path, sizes: dict, dtype: str):
    step = make_step(make_policy(path, rank=rank, world_size=world_size, dtype=dtype, **sizes))
    torch.manual_seed(99)
    PolicyCheckpoint(step).load(folder)
    number = _random_number()
    return _update(step, AFTER), _weights(step.policy), number


def _both(*arguments: Any):
    return _save(*arguments), _load(*arguments)


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("world_size", "sizes", "dtype"),
    [(1, {}, "fp32"), (2, {"tensor": 2}, "bf16"), (2, {}, "bf16"), (2, {"pipeline": 2}, "fp32")],
    ids=["one", "tp2-bf16", "dp2-bf16", "pp2"],
)
def test_resumed_updates_are_those_of_the_run_bit_for_bit(
    model: Path, tmp_path: Path, world_size: int, sizes: dict, dtype: str
) -> None:
    folder = _folder(tmp_path)
    saved, loaded = zip(*run_distributed(_both, world_size, model, folder, sizes, dtype), strict=True)
    for (metrics, weights, number, _), (same, same_weights, same_number) in zip(saved, loaded, strict=True):
        assert same == metrics
        assert same_number == number
        assert same_weights.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(same_weights[name], value), name
    on_disk = {f.name: f.stat().st_size for f in folder.iterdir()}
    told = {name: sums["bytes"] for *_, by_rank in saved for name, sums in by_rank.items()}
    assert set(on_disk) - set(told) == {".metadata", "metadata.json"}
    assert all(on_disk[name] == size for name, size in told.items())
    assert json.loads((folder / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [((2, {"tensor": 2}), (1, {})), ((1, {}), (2, {})), ((2, {}), (2, {"pipeline": 2}))],
    ids=["tp2-to-tp1", "dp1-to-dp2", "dp2-to-pp2"],
)
def test_another_mesh_continues_with_the_same_numbers(
    model: Path, tmp_path: Path, saved_on: tuple, loaded_on: tuple
) -> None:
    folder = _folder(tmp_path)
    (world_size, sizes), (other_size, other_sizes) = saved_on, loaded_on
    metrics, weights, *_ = run_distributed(_save, world_size, model, folder, sizes, "fp32")[0]
    for other, other_weights, _ in run_distributed(_load, other_size, model, folder, other_sizes, "fp32"):
        for one, two in zip(metrics, other, strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_experts_continue_on_another_mesh_that_shares_them_out(tmp_path: Path) -> None:
    folder, path = _folder(tmp_path), make_tiny_model(tmp_path / "model", architecture="qwen3_moe", kv_heads=4)
    metrics, weights, *_ = run_distributed(_save, 2, path, folder, {"expert": 2}, "fp32")[0]
    for found, tensors, _ in run_distributed(_load, 4, path, folder, {"expert": 4}, "fp32"):
        for one, two in zip(metrics, found, strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(tensors[name], value, atol=1e-5, rtol=1e-4, msg=name)


def _save_where_nothing_can_be_written(rank: int, world_size: int, path: Path, folder: Path) -> str:
    step = make_step(make_policy(path, rank=rank, world_size=world_size))
    _update(step, BEFORE)
    checkpoint = PolicyCheckpoint(step)
    checkpoint._write = lambda buckets, *rest: PolicyCheckpoint._write(  # type: ignore[method-assign]
        checkpoint, [(f"{folder}/gone/{key}", key, data) for _, key, data in buckets], *rest
    )
    checkpoint.save(folder)
    with pytest.raises(RuntimeError, match=r"(?s)could not write.*No such file"):
        checkpoint.finish()
    return "told"


def test_a_write_that_fails_is_an_error_at_finish(model: Path, tmp_path: Path) -> None:
    assert run_distributed(_save_where_nothing_can_be_written, 1, model, _folder(tmp_path)) == ["told"]
