"""What this package does on the GPUs of this machine: one JSON and one table, section by section, in nine minutes.

python -m tools.gpu_check [--output DIR] [--minutes 9] [--only NAME ...]

Needs no network. A section that has ended is not run again; delete its DIR/NAME.json to repeat it. --device cpu runs
the same on Ray's logical devices, which proves this script and nothing about GPUs.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcpo_openrlhf.recipe import memory, packages
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = {
    device: ROOT / "recipes" / f"dcpo-smollm2-135m-{name}.yaml" for device, name in (("cuda", "1gpu"), ("cpu", "cpu"))
}
BRIEF = ["evaluation.problems=0", "checkpoint.every=0", "checkpoint.export_hf=false", "monitor.tensorboard=false"]
GPU_TESTS = ("tests/policy/megatron/test_gpu.py", "tests/weight_sync/test_gpu.py")
LEAST_S = 20.0
"""A section with less time than this is left for the next call."""
Result = dict[str, Any]


@dataclass
class Check:
    """Where the sections write and until when they may run."""

    output: Path
    device: str
    steps: int
    ends: float

    def run(self, name: str, *command: str) -> tuple[int | None, str]:
        """Exit status (None: out of time) and output of `python -m command`, which is kept as DIR/NAME.log."""
        log = self.output / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
            try:
                status: int | None = process.wait(max(self.ends - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
        return status, log.read_text(errors="replace")

    def model(self, *, tiny: bool) -> Path:
        """SmolLM2 of the installed package, or a random model of two layers that ranks can share."""
        if not tiny and self.device == "cuda":
            from tools.smollm2 import ensure_smollm2

            return ensure_smollm2()
        from tests.tiny import make_biased_model

        folder = self.output / "tiny"
        return folder if (folder / "config.json").is_file() else make_biased_model(folder)

    def recipe(self, name: str, *overrides: str, tiny: bool = False) -> list[str]:
        """Arguments of a command that takes a recipe: the demo's for this device, brief, in a folder of this check."""
        own = [f"run.dir={self.output / name}", f"model.path={self.model(tiny=tiny)}", f"train.steps={self.steps}"]
        if self.device == "cpu":
            own += ["run.logical_devices=3", "model.dtype=fp32", "task.system=null", "rollout.max_prompt_tokens=116"]
        return ["--recipe", str(RECIPES[self.device]), *BRIEF, *own, *overrides]


def machine(check: Check) -> Result:
    """Packages, driver and devices."""
    recipe = load_recipe(RECIPES[check.device])
    found: Result = {
        "status": "passed",
        "python": platform.python_version(),
        "packages": packages.report(recipe).removeprefix("packages: "),
    }
    if check.device == "cuda":
        from torch.cuda import nccl

        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["devices"] = [f"{p.name}, {p.total_memory / memory.GIB:.0f} GiB, {p.major}.{p.minor}" for p in properties]
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        with contextlib.suppress(FileNotFoundError):
            found["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl.version()))}
    return found


def tests(check: Check) -> Result:
    """The tests marked gpu."""
    command = ["pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *GPU_TESTS]
    status, said = check.run("tests", *command)
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", said.splitlines()[-1])}
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", said, flags=re.M)
    return {"status": _status(status), **counts} | ({"which": failed} if failed else {})


def doctor(check: Check) -> Result:
    """Trainer and engine hold the same weights: the doctor on a tiny model that shares a device with its engine."""
    status, said = check.run("doctor", "tools.doctor", *check.recipe("doctor", tiny=True))
    return {"status": _status(status), "wrong": [line for line in said.splitlines() if " WRONG " in line]}


def demo(check: Check) -> Result:
    """The demo's recipe, with SmolLM2 on cuda, colocated there."""
    return _train(check, "demo")


def nccl(check: Check) -> Result:
    """Trainer and engine on devices of their own."""
    return _train(check, "nccl", "parallel.colocate=false", "parallel.devices_per_node=1", tiny=True)


def tensor(check: Check) -> Result:
    """Two tensor ranks."""
    return _train(check, "tensor", "parallel.devices_per_node=2", "parallel.tensor=2", tiny=True)


def pipeline(check: Check) -> Result:
    """Two pipeline stages."""
    return _train(check, "pipeline", "parallel.devices_per_node=2", "parallel.pipeline=2", tiny=True)


SECTIONS: dict[str, tuple[int, Callable[[Check], Result]]] = {
    # devices that it wants, and what it does
    "machine": (1, machine),
    "doctor": (1, doctor),
    "demo": (1, demo),
    "tests": (1, tests),
    "nccl": (2, nccl),
    "tensor": (2, tensor),
    "pipeline": (2, pipeline),
}


def _train(check: Check, name: str, *overrides: str, tiny: bool = False) -> Result:
    """A run of the recipe, and what its metrics say."""
    folder = check.output / name
    if folder.exists():  # of a call that ran out of time
        folder.rename(folder.with_name(f"{name}-{time.time_ns()}"))
    status, said = check.run(name, "dcpo_openrlhf.train_dcpo", *check.recipe(name, *overrides, tiny=tiny))
    result: Result = {"status": _status(status)}
    if status:
        result["said"] = said.splitlines()[-1:]
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if not rows:
        return result
    recipe = load_recipe(folder / "recipe.yaml")
    result |= {
        "steps": len(rows),
        "reward": _ends(rows, "rollout/reward_mean"),
        "entropy": _ends(rows, "entropy/exact"),
    }
    later = rows[1:] or rows  # the first step warms up
    responses = recipe.train.prompts_per_step * recipe.train.group_size
    tokens = [responses * row["rollout/length_mean"] for row in later]
    for key, phase in (("rollout", "rollout"), ("step", "step")):
        speeds = [n / row[f"time/{phase}"] for n, row in zip(tokens, later, strict=True)]
        result[f"response tokens/s of a {key}"] = round(statistics.median(speeds), 1)
    result["sync seconds"] = round(statistics.median(row["time/weight_sync"] for row in later), 3)
    result["mismatch"] = max(row["mismatch/prob_diff_mean"] for row in rows)
    return result | _memory(folder, recipe)


def _memory(folder: Path, recipe: Recipe) -> Result:
    """Peak of a policy process against the plan's, which on cuda reserves more than tensors [GiB]."""
    report = folder / "report.md"
    peak = re.search(
        r"peak memory of a policy process, GiB \| \| ([\d.]+)", report.read_text() if report.exists() else ""
    )
    sizes = memory.Sizes.of(json.loads((recipe.model.path / "config.json").read_text()))
    planned = memory.trainer_memory(sizes, recipe).total - memory.RESERVE[recipe.run.device]
    return {"peak GiB": float(peak[1]) if peak else None, "planned GiB": round(planned / memory.GIB, 2)}


def _ends(rows: list[dict[str, float]], key: str) -> list[float]:
    return [round(rows[0][key], 3), round(rows[-1][key], 3)]


def _status(status: int | None) -> str:
    return "out of time" if status is None else "failed" if status else "passed"


def _end(process: subprocess.Popen) -> None:
    """The process and all that it started: asked first, since a run ends its own cluster then."""
    for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def table(found: dict[str, Result]) -> str:
    """Markdown: a row a section."""
    rows = ["| section | status | seconds | seen |", "|---|---|---|---|"]
    for name, result in found.items():
        seen = {key: value for key, value in result.items() if key not in ("status", "seconds")}
        said = "; ".join(
            f"{key} {json.dumps(value) if isinstance(value, list) else value}" for key, value in seen.items()
        )
        rows.append(f"| {name} | {result['status']} | {result.get('seconds', '')} | {said.replace('|', '/')} |")
    return "\n".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 where every section passed that this machine has devices for, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=10, help="of the demo and the other runs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args(argv)
    output, device = arguments.output.absolute(), arguments.device
    devices = 3 if device == "cpu" else torch.cuda.device_count()
    if not devices:
        print("no GPU here; --device cpu proves the script alone", file=sys.stderr)
        return 1
    output.mkdir(parents=True, exist_ok=True)
    check = Check(output, device, arguments.steps, time.monotonic() + 60 * arguments.minutes)
    found: dict[str, Result] = {}
    for name, (wanted, section) in SECTIONS.items():
        file = output / f"{name}.json"
        if file.is_file():
            found[name] = json.loads(file.read_text())
        elif name in arguments.only and devices < wanted:
            found[name] = {"status": "not here", "wants devices": wanted}
        elif name in arguments.only and check.ends - time.monotonic() < LEAST_S:
            found[name] = {"status": "out of time"}
        elif name in arguments.only:
            begin = time.monotonic()
            found[name] = section(check) | {"seconds": round(time.monotonic() - begin, 1)}
            if found[name]["status"] != "out of time":
                file.write_text(json.dumps(found[name], indent=1))
        (output / "report.json").write_text(json.dumps({"device": device, "sections": found}, indent=1))
        (output / "report.md").write_text(table(found))
    print(table(found), end="")
    return int(any(result["status"] not in ("passed", "not here") for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
