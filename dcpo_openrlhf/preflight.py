"""Before anything starts: every violation that recipe, model folder and machine show, all at once, with its remedy."""

import difflib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dcpo_openrlhf.config import Recipe, RecipeError
from dcpo_openrlhf.objectives import METHODS

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # qwen3_moe is in names.TABLE and not trained yet
_SIZES = ("num_attention_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
_IMPLEMENTED = {
    # keys of config.json whose other values would train another model than the engine serves
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def check(recipe: Recipe) -> None:
    """Raise RecipeError with one line for each violation; nothing has been started or written then."""
    parts = (_method, _model, _mesh, _run_folder, _data_files, _ports, _cluster, _devices)
    violations = [text for part in parts for text in part(recipe)]
    if violations:
        raise RecipeError("the recipe cannot run:\n" + "\n".join(f"  {text}" for text in violations))


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
        yield (
            f"method.name = {name!r} is in the table and tested as maths, but the trainer cannot feed it yet; "
            "choose another"
        )


def _model(recipe: Recipe) -> Iterator[str]:
    folder = recipe.model.path
    config = folder / "config.json"
    if not os.path.isfile(config):  # Path.is_file would raise where the folder may not be entered
        yield (
            f"model.path = {folder} is not a Hugging Face model folder (no readable config.json); "
            "download one, or make the demo's model with: python -m tools.smollm2"
        )
        return
    try:
        hf: Any = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        yield f"{config} cannot be read as JSON: {error}; download the model again"
        return
    if not isinstance(hf, dict) or hf.get("model_type") not in ARCHITECTURES:
        seen = hf.get("model_type") if isinstance(hf, dict) else hf
        yield f"model_type = {seen!r} in {config} is not supported; use one of {', '.join(ARCHITECTURES)}"
        return
    missing = [name for name in _SIZES if not isinstance(hf.get(name), int)]
    if missing:
        yield f"{config} has no {', '.join(missing)}; complete it from the model's source"
        return
    for part in (_weights(folder), _features(hf, config), _divisibility(recipe, hf), _context(recipe, hf)):
        yield from part


def _weights(folder: Path) -> Iterator[str]:
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any(os.path.isfile(folder / name) for name in names):
        yield f"model.path = {folder} has no weights ({' or '.join(names)}); save the model as safetensors there"


def _features(hf: dict[str, Any], config: Path) -> Iterator[str]:
    for name, value in _IMPLEMENTED.items():
        if hf.get(name, value) != value:
            yield f"{name} = {hf[name]!r} in {config} is not implemented, only {value!r}; use another model"
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        yield f"rope_type = {kind!r} in {config} is not implemented, only 'default'; use another model"


def _divisibility(recipe: Recipe, hf: dict[str, Any]) -> Iterator[str]:
    heads = hf["num_attention_heads"]
    counts = {
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "intermediate_size": hf["intermediate_size"],
    }
    allowed = ", ".join(str(n) for n in range(1, heads + 1) if all(count % n == 0 for count in counts.values()))
    for key, tensor in (
        ("parallel.tensor", recipe.parallel.tensor),
        ("rollout.tensor_parallel", recipe.rollout.tensor_parallel),
    ):
        for name, count in counts.items():
            # vLLM gives each rank a copy where there are more ranks than key/value heads
            copied = key.startswith("rollout") and name == "num_key_value_heads" and tensor % count == 0
            if count % tensor and not copied:
                yield f"{key} = {tensor} must divide {name} = {count}; this model allows {allowed}"
    layers, stages = hf["num_hidden_layers"], recipe.parallel.pipeline
    if layers % stages:
        yield f"parallel.pipeline = {stages} must divide num_hidden_layers = {layers}; lower it"


def _mesh(recipe: Recipe) -> Iterator[str]:
    for name in ("pipeline", "context", "expert"):
        size = getattr(recipe.parallel, name)
        if size > 1:
            yield f"parallel.{name} = {size} is not supported yet: weight sync and export cut over tensor alone; set 1"
    if recipe.parallel.sequence_parallel:
        yield "parallel.sequence_parallel = true is not supported yet: packed lengths are not padded for it; set false"


def _context(recipe: Recipe, hf: dict[str, Any]) -> Iterator[str]:
    r, longest = recipe.rollout, hf["max_position_embeddings"]
    if r.context > longest:
        yield (
            f"rollout.max_prompt_tokens + max_new_tokens = {r.max_prompt_tokens} + {r.max_new_tokens} = {r.context} "
            f"exceeds the model's max_position_embeddings = {longest}; lower one of them"
        )


def _run_folder(recipe: Recipe) -> Iterator[str]:
    folder = recipe.run.dir
    nearest = folder
    # os.path.exists says no where Path.exists raises: inside a folder that this user may not enter
    while not os.path.exists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        yield (
            f"run.dir = {folder}: {nearest} is not a folder that this user can read and write; "
            "name another run.dir or change its permissions"
        )
    elif os.path.exists(folder / "metrics.jsonl"):
        yield f"run.dir = {folder} already holds a run (metrics.jsonl), which stays as it is; name another run.dir"


def _data_files(recipe: Recipe) -> Iterator[str]:
    if recipe.task.kind != "jsonl":
        return
    for key, path in (("task.train", recipe.task.train), ("task.heldout", recipe.task.heldout)):
        if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            yield f"{key} = {path}: no such readable file; name a JSONL file with the keys id, problem, answer, source"


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
