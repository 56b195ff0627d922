"""Trainer (tp = 2) and engine hold the same policy: their greedy outputs are equal after a sync, and not before."""

import contextlib
from collections.abc import Iterator

import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcpo_openrlhf import local_ray
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.recipe.resume import STOP
from dcpo_openrlhf.recipe.schema import Recipe
from tests.bounds import HANG_S
from tests.tiny import make_tiny_model

QUESTIONS = [f"What is {a} + {b}?" for a, b in [(1, 2), (3, 9), (5, 5), (0, 7)]]
TOKENS = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"device": "cpu", "dir": tmp_path_factory.mktemp("run")},
            "model": {"path": make_tiny_model(tmp_path_factory.mktemp("trainer"), tie=False, seed=1), "dtype": "fp32"},
            "task": {"kind": "arithmetic"},
            "parallel": {"devices_per_node": 2, "tensor": 2},
            "rollout": {"engines": 1, "max_prompt_tokens": 100, "max_new_tokens": TOKENS},
        }
    )


@pytest.fixture(scope="module")
def exits() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def stack(recipe: Recipe, exits: contextlib.ExitStack, tmp_path_factory: pytest.TempPathFactory):
    """(policy group, engines): the engine starts with the weights of another model."""
    from dcpo_openrlhf.policy.actor import MegatronActor
    from dcpo_openrlhf.policy.group import PolicyActorGroup
    from dcpo_openrlhf.rollout.pool import create_rollout_engines, shutdown_engines, wait_until_ready

    other = make_tiny_model(tmp_path_factory.mktemp("engine"), tie=False, seed=2)
    exits.callback(ray.shutdown)
    local_ray.start(num_cpus=3, num_gpus=3, include_dashboard=False, log_to_driver=False)
    engines = create_rollout_engines(
        count=1,
        tensor_parallel=1,
        model=str(other),
        seed=0,
        max_model_len=128,
        dtype="float32",
        device="cpu",
        transport=recipe.transport,
        cpu_kv_cache_gb=0.1,
    )
    exits.callback(shutdown_engines, engines)
    group = PolicyActorGroup(1, 2, MegatronActor)
    group.begin_init(RecipeStrategy(recipe), 1)
    wait_until_ready(engines, HANG_S)
    group.finish_init(engines, timeout=HANG_S)
    return group, engines


def engine_greedy(recipe: Recipe, engines: list) -> list[list[int]]:
    from dcpo_openrlhf.rollout.generator import DCPOSamplesGenerator

    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    generator = DCPOSamplesGenerator(RecipeStrategy(recipe), None, None, tokenizer, engines)
    samples = generator.generate(
        QUESTIONS, [""] * 4, step=0, n_samples=1, max_new_tokens=TOKENS, max_len=128, temperature=0.0
    )
    return [s.sequences[0, 1:][s.action_mask[0].bool()].tolist() for s in samples]


def test_greedy_outputs_are_equal_after_the_first_sync(recipe: Recipe, stack) -> None:
    group, engines = stack
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    prompts = tokenizer(QUESTIONS, add_special_tokens=False)["input_ids"]
    own = ray.get(group.async_run_method("greedy", prompts, TOKENS, tokenizer.eos_token_id))
    assert own[0] == own[1]  # both tensor ranks
    assert len({tuple(o) for o in own[0]}) > 1  # a model that says one thing to all would prove nothing
    hf = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    first = hf(torch.tensor([prompts[0]])).logits[0, -1].argmax()
    assert own[0][0][0] == int(first)

    assert engine_greedy(recipe, engines) != own[0]
    assert ray.get(group.async_run_method("broadcast_to_vllm")) == [1, 1]
    assert engine_greedy(recipe, engines) == own[0]


def test_rows_are_dealt_by_data_rank_and_come_back_in_order(stack) -> None:
    group, _ = stack
    from tests.policy.megatron.common import random_rows

    assert group.data_ranks == [0, 0]
    batches = [random_rows(seed=seed) for seed in (0, 1)]
    refs = group.async_run_method_batch("token_statistics", rows=batches, temperatures=[[0.8], [0.8]])
    both = group.gather(refs)
    assert [b["logp"].shape for b in both] == [rows.action_mask.shape for rows in batches]
    again = group.gather(
        group.async_run_method_batch("token_statistics", rows=batches[::-1], temperatures=[[0.8], [0.8]])
    )
    assert torch.equal(both[0]["logp"], again[1]["logp"]) and torch.equal(both[1]["entropy"], again[0]["entropy"])


def test_a_forward_pass_that_is_to_stop_ends_on_every_rank_and_the_next_call_is_served(stack, recipe: Recipe) -> None:
    group, _ = stack
    from tests.policy.megatron.common import random_rows

    rows, flag = random_rows(seed=0), recipe.run.dir / STOP
    flag.touch()
    refs = group.async_run_method_batch("token_statistics", rows=[rows], temperatures=[[0.8]])
    for ref in refs:
        with pytest.raises(RayTaskError, match="stopped between micro-batches"):
            ray.get(ref, timeout=HANG_S)
    flag.unlink()
    refs = group.async_run_method_batch("token_statistics", rows=[rows], temperatures=[[0.8]])
    assert group.gather(refs)[0]["logp"].shape == rows.action_mask.shape
