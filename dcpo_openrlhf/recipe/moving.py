"""Memory that moving weights takes: a device's in a weight sync, a node's host memory for what is kept, saved, loaded.

Estimates from config.json and the recipe, as recipe/memory.py's, whose counts of parameters these are.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dcpo_openrlhf.recipe.families import Sizes
from dcpo_openrlhf.recipe.memory import BYTES, GIB, RESERVE, TrainerMemory, engine_memory, stage_memory
from dcpo_openrlhf.recipe.schema import Recipe

SYNC_BUFFER = 2**28
"""Bytes of a message on cuda (weight_sync/device.py), of all senders together; over nccl vLLM has two under way."""


class SyncMemory(NamedTuple):
    """Bytes on a sender's device during a weight sync; the fields add up to its peak."""

    policy: float
    """Weights, gradient buffers and optimizer."""
    engine: float
    """Weights of a colocated engine, and what its process holds beside tensors."""
    buffers: float
    """Full tensors, gathered, and the chunks that they are packed into."""
    reserve: float

    @property
    def total(self) -> float:
        return sum(self)


def sync_memory(s: Sizes, recipe: Recipe) -> SyncMemory:
    """Of rank 0, which packs and sends over nccl, over ipc each rank to the engine on its device; with several senders
    of the one that needs the most.
    """
    if recipe.senders > 1:
        stages = range(recipe.parallel.pipeline)
        return max(
            (_sync_memory(s, recipe, stage, _sent_buffers(s, recipe)) for stage in stages), key=lambda m: m.total
        )
    return _sync_memory(s, recipe, 0, _packed_buffers(s, recipe))


def _sync_memory(s: Sizes, recipe: Recipe, stage: int, buffers: float) -> SyncMemory:
    need, reserve = stage_memory(s, recipe, stage), RESERVE[recipe.run.device]
    engine = engine_memory(s, recipe).weights + reserve if recipe.parallel.colocate else 0
    return SyncMemory(need.weights + need.gradients + need.optimizer, engine, buffers, reserve)


def _packed_buffers(s: Sizes, recipe: Recipe) -> float:
    """Of a rank that sends everything, as vLLM packs it."""
    element = BYTES[recipe.model.dtype]
    largest = _largest_tensor(s) * element
    # shards of the largest tensor, or gate and up of the experts of all ranks
    gathered = max(largest, 2 * s.hidden * s.ffn * element * recipe.parallel.expert * bool(s.experts))
    # the tensors of a chunk, which may end with the largest one beyond its size, their copy side by side, and over nccl
    # the chunk before, which is under way
    return 2 * (SYNC_BUFFER + largest) + SYNC_BUFFER * (recipe.transport == "nccl") + gathered


def _sent_buffers(s: Sizes, recipe: Recipe) -> float:
    """Of one of several senders: two of its buckets or the largest tensor, packed; its shards, and these joined."""
    largest = _largest_tensor(s) * BYTES[recipe.model.dtype]
    return max(2 * SYNC_BUFFER / recipe.senders, largest) + 2 * largest


def _way(recipe: Recipe) -> str:
    return recipe.transport + (f" from {recipe.senders} ranks at once" if recipe.senders > 1 else "")


def _largest_tensor(s: Sizes) -> int:
    """Elements of the largest tensor of the Hugging Face folder."""
    return s.hidden * max(s.vocab, s.query, s.ffn, s.dense_ffn if s.dense_layers else 0)


class HostMemory(NamedTuple):
    """Bytes of host memory on the node that takes the most."""

    kept: float
    """All the time: the policy's pinned copy beside colocated engines, their weights while they sleep, offloaded
    optimizer, the model a KL starts from."""
    saving: float
    """More, while a checkpoint is gathered and written: weights and optimizer of the replicas' first data ranks."""
    loading: float
    """More, while one is loaded: every rank fills optimizer state of all its parameters, then keeps its share."""


def host_memory(s: Sizes, recipe: Recipe) -> HostMemory:
    p, element = recipe.parallel, BYTES[recipe.model.dtype]
    zero = p.backend == "deepspeed"
    state = 12 if zero or recipe.model.dtype == "bf16" else 8
    each = p.devices_per_node
    held = _fullest(s, recipe)
    count = s.parameters / p.world_size if zero else held.gradients / 4  # of a rank; DeepSpeed saves and loads shares
    kept = 0.0
    if p.colocate:
        kept += each * (held.weights + held.optimizer + engine_memory(s, recipe).weights)
    if recipe.optimizer.cpu_offload:
        kept += recipe.optimizer.cpu_offload * each * _optimizer_bytes(s, recipe)
    if recipe.kl.coefficient:
        kept += each * element * (s.parameters if zero else count)
    # the first data ranks, dense layers' or experts', begin their pipeline stage, which is so many ranks in a row
    stages_here = -(-each * p.pipeline // p.world_size)
    first = each if zero else min(each, max(p.tensor, p.expert * p.expert_tensor) * stages_here)
    return HostMemory(kept, first * count * (state + element), each * count * state)


def _fullest(s: Sizes, recipe: Recipe) -> TrainerMemory:
    """Of the pipeline stage with the most parameters."""
    return max((stage_memory(s, recipe, stage) for stage in range(recipe.parallel.pipeline)), key=lambda m: m.gradients)


def _optimizer_bytes(s: Sizes, recipe: Recipe) -> float:
    """Of one rank, wherever it lies."""
    on_device = recipe.optimizer.model_copy(update={"cpu_offload": 0.0})
    return _fullest(s, recipe.model_copy(update={"optimizer": on_device})).optimizer


def violations(s: Sizes, recipe: Recipe) -> Iterator[str]:
    """Where a sync does not fit into parallel.device_memory_gb."""
    if recipe.run.device == "cpu" or recipe.train.rollout_only or not recipe.generates:
        return
    need, limit = sync_memory(s, recipe), recipe.parallel.device_memory_gb
    if need.total > limit * GIB:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in zip(need._fields, need, strict=True))
        yield (
            f"a weight sync over {_way(recipe)} needs about {need.total / GIB:.1f} GiB of a training device "
            f"({parts}), parallel.device_memory_gb = {limit:g}; raise parallel.tensor, pipeline or "
            "rollout.tensor_parallel, or the devices"
        )


def report(s: Sizes, recipe: Recipe) -> list[str]:
    """The plan's lines."""
    lines = []
    if recipe.run.device == "cuda" and not recipe.train.rollout_only and recipe.generates:
        need = sync_memory(s, recipe)
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in zip(need._fields, need, strict=True))
        lines.append(
            f"GiB of a training device during a weight sync over {_way(recipe)} (estimate): {parts}, total "
            f"{need.total / GIB:.2f} of {recipe.parallel.device_memory_gb:g} GiB"
        )
    if not recipe.train.rollout_only:
        host = host_memory(s, recipe)
        lines.append(
            f"GiB of a node's host memory (estimate, beside processes and page cache): kept {host.kept / GIB:.1f}, "
            f"while saving {host.saving / GIB:.1f} more, while loading {host.loading / GIB:.1f} more"
        )
    return lines
