"""Start a run again when a fault ended it: a bounded number of times, and not where it ends twice at the same step.

python -m tools.supervise [--restarts N] [--wait SECONDS] -- COMMAND --recipe FILE [section.key=value ...]

The first start resumes what checkpoint.resume says, auto where COMMAND and recipe leave it out; each other one resumes
auto, but a branch of another run that has no whole checkpoint yet begins once more where it began.
"""

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dcpo_openrlhf.checkpoint import newest_whole
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError
from tools.run_folder import read_jsonl

MEANT = {0: "done", 2: "recipe or data cannot run", 3: "ended by the monitor"}
"""Exit statuses of train_dcpo after which another start would change nothing."""
RESUME = "checkpoint.resume="
OVERRIDE = re.compile(r"\w+\.\w+=")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def recipe_of(command: Sequence[str]) -> Recipe:
    """The recipe that the command names, with what it sets after it. Raises RecipeError where there is none."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--recipe=") else [word])]
    if "--recipe" not in words[:-1]:
        raise RecipeError(
            f"COMMAND must name a recipe, got {' '.join(command)!r}; give --recipe FILE, overrides after it"
        )
    at = words.index("--recipe") + 1
    if early := [word for word in words[: at - 1] if OVERRIDE.match(word)]:
        raise RecipeError(f"COMMAND sets {', '.join(early)} before --recipe; put overrides after --recipe FILE")
    return load_recipe(words[at], [word for word in words[at + 1 :] if "=" in word])


def resuming(command: Sequence[str]) -> list[str]:
    """The command, from the newest whole checkpoint of its run folder."""
    return [*(word for word in command if not word.startswith(RESUME)), f"{RESUME}auto"]


def next_command(command: Sequence[str], recipe: Recipe) -> list[str]:
    """What follows a fault of `command`."""
    named = isinstance(recipe.checkpoint.resume, Path)
    begun = not named or newest_whole(recipe.run.dir / "checkpoints", quick=True) is not None
    return resuming(command) if begun else list(command)


def last_step(recipe: Recipe) -> int:
    """The last step that the run has finished, 0 before the first one."""
    file = recipe.run.dir / "metrics.jsonl"
    rows = read_jsonl(file) if file.is_file() else []
    return int(rows[-1]["step"]) if rows else 0


class Supervisor:
    """The command's present process, which SIGTERM and SIGINT are passed on to: then it is not started again."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.told_to_end = False

    def pass_on(self, number: int, _: FrameType | None) -> None:
        self.told_to_end = True
        if self.process is not None:
            self.process.send_signal(number)

    def run(self, command: Sequence[str]) -> int:
        """Exit status of one start, 128 + signal where one ended it."""
        self.process = subprocess.Popen(command)
        if self.told_to_end:  # before there was a process to tell
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait()
        return 128 - status if status < 0 else status

    def supervise(self, command: Sequence[str], recipe: Recipe, *, restarts: int, wait_s: float) -> int:
        """Exit status of the last start."""
        seen: set[int] = set()
        for used in range(restarts + 1):
            status = self.run(command)
            if self.told_to_end or status in (*MEANT, *(128 + number for number in SIGNALS)):
                return status
            step = last_step(recipe)
            say = f"supervise: the run ended with status {status} after step {step}"
            if step in seen:
                print(f"{say}, as an earlier time: it is not started again; mend what the error names", flush=True)
                return status
            if used == restarts:
                print(f"{say}; {used} of --restarts {restarts} are used", flush=True)
                return status
            print(f"{say}; start {used + 1} of --restarts {restarts} in {wait_s:g} s", flush=True)
            seen.add(step)
            command = next_command(command, recipe)
            self.wait(wait_s)
            if self.told_to_end:
                return status
        raise AssertionError("the last start returns")

    def wait(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not self.told_to_end and time.monotonic() < ends:
            time.sleep(min(0.5, seconds))


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m tools.supervise", description="Start a run again after a fault.")
    parser.usage = "%(prog)s [--restarts N] [--wait SECONDS] -- COMMAND --recipe FILE [section.key=value ...]"
    parser.add_argument("--restarts", type=int, default=5, help="starts after the first one, in all")
    parser.add_argument("--wait", type=float, default=10.0, help="seconds before each: devices become free meanwhile")
    options = parser.parse_args(own)
    if options.restarts < 0:
        parser.error(f"--restarts must be 0 or more, got {options.restarts}")
    try:
        recipe = recipe_of(command)
        if recipe.checkpoint.resume == "never" and not any(word.startswith(RESUME) for word in command):
            command = resuming(command)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    supervisor = Supervisor()
    for number in SIGNALS:
        signal.signal(number, supervisor.pass_on)
    return supervisor.supervise(command, recipe, restarts=options.restarts, wait_s=options.wait)


if __name__ == "__main__":
    sys.exit(main())
