"""A real vLLM engine under Ray: what a rollout is, weights over shared memory, no process that outlives its actor."""

import os
import signal

import pytest
import ray
from vllm import SamplingParams

from dcpo_openrlhf.rollout import pool
from dcpo_openrlhf.rollout.engine import omp_env, thread_binding
from dcpo_openrlhf.rollout.generator import request_seed
from dcpo_openrlhf.weight_sync import connect
from tests.bounds import HANG_S
from tests.tiny import make_tiny_model
from tests.weight_sync.engines import (
    CONTEXT,
    QUESTIONS,
    FolderSource,
    assert_all_end,
    assert_serves,
    cluster,
    engines,
    generator,
    largest_logp_error,
    prompts,
)

LABELS = [str(index) for index in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_model(root / str(seed), architecture="llama", tie=True, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    with cluster():
        yield


@pytest.fixture(scope="module")
def engine(ray_cluster, folders):
    with engines(folders[0], "shared_memory") as made:
        yield made[0]


def generate(engine, folder, **overrides):
    settings = {"step": 0, "n_samples": 3, "max_new_tokens": 16, "max_len": CONTEXT} | overrides
    return generator([engine], folder).generate(prompts(folder), LABELS, **settings)


def rows(experiences):
    return [experience.sequences[0].tolist() for experience in experiences]


def test_rollouts_are_groups_in_prompt_order(engine, folders):
    experiences = generate(engine, folders[0])
    assert [experience.labels for experience in experiences] == [[label] for label in LABELS for _ in range(3)]
    tokenizer = generator([engine], folders[0]).tokenizer
    expected_prompts = tokenizer(prompts(folders[0]), add_special_tokens=False)["input_ids"]
    for index, experience in enumerate(experiences):
        prompt = expected_prompts[index // 3]
        sequence = experience.sequences[0].tolist()
        response = sequence[len(prompt) :]
        assert sequence[: len(prompt)] == prompt
        assert 1 <= len(response) <= 16
        assert experience.action_mask.tolist() == [[0] * (len(prompt) - 1) + [1] * len(response)]
        assert experience.rollout_log_probs.shape == experience.action_mask.shape
        assert experience.response_length.tolist() == [len(response)]
        assert experience.truncated.tolist() == [response[-1] != tokenizer.eos_token_id]
        assert experience.rewards is None
        assert experience.info["weight_version"].tolist() == [0]
    assert any(experience.truncated.item() for experience in experiences)
    assert not all(experience.truncated.item() for experience in experiences)


def test_samples_of_a_group_differ_and_a_step_repeats(engine, folders):
    first = rows(generate(engine, folders[0], step=3))
    assert len({tuple(row) for row in first}) == len(first)
    assert rows(generate(engine, folders[0], step=3)) == first
    assert rows(generate(engine, folders[0], step=4)) != first


def test_more_prompt_tokens_than_one_batch_takes(engine, folders):
    """vLLM cannot rewind a seeded request on CPU, so that none of its prompts may be cut in two."""
    gen = generator([engine], folders[0])
    many = [f"{index} {prompt}" for index in range(16) for prompt in prompts(folders[0])]
    tokens = sum(len(ids) for ids in gen.tokenizer(many, add_special_tokens=False)["input_ids"])
    assert tokens * 8 > pool.CPU_BATCHED_TOKENS
    options = {"step": 0, "n_samples": 8, "max_new_tokens": 2, "max_len": CONTEXT}
    experiences = gen.generate(many, ["" for _ in many], **options)
    assert len(experiences) == len(many) * 8


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_those_of_the_distribution_sampled_from(engine, folders, temperature):
    experiences = generate(engine, folders[0], temperature=temperature)
    assert largest_logp_error(experiences, folders[0], temperature) < 1e-4


def test_prompt_without_room_is_an_error(engine, folders):
    with pytest.raises(ValueError, match=rf"must not exceed the context, {CONTEXT}; .*It begins: '<\|im_start\|>user"):
        generate(engine, folders[0], max_new_tokens=CONTEXT - 5)
    with pytest.raises(ValueError, match="must not exceed the context"):
        ray.get(engine.generate_responses.remote("long", "", SamplingParams(max_tokens=8), 10, None, 1, None, [5] * 3))


def test_greedy_groups_are_refused(engine, folders):
    with pytest.raises(ValueError, match="3 equal samples"):
        generate(engine, folders[0], temperature=0.0)


def test_openrlhf_entry_point_gives_the_same_rollouts(engine, folders):
    gen = generator([engine], folders[0])
    gen.prompts_dataloader = [
        ([0], [prompt], [label], [None]) for prompt, label in zip(prompts(folders[0]), LABELS, strict=True)
    ]
    experiences, consumed, exhausted = gen._generate_vllm(
        iter(gen.prompts_dataloader), 5, False, step=0, n_samples_per_prompt=3, max_new_tokens=16, max_len=CONTEXT
    )
    assert (consumed, exhausted) == (5, False)
    assert rows(experiences) == rows(generate(engine, folders[0]))


def test_a_response_ends_at_every_stop_token(engine, folders):
    gen = generator([engine], folders[0])
    settings = {"step": 0, "n_samples": 3, "max_new_tokens": 16, "max_len": CONTEXT}

    def responses():
        found = gen.generate(prompts(folders[0]), LABELS, **settings)
        return [(e.sequences[0, 1:][e.action_mask[0].bool()].tolist(), bool(e.truncated[0])) for e in found]

    stop = next(t for tokens, _ in responses() for t in tokens[:8] if t not in gen.stop_token_ids)
    gen.stop_token_ids.append(stop)
    ended = responses()
    assert all(stop not in tokens[:-1] for tokens, _ in ended)
    assert [cut for tokens, cut in ended if tokens[-1] == stop].count(False) >= 1


def test_rollouts_after_a_sync_come_from_the_new_weights_and_say_so(engine, folders):
    """The weight of the tied output layer has a packed copy, and all prompts are in the prefix cache."""
    assert_serves([engine], folders[0])
    sync = connect(
        transport="shared_memory",
        rank=0,
        engines=[engine],
        source=FolderSource(folders[1]),
        deadline_s=HANG_S,
        bucket_bytes=100_000,
    )
    sync.send_weights()
    assert_serves([engine], folders[1])
    experiences = generate(engine, folders[1])
    assert largest_logp_error(experiences, folders[1]) < 1e-4
    assert {experience.info["weight_version"].item() for experience in experiences} == {1}
    assert ray.get(engine.health.remote())["weight_version"] == 1
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("dcpo_weights_")]


def test_processes_end_with_a_killed_actor_and_the_error_names_the_engine(engine, folders):
    """The last test of the module: it takes the engine away."""
    health = ray.get(engine.health.remote())
    assert health["children"]
    os.kill(health["pid"], signal.SIGKILL)  # as the out-of-memory killer does
    assert_all_end(health["children"])
    with pytest.raises(RuntimeError, match=r"rollout engine 0 died while .*resume from the last checkpoint"):
        generate(engine, folders[0])
    with pytest.raises(RuntimeError, match="rollout engine 0 died while starting"):
        pool.wait_until_ready([engine], HANG_S)


def test_engines_that_the_cluster_cannot_hold_are_refused(folders):
    too_many = engines(folders[0], "gloo", count=8, tensor_parallel=2, timeout_s=2.0)
    with pytest.raises(RuntimeError, match=r"16 devices for 8 rollout engines \* tensor.* has 1 GPUs"), too_many:
        pass


def test_engine_that_never_answers_is_named_at_the_deadline():
    @ray.remote(num_cpus=0)
    class Silent:
        def health(self):
            signal.pause()

    with pytest.raises(RuntimeError, match=r"took more than 1 s while starting: engine 0 \(1 calls\) did not answer"):
        pool.wait_until_ready([Silent.remote()], 1.0)


def test_openmp_of_an_engine_process_that_computes_itself():
    assert omp_env("0,1|2,3") == {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}  # workers, which vLLM sets up
    alone = omp_env("2,3")
    assert (alone["OMP_NUM_THREADS"], alone["GOMP_CPU_AFFINITY"]) == ("2", "2 3")
    assert alone["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_cores_are_dealt_to_engines_and_workers():
    def binding(**settings):
        return thread_binding([2, 3, 4, 5], **({"threads": None, "workers": 1, "engine": 0, "engines": 1} | settings))

    assert binding() == "2,3,4,5"
    assert binding(workers=2) == "2,3|4,5"
    assert [binding(engine=i, engines=2) for i in range(2)] == ["2,3", "4,5"]
    assert [binding(engine=i, engines=3, threads=2) for i in range(3)] == ["2,3", "4,5", "2,3"]
    assert [binding(engine=i, engines=8) for i in range(5)] == ["2", "3", "4", "5", "2"]
    assert binding(workers=2, threads=1) == "2|3"


def test_request_seeds_differ_by_run_step_and_prompt():
    seeds = {request_seed(run, step, prompt) for run in range(5) for step in range(5) for prompt in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**48 for seed in seeds)
    assert request_seed(1, 2, 3) == request_seed(1, 2, 3)
