"""What moving weights takes: sums by hand, and the sync's own constants."""

import json
from pathlib import Path

import pytest
from vllm.distributed.weight_transfer import packed_tensor

from dcpo_openrlhf.recipe import moving
from dcpo_openrlhf.recipe.families import Sizes
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.memory import GIB, RESERVE, stage_memory
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.weight_sync import device

ROOT = Path(__file__).parents[2]
SIZES = Sizes.of(json.loads((ROOT / "tests" / "model_configs" / "Qwen2.5-7B.json").read_text()))
RANK = 3.81e9
"""Parameters on one of two tensor ranks."""


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "dcpo-qwen2.5-math-7b-8xa800.yaml", list(overrides))


def test_messages_are_those_of_the_sync() -> None:
    assert device.BUFFER_BYTES == moving.SYNC_BUFFER
    assert packed_tensor.DEFAULT_PACKED_NUM_BUFFERS == 2


def test_sync_over_nccl_by_hand() -> None:
    need = moving.sync_memory(SIZES, recipe())
    largest = 2 * 152064 * 3584  # the embedding in bf16
    assert need.policy == pytest.approx((2 + 4 + 12 / 2) * RANK, rel=0.01)
    assert need.engine == 0
    assert need.buffers == 3 * 2**28 + 3 * largest
    assert need.total < 80 * GIB and not list(moving.violations(SIZES, recipe()))


def test_colocated_engine_stands_beside_the_policy_in_a_sync() -> None:
    colocated = recipe("parallel.colocate=true", "rollout.engines=4")
    need = moving.sync_memory(SIZES, colocated)
    assert need.engine == pytest.approx(2 * SIZES.parameters + RESERVE["cuda"])
    assert need.buffers == 2 * 2**28 + 3 * 2 * 152064 * 3584
    (line,) = moving.violations(
        SIZES, recipe("parallel.colocate=true", "rollout.engines=4", "parallel.device_memory_gb=60")
    )
    assert "a weight sync over ipc needs about" in line and "engine 16.2" in line and "device_memory_gb = 60" in line


MIXTURE = ROOT / "recipes" / "cluster" / "dcpo-qwen3-235b-a22b-20x8xa800.yaml"


def mixture_sizes() -> Sizes:
    return Sizes.of(json.loads((ROOT / "tests/model_configs/Qwen3-235B-A22B.json").read_text()))


def test_one_of_several_senders_packs_less_and_gathers_no_experts() -> None:
    mixture, sizes = load_recipe(MIXTURE), mixture_sizes()
    assert mixture.senders == 8
    need = moving.sync_memory(sizes, mixture)
    assert need.buffers == 3 * 2 * 151936 * 4096, "the embedding packed, its shards, and these joined"
    stages = [stage_memory(sizes, mixture, stage) for stage in range(2)]
    assert "a weight sync over nccl from 8 ranks at once (estimate)" in "\n".join(moving.report(sizes, mixture))
    assert need.policy == max(m.weights + m.gradients + m.optimizer for m in stages)


def test_experts_of_all_ranks_are_gathered_together() -> None:
    mixture, sizes = load_recipe(MIXTURE, ["weight_sync.senders=1"]), mixture_sizes()
    largest, experts = 2 * 151936 * 4096, 2 * 2 * 4096 * 1536 * mixture.parallel.expert
    assert moving.sync_memory(sizes, mixture).buffers == 3 * 2**28 + 2 * largest + max(largest, experts)


def test_host_memory_by_hand() -> None:
    """Two replicas of two tensor ranks on one node: each rank loads all its state, the first replica's save theirs."""
    host = moving.host_memory(SIZES, recipe())
    assert host.kept == 0
    assert host.loading == pytest.approx(4 * 12 * RANK, rel=0.01)
    assert host.saving == pytest.approx(2 * 14 * RANK, rel=0.01)
    colocated = moving.host_memory(SIZES, recipe("parallel.colocate=true", "rollout.engines=4"))
    assert colocated.kept == pytest.approx(4 * ((2 + 12 / 2) * RANK + 2 * SIZES.parameters), rel=0.01)
    offloaded = moving.host_memory(SIZES, recipe("optimizer.cpu_offload=1.0"))
    assert offloaded.kept == pytest.approx(4 * 12 / 2 * RANK, rel=0.01)


def test_plan_says_both() -> None:
    text = "\n".join(moving.report(SIZES, recipe()))
    assert "during a weight sync over nccl (estimate): policy" in text
    assert "of a node's host memory" in text and "while loading 17" in text
    assert "weight sync" not in "\n".join(moving.report(SIZES, recipe("run.device=cpu", "parallel.colocate=false")))
