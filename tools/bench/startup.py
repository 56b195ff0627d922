"""Where the seconds of a start go: from the command to the first responses, and what each process computes meanwhile.

Runs `python -m tools.demo` for one step, without evaluation, and looks at its processes four times a second.

python -m tools.bench.startup --output docs/bench/startup.md [section.key=value ...]
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from dcpo_openrlhf.local_ray import adopt_orphans
from dcpo_openrlhf.recipe import processor
from tools.bench import publish
from tools.demo import ROOT
from tools.smollm2 import ensure_smollm2

MILESTONES = (
    # (what has happened, text of the log's line)
    ("the demo starts Ray's head and job server", "Starting a Ray cluster"),
    ("the job's driver is started", "Running entrypoint"),
    ("Ray joined, driver imported; engine and policy are asked to start", " starting 1 rollout engines"),
    ("engine and policy are ready", "engines and policy are ready"),
)
ROLES = (
    # (what a process does, text of its command line)
    ("vLLM's engine process", "VLLM::EngineCore"),
    ("vLLM's worker process", "VLLM::Worker"),
    ("the policy's actor", "ray::Megatron"),
    ("the engine's actor", "ray::Rollout"),
    ("the driver", "dcpo_openrlhf.train_dcpo"),
    ("graders", "dcpo_openrlhf.reward.worker"),
    ("the demo itself", "tools.demo"),
)
REST = "Ray's servers, agents and idle workers"
LOOK_S = 0.25


class Looks(threading.Thread):
    """CPU seconds of every descendant of this process, look by look."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begin = time.monotonic()
        self.seen: dict[int, list[tuple[float, float]]] = defaultdict(list)
        """Process id -> (seconds since the command, CPU seconds so far)."""
        self.names: dict[int, str] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(LOOK_S):
            for process in me.children(recursive=True):
                try:
                    times, command = process.cpu_times(), " ".join(process.cmdline())
                except psutil.Error:
                    continue
                self.seen[process.pid].append((time.monotonic() - self.begin, times.user + times.system))
                if command != "ray::IDLE":  # a worker that waited until it became an actor, or has been one
                    self.names[process.pid] = command

    def cpu_by_role(self, until: float) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for pid, looks in self.seen.items():
            role = next((role for role, text in ROLES if text in self.names.get(pid, "")), REST)
            total[role] += max((cpu for at, cpu in looks if at <= until), default=0.0)
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def start_once(overrides: list[str]) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """(milestone, seconds since the command) in their order, and CPU seconds of each role up to the last one."""
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="dcpo-startup-") as folder:
        run = Path(folder) / "run"
        settings = ["train.steps=1", "evaluation.problems=0", "checkpoint.export_hf=false", *overrides]
        command = [sys.executable, "-m", "tools.demo", "--run-dir", str(run), *settings]
        looks, milestones, log, step_at = Looks(), [], [], 0.0
        looks.start()
        demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert demo.stdout is not None
        for line in demo.stdout:
            log.append(line)
            now = time.monotonic() - looks.begin
            milestones += [(what, now) for what, text in MILESTONES if text in line]
            step_at = now if re.search(r" step 1/1 ", line) else step_at
        looks.ended.set()
        if demo.wait() != 0:
            raise SystemExit("".join(log[-20:]))
        (step,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first = step_at - step["time/step"]
        milestones += [("weights synced, first rollout begins", first)]
        milestones += [("first responses there, graded", first + step["time/rollout"])]
        milestones += [("first step's line on the screen", step_at)]
        return milestones, looks.cpu_by_role(first)


def page(milestones: list[tuple[str, float]], cpu: dict[str, float], command: str) -> str:
    units = "with" if processor.multiplies_bf16() else "without"
    lines = [
        "# From the command to the first rollout",
        "",
        f"`{command}`, {os.cpu_count()} cores {units} bf16 units, Python {platform.python_version()}; the environment "
        "is set up and the model made before. The log's lines come through the job server, up to a second late.",
        "",
        "| | seconds since the command |",
        "|---|---|",
        *[f"| {what} | {at:.1f} |" for what, at in milestones],
        "",
        f"CPU seconds until the first rollout begins, {sum(cpu.values()):.1f} in all:",
        "",
        "| process | CPU seconds |",
        "|---|---|",
        *[f"| {role} | {seconds:.1f} |" for role, seconds in cpu.items()],
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a start of the demo, and what each of its processes computes.")
    parser.add_argument("--output", type=Path, help="also write the page there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    options = parser.parse_args()
    ensure_smollm2()
    text = page(*start_once(options.overrides), f"python -m tools.bench.startup {' '.join(options.overrides)}".strip())
    publish(text, options.output)


if __name__ == "__main__":
    main()
