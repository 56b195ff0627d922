"""Token statistics and updates: packed micro-batches through megatron-core's schedules and optimizer."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from dcpo_openrlhf.policy import micro_batch
from dcpo_openrlhf.policy.megatron.attention import SharedPromptParams, sequence_params
from dcpo_openrlhf.policy.megatron.mesh import Mesh, tensor_group
from dcpo_openrlhf.policy.megatron.model import Policy
from dcpo_openrlhf.policy.packing import Layout, Packed, micro_batches
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.recipe.schema import KL, Loss, Optimizer

NO_KL = KL()


class PolicyStep:
    """The model with megatron-core's DDP, distributed optimizer and learning-rate schedule, and two passes over it."""

    def __init__(
        self,
        policy: Policy,
        *,
        optimizer: Optimizer,
        loss: Loss,
        kl: KL = NO_KL,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        share_prompts: bool = True,
        total_updates: int,
    ) -> None:
        self.policy, self.mesh, self.loss = policy, policy.mesh, loss
        self.kl = kl
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.layout = Layout(
            context_rank=self.mesh.context_rank,
            context_size=self.mesh.context_size,
            sequence_split=self.mesh.tensor_size if policy.config.sequence_parallel else 1,
            equal=not policy.config.variable_seq_lengths,
            share_prompts=share_prompts and self.mesh.context_size == 1,
        )
        self.stop_asked: Callable[[], bool] = lambda: False
        """Is a forward pass to be left between micro-batches? Set by the actor."""
        self._selected: Tensor | None = None
        self._positions: Tensor | None = None
        for chunk in policy.chunks:
            chunk.rotary_pos_emb.register_forward_hook(self._angles_of_positions)
        if (last := policy.chunks[-1]).post_process:
            # the hook gathers the sequence itself, so that prompts need no logits under sequence parallelism either
            last.output_layer.sequence_parallel = False
            last.output_layer.register_forward_pre_hook(self._keep_action_positions)
        self.models: list[Any] = _distributed(policy)
        self.optimizer = get_megatron_optimizer(_optimizer_config(optimizer, bf16=policy.config.bf16), self.models)
        for group in self.optimizer.param_groups:
            group["fused"] = True  # torch's Adam, where no other is installed: one pass over memory for eight
        self.schedule = _schedule(self.optimizer, optimizer, total_updates)
        policy.config.finalize_model_grads_func = finalize_model_grads
        policy.config.grad_scale_func = self.optimizer.scale_loss

    def token_statistics(self, rows: Rows, *, temperatures: list[float]) -> dict[str, Tensor]:
        """{"logp", "entropy"} [batch, time-1] and "tempered_logp" [batch, time-1, temperatures] of the rows.

        fp32, 0 outside the mask, from one forward of the policy, on every rank of the last pipeline stage; the stages
        before it get zeros.
        """
        out = micro_batch.blank_statistics(rows, temperatures)

        def collect(packed: Packed, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            micro_batch.collect_statistics(
                out,
                packed,
                logits,
                temperatures=temperatures,
                tp_group=tensor_group(),
                vocab_size=self.policy.shape.vocab_size,
            )
            return _no_loss(logits.device)

        self._forward_only(rows, collect)
        return {name: self._over_context(values) for name, values in out.items()}

    def _over_context(self, values: Tensor) -> Tensor:
        """The sum over context ranks, of which each has set its own tokens."""
        if self.mesh.context_size == 1:
            return values
        total = values.to(self.mesh.device)
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
        return total.cpu()

    def greedy(self, prompts: list[list[int]], *, max_new_tokens: int, eos: int) -> list[list[int]]:
        """The most likely continuation of each prompt, end token included; one forward a token, for checks alone."""
        return micro_batch.greedy(prompts, next_tokens=self._next_tokens, max_new_tokens=max_new_tokens, eos=eos)

    def _next_tokens(self, rows: Rows) -> Tensor:
        """The most likely token after each row's one action."""
        chosen = torch.zeros(len(rows), dtype=torch.long)
        self._forward_only(rows, partial(self._most_likely, chosen, rows.action_mask.shape[1]))
        chosen = self._over_context(chosen).to(self.mesh.device)
        dist.all_reduce(chosen, group=parallel_state.get_pipeline_model_parallel_group())  # the last stage's
        return chosen

    def _most_likely(
        self, chosen: Tensor, time: int, packed: Packed, logits: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        group = tensor_group()
        shards = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, logits.contiguous(), group=group)
        best = torch.cat(shards, -1)[:, : self.policy.shape.vocab_size].argmax(-1)
        chosen[packed.actions // time] = best.cpu()  # one action a row
        return _no_loss(logits.device)

    def _forward_only(self, rows: Rows, collect: Any) -> None:
        """Every micro-batch in rounds, between which the pass can be stopped; raises micro_batch.Stopped then."""
        packs = self._packs(rows)
        size = micro_batch.ROUND * self.policy.config.pipeline_model_parallel_size
        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(packs), size):
                    micro_batch.require_going_on(self.stop_asked(), self.mesh.device)
                    self._run(packs[start : start + size], collect, forward_only=True)
        finally:
            for model in self.models:
                model.train()

    def update(self, rows: Rows, *, entropy_coefficient: float = 0.0) -> dict[str, float]:
        """One optimizer step on the mini-batch that `rows` are this rank's share of; metrics of the whole mini-batch.

        The gradient is that of (sum of losses over all ranks) / (rows or tokens of all ranks): the same for every mesh
        and every split into micro-batches. Raises FloatingPointError when loss or gradient norm is not finite.
        """
        assert rows.old_logp is not None and rows.advantages
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(self._packs(rows), partial(self._loss, rows, entropy_coefficient), forward_only=False)
        metrics = micro_batch.metrics(
            _over_mesh(micro_batch.total(sums), self.mesh), reference=rows.reference_logp is not None
        )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        micro_batch.require_finite("loss", metrics["policy/loss"], "the weights are as before")
        result: Any = self.optimizer.step()
        grad_norm = float(result[1])
        micro_batch.require_finite(
            "gradient norm", grad_norm, "this update is in the weights: go back to the last checkpoint"
        )
        self.schedule.step(increment=1)
        return metrics | {"policy/grad_norm": grad_norm, "policy/learning_rate": float(learning_rate)}

    def _loss(
        self, rows: Rows, entropy_coefficient: float, packed: Packed, logits: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss sum, count it is divided by, sums to log) of one micro-batch."""
        loss_sum, count, sums = micro_batch.policy_loss(
            rows,
            packed,
            logits,
            loss=self.loss,
            kl=self.kl,
            entropy_coefficient=entropy_coefficient,
            tp_group=tensor_group(),
            vocab_size=self.policy.shape.vocab_size,
        )
        if self.mesh.context_rank:  # context ranks share the tokens of the same rows: these count once
            count, sums["count"] = torch.zeros_like(count), torch.zeros_like(sums["count"])
        return loss_sum, count, sums

    def _packs(self, rows: Rows) -> list[Packed]:
        return micro_batches(
            rows,
            size=self.micro_batch_size,
            token_cap=self.micro_batch_tokens,
            layout=self.layout,
            agree=self._agree_on_count,
        )

    def _run(self, packs: list[Packed], loss: Any, *, forward_only: bool) -> list[dict[str, Tensor]]:
        """The micro-batches through megatron-core's schedule; what `loss` returned third, on the last stage."""
        iterators = [iter(packs) for _ in self.models]
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward, loss),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=len(packs),
            seq_length=max(int(p.bounds[-1]) for p in packs),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _agree_on_count(self, count: int) -> int:
        """Micro-batches for every data rank: experts exchange tokens with each, interleaving takes whole rounds."""
        most = torch.tensor(count, device=self.mesh.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        unit = self.policy.config.pipeline_model_parallel_size if len(self.models) > 1 else 1
        return -(-int(most) // unit) * unit

    def _forward(self, loss: Any, packs: Iterator[Packed], model: torch.nn.Module) -> tuple[Tensor, Any]:
        packed = next(packs)
        device = self.mesh.device
        self._selected = packed.selected.to(device)
        params = sequence_params(packed, device)
        self._positions = params.positions if isinstance(params, SharedPromptParams) else None
        options = {"fp32_output": False} if self.policy.config.bf16 else {}
        output = model(packed.tokens.to(device), None, None, packed_seq_params=params, **options)
        return output, lambda logits: loss(packed, logits.squeeze(0))

    def _keep_action_positions(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Only positions where an action is taken reach the output layer: prompts need no logits."""
        assert self._selected is not None
        hidden = inputs[0]
        if self.policy.config.sequence_parallel:
            # the output layer sums the gradient over the tensor ranks; each takes its part of the sequence back
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        # the last token of a shared prompt is taken several times; backward of an index adds up in a fixed order
        return (hidden[self._selected], *inputs[1:])

    def _angles_of_positions(self, _: torch.nn.Module, __: Any, angles: Any) -> Any:
        """Rotary angles token by token where responses share their prompt."""
        if self._positions is None:
            return angles
        if isinstance(angles, tuple):  # yarn's come with a factor
            return (angles[0][self._positions], *angles[1:])
        return angles[self._positions]


def _no_loss(device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a pass without a loss returns: loss sum, count, sums to log."""
    return torch.zeros((), device=device), torch.zeros((), dtype=torch.int, device=device), {}


def _distributed(policy: Policy) -> list[DistributedDataParallel]:
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=True
    )
    models = []
    for index, chunk in enumerate(policy.chunks):
        module = Float16Module(policy.config, chunk) if policy.config.bf16 else chunk
        models.append(DistributedDataParallel(policy.config, options, module, disable_bucketing=index > 0))
        models[-1].broadcast_params()
    return models


def _optimizer_config(o: Optimizer, *, bf16: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=o.learning_rate,
        min_lr=o.min_learning_rate,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.grad_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        optimizer_cpu_offload=o.cpu_offload > 0,
        optimizer_offload_fraction=o.cpu_offload,
        use_precision_aware_optimizer=o.cpu_offload > 0,  # megatron-core offloads no other
    )


def _schedule(optimizer: Any, o: Optimizer, total_updates: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        # a warm-up from 0 would make the first update change nothing
        init_lr=o.learning_rate / (o.warmup_updates + 1),
        max_lr=o.learning_rate,
        min_lr=o.min_learning_rate,
        lr_warmup_steps=o.warmup_updates,
        lr_decay_steps=max(total_updates, o.warmup_updates + 1),
        lr_decay_style=o.schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=total_updates,
        wd_incr_style="constant",
    )


def _over_mesh(sums: Tensor, mesh: Mesh) -> Tensor:
    """The sums over data ranks, on every rank."""
    total = sums.to(mesh.device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # earlier pipeline stages hold zeros, the last one the sums
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total
