"""A Ray cluster with a real vLLM engine on a tiny model, compared with transformers on the same folder."""

import contextlib
import os
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from dcpo_openrlhf import local_ray
from dcpo_openrlhf.rollout import pool
from dcpo_openrlhf.rollout.generator import DCPOSamplesGenerator
from tests.bounds import ENDS_S, HANG_S

CONTEXT = 96
QUESTIONS = ("What is 3 + 4?", "the answer", "hello", "is the number 7", "system")


class FolderSource(WeightSource):
    """The weights of a Hugging Face folder; what a trainer with those weights would send."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "model.safetensors")

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()


@contextlib.contextmanager
def cluster(gpus: int = 1) -> Iterator[None]:
    """A local Ray cluster with `gpus` logical GPUs and no C++ compiler, in a folder of its own."""
    folder = tempfile.mkdtemp(prefix="ray_", dir="/tmp")  # Ray's socket names must be short
    os.environ.setdefault("RAY_worker_niceness", "0")  # else other work on the machine starves the engine
    # what torch compiled for another process on this machine is not found either
    no_compiler = {"env_vars": {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}}
    sizes = {"num_cpus": gpus + 2, "num_gpus": gpus}
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "runtime_env": no_compiler}
    try:
        local_ray.start(**sizes, **options, _temp_dir=folder)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def engines(folder: Path, transport: str, **overrides: Any) -> Iterator[list[Any]]:
    """Ready engines (one, unless `count` is given) that serve `folder` in fp32."""
    settings: dict[str, Any] = {
        "count": 1,
        "tensor_parallel": 1,
        "model": str(folder),
        "seed": 0,
        "max_model_len": CONTEXT,
        "dtype": "float32",
        "device": "cpu",
        "transport": transport,
        "cpu_kv_cache_gb": 0.125,
        "cpu_threads": 1,
        "timeout_s": HANG_S,
    }
    made = pool.create_rollout_engines(**(settings | overrides))
    try:
        pool.wait_until_ready(made, HANG_S)
        yield made
    finally:
        pool.shutdown_engines(made)


def generator(made: list[Any], folder: Path) -> DCPOSamplesGenerator:
    args = Namespace(args=Namespace(rollout=Namespace(n_samples_per_prompt=2)))
    return DCPOSamplesGenerator(args, None, None, AutoTokenizer.from_pretrained(folder), made, timeout_s=HANG_S)


def prompts(folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in QUESTIONS
    ]


def largest_logp_error(experiences: list[Any], folder: Path, temperature: float = 1.0) -> float:
    """max |rollout log-prob - transformers' log-prob at the temperature| [nats] over all response tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    for experience in experiences:
        acted = experience.action_mask[0].bool()
        with torch.no_grad():
            logp = (model(experience.sequences).logits[0, :-1] / temperature).log_softmax(-1)
        expected = logp.gather(-1, experience.sequences[0, 1:, None])[:, 0]
        worst = max(worst, (expected - experience.rollout_log_probs[0])[acted].abs().max().item())
    return worst


def assert_serves(made: list[Any], folder: Path) -> None:
    """Every engine continues the prompts as transformers does with the weights in `folder`, with the same log-probs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for engine in made:
        experiences = generator([engine], folder).generate(
            prompts(folder),
            [""] * len(QUESTIONS),
            step=0,
            n_samples=1,
            max_new_tokens=16,
            max_len=CONTEXT,
            temperature=0.0,
        )
        for experience in experiences:
            prompt_length = int(experience.action_mask[0].int().argmax()) + 1
            expected = model.generate(experience.sequences[:, :prompt_length], max_new_tokens=16, do_sample=False)  # type: ignore[attr-defined]
            assert experience.sequences.tolist() == expected.tolist()
        assert largest_logp_error(experiences, folder) < 1e-4


def assert_all_end(pids: list[int]) -> None:
    """None of the processes is left, after a while."""

    def alive(pid: int) -> bool:
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    ends = time.monotonic() + ENDS_S
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < ends, f"still running: {left}"
        time.sleep(0.5)
