"""The policy as a DeepSpeed engine: a Hugging Face model, OpenRLHF's DeepspeedStrategy, ZeRO stage 2 or 3."""

import datetime
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from dcpo_openrlhf.openrlhf_seam import make_importable, openrlhf_args
from dcpo_openrlhf.recipe.schema import Recipe

make_importable()

import deepspeed  # noqa: E402
from openrlhf.utils.deepspeed import DeepspeedStrategy  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ZeroMesh:
    """Where this rank stands: every rank is a data rank of its own."""

    rank: int
    world_size: int
    device: torch.device
    is_data_leader: bool = True
    pipeline_rank: int = 0

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def data_size(self) -> int:
        return self.world_size

    @property
    def is_stage_leader(self) -> bool:
        """One rank of each pipeline stage, of which there is one."""
        return self.rank == 0


class ZeroStrategy(DeepspeedStrategy):
    """OpenRLHF's strategy where nothing is compiled at run time and the caller says when an update is whole."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(
            seed=recipe.run.seed,
            max_norm=recipe.optimizer.grad_clip,
            zero_stage=recipe.parallel.zero_stage,
            args=openrlhf_args(recipe),
        )
        self.grad_accum_dtype = "fp32"
        on_gpu = recipe.run.device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    def setup_distributed(self, timeout: datetime.timedelta = datetime.timedelta(minutes=30)) -> None:
        """Process group of all ranks, from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        OpenRLHF's own makes a mesh of "cuda" for ring attention and tensor parallelism, which this backend has not.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # DeepSpeed's collectives in shared memory (cpu) would be compiled at the first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, timeout=timeout)
        self.world_size = dist.get_world_size()

    def get_ds_train_config(
        self, optim_dict: dict[str, Any] | None = None, *, max_norm: float | None = None
    ) -> dict[str, Any]:
        """OpenRLHF's configuration with torch's fused AdamW, sums in fp32 and gradients gathered until `step`."""
        if optim_dict is not None:
            optim_dict["params"] |= {"torch_adam": True, "fused": True}
        config = super().get_ds_train_config(optim_dict, max_norm=max_norm)
        del config["train_batch_size"]
        config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "communication_data_type": "fp32",
            "steps_per_print": 10**9,
        }
        if self.device.type == "cpu":
            # weights that stay whole are gathered again after a step, and DeepSpeed waits for the last of these
            # collectives alone: nccl ends them in order, gloo does not
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        # as with Megatron: a gradient that is not finite ends the run, it is not skipped
        config["bf16"]["check_grad_overflow"] = False
        return config


@dataclass(frozen=True)
class ZeroPolicy:
    """This rank's DeepSpeed engine around the Hugging Face model."""

    engine: Any
    stage: int
    dtype: torch.dtype
    mesh: ZeroMesh


def build_policy(recipe: Recipe) -> ZeroPolicy:
    """The engine with the weights of `model.path`; every rank of the process group calls it."""
    strategy = ZeroStrategy(recipe)
    strategy.setup_distributed()
    mesh = ZeroMesh(dist.get_rank(), dist.get_world_size(), strategy.device)
    dtype = DTYPES[recipe.model.dtype]
    # while this lives, transformers hands each rank its share of the weights as they are read
    shard_on_load = HfDeepSpeedConfig(strategy.get_ds_train_config()) if strategy.stage == 3 else None
    module = AutoModelForCausalLM.from_pretrained(
        recipe.model.path,
        dtype=dtype,
        attn_implementation=_attention(mesh.device.type, dtype),
        attention_dropout=0.0,  # as with Megatron, whatever config.json says
        trust_remote_code=recipe.model.trust_remote_code,
    )
    del shard_on_load
    module.config.use_cache = False
    if recipe.train.recompute == "full":
        module.gradient_checkpointing_enable({"use_reentrant": False})
    o = recipe.optimizer
    adam = {"lr": o.learning_rate, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}
    # OpenRLHF makes a schedule of its own here; ZeroStep sets the learning rate of each update instead
    schedule = {"lr_scheduler": "constant", "scheduler_steps": 1}
    engine, *_ = strategy.prepare((module, {"optim": "adam", "adam": adam, "max_norm": o.grad_clip, **schedule}))
    engine.lr_scheduler = None
    engine.train()  # transformers loads for evaluation, in which nothing is recomputed
    return ZeroPolicy(engine, strategy.stage, dtype, mesh)


def _attention(device: str, dtype: torch.dtype) -> str:
    """Both keep rows that are packed one after the other apart: they see the positions begin anew."""
    try:
        importlib.metadata.version("flash-attn")  # a module of that name may be our stub
    except importlib.metadata.PackageNotFoundError:
        return "sdpa"
    return "flash_attention_2" if device == "cuda" and dtype == torch.bfloat16 else "sdpa"


@torch.no_grad()
def hf_tensors(policy: ZeroPolicy) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors of the live model, one at a time, on every rank; all ranks iterate in step."""
    for name, parameter in policy.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=policy.stage == 3):
            tensor = parameter.detach().clone() if policy.stage == 3 else parameter.detach()
        yield name, tensor


def held(policy: ZeroPolicy) -> Iterator[Tensor]:
    """What this rank keeps of every weight: its share in stage 3, and what stays whole there."""
    for parameter in policy.engine.module.parameters():
        if policy.stage == 3:
            yield parameter.ds_tensor.data
        if parameter.data.numel():
            yield parameter.data


@torch.no_grad()
def scale_weights(policy: ZeroPolicy, factor: float) -> None:
    """Multiply every weight; a collective of all ranks."""
    for parameter in policy.engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=policy.stage == 3):
            parameter.mul_(factor)


def hf_shapes(policy: ZeroPolicy) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and full shapes of `hf_tensors` in its order, without any communication."""
    for name, parameter in policy.engine.module.named_parameters():
        yield name, policy.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape))
