"""N steps equal k steps + kill -9 + resume + N-k steps, bit for bit, on recorded responses: no engine is started."""

import json
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcpo_openrlhf import checkpoint, local_ray
from dcpo_openrlhf.prompts import read_prompts
from dcpo_openrlhf.recipe.load import load_recipe
from tests.bounds import ENDS_S, HANG_S
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parent.parent
STEPS, GROUP, PROMPTS, NEW_TOKENS = 6, 4, 4, 12
DEVICES = 3
ENTRY = ("-m", "dcpo_openrlhf.train_dcpo")


class Runs:
    """A recipe with its model, data and recorded responses; each run is a process of its own, on one cluster."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        make_tiny_model(folder / "model", kv_heads=4, tie=False)
        favour_seven(folder / "model")
        problems = [
            {"id": f"sum-{n}", "problem": f"What is {n} + {7 - n}?", "answer": "7", "source": "test"} for n in range(8)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(
            f"""
            run: {{dir: {folder}/unused, device: cpu, ray_address: "{address}", seed: 3}}
            model: {{path: {folder}/model, dtype: fp32}}
            task: {{train: {folder}/data.jsonl, template: plain}}
            reward: {{extractor: last_integer, workers: 1}}
            method: {{target_entropy: 3.0, alpha_schedule: pi, alpha_max: 1.0}}
            optimizer: {{learning_rate: 1.0e-3, schedule: cosine, warmup_updates: 3, eps: 1.0e-3}}
            train: {{steps: {STEPS}, prompts_per_step: {PROMPTS}, prompts_per_update: 2, group_size: {GROUP}}}
            parallel: {{devices_per_node: 2, tensor: 2}}
            rollout: {{engines: 1, max_prompt_tokens: 200, max_new_tokens: {NEW_TOKENS}, cpu_kv_cache_gb: 0.1}}
            checkpoint: {{every: 2, signal_timeout: 200}}
            monitor: {{tensorboard: false}}
            """
        )

    def record(self, name: str = "recorded", *, unsolved: int = 0, rounds: int = 1) -> None:
        """Responses of random tokens, half of which end in the right answer, as a run would have recorded them.

        Of every request's prompts the first `unsolved` have no right answer; so many requests a step.
        """
        from dcpo_openrlhf.rollout.replay import Recorder

        tokenizer = AutoTokenizer.from_pretrained(self.folder / "model")
        prompts, _ = read_prompts(load_recipe(self.recipe), tokenizer)
        recorder = Recorder(Invented(tokenizer, unsolved), self.folder / name)
        for step, drawn in ((step, i * PROMPTS) for step in range(1, STEPS + 1) for i in range(rounds)):
            chosen = prompts.take(PROMPTS)
            recorder.generate(
                [p.text for p in chosen],
                [p.problem.answer for p in chosen],
                step=step,
                max_new_tokens=NEW_TOKENS,
                max_len=200 + NEW_TOKENS,
                n_samples=GROUP,
                temperature=1.0,
                top_p=1.0,
                **({"first": drawn} if drawn else {}),
            )

    def start(self, name: str, *overrides: str, program: tuple[str, ...] = ENTRY) -> "Run":
        return Run(self, self.folder / name, *overrides, program=program)


def favour_seven(path: Path) -> None:
    """Let the model's output layer favour "7", so that an engine's responses are right now and then."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        hidden = model.model(**tokenizer("What is 3 + 4?", return_tensors="pt")).last_hidden_state[0].mean(0)
        (seven,) = tokenizer("7", add_special_tokens=False)["input_ids"]
        model.lm_head.weight[seven] += 6.0 * hidden / hidden.pow(2).sum()
    model.save_pretrained(path)


class Invented:
    """Stands for the engines: random tokens, the same ones at every call."""

    def __init__(self, tokenizer: Any, unsolved: int = 0) -> None:
        self.tokenizer, self.unsolved = tokenizer, unsolved

    def generate(
        self, prompts: list[str], labels: list[str], *, step: int, n_samples: int, max_len: int, **_: Any
    ) -> list[Any]:
        from openrlhf.trainer.ppo_utils.experience import Experience

        generator = torch.Generator().manual_seed(step)
        ids = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        answer = self.tokenizer(" 7", add_special_tokens=False)["input_ids"]
        samples = []
        for i, (prompt, prompt_ids, label) in enumerate(zip(prompts, ids, labels, strict=True)):
            for k in range(n_samples):
                length = int(torch.randint(2, NEW_TOKENS, (), generator=generator))
                right = k % 2 if i >= self.unsolved else 0
                response = torch.randint(3, 256, (length,), generator=generator).tolist() + answer * right
                tokens = torch.tensor([prompt_ids + response])
                mask = torch.zeros_like(tokens)
                mask[:, len(prompt_ids) :] = 1
                samples.append(
                    Experience(
                        sequences=tokens,
                        attention_mask=torch.ones_like(tokens),
                        action_mask=mask[:, 1:],  # type: ignore[arg-type]
                        rollout_log_probs=-6.0 * torch.rand(mask[:, 1:].shape, generator=generator) * mask[:, 1:],
                        prompts=[prompt],
                        labels=[label],
                        images=[None],
                        mm_train_inputs=[None],
                        response_length=torch.tensor([len(response)]),
                        truncated=torch.tensor([False]),
                        total_length=torch.tensor([float(tokens.shape[1])]),
                        info={"response_clip_ratio": torch.tensor([False]), "weight_version": torch.tensor([step])},
                    )
                )
        return samples


class Run:
    def __init__(self, runs: Runs, folder: Path, *overrides: str, program: tuple[str, ...] = ENTRY) -> None:
        self.folder, self.log = folder, folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:4]}.log")
        command = [sys.executable, *program, "--recipe", str(runs.recipe), f"run.dir={folder}"]
        self.process = subprocess.Popen(
            [*command, f"rollout.replay={runs.folder}/recorded", *overrides],
            cwd=ROOT,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def end(self, *, status: int = 0, seconds: float = HANG_S) -> "Run":
        try:
            assert self.process.wait(seconds) == status, self.log.read_text()[-4000:]
        finally:
            self.process.kill()
        return self

    def when(self, text: str) -> "Run":
        """Return when the log says so."""
        ends = time.monotonic() + HANG_S
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < ends, self.log.read_text()[-4000:]
            time.sleep(0.02)
        return self

    def signal_at(self, text: str, number: int) -> "Run":
        self.when(text).process.send_signal(number)
        return self

    def metrics(self) -> list[dict[str, float]]:
        """Every metric but the seconds."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.startswith(("time/", "cost/"))} for row in rows]

    def prompts(self) -> list[list[str]]:
        files = sorted((self.folder / "samples").glob("step_*.jsonl"))
        return [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in files]

    def policy_sums(self, step: int) -> dict[str, Any]:
        """Sizes and checksums of weights, optimizer and random state; .metadata also names the folder."""
        manifest = json.loads((self.folder / f"checkpoints/step_{step:06d}/manifest.json").read_text())
        return {name: sums for name, sums in manifest["files"].items() if name not in ("run.json", ".metadata")}

    def state(self, step: int) -> dict[str, Any]:
        state = json.loads((self.folder / f"checkpoints/step_{step:06d}/run.json").read_text())
        return {name: state[name] for name in ("step", "weights_version", "prompts", "controller", "monitor", "grader")}


def wait_until_idle() -> None:
    """Return when no run holds a device of the cluster."""
    ends = time.monotonic() + ENDS_S
    while ray.available_resources().get("GPU", 0) < DEVICES:
        assert time.monotonic() < ends, ray.available_resources()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    context = local_ray.start(num_cpus=DEVICES, num_gpus=DEVICES, include_dashboard=False, log_to_driver=False)
    try:
        runs = Runs(tmp_path_factory.mktemp("resume"), context.address_info["gcs_address"])
        runs.record()
        yield runs
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Run:
    """The run that nothing interrupts."""
    return runs.start("whole", "checkpoint.keep_last=9").end()


def test_a_replay_trains_on_the_recorded_responses(whole: Run) -> None:
    metrics = whole.metrics()
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["weights/version"] for m in metrics] == list(range(2, STEPS + 2))
    assert all(m["policy/grad_norm"] > 0 and m["rollout/reward_mean"] == 0.5 for m in metrics)
    assert len({m["entropy/exact"] for m in metrics}) == STEPS  # the weights move
    assert [c.step for c in checkpoint.checkpoints(whole.folder / "checkpoints")] == [2, 4, 6]
    assert "0 rollout engines" in whole.log.read_text()


@pytest.mark.slow
def test_killed_resumed_and_preempted_run_equals_the_whole_run(runs: Runs, whole: Run) -> None:
    runs.start("killed").signal_at(f"step 3/{STEPS}", signal.SIGKILL).end(status=-signal.SIGKILL)
    wait_until_idle()
    killed = [json.loads(line) for line in (runs.folder / "killed/metrics.jsonl").read_text().splitlines()]

    again = runs.start("killed", "checkpoint.resume=auto", "checkpoint.every=100")
    again.signal_at(f"step 4/{STEPS}", signal.SIGTERM).end(status=128 + signal.SIGTERM, seconds=ENDS_S)
    wait_until_idle()
    assert f"resuming after step 2 from {runs.folder}/killed" in again.log.read_text()
    cut = [json.loads(line) for line in (runs.folder / "killed/cut/001/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in cut] == [row["step"] for row in killed if row["step"] > 2]
    newest = checkpoint.newest_whole(runs.folder / "killed/checkpoints")
    assert newest is not None and newest.step == again.metrics()[-1]["step"] >= 4

    last = runs.start("killed", "checkpoint.resume=auto").end()
    assert f"resuming after step {newest.step}" in last.log.read_text()
    assert last.metrics() == whole.metrics()
    assert last.prompts() == whole.prompts()
    assert last.policy_sums(STEPS) == whole.policy_sums(STEPS)
    assert last.state(STEPS) == whole.state(STEPS)
    ours, theirs = (load_file(run.folder / "hf/model.safetensors") for run in (last, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    assert f"{STEPS} steps" in (last.folder / "report.md").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_lacks_only_its_end_gets_it_and_a_finished_one_stays_as_it_is(runs: Runs, whole: Run) -> None:
    ended = runs.folder / "ended"
    shutil.copytree(whole.folder, ended)
    (ended / "report.md").unlink()
    shutil.rmtree(ended / "hf")
    run = runs.start("ended", "checkpoint.keep_last=9", "checkpoint.resume=auto").end()
    assert (ended / "hf/model.safetensors").is_file() and f"{STEPS} steps" in (ended / "report.md").read_text()
    assert run.metrics() == whole.metrics() and run.policy_sums(STEPS) == whole.policy_sums(STEPS)
    report = (ended / "report.md").stat()
    again = runs.start("ended", "checkpoint.keep_last=9", "checkpoint.resume=auto").end()
    assert "is finished, report and all: nothing is left to do" in again.log.read_text()
    assert (ended / "report.md").stat() == report


@pytest.mark.slow
def test_an_error_loses_no_finished_step(runs: Runs, whole: Run) -> None:
    recorded = runs.folder / "short-of-one"
    shutil.copytree(runs.folder / "recorded", recorded)
    run = runs.start("error", "checkpoint.every=100", f"rollout.replay={recorded}")
    run.when(f"step 1/{STEPS}")
    (file,) = recorded.rglob(f"step_{STEPS:06d}.pt")
    file.unlink()
    run.end(status=1)
    assert f"step_{STEPS:06d}.pt is missing" in run.log.read_text()
    newest = checkpoint.newest_whole(runs.folder / "error/checkpoints")
    assert newest is not None and newest.step == STEPS - 1
    assert run.metrics() == whole.metrics()[:-1]


@pytest.mark.slow
def test_another_mesh_continues_with_the_same_numbers(runs: Runs, whole: Run) -> None:
    point = whole.folder / "checkpoints/step_000002"
    mesh = ("parallel.tensor=1", "parallel.devices_per_node=2", f"checkpoint.resume={point}")
    other = runs.start("other-mesh", *mesh).end()
    assert "parallel.tensor: 2 -> 1" in other.log.read_text()
    assert [m["step"] for m in other.metrics()] == list(range(3, STEPS + 1))
    for mine, theirs in zip(other.metrics(), whole.metrics()[2:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


KEEPS: dict[str, tuple[str, ...]] = {
    "adaptive_entropy": ("method.adaptive_entropy_step=0.01", "method.adaptive_entropy_max=0.025"),
    "entropic": ("method.entropic_threshold=0", "method.entropic_integral=0.3", "method.entropic_proportional=0.1"),
    "clip_cov": ("method.clip_cov_share=0.2", "method.clip_cov_low=0"),
}
"""Methods that carry something of their own from step to step, or draw by lot."""


@pytest.mark.slow
@pytest.mark.parametrize("name", KEEPS)
def test_a_resume_keeps_what_other_methods_carry_and_the_course_of_the_target(runs: Runs, name: str) -> None:
    course = ("method.target_schedule=cosine", "method.target_entropy=5.6", "method.target_entropy_end=5.2")
    method = (f"method.name={name}", *KEEPS[name], *course, "method.alpha_schedule=reference")
    whole = runs.start(name, "checkpoint.keep_last=9", *method).end()
    point = whole.folder / "checkpoints/step_000002"
    last = runs.start(f"{name}-resumed", f"checkpoint.resume={point}", *method).end()
    assert last.metrics() == whole.metrics()[2:]
    assert last.policy_sums(STEPS) == whole.policy_sums(STEPS) and last.state(STEPS) == whole.state(STEPS)
    metrics = whole.metrics()
    assert len({m["entropy/target"] for m in metrics}) == STEPS
    if name == "adaptive_entropy":
        assert len({m["dcpo/entropy_coefficient"] for m in metrics}) > 2
    if name == "entropic":
        assert len({m["dcpo/sample_weight"] for m in metrics}) > 3


@pytest.mark.slow
def test_a_step_of_several_rounds_resumes_with_the_very_next_prompt(runs: Runs) -> None:
    """Each request's first two groups are all wrong: two rounds of four fill a step of four."""
    runs.record("refilled", unsolved=2, rounds=2)
    filtered = ("train.filter=all_wrong", f"rollout.replay={runs.folder}/refilled")
    whole = runs.start("filtered", "checkpoint.keep_last=9", *filtered).end()
    for step, m in enumerate(whole.metrics(), start=1):
        expected = {"drawn": 8, "kept": 4, "surplus": 0, "rounds": 2, "short": 0}
        assert {name: m[f"filter/{name}"] for name in expected} == expected
        assert m["rollout/success_rate"] == 0.25 and m["group/all_wrong"] == 0.5 and m["policy/grad_norm"] > 0
        if step % 2 == 0:  # eight problems
            assert whole.state(step)["prompts"]["epoch"] == step - 1 and whole.state(step)["prompts"]["position"] == 8
    point = whole.folder / "checkpoints/step_000002"
    last = runs.start("filtered-resumed", f"checkpoint.resume={point}", *filtered).end()
    assert last.metrics() == whole.metrics()[2:]
    assert last.prompts() == whole.prompts()[2:]
    assert last.policy_sums(STEPS) == whole.policy_sums(STEPS) and last.state(STEPS) == whole.state(STEPS)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_with_an_engine_too(runs: Runs) -> None:
    """fp32: the engine repeats its responses for equal batches, so a killed and resumed run repeats all of it."""
    engine = "rollout.replay=null"
    whole = runs.start("engine", engine, "rollout.record=true").end()
    assert len({m["rollout/reward_mean"] for m in whole.metrics()}) > 1

    replayed = runs.start("engine-replayed", f"rollout.replay={whole.folder}").end()
    assert replayed.metrics() == whole.metrics()
    assert replayed.policy_sums(STEPS) == whole.policy_sums(STEPS)

    runs.start("engine-killed", engine).signal_at(f"step 3/{STEPS}", signal.SIGKILL).end(status=-signal.SIGKILL)
    wait_until_idle()
    resumed = runs.start("engine-killed", engine, "checkpoint.resume=auto").end()
    assert resumed.metrics() == whole.metrics()
    assert resumed.policy_sums(STEPS) == whole.policy_sums(STEPS)

    only = runs.start("responses", engine, "rollout.record=true", "train.rollout_only=true", "train.steps=1").end()
    ours, theirs = (torch.load(run.folder / "samples/step_000001.pt") for run in (only, whole))
    for name, column in theirs["samples"].items():
        if "tensor" in column and name != "info":
            assert torch.equal(ours["samples"][name]["tensor"], column["tensor"]), name


AHEAD = ("rollout.replay=null", "rollout.ahead=1", "correction.level=token", "correction.mode=clip")
STOPPED = """
import os, signal, sys
from dcpo_openrlhf import train_dcpo
from dcpo_openrlhf.rollout.ahead import Ahead

begin, wait = Ahead.begin, Ahead.wait

def begin_without_an_engine(self, *arguments, step, **named):
    if step == 4:
        os.kill(self.generator.vllm_engines._known[0]["pid"], signal.SIGSTOP)
    begin(self, *arguments, step=step, **named)

def wait_aloud(self, look):
    if self.following is not None and self.following.step == 4:
        print("waiting for the responses of step 4", flush=True)
    wait(self, look)

Ahead.begin, Ahead.wait = begin_without_an_engine, wait_aloud
sys.exit(train_dcpo.main())
"""
"""A run whose engine stops before it draws the responses of step 4, which step 3's sync then waits for."""


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_with_an_engine_that_draws_ahead_too(runs: Runs) -> None:
    """A checkpoint holds the responses that its next step trains on: the weights that drew them are gone."""
    whole = runs.start("ahead", *AHEAD, "rollout.record=true", "checkpoint.keep_last=9").end()
    assert [m["rollout/age_mean"] for m in whole.metrics()] == [0.0] + [1.0] * (STEPS - 1)
    assert len({m["rollout/reward_mean"] for m in whole.metrics()}) > 1
    held = [(c.path / "ahead.pt").is_file() for c in checkpoint.checkpoints(whole.folder / "checkpoints")]
    assert held == [True, True, False], "nothing follows the last step"

    replayed = runs.start("ahead-replayed", *AHEAD[1:], f"rollout.replay={whole.folder}").end()
    assert replayed.metrics() == whole.metrics() and replayed.policy_sums(STEPS) == whole.policy_sums(STEPS)

    runs.start("ahead-killed", *AHEAD).signal_at(f"step 3/{STEPS}", signal.SIGKILL).end(status=-signal.SIGKILL)
    wait_until_idle()
    signalled = runs.start("ahead-killed", *AHEAD, "checkpoint.resume=auto", "checkpoint.every=100")
    signalled.signal_at(f"step 4/{STEPS}", signal.SIGTERM).end(status=128 + signal.SIGTERM, seconds=ENDS_S)
    wait_until_idle()
    assert "under way" not in signalled.log.read_text()
    resumed = runs.start("ahead-killed", *AHEAD, "checkpoint.resume=auto").end()
    assert "resuming after step 4" in resumed.log.read_text() or "resuming after step 5" in resumed.log.read_text()
    assert resumed.metrics() == whole.metrics()
    assert resumed.policy_sums(STEPS) == whole.policy_sums(STEPS) and resumed.state(STEPS) == whole.state(STEPS)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_signal_does_not_wait_for_responses_longer_than_half_of_its_bound(runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    run = runs.start("ahead-stopped", *AHEAD, "checkpoint.signal_timeout=60", program=(str(script),))
    run.signal_at("waiting for the responses of step 4", signal.SIGTERM)
    run.end(status=128 + signal.SIGTERM, seconds=ENDS_S)
    wait_until_idle()
    assert "responses of step 4 were under way and are not saved" in run.log.read_text()
    newest = checkpoint.newest_whole(runs.folder / "ahead-stopped/checkpoints")
    assert newest is not None and newest.step == 3 and not (newest.path / "ahead.pt").exists()
    resumed = runs.start("ahead-stopped", *AHEAD, "checkpoint.resume=auto").end()
    assert [m["rollout/age_mean"] for m in resumed.metrics()] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert [m["weights/version"] for m in resumed.metrics()] == list(range(2, STEPS + 2))
