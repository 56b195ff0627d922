"""The comparison with stock OpenRLHF: the same steps asked of both, the records read, the page. No engine starts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils.tensorboard import SummaryWriter

from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.rollout import chat, tasks
from tests.bounds import HANG_S
from tools.bench import against_openrlhf, sides
from tools.bench.sides import OPENRLHF, OURS, Setting

SETTING = Setting(
    prompts=6, group_size=4, new_tokens=12, steps=3, dtype="fp32", method="grpo", learning_rate=3e-5, micro_batch=8
)
PROMPTS, FOLDER = Path("/tmp/prompts.jsonl"), Path("/tmp/run")


def our_recipe() -> Recipe:
    words = sides.our_command(SETTING, FOLDER, PROMPTS)
    return load_recipe(words[words.index("--recipe") + 1], words[words.index("--recipe") + 2 :])


def openrlhf_options() -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for word in sides.openrlhf_command(SETTING, FOLDER, PROMPTS)[3:]:
        if word.startswith("--"):
            options[name := word.removeprefix("--")] = []
        else:
            options[name].append(word)
    return options


def test_both_sides_are_asked_for_the_same() -> None:
    ours, theirs = our_recipe(), openrlhf_options()
    t, r, o = ours.train, ours.rollout, ours.optimizer
    same = {
        "actor.model_name_or_path": [ours.model.path],
        "actor.adam.lr": [o.learning_rate],
        "actor.adam.betas": [o.beta1, o.beta2],
        "actor.adam.weight_decay": [o.weight_decay],
        "actor.lr_scheduler": [o.schedule],
        "actor.lr_warmup_ratio": [o.warmup_updates],
        "data.max_len": [r.context],
        "data.prompt_dataset": [ours.task.train],
        "rollout.batch_size": [t.prompts_per_step],
        "rollout.max_new_tokens": [r.max_new_tokens],
        "rollout.n_samples_per_prompt": [t.group_size],
        "train.batch_size": [t.prompts_per_update * t.group_size],
        "train.num_episodes": [t.steps],  # of one step each: the file holds a step's prompts
        "train.seed": [ours.run.seed],
        "vllm.num_engines": [r.engines],
    }
    assert {name: theirs[name] for name in same} == {name: list(map(str, values)) for name, values in same.items()}
    rows = int(theirs["train.micro_batch_size"][0])
    assert theirs["rollout.micro_batch_size"] == [str(rows)]
    assert t.micro_batch_tokens == rows * (sides.RENDERED_TOKENS + r.max_new_tokens)
    assert (ours.model.dtype, ours.method.name, ours.reward.extractor) == ("fp32", "grpo", "last_integer")
    assert ours.loss.aggregation == "sequence_mean" and theirs["actor.loss_agg_mode"] == ["seq-mean-token-mean"]
    assert ours.updates_per_step == 1 and not ours.reward.require_end and ours.checkpoint.export_hf


def test_openrlhf_knows_the_options() -> None:
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations
    parser = (Path(spec.submodule_search_locations[0]) / "cli" / "train_ppo_ray.py").read_text()
    for name in openrlhf_options():
        assert f'"--{name}"' in parser or f'f"--{name.replace("actor.", "{prefix}.", 1)}"' in parser, name


def test_both_sides_read_the_same_prompts(tmp_path: Path) -> None:
    """OpenRLHF hands the turns of the file to the chat template, we the problem with template and system message."""
    file = tmp_path / "prompts.jsonl"
    sides.write_prompts(file, 6)
    theirs = [json.loads(line)["turns"] for line in file.read_text().splitlines()]
    task, ours = our_recipe().task, []

    class Tokenizer:
        chat_template = "any"

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            ours.append(messages)
            return ""

    for problem in tasks.load_jsonl(file):
        chat.render(
            problem, tokenizer=Tokenizer(), template=tasks.prompt_template(task.template), system=task.system, chat=True
        )
    assert ours == theirs and len(ours) == 6
    with pytest.raises(SystemExit, match="is 1000; lower it"):
        sides.write_prompts(file, 1000)


@pytest.mark.parametrize(
    ("response", "reward"), [("The sum is 13.", 1.0), ("13<|im_end|>", 1.0), ("13, or 14", 0.0), ("no idea", 0.0)]
)
def test_openrlhf_is_given_our_reward(response: str, reward: float) -> None:
    spec = importlib.util.spec_from_file_location("reward_func", sides.SHIM / "reward.py")  # as OpenRLHF loads it
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompt = "What is 6 + 7?"
    assert module.reward_func([prompt + response], [prompt], ["13"]) == {"rewards": reward}


def test_ours_runs_without_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "someone-elses:6379")
    theirs, ours = (sides.environment(side, SETTING, tmp_path, tmp_path) for side in (OPENRLHF, OURS))
    assert str(sides.SHIM) == theirs["PYTHONPATH"].split(os.pathsep)[0] and theirs["OPENRLHF_FP32"] == "1"
    assert str(sides.SHIM) not in ours["PYTHONPATH"].split(os.pathsep)
    assert not {"OPENRLHF_FP32", "OMP_NUM_THREADS", "VLLM_PLUGINS"} & (ours.keys() - os.environ.keys())
    assert "RAY_ADDRESS" not in theirs.keys() | ours.keys()


SHIMMED = """
import threading, torch
assert torch.device(f"cuda:{torch.cuda.current_device()}") == torch.device("cuda:0")
assert torch.ones(1).to(torch.cuda.current_device()).device.type == "cpu"
torch.cuda.synchronize(); torch.cuda.current_stream().synchronize()

import os, sys, types, openrlhf.trainer
ray = sys.modules["openrlhf.trainer.ray"] = types.ModuleType("openrlhf.trainer.ray")  # its own brings vLLM
ray.__path__ = [os.path.join(openrlhf.trainer.__path__[0], "ray")]
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from openrlhf.utils.distributed_util import stateless_init_process_group
from openrlhf.utils.utils import convert_to_torch_dtype
from openrlhf.utils.deepspeed import deepspeed_utils
assert convert_to_torch_dtype("bf16") == torch.float32
assert deepspeed_utils.get_train_ds_config(offload=False)["bf16"] == {"enabled": False}

import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

class Worker(WorkerWrap):
    device = "cpu"
    def __init__(self):
        self._model_update_group = stateless_init_process_group("127.0.0.1", port, 1, 2, "cpu")
        self.model_runner = self.model = self
    def load_weights(self, weights):
        self.loaded = weights

def receive():
    worker = Worker()
    worker.update_weight("w", torch.float32, (3,))
    loaded.extend(worker.loaded)

loaded = []
thread = threading.Thread(target=receive)
thread.start()
trainer = stateless_init_process_group("127.0.0.1", port, 0, 2, torch.cuda.current_device())
trainer.broadcast(torch.arange(3.0), src=0, stream=torch.cuda.current_stream())
thread.join()
(name, tensor), = loaded
assert name == "w" and tensor.tolist() == [0, 1, 2], loaded
os._exit(0)  # without gloo's teardown: of two groups in one process it has aborted once, after all this was true
"""


def test_shim(tmp_path: Path) -> None:
    """A weight goes from OpenRLHF's trainer to its worker without CUDA, and fp32 is what it is told."""
    env = sides.environment(OPENRLHF, SETTING, tmp_path, tmp_path)
    done = subprocess.run([sys.executable, "-c", SHIMMED], env=env, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr


def test_a_failed_side_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    child = "import subprocess, sys\nprint(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)\n"
    with pytest.raises(SystemExit, match=r"why it failed\n(.|\n)*status 3"):
        command = [sys.executable, "-c", child + "print('why it failed'); sys.exit(3)"]
        against_openrlhf.run(command, os.environ, tmp_path, timeout=HANG_S)
    assert not psutil.pid_exists(int((tmp_path / "log").read_text().split()[0]))
    with pytest.raises(SystemExit, match="has not ended within 0 s"):
        against_openrlhf.run(["sleep", "1000"], os.environ, tmp_path, timeout=0.0)
    looks = against_openrlhf.run(
        [sys.executable, "-c", "import time; time.sleep(2.5)"], os.environ, tmp_path, timeout=HANG_S
    )
    assert looks.peak_bytes > 0


def write_events(folder: Path, side: str, *, steps: int) -> None:
    """Step n takes n seconds in the first phase, 10 n in the second, and so on; a step's record comes n^2 s after 0."""
    column = (OPENRLHF, OURS).index(side)
    writer = SummaryWriter(str(folder / "inside"))
    for n in range(1, steps + 1):
        for power, tags in enumerate(against_openrlhf.PHASES.values()):
            writer.add_scalar(tags[column], n * 10**power, n, walltime=n * n)
        writer.add_scalar(against_openrlhf.REWARD[column], n / 8, n)
        writer.add_scalar(against_openrlhf.LENGTH[column], 2 * n, n)
    writer.close()


@pytest.mark.parametrize("side", [OPENRLHF, OURS])
def test_records_are_read(side: str, tmp_path: Path) -> None:
    write_events(tmp_path, side, steps=3)
    record = against_openrlhf.read_record(side, tmp_path, steps=3, peak_gib=1.5, others=0.1)
    assert record.seconds == {
        "generation": [2, 3],
        "token statistics": [20, 30],
        "training": [200, 300],
        "weight broadcast": [2000, 3000],
        "step": [3, 5],
    }
    assert record.reward == [0.125, 0.25, 0.375] and record.length == 4
    with pytest.raises(SystemExit, match="at 4 steps, not 3"):
        against_openrlhf.read_record(side, tmp_path, steps=4, peak_gib=1.5, others=0.1)


def record(seconds: float, *, step: float, gib: float) -> against_openrlhf.Record:
    phases = {phase: [seconds, 100 * seconds, seconds / 2] for phase in against_openrlhf.PHASES}
    return against_openrlhf.Record(phases | {"step": [step]}, [0.0, 0.25], 9.0, gib, 0.02)


def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    records = {
        OPENRLHF: [record(4.0, step=9.0, gib=5.0), record(4.0, step=9.0, gib=6.0)],
        OURS: [record(1.0, step=3.0, gib=4.0), record(1.0, step=3.0, gib=3.0)],
    }
    parts = [against_openrlhf.heading(SETTING, 2), against_openrlhf.table(records)]
    text = against_openrlhf.page(parts, "python -m it")
    for line in (
        "**6 prompts, 4 responses each** of at most 12 tokens, fp32, micro-batches of 8 rows (ours: of the 384 tokens "
        "that these hold when padded), one update a step. Ours is grpo. Medians of 4 steps, all but the first of each "
        "run; runs of a side: 2.",
        "| | OpenRLHF | ours | times ours | aim |",
        "| generation [s] | 4.00 | 1.00 | 4.00 | 1, met |",
        "| weight broadcast [s] | 4.00 | 1.00 | 4.00 | 5, not met |",
        "| step [s] | 9.00 | 3.00 | 3.00 | 3, met |",
        "| peak memory [GiB] | 6.0 | 4.0 | 1.50 | |",
        "| reward of each step | 0.00 0.25; 0.00 0.25 | 0.00 0.25; 0.00 0.25 | | |",
        "| the cores' time that other work took | 2 %, 2 % | 2 %, 2 % | | |",
    ):
        assert line in text.splitlines(), line
    assert "`python -m it`, " in text and "openrlhf 0.11.2, " in text and "a stub for flash-attn" in text


@pytest.mark.parametrize("words", [["--steps", "1"], ["--turns", "0"], ["--prompts", "4", "--group-size", "4", "8"]])
def test_options_that_cannot_be(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        against_openrlhf.parse(words)
