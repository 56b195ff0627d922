"""The memory estimate: parameters as published, sums by hand for one recipe, and peaks measured in a process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcpo_openrlhf.recipe import memory, processor
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.memory import GIB, Sizes
from dcpo_openrlhf.recipe.schema import Recipe
from tests.bounds import HANG_S
from tests.tiny import ARCHITECTURE_FIELDS, make_tiny_model
from tools.smollm2 import default_output

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "model_configs"
PUBLISHED = {
    # total, and active per token with the embedding left out [10^9]; the model cards say 7.61, 32.5, 4.0, 30.5 and 235
    "Qwen2.5-7B": (7.616, 7.071),
    "Qwen2.5-Math-7B": (7.616, 7.071),
    "Qwen2.5-32B": (32.764, 31.985),
    "Qwen3-4B": (4.022, 4.022),
    "Qwen3-30B-A3B": (30.532, 3.042),
    "Qwen3-235B-A22B": (235.094, 21.568),
}


def sizes(name: str) -> Sizes:
    return Sizes.of(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    s = sizes(name)
    total, active = PUBLISHED[name]
    assert (s.parameters / 1e9, s.active_parameters / 1e9) == pytest.approx((total, active), abs=0.001)


@pytest.mark.parametrize("architecture", ARCHITECTURE_FIELDS)
@pytest.mark.parametrize("tie", [True, False])
def test_parameters_are_those_of_transformers(architecture: str, tie: bool, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = make_tiny_model(tmp_path, architecture=architecture, tie=tie)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (a file is no dict)
    assert Sizes.of(json.loads((folder / "config.json").read_text())).parameters == count


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "dcpo-qwen2.5-math-7b-8xa800.yaml", list(overrides))


def test_sums_by_hand() -> None:
    """Qwen2.5-7B on tensor 2 x data 2 with sequence parallelism, 8192 tokens a micro-batch."""
    s = sizes("Qwen2.5-7B")
    need = memory.trainer_memory(s, recipe())
    half = s.parameters / 2
    assert need.weights == pytest.approx(2 * half, rel=1e-4)
    assert need.gradients == pytest.approx(4 * half, rel=1e-4)
    assert need.optimizer == pytest.approx(12 * half / 2, rel=1e-4)
    # keys: of a group of 1024 + 8 x 3072 tokens the prompt's once, and again before each of 8 responses
    keys = (9 * 1024 + 8 * 3072) / (1024 + 8 * 3072)
    # norm inputs and linear inputs: 4 x 3584; q, out, k, v: 2 x 3584 + 2 x 512; rotary 4 x 128; MLP 3 x 18944
    per_token = 28 * 2 * (4 * 3584 + 2 * 3584 + 2 * 512 * keys + 4 * 128 + 3 * 18944) / 2
    assert need.activations == 8192 * per_token
    assert need.logits == 8192 * 2 * 152064 / 2


def test_meshes_share_out_what_they_should() -> None:
    s, r = sizes("Qwen2.5-7B"), recipe()
    four = memory.trainer_memory(s, recipe("parallel.tensor=4"))
    two = memory.trainer_memory(s, r)
    assert four.weights == pytest.approx(two.weights / 2, rel=1e-3)
    assert four.optimizer == pytest.approx(two.optimizer, rel=1e-3), "half the weights over half the data ranks"
    assert four.activations == pytest.approx(two.activations / 2)
    whole = memory.trainer_memory(s, recipe("parallel.sequence_parallel=false"))
    assert whole.activations - two.activations == pytest.approx(8192 * 28 * 4 * 2 * 3584 / 2)
    assert memory.trainer_memory(s, recipe("train.recompute=full")).activations < two.activations / 8
    apart = memory.trainer_memory(s, recipe("train.share_prompts=false"))
    assert memory.trainer_memory(s, recipe("parallel.context=2")).activations == apart.activations / 2


def test_zero_shares_out_optimizer_and_gradients_and_in_stage_3_the_weights() -> None:
    s = sizes("Qwen2.5-7B")
    mesh = ["parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.backend=deepspeed"]
    r = [recipe(*mesh, f"parallel.zero_stage={stage}") for stage in (2, 3)]
    two, three = (memory.trainer_memory(s, one) for one in r)
    ranks = r[0].parallel.world_size
    assert two.optimizer == three.optimizer == 12 * s.parameters / ranks
    assert two.gradients == 4 * s.parameters / ranks + (2 + 4) * 5e8
    assert two.weights == 2 * s.parameters
    assert three.weights == 2 * (s.parameters / ranks + 1e9)
    assert memory.checkpoint_bytes(s, r[0]) == 14 * s.parameters
    assert memory.checkpoint_bytes(s, r[1]) == 12 * s.parameters
    assert f"training: 1 x {ranks} devices, DeepSpeed ZeRO stage 2 over all of them" in memory.report(s, r[0])
    (said,) = memory.violations(
        s, recipe(*mesh, "parallel.device_memory_gb=24", "rollout.tensor_parallel=2", "rollout.engines=2")
    )
    assert "raise the devices, set parallel.zero_stage=3, set train.recompute=full" in said


def test_the_first_stage_holds_most_activations_and_the_last_the_logits() -> None:
    s, r = sizes("Qwen2.5-7B"), recipe("parallel.tensor=1", "parallel.pipeline=2", "parallel.sequence_parallel=false")
    first, last = (memory.stage_memory(s, r, stage) for stage in (0, 1))
    assert first.activations == 2 * last.activations
    assert (first.logits, last.logits > 0) == (0, True)
    assert first.weights + last.weights == pytest.approx(2 * s.parameters, rel=1e-4)
    interleaved = recipe(
        "parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.sequence_parallel=false"
    )
    assert memory.stage_memory(s, interleaved, 0).activations == pytest.approx(1.25 * first.activations)


def test_experts_are_shared_out_over_expert_ranks() -> None:
    s = sizes("Qwen3-30B-A3B")
    r = load_recipe(ROOT / "recipes" / "cluster" / "dcpo-qwen3-30b-a3b-4x8xa800.yaml")
    need = memory.trainer_memory(s, r)
    dense, experts = s.parameters - s.expert_parameters, s.expert_parameters / 16
    assert need.weights == pytest.approx(2 * (dense + experts), rel=1e-4)
    assert need.optimizer == pytest.approx(12 * (dense / 16 + experts), rel=1e-4)


def test_engine_cache_is_what_weights_leave() -> None:
    s = sizes("Qwen2.5-7B")
    engine = memory.engine_memory(s, recipe())
    assert engine.weights == 2 * s.parameters
    assert engine.kv_cache == 0.85 * 80 * GIB - engine.weights - 2 * GIB
    assert engine.kv_tokens == engine.kv_cache // (2 * 28 * 4 * 128 * 2)
    # four key/value heads over eight ranks: each holds a copy of one
    copied = memory.engine_memory(s, recipe("rollout.tensor_parallel=8", "rollout.engines=1"))
    assert copied.kv_tokens == copied.kv_cache // (2 * 28 * 1 * 128 * 2)


def test_disk_counts_what_is_kept_and_what_is_being_written() -> None:
    s, r = sizes("Qwen2.5-7B"), recipe("train.steps=1000")
    assert memory.checkpoint_bytes(s, r) == 14 * s.parameters
    assert memory.disk_bytes(s, r) == (2 + 1 + 1) * 14 * s.parameters + 2 * s.parameters
    assert memory.disk_bytes(s, recipe("checkpoint.every=0", "checkpoint.export_hf=false")) == 0


def test_time_follows_its_assumptions() -> None:
    s = sizes("Qwen2.5-7B")
    one, other = (
        memory.step_time(s, recipe(*o)) for o in ([], ["estimate.mfu=0.6", "estimate.engine_tokens_per_second=500"])
    )
    assert other == pytest.approx((4 * one.rollout, one.token_stats / 2, one.train / 2))
    assert one.rollout == 512 * 8 * 1500 / (4 * 2000)


# tensors of 1 MiB and more go back to the system when they are freed, so that resident memory is live memory
SETTINGS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
MEASURE = """
import json, os, sys
from pathlib import Path
from typing import Any
import torch
from dcpo_openrlhf.policy import cpu as allocator
from dcpo_openrlhf.policy.megatron import cpu
torch.set_num_threads(1)
cpu.install()
from dcpo_openrlhf.recipe.schema import Loss, Model, Optimizer, Parallel, Train
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.policy.megatron.mesh import init_mesh
from dcpo_openrlhf.policy.megatron.model import build_policy
from dcpo_openrlhf.policy.megatron.step import PolicyStep

path, dtype, recompute, batch, time, vocabulary, prompt, group = sys.argv[1:4] + [int(a) for a in sys.argv[4:]]

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def rows(batch, time):
    attention = torch.ones(batch, time, dtype=torch.bool)
    tokens = torch.randint(1, vocabulary, (batch, time))  # 0 is padding, whose embedding is zero
    tokens[:, :prompt] = tokens[::group, :prompt].repeat_interleave(group, 0)[:batch]
    actions = attention[:, 1:] & (torch.arange(1, time) >= prompt)
    logp = torch.full((batch, time - 1), -5.0)
    return Rows(tokens, attention, actions, logp, (torch.randn(batch, 1).expand_as(logp).contiguous(),))

parallel, train = Parallel(devices_per_node=1), Train(recompute=recompute)
mesh = init_mesh(parallel, device="cpu", rank=0, world_size=1, seed=1)
torch.ones(64, 64).mm(torch.ones(64, 64))
before = resident("VmRSS")
policy = build_policy(model=Model(path=Path(path), dtype=dtype), parallel=parallel, train=train, mesh=mesh)
step = PolicyStep(policy, optimizer=Optimizer(), loss=Loss(), micro_batch_size=batch, total_updates=9)
step.update(rows(1, 64))  # makes Adam's moments
allocator.return_freed_memory()
states = resident("VmRSS") - before
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
step.update(rows(batch, time))
print(json.dumps({"states": states, "peak": resident("VmHWM") - before}), flush=True)
os._exit(0)  # gloo's threads may outlive the interpreter, which then ends by SIGABRT
"""


def measured(
    path: Path, *, dtype: str, recompute: str, batch: int, time: int, vocabulary: int, prompt: int, group: int
) -> dict[str, int]:
    """Bytes of the model and its optimizer, and the peak of an update of full rows, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    arguments = [str(path), dtype, recompute, *map(str, (batch, time, vocabulary, prompt, group))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *arguments],
        env=os.environ | rendezvous | SETTINGS,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def estimated(
    path: Path, *, dtype: str, recompute: str, batch: int, time: int, prompt: int, group: int
) -> memory.TrainerMemory:
    r = Recipe.model_validate(
        {
            "run": {"device": "cpu"},
            "model": {"path": path, "dtype": dtype},
            "task": {"kind": "arithmetic"},
            "train": {
                "micro_batch_size": batch,
                "recompute": recompute,
                "group_size": max(group, 2),
                "share_prompts": group > 1,
                "prompts_per_step": 8,
                "prompts_per_update": 8,
            },
            "parallel": {"devices_per_node": 1},
            "rollout": {"max_prompt_tokens": prompt, "max_new_tokens": time - prompt},
        }
    )
    return memory.trainer_memory(Sizes.of(json.loads((path / "config.json").read_text())), r)


def compare(path: Path, vocabulary: int, **shape: Any) -> None:
    shape = {"prompt": 1, "group": 1} | shape
    need, seen = estimated(path, **shape), measured(path, vocabulary=vocabulary, **shape)
    said = f"measured {seen}, estimated {need._asdict()}, total {need.total}"
    assert need.weights + need.gradients + need.optimizer == pytest.approx(seen["states"], rel=0.2), said
    assert need.total == pytest.approx(seen["peak"], rel=0.2), said


EMULATED = pytest.mark.skipif(
    not processor.multiplies_bf16(), reason="bf16 is emulated on this processor, which takes minutes here"
)


@pytest.mark.parametrize(("dtype", "recompute"), [("fp32", "none"), pytest.param("bf16", "full", marks=EMULATED)])
def test_peak_of_a_small_model(dtype: str, recompute: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, architecture="qwen3", hidden=512, layers=8, heads=8, kv_heads=4, ffn=1536)
    compare(path, 256, dtype=dtype, recompute=recompute, batch=8, time=512)


@pytest.mark.parametrize(("prompt", "time"), [(96, 160), (400, 640)])  # short attention, and torch's kernel
def test_peak_where_responses_share_their_prompt(prompt: int, time: int, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, architecture="qwen3", hidden=512, layers=8, heads=8, kv_heads=4, ffn=1536)
    compare(path, 256, dtype="fp32", recompute="none", batch=16, time=time, prompt=prompt, group=4)


def test_the_starting_model_is_counted_in_host_memory() -> None:
    s, r = sizes("Qwen2.5-7B"), recipe("kl.coefficient=0.01")
    assert memory.trainer_memory(s, r) == memory.trainer_memory(s, recipe()), "nothing of it is on the device"
    each = r.parallel.data * 2 * s.parameters / GIB
    assert f"starting model (kl.coefficient = 0.01): {each:.2f} GiB of each node's host memory" in memory.report(s, r)


def test_a_shared_prompt_counts_once() -> None:
    sizes_of = "train.micro_batch_tokens=null", "train.micro_batch_size=16"
    shared, apart = (recipe(*sizes_of, f"train.share_prompts={share}") for share in ("true", "false"))
    assert memory.micro_batch_tokens(apart) == 16 * (1024 + 3072)
    assert memory.micro_batch_tokens(shared) == 2 * 1024 + 16 * 3072
    assert "prompts: each computed once" in memory.report(sizes("Qwen2.5-7B"), shared)
    for change, why in [
        ("train.share_prompts=false", "train.share_prompts = false"),
        ("parallel.context=2", "parallel.context = 2"),
        ("parallel.backend=deepspeed", "parallel.backend = deepspeed"),
    ]:
        text = memory.report(
            sizes("Qwen2.5-7B"), recipe(change, "parallel.tensor=1", "parallel.sequence_parallel=false")
        )
        assert f"prompts: computed again with every response ({why})" in text


@pytest.mark.long
@EMULATED
@pytest.mark.skipif(not default_output().is_dir(), reason="the demo's model is not there: python -m tools.smollm2")
def test_peak_of_smollm2() -> None:
    compare(default_output(), 49152, dtype="bf16", recompute="none", batch=4, time=512)
