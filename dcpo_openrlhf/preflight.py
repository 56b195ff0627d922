"""Before anything starts: every violation that recipe, model folder and machine show, all at once, with its remedy."""

import difflib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcpo_openrlhf.config import Recipe, RecipeError
from dcpo_openrlhf.objectives import METHODS

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")


def check(recipe: Recipe) -> None:
    """Raise RecipeError with one line for each violation; nothing has been started or written then."""
    violations = [
        text for part in (_method, _model, _run_folder, _data_files, _ports, _devices) for text in part(recipe)
    ]
    if violations:
        raise RecipeError("the recipe cannot run:\n" + "\n".join(f"  {text}" for text in violations))


def check_cluster(recipe: Recipe, *, gpus: float, cpus: float) -> None:
    """Raise RecipeError where the Ray cluster holds fewer devices than trainer and engines take."""
    wanted = devices(recipe)
    kind = "logical devices" if recipe.run.device == "cpu" else "GPUs"
    if gpus < wanted or cpus < wanted:
        raise RecipeError(
            f"{_devices_sum(recipe)}, the cluster has {gpus:g} {kind} and {cpus:g} CPUs; lower rollout.engines or the mesh, "
            "or add devices (ray start --num-gpus=N --num-cpus=N)"
        )


def devices(recipe: Recipe) -> int:
    """Ray GPUs of a run: trainer ranks plus engines * their tensor parallel size."""
    return recipe.parallel.world_size + recipe.rollout.engines * recipe.rollout.tensor_parallel


def _devices_sum(recipe: Recipe) -> str:
    p, r = recipe.parallel, recipe.rollout
    return (
        f"the run needs {devices(recipe)} devices: {p.nodes} nodes * {p.devices_per_node} for training "
        f"+ {r.engines} engines * tensor_parallel {r.tensor_parallel}"
    )


def _method(recipe: Recipe) -> Iterator[str]:
    name = recipe.method.name
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        yield f"method.name = {name!r} is not a row of objectives.METHODS; {hint}choose one of {', '.join(METHODS)}"
    elif METHODS[name].samples != "policy" or METHODS[name].expected_regulariser:
        yield f"method.name = {name!r} is in the table and tested as maths, but the trainer cannot feed it yet; choose another"


def _model(recipe: Recipe) -> Iterator[str]:
    folder = recipe.model.path
    if not (folder / "config.json").is_file():
        yield (
            f"model.path = {folder} is not a Hugging Face model folder (no config.json); download one, or make the demo's model "
            "with: python -m tools.smollm2"
        )
        return
    try:
        hf: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        yield f"{folder / 'config.json'} cannot be read: {error}"
        return
    if hf.get("model_type") not in ARCHITECTURES:
        yield f"model_type = {hf.get('model_type')!r} in {folder} is not supported; use one of {', '.join(ARCHITECTURES)}"
        return
    yield from _divisibility(recipe, hf)
    longest = hf.get("max_position_embeddings", 0)
    if recipe.rollout.context > longest:
        r = recipe.rollout
        yield (
            f"rollout.max_prompt_tokens + max_new_tokens = {r.max_prompt_tokens} + {r.max_new_tokens} = {r.context} exceeds the model's "
            f"max_position_embeddings = {longest}; lower one of them"
        )


def _divisibility(recipe: Recipe, hf: dict[str, Any]) -> Iterator[str]:
    heads = hf["num_attention_heads"]
    counted = {
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads", heads),
        "intermediate_size": hf["intermediate_size"],
    }
    for key, tensor in (
        ("parallel.tensor", recipe.parallel.tensor),
        ("rollout.tensor_parallel", recipe.rollout.tensor_parallel),
    ):
        for name, count in counted.items():
            if count % tensor:
                fitting = [n for n in range(1, heads + 1) if all(c % n == 0 for c in counted.values())]
                yield f"{key} = {tensor} must divide {name} = {count}; this model allows {', '.join(map(str, fitting))}"
    layers = hf["num_hidden_layers"]
    if layers % recipe.parallel.pipeline:
        yield f"parallel.pipeline = {recipe.parallel.pipeline} must divide num_hidden_layers = {layers}"


def _run_folder(recipe: Recipe) -> Iterator[str]:
    folder = recipe.run.dir
    if (folder / "metrics.jsonl").exists():
        yield f"run.dir = {folder} already holds a run (metrics.jsonl); name another folder, nothing in it was touched"
        return
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        yield f"run.dir = {folder}: {nearest} is not a folder that this user can read and write; name another run.dir or change its permissions"


def _data_files(recipe: Recipe) -> Iterator[str]:
    if recipe.task.kind != "jsonl":
        return
    for key, path in (("task.train", recipe.task.train), ("task.heldout", recipe.task.heldout)):
        if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
            yield f"{key} = {path}: no such readable file; it is JSONL with id, problem, answer, source"


def _ports(recipe: Recipe) -> Iterator[str]:
    port = recipe.weight_sync.port
    if port is None:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            yield (
                f"weight_sync.port = {port} cannot be bound on this host ({error.strerror}); "
                "name another port, or null for a free one"
            )


def _devices(recipe: Recipe) -> Iterator[str]:
    joins = recipe.run.ray_address or os.environ.get("RAY_ADDRESS")
    if recipe.run.device == "cpu" and not joins and devices(recipe) > recipe.run.logical_devices:
        yield f"{_devices_sum(recipe)}, run.logical_devices = {recipe.run.logical_devices}; raise it, or lower rollout.engines or the mesh"
