"""Stock OpenRLHF and this recipe, told to make the same steps: command lines, environments, prompts."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dcpo_openrlhf.rollout import tasks
from tools.demo import CLUSTER_ENV, ROOT
from tools.smollm2 import default_output

SHIM = Path(__file__).parent / "openrlhf_cpu"
RECIPE = ROOT / "recipes" / "dcpo-smollm2-135m-cpu.yaml"
SYSTEM = "Reply with one number."
PROMPT_TOKENS = 116
RENDERED_TOKENS = 36
"""Of the longest sum in SmolLM2's chat template."""
BETA1, BETA2, WEIGHT_DECAY = 0.5, 0.95, 0.01
SEED = 1
OPENRLHF, OURS = "OpenRLHF", "ours"


@dataclass(frozen=True)
class Setting:
    """One comparison; the learning rate is constant and every step makes one update."""

    prompts: int
    group_size: int
    new_tokens: int
    steps: int
    dtype: str
    method: str
    learning_rate: float
    micro_batch: int
    """Rows at most."""

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def rows_at_once(self) -> int:
        return min(self.micro_batch, self.rows)

    @property
    def tokens_at_once(self) -> int:
        """What those rows hold where each is padded to the longest possible."""
        return self.rows_at_once * (RENDERED_TOKENS + self.new_tokens)


def write_prompts(file: Path, count: int) -> None:
    """Sums as JSONL that both sides read; every step takes all of them, each side in an order of its own."""
    problems = tasks.arithmetic(level=1, split="train", seed=SEED)
    if count > len(problems):
        raise SystemExit(f"--prompts must not exceed the demo's {len(problems)} sums, but is {count}; lower it")
    with file.open("w") as lines:
        for p in problems[:count]:
            turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": p.problem}]
            row = {"id": p.id, "problem": p.problem, "answer": p.answer, "source": p.source, "turns": turns}
            lines.write(json.dumps(row) + "\n")


def openrlhf_command(s: Setting, folder: Path, prompts: Path) -> list[str]:
    """train_ppo_ray's; it writes into `folder`."""
    options: dict[str, object] = {
        "actor.model_name_or_path": default_output(),
        "actor.num_gpus_per_node": 1,
        "actor.loss_agg_mode": "seq-mean-token-mean",
        "actor.adam.lr": s.learning_rate,
        "actor.adam.betas": f"{BETA1} {BETA2}",
        "actor.adam.weight_decay": WEIGHT_DECAY,
        "actor.lr_scheduler": "constant",
        "actor.lr_warmup_ratio": 0,
        "algo.advantage.estimator": "group_norm",
        "algo.kl.init_coef": 0,
        "ckpt.output_dir": folder / "hf",
        "ckpt.path": folder / "checkpoints",
        "data.apply_chat_template": "",
        "data.input_key": "turns",
        "data.label_key": "answer",
        "data.max_len": PROMPT_TOKENS + s.new_tokens,
        "data.prompt_dataset": prompts,
        "ds.attn_implementation": "sdpa",
        "ds.zero_stage": 2,
        "logger.tensorboard_dir": folder / "tensorboard",
        "reward.remote_url": SHIM / "reward.py",
        "rollout.batch_size": s.prompts,
        "rollout.max_new_tokens": s.new_tokens,
        "rollout.micro_batch_size": s.rows_at_once,
        "rollout.n_samples_per_prompt": s.group_size,
        "train.batch_size": s.rows,
        "train.micro_batch_size": s.rows_at_once,
        "train.num_episodes": s.steps,
        "train.seed": SEED,
        "vllm.enable_prefix_caching": "",
        "vllm.enforce_eager": "",
        "vllm.num_engines": 1,
        "vllm.sync_backend": "gloo",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    return [sys.executable, "-m", "tools.bench.openrlhf_cpu.train", *words]


def our_command(s: Setting, folder: Path, prompts: Path) -> list[str]:
    """The demo's recipe; `folder` becomes the run folder."""
    settings: dict[str, object] = {
        "run.dir": folder,
        "run.seed": SEED,
        "model.path": default_output(),
        "model.dtype": s.dtype,
        "task.kind": "jsonl",
        "task.train": prompts,
        "task.system": SYSTEM,
        "reward.require_end": "false",
        "method.name": s.method,
        "loss.aggregation": "sequence_mean",
        "optimizer.learning_rate": s.learning_rate,
        "optimizer.beta1": BETA1,
        "optimizer.beta2": BETA2,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "train.steps": s.steps,
        "train.prompts_per_step": s.prompts,
        "train.prompts_per_update": s.prompts,
        "train.group_size": s.group_size,
        "train.micro_batch_tokens": s.tokens_at_once,
        "rollout.max_prompt_tokens": PROMPT_TOKENS,
        "rollout.max_new_tokens": s.new_tokens,
        "rollout.cpu_kv_cache_gb": 1.0,
        "evaluation.problems": 0,
        "checkpoint.every": 0,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "dcpo_openrlhf.train_dcpo", "--recipe", str(RECIPE), *words]


COMMANDS: dict[str, Callable[[Setting, Path, Path], list[str]]] = {OPENRLHF: openrlhf_command, OURS: our_command}


def environment(side: str, s: Setting, folder: Path, extensions: Path) -> dict[str, str]:
    """Variables of the side: Ray keeps its files in `folder`, DeepSpeed what it compiles in `extensions`."""
    env = CLUSTER_ENV | {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"RAY_TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if side == OPENRLHF:
        cores = sorted(os.sched_getaffinity(0))
        path.insert(0, str(SHIM))
        env |= {
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(extensions),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]]),  # ninja
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "OMP_NUM_THREADS": str(len(cores)),  # Ray would give the policy one
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # vLLM would leave one out
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, whole ones alone
            "VLLM_PLUGINS": "",  # ours is no part of it
        }
        if s.dtype == "fp32":
            env["OPENRLHF_FP32"] = "1"
    return env | {"PYTHONPATH": os.pathsep.join(path)}
