"""The packages that a run stands on: which a recipe needs, what is found of them, what they were tested with."""

import importlib.metadata
from collections.abc import Iterator

import torch

from dcpo_openrlhf.recipe.schema import Recipe

TESTED = {
    "torch": "2.13.0",
    "deepspeed": "0.19.6",
    "megatron-core": "0.19.2",
    "openrlhf": "0.11.2",
    "ray": "2.55.0",
    "transformer-engine": "2.20.2",
    "transformers": "5.15.0",
    "vllm": "0.29.0",
}
"""Versions that pyproject.toml pins, or OpenRLHF (deepspeed); what a recipe has no use for may be missing."""
TE = "transformer-engine"
PACKED_FROM = (9, 0)
"""Compute capability from which cuDNN attends to packed rows (Transformer Engine's fused_attn.cpp)."""


def report(recipe: Recipe) -> str:
    """Versions found of the packages that a run stands on, beside those it was tested with where they differ."""
    found = {name: version(name) for name in _needed(recipe)}
    return "packages: " + ", ".join(
        f"{name} {seen or 'missing'}" + ("" if _same(seen, TESTED[name]) else f" (tested with {TESTED[name]})")
        for name, seen in found.items()
    )


def violations(recipe: Recipe) -> Iterator[str]:
    missing = [name for name in _needed(recipe) if version(name) is None]
    if TE in missing:
        missing.remove(TE)
        wants = f"model.layers = {recipe.model.layers}"
        if recipe.model.layers == "local":
            wants = f"optimizer.cpu_offload = {recipe.optimizer.cpu_offload:g}"
        yield (
            f"{wants} takes Transformer Engine on cuda, which is not installed here ({TE} {TESTED[TE]}); install it "
            "(make setup-gpu), or set model.layers=local and optimizer.cpu_offload=0, which the plan then counts"
        )
    if missing:
        yield f"not installed: {', '.join(missing)}; install a lock file of docker/"
    found = capability()
    takes = TE in _needed(recipe) and recipe.model.layers != "local"
    if takes and found is not None and found < PACKED_FROM and version("flash-attn") is None:
        yield (
            "Transformer Engine has kernels of its own for packed rows from compute "
            f"capability {'.'.join(map(str, PACKED_FROM))} on, this GPU has {'.'.join(map(str, found))}: it takes "
            "flash-attn there, which is not installed, or whole score matrices, which the plan does not count; install "
            "flash-attn (make setup-gpu), or set model.layers=local"
        )


def capability() -> tuple[int, int] | None:
    """Compute capability of this machine's first GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _needed(recipe: Recipe) -> list[str]:
    """Those of TESTED that the recipe has a use for."""
    megatron = recipe.parallel.backend == "megatron"
    layers = recipe.run.device == "cuda" and (recipe.model.layers != "local" or recipe.optimizer.cpu_offload > 0)
    used = {"megatron-core": megatron, TE: megatron and layers and not recipe.train.rollout_only}
    return [name for name in TESTED if used.get(name, True)]


def version(name: str) -> str | None:
    for candidate in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _same(found: str | None, tested: str) -> bool:
    return found is not None and found.partition("+")[0] == tested
