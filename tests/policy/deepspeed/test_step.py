"""Both backends agree on the same batch: statistics, gradient, loss and updated weights, on any number of ranks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpo_openrlhf.policy.reference import Reference
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.recipe.schema import Optimizer
from tests.bounds import HANG_S
from tests.distributed import run_distributed
from tests.policy.deepspeed.common import make_recipe, make_step
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[3]
TEMPERATURES = [0.8, 1.2]
# name: (processes, ZeRO stage, architecture, train.*)
RUNS: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "one-2": (1, 2, "llama", {"micro_batch_size": 3}),
    "one-3": (1, 3, "qwen3", {"micro_batch_tokens": 60}),
    "two-2": (2, 2, "qwen2", {"micro_batch_tokens": 60}),
    "two-3": (2, 3, "llama", {"micro_batch_size": 2, "recompute": "full"}),
}


def rows(seed: int = 0) -> Rows:
    """Those of the Megatron tests, and every term that a loss can have."""
    from tests.policy.megatron.common import random_rows

    made, g = random_rows(seed=seed), torch.Generator().manual_seed(seed)
    return replace(
        made,
        scale=torch.rand(len(made), generator=g),
        expected_weight=torch.rand(len(made), generator=g),
        expected_temperature=1.2,
    )


def _megatron(rank: int, world_size: int, models: dict[str, Path]) -> dict[str, Any]:
    """{architecture: (statistics, gradients, metrics of two updates, weights)} of one process."""
    from dcpo_openrlhf.policy.megatron.model import hf_tensors
    from tests.policy.megatron.common import make_policy, make_step

    results = {}
    for architecture, path in models.items():
        step = make_step(make_policy(path, rank=rank, world_size=world_size))
        stats = step.token_statistics(rows(), temperatures=TEMPERATURES)
        metrics, gradients = [], {}
        for seed in (0, 1):
            metrics.append(step.update(rows(seed), entropy_coefficient=0.1))
            gradients = gradients or _gradients_of_megatron(step)
        weights = {name: value.clone() for name, value in hf_tensors(step.policy)}
        results[architecture] = stats, gradients, metrics, weights
    return results


def _gradients_of_megatron(step: Any) -> dict[str, Tensor]:
    """The last update's main gradients, clipped, under Hugging Face names."""
    gradients = {}
    for entry, parameter in step.policy.entries():
        merged = entry.cut.merge([parameter.main_grad.clone()], step.policy.shape)
        gradients |= dict(zip(entry.hf_names, merged, strict=True))
    return gradients


def _zero(rank: int, world_size: int, models: dict[str, Path], names: list[str]) -> dict[str, Any]:
    """{run: what `_megatron` gives, statistics of this rank's rows alone}."""
    from deepspeed.utils import safe_get_full_grad

    from dcpo_openrlhf.policy.deepspeed.model import held, hf_tensors

    results = {}
    for name in names:
        _, stage, architecture, train = RUNS[name]
        step = make_step(make_recipe(models[architecture], world_size=world_size, stage=stage, train=train))
        if name == "two-3":  # as where another rank has a micro-batch more
            step._agree_on_count = lambda count: count + 1
        part = rows().part(step.mesh.data_rank, step.mesh.data_size)
        stats = step.token_statistics(part, temperatures=TEMPERATURES)
        reference = Reference(held(step.policy))
        gradients: dict[str, Tensor] = {}

        def keep(
            step: Any = step, gradients: dict[str, Tensor] = gradients, take: Any = step.engine.optimizer.step
        ) -> None:
            if not gradients:
                for key, parameter in step.engine.module.named_parameters():
                    gradient: Any = safe_get_full_grad(parameter)
                    gradients[key] = gradient.clone()
            take()

        step.engine.optimizer.step = keep
        metrics = [
            step.update(rows(seed).part(step.mesh.data_rank, step.mesh.data_size), entropy_coefficient=0.1)
            for seed in (0, 1)
        ]
        weights = {key: value.clone() for key, value in hf_tensors(step.policy)}
        with reference.in_place():
            started = step.token_statistics(part, temperatures=TEMPERATURES)
        after = {key: value.clone() for key, value in hf_tensors(step.policy)}
        assert all(torch.equal(started[key], stats[key]) for key in stats), "the starting model in the policy's place"
        assert all(torch.equal(after[key], weights[key]) for key in weights)
        results[name] = (part.index, stats), gradients, metrics, weights
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny_model(folder / name, architecture=name, kv_heads=2, tie=name == "llama")
        for name in ("llama", "qwen2", "qwen3")
    }


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Any]:
    return run_distributed(_megatron, 1, models)[0]


@pytest.fixture(scope="module")
def results(models: dict[str, Path]) -> dict[str, list[Any]]:
    """{run: what each rank returns}; runs of as many processes share one launch."""
    by_run: dict[str, list[Any]] = {}
    for world_size in (1, 2):
        names = [name for name, (size, *_) in RUNS.items() if size == world_size]
        ranks = run_distributed(_zero, world_size, models, names)
        by_run |= {name: [rank[name] for rank in ranks] for name in names}
    return by_run


@pytest.mark.parametrize("name", RUNS)
def test_gradient_is_megatrons(results: dict[str, list[Any]], expected: dict[str, Any], name: str) -> None:
    _, wanted, metrics, _ = expected[RUNS[name][2]]
    for _, found, own, _ in results[name]:
        assert found.keys() == wanted.keys()
        a, b = (torch.cat([g[key].double().flatten() for key in found]) for g in (wanted, found))
        cosine = float(a @ b / (a.norm() * b.norm()))
        assert cosine > 0.999, cosine
        assert float(b.norm()) == pytest.approx(metrics[0]["policy/grad_norm"], rel=1e-4)
        assert own[0]["policy/grad_norm"] == pytest.approx(metrics[0]["policy/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_updates_and_statistics_are_megatrons(
    results: dict[str, list[Any]], expected: dict[str, Any], name: str
) -> None:
    stats, _, metrics, weights = expected[RUNS[name][2]]
    ranks = results[name]
    order = torch.cat([index for (index, _), *_ in ranks]).argsort()
    for key, value in stats.items():
        own = torch.cat([own[key] for (_, own), *_ in ranks])[order]
        torch.testing.assert_close(own, value, atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    for _, _, own, own_weights in ranks:
        for step, other in zip(metrics, own, strict=True):
            assert other == pytest.approx(step, rel=1e-4, abs=1e-6)
        assert own_weights.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(own_weights[key], value, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate_is_megatrons(schedule: Any, warmup: int) -> None:
    from dcpo_openrlhf.policy.deepspeed.step import learning_rate
    from dcpo_openrlhf.policy.megatron.step import _schedule

    o = Optimizer(learning_rate=1e-3, min_learning_rate=1e-4, schedule=schedule, warmup_updates=warmup)
    group = {"lr": 0.0, "weight_decay": 0.0, "max_lr": 1e-3, "min_lr": 1e-4}
    optimizer: Any = type("Optimizer", (), {"param_groups": [group]})()
    theirs = _schedule(optimizer, o, 9)
    for done in range(9):
        assert learning_rate(o, done, 9) == pytest.approx(group["lr"], rel=1e-12), done
        theirs.step(increment=1)


def test_nothing_of_megatron_core_is_imported() -> None:
    script = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron":
            raise ImportError(f"{name} is not for this backend")

sys.meta_path.insert(0, Refuse())
for module in ("model", "step", "checkpoint", "memory"):
    importlib.import_module(f"dcpo_openrlhf.policy.deepspeed.{module}")
for module in ("policy.actor", "trainer", "train_dcpo", "weight_sync.source"):
    importlib.import_module(f"dcpo_openrlhf.{module}")
importlib.import_module("tools.export_hf")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
