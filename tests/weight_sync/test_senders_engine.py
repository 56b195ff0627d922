"""A real vLLM engine takes the weights of two pipeline stages from two senders at once, also when connected anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.recipe.schema import Recipe
from tests.bounds import HANG_S
from tests.tiny import make_tiny_model
from tests.weight_sync.engines import assert_serves, cluster, engines


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_model(root / str(seed), tie=True, seed=seed, layers=2) for seed in range(2)]


@pytest.fixture(scope="module")
def recipe(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"device": "cpu", "dir": tmp_path_factory.mktemp("run")},
            "model": {"path": folders[1], "dtype": "fp32"},
            "task": {"kind": "arithmetic"},
            "parallel": {"devices_per_node": 2, "pipeline": 2},
            "rollout": {"engines": 1, "max_prompt_tokens": 60, "max_new_tokens": 16},
            "weight_sync": {"transport": "gloo"},
        }
    )


@pytest.fixture(scope="module")
def stack(recipe: Recipe, folders: list[Path]) -> Iterator[tuple[Any, list[Any]]]:
    """(policy, engines): the engine starts with another model's weights."""
    from dcpo_openrlhf.policy.actor import MegatronActor
    from dcpo_openrlhf.policy.group import PolicyActorGroup

    assert recipe.senders == 2
    with cluster(gpus=3), engines(folders[0], recipe.sync_backend) as made:
        group = PolicyActorGroup(1, 2, MegatronActor)
        group.begin_init(RecipeStrategy(recipe), 1)
        group.finish_init(made, timeout=HANG_S)
        yield group, made


def test_an_engine_follows_both_stages(stack: Any, folders: list[Path]) -> None:
    group, made = stack
    assert_serves(made, folders[0])
    for version in (1, 2):
        assert ray.get(group.async_run_method("broadcast_to_vllm")) == [version, version]
        assert_serves(made, folders[1])
        assert ray.get(made[0].weight_version.remote()) == version
        first, last = ray.get(group.async_run_method("sent_checksums"))
        assert "model.embed_tokens.weight" in first and "model.norm.weight" in last and not first.keys() & last.keys()
        assert ray.get(made[0].weight_checksums.remote()) == [first | last]
        ray.get(group.async_run_method("connect", made, version))  # as after an engine's restart
