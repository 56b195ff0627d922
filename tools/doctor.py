"""Whether a recipe would run here, and whether its trainer and engines hold the same weights; one line a check.

Usage: python -m tools.doctor --recipe FILE [section.key=value ...]

Machine, packages and preflight come first. If they let a run start, the recipe's engines and policy are started as a
run starts them, synced twice, compared and ended; the run folder is a temporary one.
"""

import argparse
import contextlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch

from dcpo_openrlhf.recipe import packages, preflight, processor, resume
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.memory import GIB
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError
from dcpo_openrlhf.signals import Interrupted
from dcpo_openrlhf.train_dcpo import log_to, started
from tools.examination import Examination, Skipped, Wrong

if TYPE_CHECKING:
    from dcpo_openrlhf.trainer import DCPOTrainer


class Report:
    """Prints each check as it ends and counts those that are wrong."""

    def __init__(self) -> None:
        self.count = self.wrong_count = 0

    def ok(self, name: str, detail: str = "") -> None:
        self._line(name, f"ok       {detail}")

    def wrong(self, name: str, detail: str) -> None:
        self.wrong_count += 1
        self._line(name, f"WRONG    {detail}")

    def skipped(self, name: str, reason: str) -> None:
        self._line(name, f"skipped  ({reason})")

    def _line(self, name: str, text: str) -> None:
        self.count += 1
        print(f"{name:<18}{text}".rstrip(), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all well, 1 something is wrong, 2 the recipe cannot be read, 128 + signal after a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.doctor", description="Check a recipe, this machine, and that trainer and engine agree."
    )
    parser.add_argument("--recipe", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    arguments = parser.parse_args(argv)
    log_to(sys.stderr)
    try:
        recipe = resume.keep_chosen(load_recipe(arguments.recipe, arguments.overrides))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report()
    try:
        before_start(recipe, report)
        live(recipe, report)
    except KeyboardInterrupt as interrupted:  # Interrupted, or Ctrl-C before anything is started
        number = interrupted.args[0] if isinstance(interrupted, Interrupted) else signal.SIGINT
        print(f"ended by {signal.Signals(number).name}; every process of this check is gone", file=sys.stderr)
        return 128 + number
    print(f"{report.wrong_count} of {report.count} checks are WRONG" if report.wrong_count else "all well")
    return 1 if report.wrong_count else 0


def before_start(recipe: Recipe, report: Report) -> None:
    """What recipe, model folder and machine show without anything started."""
    report.ok("machine", machine())
    found = preflight.violations(recipe)
    if not found["packages"]:
        report.ok("packages", packages.report(recipe).removeprefix("packages: "))
        del found["packages"]
    for name, texts in found.items():
        for text in texts:
            report.wrong(name, text)
        if not texts:
            report.ok(name)
    for hint in preflight.hints(recipe):
        report.ok("hint", hint)


def machine() -> str:
    memory, shared = psutil.virtual_memory(), "/dev/shm"
    units = "with" if processor.multiplies_bf16() else "without"
    parts = [
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
        f"{len(psutil.Process().cpu_affinity() or [])} cores {units} bf16 units",
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory free",
        f"{shutil.disk_usage(shared).free / GIB:.1f} GiB in {shared}",
        gpus(),
    ]
    return ", ".join(parts)


def gpus() -> str:
    """Number, name, memory and driver as nvidia-smi tells; torch itself would take memory of the first one."""
    if not shutil.which("nvidia-smi"):
        return "no GPU (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return f"nvidia-smi ended with status {done.returncode}: {done.stdout.strip() or done.stderr.strip()}"
    kinds = Counter(line.strip() for line in done.stdout.splitlines())
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) + f"; torch's CUDA {torch.version.cuda}"


def live(recipe: Recipe, report: Report) -> None:
    """Start engines and policy as a run does, compare them, and end them."""
    strangers = set(psutil.Process().children(recursive=True))
    with tempfile.TemporaryDirectory(prefix="dcpo-doctor-") as folder:
        own = own_copy(recipe, folder)
        reason = why_not(own)
        if reason:
            for name in ("start", *Examination.CHECKS, "end"):
                report.skipped(name, reason)
            return
        with contextlib.ExitStack() as stack:
            begin = time.monotonic()
            try:
                with contextlib.redirect_stdout(sys.stderr):  # what libraries say when they are loaded
                    trainer = stack.enter_context(started(own))
            except Exception as error:
                report.wrong("start", told(error))
                for name in Examination.CHECKS:
                    report.skipped(name, "start failed")
            else:
                ranks, engines = own.parallel.world_size, len(trainer.vllm_engines)
                report.ok("start", f"{time.monotonic() - begin:.0f} s for {ranks} policy ranks and {engines} engines")
                examine(trainer, report)
    mine = [process for process in psutil.Process().children(recursive=True) if process not in strangers]
    alive = psutil.wait_procs(mine, timeout=10)[1]
    if alive:
        report.wrong("end", f"processes {[process.pid for process in alive]} are still there; end them")
    else:
        report.ok("end", "no process of this check is left on this machine")


def own_copy(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with a run folder of its own, in which nothing is kept, and with the sync's checksums on."""
    changes: dict[str, dict[str, Any]] = {
        "run": {"dir": folder},
        "rollout": {"record": False},
        "weight_sync": {"verify": True},
        "checkpoint": {"every": 0, "resume": "never", "export_hf": False},
        "monitor": {"tensorboard": False, "wandb": "off"},
    }
    values = recipe.model_dump(mode="json")
    return Recipe.model_validate({section: keys | changes.get(section, {}) for section, keys in values.items()})


def why_not(recipe: Recipe) -> str:
    """Why there is no trainer and engine to compare, or ""."""
    if not recipe.generates:
        return "rollout.replay: such a run starts no engine"
    if recipe.train.rollout_only:
        return "train.rollout_only: such a run starts no policy"
    wrong = [name for name, texts in preflight.violations(recipe).items() if texts]
    return f"a run could not start: {', '.join(wrong)}" if wrong else ""


def examine(trainer: "DCPOTrainer", report: Report) -> None:
    """Every live check in order; one that fails, other than by what it finds, leaves the others without ground."""
    examination, failed = Examination(trainer), ""
    for name, check in Examination.CHECKS.items():
        if failed:
            report.skipped(name, f"{failed} failed")
            continue
        try:
            report.ok(name, check(examination))
        except Skipped as skipped:
            report.skipped(name, str(skipped))
        except Wrong as wrong:
            report.wrong(name, str(wrong))
        except Exception as error:
            report.wrong(name, told(error))
            failed = name


def told(error: Exception) -> str:
    """The error on one line: its first and last one, without the traceback of another process between them."""
    cause = getattr(error, "cause", None) or error  # Ray's own error repeats the remote traceback
    text = re.sub(r"\x1b\[\d+m", "", str(cause))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(cause).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


if __name__ == "__main__":
    sys.exit(main())
