"""Which rank sends which weights where several do: in every pipeline stage one rank for each share of its experts.

A sender has the experts of its own rank, and is handed those of the other expert ranks of its share; whatever is no
expert goes to the sender of the stage that has the least to send. Nothing crosses stages.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dcpo_openrlhf.policy.megatron import names
from dcpo_openrlhf.policy.megatron.mesh import tensor_group
from dcpo_openrlhf.policy.megatron.model import Held, Policy, all_gather, exported, named_weights


class Sent(NamedTuple):
    """A parameter on its way: from the rank that holds it to the one that sends it."""

    held: Held
    entry: names.Entry
    expert_rank: int | None
    """None: every rank of the stage has it, or a part of it."""
    holder: int
    sender: int
    shapes: list[tuple[int, ...]]
    """Of the Hugging Face tensors that it makes."""


def _sent(policy: Policy, per_stage: int) -> Iterator[Sent]:
    """Every exported parameter of every stage, in one order on all ranks."""
    mesh, load = policy.mesh, Counter[int]()
    for held, entries in exported(policy):
        first = [policy.first_ranks[held.stage, expert] for expert in range(mesh.expert_size)]
        senders = first[:: mesh.expert_size // per_stage]
        size = mesh.expert_tensor_size if entries[0].expert else mesh.tensor_size
        merged = entries[0].cut.merge([torch.empty(held.shape, device="meta")] * size, policy.shape)
        shapes = [tuple(tensor.shape) for tensor in merged]
        for expert_rank, entry in enumerate(entries):
            if entry.expert:
                sender, holder = senders[expert_rank * per_stage // mesh.expert_size], first[expert_rank]
            else:
                sender = holder = min(senders, key=lambda rank: load[rank])
            load[sender] += sum(tensor.numel() for tensor in merged)
            yield Sent(held, entry, expert_rank if entry.expert else None, holder, sender, shapes)


def sent_shapes(policy: Policy, per_stage: int) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
    """Name, dtype, full shape, sender and stage of every Hugging Face tensor, without any communication."""
    for sent in _sent(policy, per_stage):
        for name, shape in zip(sent.entry.hf_names, sent.shapes, strict=True):
            yield name, sent.held.dtype, shape, sent.sender, sent.held.stage


@torch.no_grad()
def sent_tensors(policy: Policy, per_stage: int) -> Iterator[tuple[str, Tensor]]:
    """The full Hugging Face tensors that this rank sends, in the order of `sent_shapes`; all ranks iterate.

    Where nothing must be gathered they are views of the weights, which the next update changes.
    """
    mesh = policy.mesh
    own = [dict(named_weights(chunk)) for chunk in policy.chunks]
    for sent in _sent(policy, per_stage):
        if sent.held.stage != mesh.pipeline_rank:
            continue
        whole = _whole(sent, own[sent.held.chunk][sent.held.name].detach().contiguous(), policy)
        if whole is not None:
            yield from zip(sent.entry.hf_names, whole, strict=True)


def _whole(sent: Sent, local: Tensor, policy: Policy) -> list[Tensor] | None:
    """The parameter's Hugging Face tensors, on its sender; None on the others, which help."""
    mesh, entry = policy.mesh, sent.entry
    shards = [local]
    if sent.holder != sent.sender:
        handed = _handed_over(sent, local, mesh.rank)
        if handed is None:
            return None
        shards = [handed]
    elif sent.expert_rank in (None, mesh.expert_rank) and entry.cut is not names.REPLICATED:
        group: Any = parallel_state.get_expert_tensor_parallel_group() if entry.expert else tensor_group()
        if sent.sender not in dist.get_process_group_ranks(group):
            return None
        shards = all_gather(local, group)
    return entry.cut.merge(shards, policy.shape) if mesh.rank == sent.sender else None


def _handed_over(sent: Sent, local: Tensor, rank: int) -> Tensor | None:
    """An expert of another rank, whole there, on the sender; None on the others."""
    if rank not in (sent.holder, sent.sender):
        return None
    group: Any = parallel_state.get_expert_model_parallel_group()
    if rank == sent.holder:
        there = dist.P2POp(dist.isend, local, sent.sender, group)
    else:
        local = torch.empty_like(local)
        there = dist.P2POp(dist.irecv, local, sent.holder, group)
    for work in dist.batch_isend_irecv([there]):  # within the group's own communicator
        work.wait()
    return local if rank == sent.sender else None
