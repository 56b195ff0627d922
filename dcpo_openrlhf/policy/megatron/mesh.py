"""The mesh of ranks: megatron-core's process groups for tensor, pipeline, context, expert and data parallelism."""

import datetime
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.safe_globals import safe_load_from_bytes

from dcpo_openrlhf.recipe.schema import Parallel

# megatron-core puts this loader in the place of torch's, whose name pickled tensors carry: under its own name every
# process that reads a tensor of ours, the driver too, would import megatron-core
safe_load_from_bytes.__module__, safe_load_from_bytes.__qualname__ = "torch.storage", "_load_from_bytes"
safe_load_from_bytes.__name__ = "_load_from_bytes"


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. Ranks count from 0; `device` is where its tensors live."""

    rank: int
    world_size: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    tensor_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    """Place within one expert: an expert is cut like the dense layers where expert = 1, else whole on its rank."""
    expert_tensor_size: int
    device: torch.device

    @property
    def is_data_leader(self) -> bool:
        """One rank of each data-parallel replica speaks for it: first tensor and context rank of the last stage."""
        return self.tensor_rank == 0 and self.context_rank == 0 and parallel_state.is_pipeline_last_stage()

    @property
    def is_stage_leader(self) -> bool:
        """One rank of each pipeline stage."""
        return self.tensor_rank == self.context_rank == self.data_rank == 0


def init_mesh(
    parallel: Parallel, *, device: str, rank: int, world_size: int, seed: int, timeout: float = 1800.0
) -> Mesh:
    """Process groups of `parallel` over `world_size` ranks (nccl on cuda, gloo on cpu).

    MASTER_ADDR and MASTER_PORT are set by the caller. Raises ValueError where the mesh does not fill the world.
    """
    split = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % split:
        raise ValueError(
            f"world size {world_size} != tensor {parallel.tensor} * pipeline {parallel.pipeline} "
            f"* context {parallel.context} * data; lower one of them"
        )
    expert_split = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world_size % expert_split:
        raise ValueError(
            f"expert * pipeline = {parallel.expert} * {parallel.pipeline} (experts cut in {parallel.expert_tensor}) "
            f"must divide the world size {world_size}; lower one of them"
        )
    backend = "nccl" if device == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # gloo twins of the data-parallel groups: nccl runs that save checkpoints need them
        create_gloo_process_groups=True,
    )
    if device == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    else:
        # no dropout and no random initialisation here: the tracker that draws nothing, where CUDA's has no generator
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    return Mesh(
        rank=rank,
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_size=parallel.tensor,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel.expert,
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank() or 0,
        expert_tensor_size=parallel.expert_tensor,
        device=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu"),
    )


def tensor_group() -> dist.ProcessGroup:
    """This rank's tensor-parallel group."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def close_mesh() -> None:
    """Destroy the process groups, so that another mesh can be made in this process."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
