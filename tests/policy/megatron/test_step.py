"""One update is the same on every mesh, for every split into micro-batches, packed or not, recomputed or not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpo_openrlhf.methods import METHODS, Constants, method_advantage, penalty_weight
from dcpo_openrlhf.policy import micro_batch
from dcpo_openrlhf.policy.megatron.model import hf_tensors
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.policy.shared_prompts import deal
from tests.distributed import run_distributed
from tests.policy.megatron.common import grouped_rows, make_policy, make_step, random_rows
from tests.tiny import ARCHITECTURE_FIELDS, MIXTURES, make_tiny_model

# name: (processes, architecture, mesh and recomputation)
MESHES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one": (1, "llama", {}),
    "recompute-selective": (1, "llama", {"recompute": "selective"}),
    "recompute-full": (1, "llama", {"recompute": "full"}),
    "one-moe": (1, "qwen3_moe", {}),
    "dp2": (2, "llama", {}),
    "tp2": (2, "llama", {"tensor": 2}),
    "sp2": (2, "llama", {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, "llama", {"pipeline": 2}),
    "interleaved": (2, "llama", {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, "llama", {"context": 2}),
    "ep2": (2, "qwen3_moe", {"expert": 2}),
    "tp2-moe": (2, "qwen3_moe", {"tensor": 2, "sequence_parallel": True}),
    "tp2ep2": (2, "qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "tp4": (4, "llama", {"tensor": 4}),
    "tp2dp2": (4, "llama", {"tensor": 2}),
    "tp2pp2": (4, "llama", {"tensor": 2, "pipeline": 2}),
    "sp2pp2-full": (4, "llama", {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "recompute": "full"}),
    "sp2cp2": (4, "llama", {"tensor": 2, "sequence_parallel": True, "context": 2}),
    "interleaved-dp2": (4, "llama", {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2cp2": (4, "llama", {"pipeline": 2, "context": 2}),
    "pp2ep2": (4, "qwen3_moe", {"pipeline": 2, "expert": 2}),
    "sp2ep2dp2": (4, "qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "cp2ep2": (4, "qwen3_moe", {"context": 2, "expert": 2}),
}
# packing off, some rows at a time, and up to a number of tokens
SPLITS: dict[str, dict[str, Any]] = {
    "row by row": {"micro_batch_size": 1, "aggregation": "token_mean"},
    "three rows": {"micro_batch_size": 3, "aggregation": "sequence_mean"},
    "60 tokens": {"micro_batch_tokens": 60, "aggregation": "token_mean"},
}
TEMPERATURES = [0.8, 1.2]


def splits_of(name: str) -> dict[str, dict[str, Any]]:
    """All of them on one or two processes; four have a core to share and leave one out."""
    return SPLITS if MESHES[name][0] < 4 else {key: SPLITS[key] for key in ("row by row", "60 tokens")}


def rows_of_update(seed: int) -> Rows:
    """Rows of which clip_cov left out some tokens and kl_cov holds others, chosen before they are dealt and split."""
    rows, constants = random_rows(seed=seed), Constants(clip_cov_share=0.1, clip_cov_low=0.0, kl_cov_share=0.2)
    assert rows.old_logp is not None
    group_advantage = rows.advantages[0].sum(1) / rows.action_mask.sum(1)
    tokens = {"old_logp": rows.old_logp, "mask": rows.action_mask, "constants": constants}
    (advantage,) = method_advantage(
        METHODS["clip_cov"],
        group_advantage=group_advantage,
        success=(group_advantage > 0).float(),
        target_ratio=torch.ones_like(rows.old_logp),
        alpha=0.0,
        mixing="convex",
        seed=seed,
        **tokens,
    )
    held = penalty_weight(METHODS["kl_cov"], group_advantage=group_advantage, **tokens)
    assert held is not None and held.any() and ((advantage == 0) & rows.action_mask).any()
    return replace(rows, advantages=(advantage,), penalty_weight=held)


def _on_meshes(rank: int, world_size: int, models: dict[str, Path], names: list[str]) -> dict[str, Any]:
    """{(mesh, split): (this rank's token statistics or None, metrics of two updates, weights on rank 0)}."""
    results = {}
    for name in names:
        _, architecture, sizes = MESHES[name]
        for split, options in splits_of(name).items():
            policy = make_policy(models[architecture], rank=rank, world_size=world_size, **sizes)
            step, mesh = make_step(policy, **options), policy.mesh
            part = random_rows().part(mesh.data_rank, mesh.data_size)
            stats = step.token_statistics(part, temperatures=TEMPERATURES)
            metrics = [
                step.update(rows_of_update(seed).part(mesh.data_rank, mesh.data_size), entropy_coefficient=0.1)
                for seed in (0, 1)
            ]
            weights = {key: value.clone() for key, value in hf_tensors(policy)}
            mine = (part.index, stats) if mesh.is_data_leader else None
            results[name, split] = mine, metrics, weights if rank == 0 else None
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": make_tiny_model(folder / "llama", layers=4, kv_heads=4, tie=True),
        "qwen3_moe": make_tiny_model(folder / "moe", architecture="qwen3_moe", layers=2, tie=False),
    }


@pytest.fixture(scope="module")
def results(models: dict[str, Path]) -> dict[int, list[dict[str, Any]]]:
    """For each number of processes what its ranks return; all meshes of a size share one launch."""
    sizes = sorted({world_size for world_size, *_ in MESHES.values()})
    return {
        size: run_distributed(_on_meshes, size, models, [name for name, (world, *_) in MESHES.items() if world == size])
        for size in sizes
    }


def _statistics(ranks: list[dict[str, Any]], key: tuple[str, ...]) -> dict[str, Tensor]:
    """Of all rows in their order, from the leaders of the data ranks."""
    parts = [rank[key][0] for rank in ranks if rank[key][0] is not None]
    order = torch.cat([index for index, _ in parts]).argsort()
    return {name: torch.cat([stats[name] for _, stats in parts])[order] for name in parts[0][1]}


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in MESHES for split in splits_of(name)])
def test_update_equals_that_of_one_process(results: dict[int, list[dict[str, Any]]], name: str, split: str) -> None:
    world_size, architecture, _ = MESHES[name]
    single = "one" if architecture == "llama" else "one-moe"
    # loss and gradient of every split with the same aggregation are those of the rows one by one
    same = "row by row" if SPLITS[split]["aggregation"] == "token_mean" else split
    _, metrics, weights = results[1][0][single, same]
    statistics = _statistics(results[1], (single, same))
    ranks = results[world_size]
    for key, value in _statistics(ranks, (name, split)).items():
        torch.testing.assert_close(value, statistics[key], atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    for rank in ranks:
        for step, other in zip(metrics, rank[name, split][1], strict=True):
            assert other == pytest.approx(step, rel=1e-5, abs=1e-6)
    assert ranks[0][name, split][2].keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(ranks[0][name, split][2][key], value, atol=1e-5, rtol=1e-5, msg=key)


# responses that share their prompt: some rows and up to a number of tokens, both of which cut groups in parts
SHARED_SPLITS: dict[str, dict[str, Any]] = {
    "unshared": {"micro_batch_size": 1, "share_prompts": False},
    "three rows": {"micro_batch_size": 3},
    "40 tokens": {"micro_batch_tokens": 40},
}


def shared_splits_of(name: str) -> list[tuple[str, str]]:
    """(split, aggregation) on each mesh; without sharing on one process alone."""
    if MESHES[name][0] == 4:
        return [("40 tokens", "token_mean")]
    unshared = [("unshared", how) for how in ("token_mean", "sequence_mean")] if name in ALONE else []
    return [*unshared, ("three rows", "token_mean"), ("40 tokens", "sequence_mean")]


ALONE = {"llama": "one", "qwen3_moe": "one-moe"}
ALONE |= {name: architecture for architecture, name in ALONE.items()}


def _sharing_on_meshes(rank: int, world_size: int, models: dict[str, Path], names: list[str]) -> dict[str, Any]:
    """{(mesh, split, aggregation): (token statistics or None, metrics of two updates, weights on rank 0)}."""
    results = {}
    for name in names:
        _, architecture, sizes = MESHES[name]
        for split, aggregation in shared_splits_of(name):
            policy = make_policy(models[architecture], rank=rank, world_size=world_size, **sizes)
            step, mesh = make_step(policy, aggregation=aggregation, **SHARED_SPLITS[split]), policy.mesh
            mine = [deal(grouped_rows(seed=seed), mesh.data_size, groups=True)[mesh.data_rank] for seed in (0, 1)]
            stats = step.token_statistics(mine[0], temperatures=TEMPERATURES)
            metrics = [step.update(rows, entropy_coefficient=0.1) for rows in mine]
            weights = {key: value.clone() for key, value in hf_tensors(policy)}
            leader = (mine[0].index, stats) if mesh.is_data_leader else None
            results[name, split, aggregation] = leader, metrics, weights if rank == 0 else None
    return results


@pytest.fixture(scope="module")
def sharing(models: dict[str, Path]) -> dict[int, list[dict[str, Any]]]:
    sizes = sorted({world_size for world_size, *_ in MESHES.values()})
    of_size = {size: [name for name, (world, *_) in MESHES.items() if world == size] for size in sizes}
    return {size: run_distributed(_sharing_on_meshes, size, models, of_size[size]) for size in sizes}


@pytest.mark.parametrize(
    ("name", "split", "aggregation"),
    [(name, *split) for name in MESHES for split in shared_splits_of(name) if split[0] != "unshared"],
)
def test_responses_that_share_their_prompt_train_as_rows_by_themselves(
    sharing: dict[int, list[dict[str, Any]]], name: str, split: str, aggregation: str
) -> None:
    world_size, architecture, _ = MESHES[name]
    key = (ALONE[architecture], "unshared", aggregation)
    _, metrics, weights = sharing[1][0][key]
    statistics = _statistics(sharing[1], key)
    ranks = sharing[world_size]
    for kind, value in _statistics(ranks, (name, split, aggregation)).items():
        torch.testing.assert_close(
            value, statistics[kind], atol=1e-5, rtol=1e-5, msg=lambda m, kind=kind: f"{kind}: {m}"
        )
    for rank in ranks:
        for step, other in zip(metrics, rank[name, split, aggregation][1], strict=True):
            assert other == pytest.approx(step, rel=2e-5, abs=1e-6)
    for kind, value in weights.items():
        torch.testing.assert_close(
            ranks[0][name, split, aggregation][2][kind],
            value,
            atol=1e-5,
            rtol=1e-5,
            msg=lambda m, kind=kind: f"{kind}: {m}",
        )


# every family: (processes, mesh); megatron-core trains experts on tensor ranks with sequence parallelism alone
FAMILY_MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
}
FAMILY_CASES = [
    (architecture, mesh)
    for architecture in ARCHITECTURE_FIELDS
    for mesh in FAMILY_MESHES
    if mesh != "one" and (mesh != "ep2" or architecture in MIXTURES)
]


def _one_update(rank: int, world_size: int, models: dict[str, Path]) -> dict[Any, Any]:
    """{(family, mesh): (metrics of an update, weights)} of every mesh of this many processes."""
    found = {}
    for architecture, path in models.items():
        for name, (size, sizes) in FAMILY_MESHES.items():
            if size == world_size and (name != "ep2" or architecture in MIXTURES):
                policy = make_policy(path, rank=rank, world_size=world_size, **sizes)
                step, mesh = make_step(policy, micro_batch_tokens=60), policy.mesh
                metrics = step.update(random_rows().part(mesh.data_rank, mesh.data_size), entropy_coefficient=0.1)
                found[architecture, name] = metrics, {key: value.clone() for key, value in hf_tensors(policy)}
    return found


@pytest.fixture(scope="module")
def family_updates(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], list[dict[Any, Any]]]:
    """Of one process, and of both ranks of two."""
    folder = tmp_path_factory.mktemp("families")
    models = {
        a: make_tiny_model(folder / a, architecture=a, hidden=64, kv_heads=4, tie=False) for a in ARCHITECTURE_FIELDS
    }
    (alone,) = run_distributed(_one_update, 1, models)
    return alone, run_distributed(_one_update, 2, models)


@pytest.mark.parametrize(("architecture", "mesh"), FAMILY_CASES)
def test_every_family_is_updated_as_in_one_process(
    family_updates: tuple[dict[Any, Any], list[dict[Any, Any]]], architecture: str, mesh: str
) -> None:
    alone, ranks = family_updates
    metrics, weights = alone[architecture, "one"]
    for rank in ranks:
        found, tensors = rank[architecture, mesh]
        assert found == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert tensors.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(tensors[key], value, atol=1e-5, rtol=1e-5, msg=key)


def _stopped(rank: int, world_size: int, path: Path, sizes: dict[str, Any]) -> tuple[int, bool]:
    """(micro-batches done before the pass was left, is the next pass as ever)."""
    step = make_step(make_policy(path, rank=rank, world_size=world_size, **sizes), micro_batch_size=1)
    rows, done = random_rows(batch=40), []
    before = step.token_statistics(rows, temperatures=[0.8])
    step.stop_asked = lambda: rank == 1 and len(done) > 0  # one rank alone hears of it
    original = step._run
    step._run = lambda packs, *args, **kwargs: (done.append(len(packs)), original(packs, *args, **kwargs))[1]
    with pytest.raises(micro_batch.Stopped):
        step.token_statistics(rows, temperatures=[0.8])
    step.stop_asked = lambda: False
    after = step.token_statistics(rows, temperatures=[0.8])
    return done[0], all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_a_forward_pass_is_left_between_micro_batches_by_every_rank(tmp_path: Path, sizes: dict[str, Any]) -> None:
    path = make_tiny_model(tmp_path / "model")
    for done, same in run_distributed(_stopped, 2, path, sizes):
        assert done == micro_batch.ROUND * sizes.get("pipeline", 1) and same
