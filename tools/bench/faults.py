"""What a fault costs: how soon it is noticed, when the engine is back, what of the run is lost. One run a fault.

python -m tools.bench.faults [--output FILE] [--only FAULT ...] [--recipe FILE] [section.key=value ...]

Without a recipe: a random model of two layers on two policy ranks, so that the seconds are those of the stack. Each run
is a process that hurts itself at a chosen moment of its second step; its metrics are compared with those of a run that
nothing disturbs.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dcpo_openrlhf import local_ray
from dcpo_openrlhf.local_ray import adopt_orphans, descendants
from dcpo_openrlhf.recipe.load import load_recipe
from tools.bench import publish
from tools.demo import ROOT

STEP, STEPS = 2, 3
MARK = "fault: "
STORE_BYTES = 96 << 20
"""Ray's object store, where it is to be filled."""


@dataclass(frozen=True)
class Fault:
    what: str
    victim: str
    """actor or worker of the first engine, rank: the policy's, or store: Ray's, which is filled."""
    number: int
    moment: str
    """begin: requests are about to go. generate: they are on their way. sync: calls to the engines are. train: an
    update begins."""


FAULTS = {
    "kill-before": Fault("kill -9 of vLLM's worker before it generates", "worker", signal.SIGKILL, "begin"),
    "kill-actor": Fault("kill -9 of the engine's actor while it generates", "actor", signal.SIGKILL, "generate"),
    "kill-worker": Fault("kill -9 of vLLM's worker while it generates", "worker", signal.SIGKILL, "generate"),
    "stop-actor": Fault("SIGSTOP of the engine's actor while it generates", "actor", signal.SIGSTOP, "generate"),
    "stop-worker": Fault("SIGSTOP of vLLM's worker while it generates", "worker", signal.SIGSTOP, "generate"),
    "sync-kill": Fault("kill -9 of vLLM's worker during a weight sync", "worker", signal.SIGKILL, "sync"),
    "sync-stop": Fault("SIGSTOP of vLLM's worker during a weight sync", "worker", signal.SIGSTOP, "sync"),
    "full-store": Fault("Ray's object store is full when an update begins", "store", 0, "train"),
    "kill-rank": Fault("kill -9 of a policy rank during an update, tools.supervise", "rank", signal.SIGKILL, "train"),
}


def tiny_recipe(folder: Path) -> Path:
    """A recipe of STEPS steps in `folder`, with its model and its data."""
    from tests.tiny import make_biased_model

    make_biased_model(folder / "model")
    rows = [{"id": f"sum-{n}", "problem": f"What is {n} + {7 - n}?", "answer": "7", "source": "test"} for n in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
        run: {{dir: {folder}/unused, device: cpu, logical_devices: 4}}
        model: {{path: {folder}/model, dtype: fp32}}
        task: {{train: {folder}/data.jsonl, template: plain}}
        reward: {{extractor: last_integer, workers: 1}}
        method: {{target_entropy: 3.0, alpha_max: 1.0}}
        optimizer: {{learning_rate: 1.0e-3}}
        train: {{steps: {STEPS}, prompts_per_step: 4, prompts_per_update: 2, group_size: 4, micro_batch_size: 16}}
        parallel: {{devices_per_node: 2, tensor: 2}}
        rollout: {{engines: 1, max_prompt_tokens: 200, max_new_tokens: 16, cpu_kv_cache_gb: 0.1, restarts: 9}}
        checkpoint: {{every: 1, asynchronous: false, export_hf: false}}
        monitor: {{tensorboard: false}}
        """
    )
    return folder / "recipe.yaml"


def hurt_at_its_moment(fault: Fault, once: Path) -> None:
    """Let this process's run hurt itself in step STEP, the first time that it gets there; `once` remembers."""
    if fault.victim == "store":
        os.environ |= {"RAY_max_direct_call_object_size": "0"}  # small objects go there too; Ray reads it when imported
    from dcpo_openrlhf import train_dcpo
    from dcpo_openrlhf.rollout.healing import EnginePool
    from dcpo_openrlhf.trainer import DCPOTrainer

    at = [0.0]

    def tell(what: str) -> None:
        print(f"{MARK}{what} {time.monotonic() - at[0]:.2f} s", flush=True)

    def hurt(pids: Sequence[int], number: int) -> None:
        once.touch()
        at[0] = time.monotonic()
        tell("done")
        for pid in pids:
            os.kill(pid, number)

    def victims(pool: EnginePool) -> list[int]:
        health = pool._known[0]
        return [health["pid"]] if fault.victim == "actor" else health["children"][-1:]

    def before(cls: Any, name: str, act: Callable[..., None]) -> None:
        original = getattr(cls, name)

        def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
            act(self, *arguments, **named)
            return original(self, *arguments, **named)

        setattr(cls, name, wrapped)

    doing = [""]
    held: list[Any] = []

    def remember(pool: EnginePool, *_: Any, **named: Any) -> None:
        doing[0] = named["doing"]
        if fault.moment == "begin":
            while_it_generates(pool)

    def while_it_generates(pool: EnginePool, *_: Any) -> None:
        if doing[0].endswith(f"step {STEP}") and not once.exists():
            hurt(victims(pool), fault.number)

    def before_a_sync(pool: EnginePool, _: Any, version: int, *__: Any) -> None:
        if version == STEP + 1 and not once.exists():  # held still, so that the sync cannot be over before the fault
            os.kill(victims(pool)[0], signal.SIGSTOP)

    def in_a_sync(pool: EnginePool, _: Any, doing: str) -> None:
        if doing.endswith(f"version {STEP + 1}") and not once.exists():
            time.sleep(0.5)
            hurt(victims(pool), fault.number)

    def in_an_update(_: Any, step: int) -> None:
        if step != STEP or once.exists():
            return
        if fault.victim == "store":
            held.extend(ray.put(np.zeros(2**20, np.uint8)) for _ in range(STORE_BYTES >> 20))
            hurt([], fault.number)
        else:
            ranks = [
                p.pid for p in descendants() if "Actor" in (name := " ".join(p.cmdline())) and "Rollout" not in name
            ]
            hurt([pid for pid in ranks[-1:]], fault.number)

    if fault.victim == "store":
        import ray

        start = local_ray.start
        local_ray.start = lambda **options: start(**options, object_store_memory=STORE_BYTES)  # type: ignore[assignment]
    before(EnginePool, "_restart", lambda *_: tell("noticed"))
    if fault.moment in ("begin", "generate"):
        before(EnginePool, "begin", remember)
        before(EnginePool, "_next", while_it_generates)
    elif fault.moment == "sync":
        before(EnginePool, "_sync_once", before_a_sync)
        before(EnginePool, "_by_policy", in_a_sync)
    else:
        before(DCPOTrainer, "ppo_train", in_an_update)
        before(train_dcpo, "_save_after_error", lambda *_: tell("noticed"))
    came_up = EnginePool.came_up

    def up(self: EnginePool, slot: int, health: dict[str, Any]) -> None:
        came_up(self, slot, health)
        if at[0]:
            tell("up again")

    EnginePool.came_up = up  # type: ignore[method-assign]


def hurt_run(name: str, arguments: list[str]) -> int:
    """The run itself, in a process of its own."""
    from dcpo_openrlhf import train_dcpo

    recipe = load_recipe(arguments[1], arguments[2:])
    if name != "none":
        hurt_at_its_moment(FAULTS[name], recipe.run.dir.with_suffix(".hurt"))
    return train_dcpo.main(arguments)


@dataclass
class Outcome:
    status: int
    log: str
    seconds: dict[str, float]
    rows: list[dict[str, float]]
    left: list[str]
    """Command lines of processes that are there 10 s after the end."""


def run(name: str, folder: Path, recipe: str, overrides: Sequence[str]) -> Outcome:
    """The recipe with the fault ("none": without), to its end."""
    words = ["--recipe", recipe, *overrides, f"run.dir={folder / name}"]
    command = [sys.executable, "-m", "tools.bench.faults", "--hurt", name, *words]
    if name == "kill-rank":
        command = [sys.executable, "-m", "tools.supervise", "--wait", "1", "--", *command]
    adopt_orphans()
    strangers = frozenset(descendants())
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    mine = descendants(strangers)
    left = psutil.wait_procs(mine, timeout=10)[1]
    file = folder / name / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    seconds = {what: float(at) for what, at in re.findall(rf"{MARK}([a-z ]+) ([\d.]+) s", done.stdout)}
    names = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline()))
    return Outcome(done.returncode, done.stdout, seconds, rows, names)


def difference(rows: Sequence[dict[str, float]], whole: Sequence[dict[str, float]]) -> float:
    """Largest relative difference of a metric but the times; inf where steps or metrics are missing."""
    largest = 0.0 if len(rows) == len(whole) else float("inf")
    for mine, theirs in zip(rows, whole, strict=False):
        for name, value in theirs.items():
            if not name.startswith(("time/", "cost/")):
                largest = max(largest, abs(mine.get(name, float("inf")) - value) / max(abs(value), 1e-12))
    return largest


def table(outcomes: dict[str, Outcome], whole: Outcome) -> list[str]:
    lines = [
        "| fault, in step 2 | noticed after [s] | engine up again after [s] | exit status | metrics differ by |",
        "|---|---|---|---|---|",
    ]
    for name, o in outcomes.items():
        noticed, up = (f"{o.seconds[k]:.1f}" if k in o.seconds else "-" for k in ("noticed", "up again"))
        same = difference(o.rows, whole.rows)
        lines.append(
            f"| {FAULTS[name].what} | {noticed} | {up} | {o.status} | {'none' if same == 0 else f'{same:.1e}'} |"
        )
    return lines


def main() -> int:
    if sys.argv[1:2] == ["--hurt"]:
        return hurt_run(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description="Measure what faults cost a run.")
    parser.add_argument("--output", type=Path, help="also write the page there")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="these faults alone")
    parser.add_argument("--recipe", help="of another run, three steps or more; none: a tiny one")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dcpo-faults-") as name:
        folder = Path(name)
        recipe = options.recipe or str(tiny_recipe(folder))
        whole = run("none", folder, recipe, options.overrides)
        if whole.status:
            raise SystemExit(whole.log[-3000:])
        outcomes = {}
        for fault in options.only:
            outcomes[fault] = outcome = run(fault, folder, recipe, options.overrides)
            print(
                fault, outcome.status, outcome.seconds, difference(outcome.rows, whole.rows), outcome.left, flush=True
            )
    command = f"python -m tools.bench.faults {shlex.join(sys.argv[1:])}".strip()
    text = "\n".join(["# What faults cost", "", f"`{command}`, {os.cpu_count()} cores.", "", *table(outcomes, whole)])
    publish(text + "\n", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
