"""What rollout.ahead saves: the step of one engine and one policy rank on a core each, on-policy and one step ahead.

Runs take turns; their learning rate is so small that all of them make the same responses. The overlap that is possible
is what the engine's seconds and the policy's have in common, each as long as in the on-policy runs.

python -m tools.bench.ahead --output docs/bench/ahead.md [section.key=value ...]
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from dcpo_openrlhf.recipe import processor
from tools.bench import publish
from tools.demo import CLUSTER_ENV, ROOT
from tools.smollm2 import ensure_smollm2

RECIPE = ROOT / "recipes" / "dcpo-smollm2-135m-cpu.yaml"
SETTINGS = (
    "optimizer.learning_rate=1e-9",
    "rollout.cpu_threads=1",
    "parallel.cpu_threads=1",
    "correction.level=token",
    "correction.mode=clip",
    "evaluation.problems=0",
    "checkpoint.every=0",
    "checkpoint.export_hf=false",
    "monitor.tensorboard=false",
)
FIRST = 2
"""Steps that are not counted: caches are cold, and the first one's responses are not drawn ahead."""

Row = Mapping[str, float]


def run(folder: Path, ahead: int, steps: int, overrides: Sequence[str]) -> list[Row]:
    """metrics.jsonl of a run that ended well."""
    words = [*SETTINGS, *overrides, f"train.steps={steps}", f"rollout.ahead={ahead}", f"run.dir={folder}"]
    command = [sys.executable, "-m", "dcpo_openrlhf.train_dcpo", "--recipe", str(RECIPE), *words]
    env = CLUSTER_ENV | {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def phases(rows: Sequence[Row]) -> dict[str, float]:
    """Median seconds of each phase of the steps that are counted; the last step has nothing to wait for."""
    counted = rows[FIRST:-1]

    def seconds(name: str) -> float:
        return median(row.get(f"time/{name}", 0.0) for row in counted)

    names = ("generation", "rollout", "token_stats", "train", "wait", "step")
    sync = median(row["time/weight_sync"] - row.get("time/wait", 0.0) for row in counted)
    return {name: seconds(name) for name in names} | {"weight_sync": sync}


def overlap(apart: Row, beside: Row) -> tuple[float, float]:
    """Seconds a step: (the overlap that is possible, the one that is reached), of the phases of both kinds of runs.

    What is left of the rollout with ahead 1 is grading, which the engine's work may run beside as well.
    """
    graded = beside["rollout"]
    return min(apart["rollout"] - graded, graded + apart["token_stats"] + apart["train"]), apart["step"] - beside[
        "step"
    ]


def page(apart: Row, beside: Row, *, command: str, steps: int, rounds: int, responses: str, load: float) -> str:
    possible, reached = overlap(apart, beside)
    rows = (
        ("the engine draws the step's responses", apart["rollout"] - beside["rollout"], beside["generation"]),
        ("grades", beside["rollout"], beside["rollout"]),
        ("token statistics, advantages", apart["token_stats"], beside["token_stats"]),
        ("update", apart["train"], beside["train"]),
        ("waiting for the engine", 0.0, beside["wait"]),
        ("weight sync", apart["weight_sync"], beside["weight_sync"]),
        ("**step**", apart["step"], beside["step"]),
    )
    units = "with" if processor.multiplies_bf16() else "without"
    return "\n".join(
        [
            "# One step ahead",
            "",
            f"`{command}`: {rounds} runs of {steps} steps each way, in turns, {responses}; median seconds of the steps "
            f"{FIRST + 1} to {steps - 1}. One engine and one policy rank, a thread each, on {os.cpu_count()} cores "
            f"{units} bf16 units; load average {load:.1f} before the first run.",
            "",
            "| seconds | rollout.ahead = 0 | rollout.ahead = 1 |",
            "|---|---|---|",
            *(f"| {name} | {one:.2f} | {other:.2f} |" for name, one, other in rows),
            "",
            "Overlap that is possible, the shorter of the engine's seconds and of those of grades, statistics and "
            f"update, each as on-policy: {possible:.2f} s a step. Reached: {reached:.2f} s, {reached / possible:.0%} "
            f"of it; the step takes {beside['step'] / apart['step']:.2f} times as long. Grades are time/rollout with "
            "ahead 1, and the first line of ahead 0 is its time/rollout without them.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time steps with rollout.ahead 0 and 1.")
    parser.add_argument("--output", type=Path, help="also write the page there")
    parser.add_argument("--steps", type=int, default=9, help="of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    options = parser.parse_args()
    ensure_smollm2()
    load = os.getloadavg()[0]
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="dcpo-ahead-") as name:
        for turn in range(options.rounds):
            for ahead in found:
                rows = run(Path(name) / f"{ahead}-{turn}", ahead, options.steps, options.overrides)
                found[ahead].append(phases(rows))
                print(f"ahead {ahead}", found[ahead][-1], flush=True)
    apart, beside = ({key: median(one[key] for one in runs) for key in runs[0]} for runs in found.values())
    arguments = " ".join(word for word in sys.argv[1:] if word not in ("--output", str(options.output)))
    command = "make bench BENCH=ahead" + (f" ARGS={shlex.quote(arguments)}" if arguments else "")
    responses = f"{rows[-1]['rollout/length_mean']:.1f} tokens a response"
    settings = {"steps": options.steps, "rounds": options.rounds, "responses": responses, "load": load}
    text = page(apart, beside, command=command, **settings) + "\n"
    publish(text, options.output)


if __name__ == "__main__":
    main()
