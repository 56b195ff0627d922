"""Before anything starts: every violation that recipe, model folder and machine show, all at once, with its remedy."""

import difflib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dcpo_openrlhf.methods import METHODS, rewards_solved_groups
from dcpo_openrlhf.recipe import families, memory, model_config, moving, packages, processor, resume, weights
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError

IMPORT_LIMIT_S = 300.0
"""For one reward function; torch alone takes seconds, much longer where all cores are busy."""
LOCAL_FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs")


def check(recipe: Recipe, *, dry_run: bool = False) -> list[str]:
    """Raise RecipeError with one line for each violation; nothing has been started or written then.

    dry_run: what this machine lacks (GPUs, weights, data, room) is no error and is returned instead, so that a recipe
    can be planned anywhere.
    """
    found = violations(recipe, dry_run=dry_run)
    wrong = found.pop("method") + found.pop("model") + found.pop("reward")
    lacking = [text for texts in found.values() for text in texts]
    if dry_run and _config_file(recipe, dry_run=True) == recipe.model.config:
        lacking.insert(0, f"model.path = {recipe.model.path} holds no model yet; download it there")
    if wrong or (lacking and not dry_run):
        raise RecipeError("the recipe cannot run:\n" + "\n".join(f"  {text}" for text in wrong + lacking))
    return lacking


def violations(recipe: Recipe, *, dry_run: bool = False) -> dict[str, list[str]]:
    """Each check's name -> what it found, with the remedy; method, model and reward are errors of a dry run too."""
    machine = {
        "weights": _weights,
        "paths": _paths,
        "run folder": _run_folder,
        "resume": _resume,
        "replay": _replay,
        "data files": _data_files,
        "disk": _disk,
        "ports": _ports,
        "cluster": _cluster,
        "devices": _devices,
        "packages": packages.violations,
    }
    found = {"method": list(_method(recipe)), "model": list(_model(recipe, dry_run)), "reward": list(_reward(recipe))}
    return found | {name: list(part(recipe)) for name, part in machine.items()}


def plan(recipe: Recipe, lacking: list[str]) -> str:
    """Devices, memory, packages and what this machine lacks, as YAML comments: --dry-run prints it after the recipe."""
    hf = json.loads(_config_file(recipe, dry_run=True).read_text())
    sizes = memory.Sizes.of(hf)
    lines = [memory.report(sizes, recipe), *moving.report(sizes, recipe), packages.report(recipe)]
    lines += [f"note: {text}" for text in hints(recipe)]
    lines += [f"a run on this machine would be refused: {text}" for text in lacking]
    return "\n".join(f"# {line}" for line in "\n".join(lines).splitlines())


def hints(recipe: Recipe) -> list[str]:
    """What is no violation and yet worth a look."""
    said = []
    if recipe.run.device == "cpu" and recipe.model.dtype == "bf16" and not processor.multiplies_bf16():
        said.append(
            f"model.dtype = bf16 on a processor without bf16 units: bf16 multiplies {processor.bf16_slowdown():.2g} x "
            "slower than fp32 here; leave model.dtype at auto, which takes fp32, or run where AVX512-BF16 or AMX is"
        )
    said += _slow_rollouts(recipe)
    if recipe.rollout.top_p < 1 and recipe.correction.level == "off" and not recipe.train.rollout_only:
        said.append(
            f"rollout.top_p = {recipe.rollout.top_p:g}: tokens outside it are never drawn, those inside too often: "
            "the policy ratio, rho and the sampled entropy are biased; set 1, or correction.level=token"
        )
    said += _ahead(recipe)
    if recipe.parallel.nodes > 1:
        folders = [recipe.run.dir, recipe.model.path, *(file.path for file in recipe.task.files("train"))]
        local = [f"{folder} ({kind})" for folder in folders if (kind := _file_system(folder)) in LOCAL_FILE_SYSTEMS]
        if local:
            said.append(
                f"parallel.nodes = {recipe.parallel.nodes}, and every node must see the same files: "
                f"{', '.join(local)} looks like this machine's own disk; use a shared file system"
            )
    return said


def _ahead(recipe: Recipe) -> Iterator[str]:
    """What responses drawn while the step before trains ask for."""
    ahead, off = recipe.rollout.ahead, recipe.correction.level == "off"
    if ahead and off:
        yield (
            f"rollout.ahead = {ahead}: responses are drawn by weights up to {ahead} version older than pi_old, and "
            "without a correction the policy ratio, rho and the group advantage take them for pi_old's own; set "
            "correction.level=token correction.mode=clip, which weighs each token by pi_old / mu"
        )
    if ahead and recipe.run.device == "cpu" and None in (recipe.rollout.cpu_threads, recipe.parallel.cpu_threads):
        yield (
            f"rollout.ahead = {ahead} on cpu: engines and policy compute at the same time, and each takes all cores "
            "unless told otherwise; share them out with rollout.cpu_threads and parallel.cpu_threads"
        )


def _slow_rollouts(recipe: Recipe) -> Iterator[str]:
    """Where responses of full length would take longer than rollout.timeout: every retry of that step ends alike."""
    r, e, t = recipe.rollout, recipe.estimate, recipe.train
    responses, devices_ = t.prompts_per_step * t.group_size, r.engines * r.tensor_parallel
    rate = devices_ * e.engine_tokens_per_second
    longest, usual = (responses * min(n, r.max_new_tokens) / rate for n in (r.max_new_tokens, e.response_tokens))
    if recipe.generates and recipe.run.device == "cuda" and longest > r.timeout:
        yield (
            f"rollout.timeout = {r.timeout:g} s ends the run where {responses} responses take longer: about "
            f"{longest:.0f} s if all of them reach rollout.max_new_tokens = {r.max_new_tokens}, {usual:.0f} s at "
            f"estimate.response_tokens = {e.response_tokens} (ESTIMATE: {devices_} engine devices, "
            f"estimate.engine_tokens_per_second = {e.engine_tokens_per_second:g}); raise it, for a step that is too "
            "slow once is so at every retry"
        )


def check_cluster(recipe: Recipe, *, gpus: float, cpus: float) -> None:
    """Raise RecipeError where the Ray cluster holds fewer devices than trainer and engines take."""
    wanted = devices(recipe)
    kind = "logical devices" if recipe.run.device == "cpu" else "GPUs"
    if gpus < wanted or cpus < wanted:
        raise RecipeError(
            f"{_devices_sum(recipe)}, the cluster has {gpus:g} {kind} and {cpus:g} CPUs; "
            "lower rollout.engines or the mesh, or add devices (ray start --num-gpus=N --num-cpus=N)"
        )


def devices(recipe: Recipe) -> int:
    """Ray GPUs of a run: trainer ranks plus engines * their tensor parallel size; a replay needs no engines."""
    train = 0 if recipe.train.rollout_only else recipe.parallel.world_size
    if recipe.parallel.colocate:
        return train
    return train + (recipe.rollout.engines * recipe.rollout.tensor_parallel if recipe.generates else 0)


def _devices_sum(recipe: Recipe) -> str:
    p, r = recipe.parallel, recipe.rollout
    return (
        f"the run needs {devices(recipe)} devices: {p.nodes} nodes * {p.devices_per_node} for training "
        f"+ {r.engines} engines * tensor_parallel {r.tensor_parallel}"
        + (", without the engines" if not recipe.generates else "")
        + (", without training" if recipe.train.rollout_only else "")
    )


def _method(recipe: Recipe) -> Iterator[str]:
    name = recipe.method.name
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        yield f"method.name = {name!r} is not a row of methods.METHODS; {hint}choose one of {', '.join(METHODS)}"
    elif recipe.train.filter == "uniform" and rewards_solved_groups(METHODS[name]):
        yield (
            f"train.filter = uniform drops groups of right responses alone, and method.name = {name} trains on their "
            f"R: {METHODS[name].equation}; set train.filter=all_wrong, whose groups have none"
        )


def _reward(recipe: Recipe) -> Iterator[str]:
    for name in recipe.reward.functions:
        yield from (f"reward.function or reward.by_source: {reason}" for reason in why_not_imported(name))


def why_not_imported(function: str) -> list[str]:
    """What is wrong with a reward function, tried in a process like the graders'; nothing where it loads."""
    command = [sys.executable, "-m", "dcpo_openrlhf.reward.functions", function]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_LIMIT_S)
        return json.loads(tried.stdout)
    except subprocess.TimeoutExpired:
        return [f"{function} was not imported within {IMPORT_LIMIT_S:.0f} s"]
    except ValueError:
        return [f"{function} cannot be imported: its process ended with code {tried.returncode}"]


def _config_file(recipe: Recipe, *, dry_run: bool) -> Path:
    """The model's config.json; for a dry run the one of model.config where the model is not there yet."""
    file = recipe.model.path / "config.json"
    if dry_run and recipe.model.config is not None and not os.path.isfile(file):
        return recipe.model.config
    return file


def _model(recipe: Recipe, dry_run: bool) -> Iterator[str]:
    folder, config = recipe.model.path, _config_file(recipe, dry_run=dry_run)
    if not os.path.isfile(config):  # Path.is_file would raise where the folder may not be entered
        yield (
            f"model.path = {folder} is not a Hugging Face model folder (no readable config.json); "
            "download one, or make the demo's model with: python -m tools.smollm2"
            + ("; or plan with model.config=FILE, its config.json" if dry_run else "")
        )
        return
    try:
        hf: Any = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        yield f"{config} cannot be read as JSON: {error}; download the model again"
        return
    if not isinstance(hf, dict) or hf.get("model_type") not in families.FAMILIES:
        seen = hf.get("model_type") if isinstance(hf, dict) else hf
        yield f"model_type = {seen!r} in {config} {families.why_not(seen)}"
        return
    family = families.family_of(hf)
    if family.experts:
        hf[family.experts] = families.expert_count(hf) or None
    missing = [name for name in (*model_config.SIZES, *families.counts(family)) if not isinstance(hf.get(name), int)]
    if missing:
        yield f"{config} has no {', '.join(missing)}; complete it from the model's source"
        return
    divided = list(model_config.divisibility(recipe, hf))
    yield from (*model_config.features(hf, config), *divided, *model_config.context(recipe, hf))
    if not divided:  # a mesh that does not fit the model has no memory to speak of
        yield from memory.violations(memory.Sizes.of(hf), recipe)
        yield from moving.violations(memory.Sizes.of(hf), recipe)


def _weights(recipe: Recipe) -> Iterator[str]:
    folder = recipe.model.path
    try:
        hf = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return  # said by _model, or by check for a dry run
    yield from weights.violations(folder, hf)


def _disk(recipe: Recipe) -> Iterator[str]:
    try:
        sizes = memory.Sizes.of(json.loads((recipe.model.path / "config.json").read_text()))
        free = shutil.disk_usage(_nearest(recipe.run.dir)).free
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # said elsewhere, or not known here
    need = memory.disk_bytes(sizes, recipe)
    if need > free:
        yield (
            f"run.dir = {recipe.run.dir} has {free / memory.GIB:.1f} GiB of disk left, checkpoints and export take up "
            f"to {need / memory.GIB:.1f}; make room, or lower checkpoint.keep_last"
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    # os.path.exists says no where Path.exists raises: inside a folder that this user may not enter
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path` ("" where the kernel does not say)."""
    place, best = str(_nearest(path.absolute()).resolve()), ("", "")
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, mount, kind, *_ = line.split()
        if (place + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best[0]):
            best = mount, kind
    return best[1]


def _paths(recipe: Recipe) -> Iterator[str]:
    if "working_dir_files" not in Path.cwd().parts:  # where Ray unpacks a job's --working-dir, on each node anew
        return
    paths = {key: path for key, path in recipe.paths.items() if key != "model.config"}
    relative = [f"{key} = {path}" for key, path in paths.items() if not path.is_absolute()]
    if relative:
        yield (
            f"{', '.join(relative)} must be absolute: a job's working directory is a copy that ends with it, "
            "on every node another; add what `python -m tools.paths --recipe FILE` prints where the job is submitted"
        )


def _run_folder(recipe: Recipe) -> Iterator[str]:
    folder = recipe.run.dir
    nearest = _nearest(folder)
    if not nearest.is_dir() or not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        yield (
            f"run.dir = {folder}: {nearest} is not a folder that this user can read and write; "
            "name another run.dir or change its permissions"
        )
    elif os.path.exists(folder / "metrics.jsonl") and not _continues(recipe):
        yield (
            f"run.dir = {folder} already holds a run (metrics.jsonl), which stays as it is; name another run.dir, "
            "or continue it with checkpoint.resume=auto"
        )


def _continues(recipe: Recipe) -> bool:
    """Does checkpoint.resume mean the run that run.dir holds?"""
    named = recipe.checkpoint.resume
    own = (recipe.run.dir / "checkpoints").absolute()
    if not isinstance(named, Path):
        return named == "auto"
    return named.absolute().parent == own or named == resume.branched_from(recipe)


def _resume(recipe: Recipe) -> Iterator[str]:
    try:
        resume.resume_point(recipe, quick=True)
    except RecipeError as error:
        yield str(error)


def _replay(recipe: Recipe) -> Iterator[str]:
    folder = recipe.rollout.replay
    if folder is None:
        return
    samples = folder / "samples" if os.path.isdir(folder / "samples") else folder
    steps = range(1, recipe.train.steps + 1)
    recorded = [step for step in steps if os.path.isfile(samples / f"step_{step:06d}.pt")]
    if samples.absolute() == (recipe.run.dir / "samples").absolute():
        yield f"rollout.replay = {folder} is the run.dir itself; name another run.dir"
    if len(recorded) < recipe.train.steps:
        yield (
            f"rollout.replay = {folder} holds the responses of {len(recorded)} of {recipe.train.steps} steps "
            "(step_NNNNNN.pt); record them with rollout.record=true, or lower train.steps"
        )
    others = []
    if METHODS.get(recipe.method.name, METHODS["grpo"]).samples == "policy+tempered":
        others += [f"tempered_{step:06d}.pt" for step in steps]
    e = recipe.evaluation
    if e.problems and (recipe.task.kind == "arithmetic" or recipe.task.heldout):
        times = {0, recipe.train.steps} | ({step for step in steps if step % e.every == 0} if e.every else set())
        others += [f"evaluation_{step:06d}.pt" for step in sorted(times)]
    if missing := [name for name in others if not os.path.isfile(samples / name)]:
        yield (
            f"rollout.replay = {folder} lacks {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}, which "
            "evaluation and rows drawn at T will ask for; record them with the same evaluation.* and method.name, or "
            "set evaluation.problems=0"
        )


def _data_files(recipe: Recipe) -> Iterator[str]:
    if recipe.task.kind != "jsonl":
        return
    for key, path in recipe.paths.items():
        if key.startswith("task.") and not (os.path.exists(path) and os.access(path, os.R_OK)):
            yield f"{key} = {path}: no such readable file or folder; name one of problems (docs/bring_your_own.md)"


def _ports(recipe: Recipe) -> Iterator[str]:
    port = recipe.weight_sync.port
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # an ended run's port is free, whatever TIME_WAIT says
        try:
            probe.bind(("", port))
        except OSError as error:
            yield (
                f"weight_sync.port = {port} cannot be bound on this host ({error.strerror}); "
                "name another port, or null for a free one"
            )


def _cluster(recipe: Recipe) -> Iterator[str]:
    address = recipe.run.ray_address or os.environ.get("RAY_ADDRESS") or ""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # a local cluster, or "auto"
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:  # ray.init would try for minutes
        yield (
            f"no Ray cluster answers at {address}, which run.ray_address or RAY_ADDRESS names ({error}); "
            "start it (ray start --head), or unset both to have a local one"
        )


def _devices(recipe: Recipe) -> Iterator[str]:
    if recipe.run.ray_address or os.environ.get("RAY_ADDRESS"):
        return  # check_cluster counts that cluster's devices
    gpus = torch.cuda.device_count()
    if recipe.run.device == "cpu" and devices(recipe) > recipe.run.logical_devices:
        yield (
            f"{_devices_sum(recipe)}, run.logical_devices = {recipe.run.logical_devices}; "
            "raise it, or lower rollout.engines or the mesh"
        )
    if recipe.run.device == "cuda" and devices(recipe) > gpus:
        yield (
            f"{_devices_sum(recipe)}, this machine has {gpus} GPUs; lower rollout.engines or the mesh, "
            "join a cluster (RAY_ADDRESS or run.ray_address), or set run.device=cpu"
        )
