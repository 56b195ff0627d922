"""Which run a recipe continues: the checkpoint that it names, what may differ from it, and the run folder cut back.

What a resumed run takes back lies in <run folder>/cut/NNN/.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from dcpo_openrlhf.checkpoint import STATE, STEP_NAME, Checkpoint, damage, newest_whole
from dcpo_openrlhf.errors import RunError
from dcpo_openrlhf.recipe import weights
from dcpo_openrlhf.recipe.load import resolved_yaml
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError

logger = logging.getLogger(__name__)
REPORT = "report.md"
STOP = ".stop_forward"
"""While a file of this name stands in the run folder, ranks leave a forward pass between micro-batches."""
LOCK = ".lock"
"""Held by the run that writes into the run folder; the kernel takes it back, however that run ends."""
_OF_A_STEP = re.compile(r"(?:step|evaluation|tempered)_(\d{6,})")
MAY_DIFFER = (
    # where a run happens, how long things may take, what is kept: none of it is in the numbers
    "run.dir",
    "run.ray_address",
    "run.logical_devices",
    "run.profile",
    "run.worker_logs",
    "run.startup_timeout",
    "run.shutdown_timeout",
    "model.path",
    "model.config",
    # the problems themselves are compared by their fingerprints
    "task.train",
    "task.heldout",
    "task.fields",
    "reward.workers",
    "parallel.",
    "rollout.engines",
    "rollout.tensor_parallel",
    "rollout.gpu_memory_utilization",
    "rollout.max_sequences",
    "rollout.cpu_kv_cache_gb",
    "rollout.cpu_threads",
    "rollout.timeout",
    "rollout.heartbeat",
    "rollout.restarts",
    "rollout.record",
    "rollout.replay",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.share_prompts",
    "train.recompute",
    "weight_sync.",
    "evaluation.every",
    "checkpoint.",
    "monitor.",
    "estimate.",
)
"""Keys, or sections, in which a resumed run may differ from its checkpoint's recipe."""
_DEEPSPEED_FILES = ("parallel.zero_stage", "parallel.nodes", "parallel.devices_per_node")
"""What DeepSpeed's files of a rank belong to: another stage or number of ranks cannot read them."""


def resume_point(recipe: Recipe, *, quick: bool = False) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` names, verified; None where the run starts from its beginning.

    Raises RecipeError for a named checkpoint that is damaged, or a recipe that would continue another run.
    """
    if recipe.checkpoint.resume == "never":
        return None
    found = _found(recipe, quick=quick)
    if found is None:
        return None
    state = found.state()
    refused, tolerated = differences(state["recipe"], recipe)
    if refused:
        raise RecipeError(
            f"{found.path} belongs to another recipe; set these back or start a new run.dir:\n"
            + "\n".join(f"    {line}" for line in refused)
        )
    if (saved := state.get("reference")) and saved != (now := starting_model(recipe)):
        raise RecipeError(
            f"{found.path} has a KL to the model that its run started from (fingerprint {saved}); {recipe.model.path} "
            f"holds other weights ({now}): name that model's folder as model.path"
        )
    if found.step > recipe.train.steps:
        raise RecipeError(
            f"{found.path} is at step {found.step}, beyond train.steps = {recipe.train.steps}; raise train.steps, or "
            "resume from an earlier one"
        )
    if not quick:
        logger.info("resuming after step %d from %s", found.step, found.path)
        for line in tolerated:
            logger.info("  differs from the checkpoint: %s", line)
    return found


def starting_model(recipe: Recipe) -> str | None:
    """What tells the weights of `model.path` from others, where the run has a KL to them; a resume compares it."""
    return weights.fingerprint(recipe.model.path) if recipe.kl.coefficient else None


def finished(recipe: Recipe) -> bool:
    """Has the run that the recipe resumes done its steps and written its report? RecipeError as `resume_point`.

    The report is a run's last file; one of fewer steps lies in cut/ since the run went on.
    """
    point = resume_point(recipe, quick=True)
    return point is not None and point.step == recipe.train.steps and (recipe.run.dir / REPORT).is_file()


def what_is_kept(recipe: Recipe, saved_step: int) -> str:
    """Where the policy of a run stands that has ended."""
    c, folder = recipe.checkpoint, recipe.run.dir
    kept = [f"checkpoint step_{saved_step:06d}"] if c.every else []
    kept += ["the exported policy hf/"] if c.export_hf else []
    if not kept:
        return "the policy is not kept: checkpoint.every = 0 and checkpoint.export_hf = false"
    return f"{' and '.join(kept)} in {folder}" + ("" if c.every else "; with checkpoint.every = 0 it cannot be resumed")


def keep_chosen(recipe: Recipe) -> Recipe:
    """The recipe with the model.dtype and task.date of the checkpoint that it resumes, where it leaves them open.

    A replay keeps the date of the run that recorded it: its prompts were written on that day.
    """
    saved: dict[str, Any] = {}
    if recipe.checkpoint.resume != "never":
        with contextlib.suppress(RecipeError):  # told by the preflight
            found = _found(recipe, quick=True)
            saved = found.state()["recipe"] if found is not None else {}
    if recipe.chose("model.dtype") and saved:
        recipe = recipe.with_chosen("model.dtype", saved["model"]["dtype"])
    day = (saved or _recorded(recipe)).get("task", {}).get("date")
    if recipe.task.date is None and day is not None:
        recipe = recipe.with_chosen("task.date", datetime.date.fromisoformat(str(day)))
    return recipe


def _recorded(recipe: Recipe) -> dict[str, Any]:
    """The recipe.yaml of the run whose responses are replayed; nothing where it is not there."""
    folder = recipe.rollout.replay
    return {} if folder is None else _kept(folder) or _kept(folder.parent)


def _kept(run: Path) -> dict[str, Any]:
    """The recipe.yaml of a run folder; nothing where it is not there."""
    found = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load((run / "recipe.yaml").read_text())
    return found if isinstance(found, dict) else {}


def branched_from(recipe: Recipe) -> Path | None:
    """The checkpoint of another run that the one in run.dir began from, while it has no whole one of its own."""
    own, kept = recipe.run.dir / "checkpoints", _kept(recipe.run.dir).get("checkpoint") or {}
    if (began := kept.get("resume", "never")) in ("never", "auto") or Path(began).absolute().parent == own.absolute():
        return None
    return None if newest_whole(own, quick=True) else Path(began)


def _found(recipe: Recipe, *, quick: bool) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` names; RecipeError for one that is damaged."""
    resume = recipe.checkpoint.resume
    auto = resume == "auto"
    found = newest_whole(recipe.run.dir / "checkpoints", quick=quick) if auto else _named(Path(resume), quick)
    if found is None and (began := branched_from(recipe)):
        raise RecipeError(
            f"checkpoint.resume = auto: the run in {recipe.run.dir} began from {began} and has no whole checkpoint of "
            f"its own; name that one again, checkpoint.resume={began}, or start a new run.dir"
        )
    if found and not (found.path / STATE).is_file():  # tools.import_hf writes weights alone
        raise RecipeError(
            f"checkpoint.resume = {resume}: {found.path} belongs to no run (no {STATE}), as tools.import_hf writes it; "
            "start from the Hugging Face folder that it was made of: model.path=DIR and checkpoint.resume=never"
        )
    return found


def _named(path: Path, quick: bool) -> Checkpoint:
    match = STEP_NAME.fullmatch(path.name)
    if not match or not path.is_dir():
        raise RecipeError(
            f"checkpoint.resume = {path} is not a checkpoint (a folder step_NNNNNN); name one, or use auto or never"
        )
    if wrong := damage(path, quick=quick):
        raise RecipeError(f"checkpoint.resume = {path} is damaged: {wrong}; name another, or use auto")
    return Checkpoint(path, int(match[1]))


def differences(saved: dict[str, Any], recipe: Recipe) -> tuple[list[str], list[str]]:
    """("key: saved -> now" of those that would change the run, the same of those that may differ)."""
    # a checkpoint from before a key existed ran as the key's default says
    old, new = _defaults() | _flat(saved), _flat(recipe.model_dump(mode="json"))
    lines: tuple[list[str], list[str]] = ([], [])
    for key in sorted(old.keys()):
        if key not in new:
            lines[0].append(f"{key}: {old[key]!r} in the checkpoint, and this version has no such key")
        elif old[key] != new[key]:
            tolerated = _may_differ(key, recipe)
            if key == "parallel.expert" and 1 in (
                old[key],
                new[key],
            ):  # shared-out experts have an optimizer of their own
                tolerated = False
            lines[tolerated].append(f"{key}: {old[key]!r} -> {new[key]!r}")
    return lines


def _may_differ(key: str, recipe: Recipe) -> bool:
    if key == "train.steps":  # the other schedules end at the last update
        return recipe.optimizer.schedule == recipe.method.target_schedule == "constant"
    if key in _DEEPSPEED_FILES and recipe.parallel.backend == "deepspeed":
        return False
    if key == "parallel.backend":
        return False
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_DIFFER)


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in recipe.items() for key, value in values.items()}


def _defaults() -> dict[str, Any]:
    """Every key that has a default, as a recipe's JSON has it."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        f"{name}.{key}": to_jsonable_python(field.default)
        for name, section in sections.items()
        for key, field in section.model_fields.items()  # type: ignore[union-attr]
        if not field.is_required()
    }


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The run folder, made if need be, is this process's alone inside. Raises RunError that names the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunError(
                f"run.dir = {folder} is in use by {holder}; wait for its end or end it, or name another run.dir"
            ) from None
        except OSError as error:
            logger.warning(
                "run.dir = %s: its file system has no locks (%s); no other run may use it now", folder, error.strerror
            )
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def prepare_run_folder(recipe: Recipe, point: Checkpoint | None) -> None:
    """A run folder that holds nothing beyond the checkpoint's step; what it held is moved to cut/NNN/, nothing is lost.

    Rows whose step is above the checkpoint's (and a torn last line), samples, traces and checkpoints of later steps,
    evaluations that will be made again, the report, and the recipe that was in force. Files that no run writes stay.
    """
    folder, last = recipe.run.dir, point.step if point else 0
    stands = point is not None and last < recipe.train.steps and "heldout_accuracy" in point.scores()
    rows_to = {"metrics": last, "events": last, "evaluation": last if stands else last - 1}
    rows_to["timeline"] = last if point else -1  # with no step the start goes too
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).unlink(missing_ok=True)
    if recipe.checkpoint.resume != "never" and (folder / "recipe.yaml").exists():
        earlier = [int(path.name) for path in (folder / "cut").glob("*") if path.name.isdigit()]
        cut = folder / "cut" / f"{max(earlier, default=0) + 1:03d}"
        cut.mkdir(parents=True)
        shutil.copy2(folder / "recipe.yaml", cut)
        for made in (REPORT, "hf"):  # of the steps that are made again
            if (folder / made).exists():
                (folder / made).rename(cut / made)
        for name, kept in rows_to.items():
            if (file := folder / f"{name}.jsonl").is_file():
                _cut_rows(file, cut / file.name, kept)
        for later in [
            path for made in ("samples/*_*", "profile/*_*", "checkpoints/step_*") for path in folder.glob(made)
        ]:
            if (number := _OF_A_STEP.match(later.name)) and int(number[1]) > last:
                (cut / later.parent.name).mkdir(exist_ok=True)
                later.rename(cut / later.parent.name / later.name)
    aside = folder / ".recipe.yaml.partial"
    aside.write_text(resolved_yaml(recipe))
    aside.rename(folder / "recipe.yaml")


def _cut_rows(file: Path, side: Path, last: int) -> None:
    """Rows up to step `last` stay in `file`; the others go to `side`."""
    kept, cut = [], []
    for line in file.read_bytes().splitlines(keepends=True):
        (kept if _step_of(line) <= last else cut).append(line)
    if cut:
        side.write_bytes(b"".join(cut))
        aside = file.with_name(f".{file.name}.partial")
        aside.write_bytes(b"".join(kept))
        aside.rename(file)


def _step_of(line: bytes) -> float:
    """The row's step; infinity for a line that a kill tore apart."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
