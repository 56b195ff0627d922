"""The whole path with a tiny model: two steps at tp 2, a real vLLM engine, sync, export, reload, a repeat, a signal."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bounds import ENDS_S, HANG_S
from tests.recipe.test_processor import AVX2
from tests.tiny import make_biased_model

MARK = "DCPO_TEST_MARK"
ROOT = Path(__file__).parent.parent
METRICS = [
    "train/step",
    "rollout/reward_mean",
    "rollout/truncated_fraction",
    "entropy/exact",
    "entropy/sampled",
    "entropy/target",
    "dcpo/temperature",
    "dcpo/alpha",
    "dcpo/target_ratio_mean",
    "policy/loss",
    "policy/grad_norm",
    "policy/clip_fraction_high",
    "policy/clip_fraction_low",
    "policy/approx_kl",
    "mismatch/prob_diff_mean",
    "mismatch/kl",
    "time/rollout",
    "time/token_stats",
    "time/train",
    "time/weight_sync",
    "time/step",
    "weights/version",
]


class Run:
    """A `train_dcpo` process whose descendants can be found by a mark in their environment."""

    def __init__(self, folder: Path, model: Path, *overrides: str, environment: dict[str, str] | None = None) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        recipe, data = folder.with_suffix(".yaml"), folder.with_suffix(".jsonl")
        rows = [
            {"id": f"sum-{n}", "problem": f"What is {n} + {7 - n}?", "answer": "7", "source": "test"} for n in range(8)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe.write_text(
            f"""
            run: {{dir: {folder}, device: cpu, logical_devices: 3}}
            model: {{path: {model}, dtype: fp32}}
            task: {{train: {data}, heldout: {data}, template: plain}}
            reward: {{extractor: last_integer}}
            method: {{target_entropy: 3.0, alpha_max: 1.0}}
            optimizer: {{learning_rate: 1.0e-3}}
            train: {{steps: 2, prompts_per_step: 4, prompts_per_update: 2, group_size: 4, micro_batch_size: 3}}
            parallel: {{devices_per_node: 2, tensor: 2}}
            rollout: {{engines: 1, max_prompt_tokens: 200, max_new_tokens: 16, cpu_kv_cache_gb: 0.1}}
            evaluation: {{problems: 4}}
            """
        )
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
        self.log = folder.with_suffix(".log")
        command = [sys.executable, "-m", "dcpo_openrlhf.train_dcpo", "--recipe", str(recipe), *overrides]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | {MARK: self.mark} | (environment or {}),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait(self, seconds: float = HANG_S) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def wait_for(self, text: str) -> None:
        ends = time.monotonic() + HANG_S
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < ends, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def samples(self, step: int) -> list[dict]:
        return [json.loads(line) for line in (self.folder / f"samples/step_{step:06d}.jsonl").read_text().splitlines()]

    def phases(self, step: int, process: str) -> set[str]:
        rows = [json.loads(line) for line in (self.folder / "timeline.jsonl").read_text().splitlines()]
        (row,) = [row for row in rows if (row["step"], row["part"]) == (step, "step")]
        return {name for name, _, _ in row["processes"][process]}

    def alive(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:200])
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_biased_model(tmp_path_factory.mktemp("model"))


TERMS = ("kl.coefficient=0.01", "kl.estimator=k2", "correction.level=token")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "first", model, *TERMS)
    assert run.wait() == 0, run.log.read_text()[-5000:]
    return run


def test_run_folder_holds_metrics_samples_and_report(finished: Run) -> None:
    metrics = finished.metrics()
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert set(METRICS) <= set(m)
        assert m["entropy/target"] == 3.0
        assert m["mismatch/prob_diff_mean"] < 1e-4  # fp32 on both sides: the engine has the trainer's weights
        assert m["policy/grad_norm"] > 0 and 0 < m["rollout/reward_mean"] < 1
        assert m["correction/outside"] == 0 and m["correction/ess"] == pytest.approx(1, abs=1e-5)  # one policy, in fp32
        assert m["policy/kl_reference"] > 1e-4, "two updates a step: the second one is away from the starting model"
    assert [m["weights/version"] for m in metrics] == [2, 3]  # version 1 is the sync before the first rollout
    report = (finished.folder / "report.md").read_text()
    assert "held-out accuracy" in report and "minutes" in report
    assert (finished.folder / "recipe.yaml").is_file() and list((finished.folder / "tensorboard").iterdir())
    assert len(finished.samples(2)) == 8


@pytest.mark.long
def test_colocated_run_on_two_pipeline_stages(tmp_path: Path, model: Path) -> None:
    mesh = ["parallel.tensor=1", "parallel.pipeline=2", "parallel.colocate=true", "run.logical_devices=2"]
    run = Run(tmp_path / "run", model, *mesh, "train.micro_batch_tokens=600", "run.profile=[2]")
    assert run.wait() == 0, run.log.read_text()[-3000:]
    traces = {path.name: trace(path) for path in (run.folder / "profile").iterdir()}
    for stage in (0, 1):
        assert "aten::mm" in traces[f"step_000002_policy_stage{stage}.json"]
    assert {"wake", "sleep", "generate"} <= run.phases(2, "engine 0") and "offload" in run.phases(2, "policy 1")
    for m in run.metrics():
        assert m["mismatch/prob_diff_mean"] < 1e-4 and m["policy/grad_norm"] > 0


def test_a_processor_with_avx2_alone_trains_and_generates_in_fp32(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path / "run", model, "train.steps=1", "model.dtype=auto", "evaluation.problems=0", environment=AVX2)
    assert run.wait() == 0, run.log.read_text()[-3000:]
    assert "  dtype: fp32" in (run.folder / "recipe.yaml").read_text()
    (m,) = run.metrics()
    assert m["mismatch/prob_diff_mean"] < 1e-4 and m["policy/grad_norm"] > 0


def test_nothing_is_left_after_the_end(finished: Run) -> None:
    assert finished.alive() == []


def test_exported_folder_loads_in_transformers_with_trained_weights(finished: Run, model: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(finished.folder / "hf", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)
    assert max(float((before[n] - after[n]).abs().max()) for n in moved) < 0.1  # four updates of about 1e-3


def test_exported_folder_loads_in_vllm(finished: Run) -> None:
    code = f"""
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    options = dict(enforce_eager=True, dtype="float32", max_model_len=128, kv_cache_memory_bytes=2**27)
    llm = LLM({str(finished.folder / "hf")!r}, **options)
    print("TOKENS", list(llm.generate("1 + 1", SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids))
"""
    script = finished.folder / "load.py"
    script.write_text(code)
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=HANG_S, cwd=finished.folder
    )
    assert "TOKENS" in out.stdout, out.stderr[-3000:]


@pytest.fixture(scope="module")
def again(finished: Run, model: Path) -> Run:
    """The same run once more with its first step profiled, ended by a signal after it."""
    again = Run(finished.folder.with_name("again"), model, *TERMS, "train.steps=50", "run.profile=[1]")
    again.wait_for("step 2/50")  # the traces of step 1 are written after its line
    again.process.send_signal(signal.SIGTERM)
    assert again.wait(ENDS_S) == 128 + signal.SIGTERM, again.log.read_text()[-3000:]
    ends = time.monotonic() + ENDS_S
    while left := again.alive():
        assert time.monotonic() < ends, left
        time.sleep(0.5)
    assert "ended by SIGTERM" in again.log.read_text()
    return again


def test_same_seed_repeats_prompts_and_first_metrics_profiled_or_not(finished: Run, again: Run) -> None:
    first, repeat = finished.metrics()[0], again.metrics()[0]
    assert [r["id"] for r in again.samples(1)] == [r["id"] for r in finished.samples(1)]
    assert [r["response"] for r in again.samples(1)] == [r["response"] for r in finished.samples(1)]
    for name in ("entropy/exact", "entropy/sampled", "rollout/reward_mean", "policy/loss", "policy/grad_norm"):
        assert repeat[name] == pytest.approx(first[name], rel=1e-5), name


def trace(file: Path) -> set[str]:
    return {event["name"] for event in json.loads(file.read_text())["traceEvents"]}


def test_a_profiled_step_has_a_trace_of_the_driver_and_of_one_rank_a_stage(finished: Run, again: Run) -> None:
    driver, policy = sorted((again.folder / "profile").iterdir())
    assert (driver.name, policy.name) == ("step_000001_driver.json", "step_000001_policy_stage0.json")
    assert {"rollout", "grade", "advantages", "update", "sync", "monitor"} <= trace(driver)
    assert {"statistics", "update", "sync", "aten::mm"} <= trace(policy), "of two tensor ranks the first"
    assert not (finished.folder / "profile").exists()


def test_the_timeline_has_every_process_at_every_step(finished: Run) -> None:
    rows = [json.loads(line) for line in (finished.folder / "timeline.jsonl").read_text().splitlines()]
    assert [(row["step"], row["part"]) for row in rows] == [(0, "start"), (1, "step"), (2, "step"), (2, "end")]
    assert all(before["end"] == after["begin"] for before, after in itertools.pairwise(rows))
    engine, ranks = {"generate", "load weights"}, {"statistics", "update", "sync"}
    wanted = {"driver": ranks | {"rollout", "grade", "advantages", "monitor"}, "engine 0": engine}
    wanted |= {"policy 0": ranks, "policy 1": ranks}
    for row in rows[1:3]:
        assert row["processes"].keys() == wanted.keys()
        for process, phases in wanted.items():
            assert phases <= finished.phases(row["step"], process), process
        for done in row["processes"].values():  # of this step: nothing here is made ahead
            assert all(0 <= b <= e <= row["end"] - row["begin"] + 1e-3 for _, b, e in done)
    assert {"evaluation", "export"} <= {name for name, _, _ in rows[3]["processes"]["driver"]}
