"""What the Megatron tests share: a policy on this rank, and rows of random tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from dcpo_openrlhf.policy.megatron import cpu
from dcpo_openrlhf.policy.megatron.mesh import init_mesh
from dcpo_openrlhf.policy.megatron.model import Policy, build_policy
from dcpo_openrlhf.policy.megatron.step import PolicyStep
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.recipe.schema import KL, Loss, Model, Optimizer, Parallel, Train
from tests.distributed import renew_process_group
from tests.tiny import make_tiny_model


def make_models(folder: Path, kinds: Sequence[tuple[str, bool]]) -> dict[tuple[str, bool], Path]:
    """A tiny model of each (architecture, are embeddings tied), deep enough for every mesh."""
    return {
        (a, tie): make_tiny_model(folder / f"{a}-{tie}", architecture=a, layers=4, hidden=64, kv_heads=4, tie=tie)
        for a, tie in kinds
    }


def make_policy(
    path: Path,
    *,
    rank: int,
    world_size: int,
    dtype: str = "fp32",
    recompute: Any = "none",
    device: str = "cpu",
    layers: Any = "auto",
    **mesh_sizes: Any,
) -> Policy:
    """The policy of the HF folder on a mesh of tensor/pipeline/... sizes by keyword; replaces an earlier mesh."""
    if device == "cpu":
        cpu.install()
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
        renew_process_group()
    parallel = Parallel(nodes=1, devices_per_node=world_size, **mesh_sizes)
    mesh = init_mesh(parallel, device=device, rank=rank, world_size=world_size, seed=1)
    model = Model(path=path, dtype=dtype, layers=layers)  # type: ignore[arg-type]
    return build_policy(model=model, parallel=parallel, train=Train(recompute=recompute), mesh=mesh)


def make_step(
    policy: Policy,
    *,
    micro_batch_size: int = 2,
    micro_batch_tokens: int | None = None,
    share_prompts: bool = True,
    learning_rate: float = 1e-3,
    cpu_offload: float = 0.0,
    **loss: Any,
) -> PolicyStep:
    return PolicyStep(
        policy,
        # Adam's first step is nearly the sign of the gradient: a larger eps keeps rounding of tiny gradients small
        optimizer=Optimizer(learning_rate=learning_rate, eps=1e-3, cpu_offload=cpu_offload),
        loss=Loss(**loss),
        kl=KL(coefficient=0.3),
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        share_prompts=share_prompts,
        total_updates=10,
    )


def random_rows(*, batch: int = 8, longest: int = 24, vocab_size: int = 256, seed: int = 0) -> Rows:
    """Ragged prompts and responses with an old policy near the present one and advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, 8, (batch,), generator=g)
    lengths = prompts + torch.randint(1, longest - 8, (batch,), generator=g)
    lengths[0] = longest
    time = torch.arange(longest)
    attention = time[None] < lengths[:, None]
    actions = attention[:, 1:] & (time[None, 1:] >= prompts[:, None])
    sequences = torch.randint(0, vocab_size, (batch, longest), generator=g) * attention
    advantage = torch.randn(batch, 1, generator=g).expand(batch, longest - 1) * actions
    old_logp = torch.full(actions.shape, -5.0) + 0.3 * torch.randn(actions.shape, generator=g)
    starting = old_logp + 0.3 * torch.randn(actions.shape, generator=g)
    correction = (
        torch.rand(actions.shape, generator=g).mul(2).masked_fill(torch.rand(actions.shape, generator=g) < 0.1, 0)
    )
    return Rows(sequences, attention, actions, old_logp, (advantage,), correction=correction, reference_logp=starting)


def grouped_rows(
    *, prompts: int = 3, group_size: int = 4, longest: int = 24, vocab_size: int = 256, seed: int = 0
) -> Rows:
    """`group_size` responses to each prompt, prompts of one token and responses of one among them, and a lone row."""
    g = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(2, 12, (prompts - 1,), generator=g).tolist()]
    of_row = [length for length in lengths for _ in range(group_size)] + [5]
    batch, time = len(of_row), torch.arange(longest)
    starts = torch.tensor(of_row)
    responses = torch.randint(1, 12, (batch,), generator=g)
    responses[group_size] = 1
    ends = starts + responses
    attention = time[None] < ends[:, None]
    actions = attention[:, 1:] & (time[None, 1:] >= starts[:, None])
    sequences = torch.randint(0, vocab_size, (batch, longest), generator=g)
    for first in range(0, batch - 1, group_size):
        prompt = of_row[first]
        sequences[first : first + group_size, :prompt] = sequences[first, :prompt]
    sequences = sequences * attention
    advantage = torch.randn(batch, 1, generator=g).expand(batch, longest - 1) * actions
    old_logp = torch.full(actions.shape, -5.0) + 0.3 * torch.randn(actions.shape, generator=g)
    starting = old_logp + 0.3 * torch.randn(actions.shape, generator=g)
    correction = (
        torch.rand(actions.shape, generator=g).mul(2).masked_fill(torch.rand(actions.shape, generator=g) < 0.1, 0)
    )
    return Rows(sequences, attention, actions, old_logp, (advantage,), correction=correction, reference_logp=starting)
