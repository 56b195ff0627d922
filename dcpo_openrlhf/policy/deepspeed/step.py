"""Token statistics and updates: packed micro-batches through a DeepSpeed engine. The numbers are those of megatron/."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dcpo_openrlhf import objectives
from dcpo_openrlhf.policy import micro_batch
from dcpo_openrlhf.policy.deepspeed.model import ZeroPolicy
from dcpo_openrlhf.policy.packing import Packed, micro_batches
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.recipe.schema import KL, Loss, Optimizer

NO_KL = KL()


class ZeroStep:
    """The engine with the learning-rate schedule, and two passes over it."""

    def __init__(
        self,
        policy: ZeroPolicy,
        *,
        optimizer: Optimizer,
        loss: Loss,
        kl: KL = NO_KL,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        share_prompts: bool = False,
        total_updates: int,
    ) -> None:
        """share_prompts: not implemented, for its attention sees rows alone; Recipe.shares_prompts is False."""
        assert not share_prompts
        self.policy, self.engine, self.mesh, self.loss = policy, policy.engine, policy.mesh, loss
        self.kl = kl
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.optimizer, self.total_updates = optimizer, total_updates
        self.updates = 0
        """Optimizer steps done; the learning rate follows from it."""
        self.stop_asked: Callable[[], bool] = lambda: False
        """Is a forward pass to be left between micro-batches? Set by the actor."""

    def token_statistics(self, rows: Rows, *, temperatures: list[float]) -> dict[str, Tensor]:
        """{"logp", "entropy"} [batch, time-1] and "tempered_logp" [batch, time-1, temperatures] of the rows.

        fp32, 0 outside the mask, from one forward of the policy.
        """
        out = micro_batch.blank_statistics(rows, temperatures)
        self._forward_only(rows, partial(micro_batch.collect_statistics, out, temperatures=temperatures))
        return out

    def greedy(self, prompts: list[list[int]], *, max_new_tokens: int, eos: int) -> list[list[int]]:
        """The most likely continuation of each prompt, end token included; one forward a token, for checks alone."""
        return micro_batch.greedy(prompts, next_tokens=self._next_tokens, max_new_tokens=max_new_tokens, eos=eos)

    def _next_tokens(self, rows: Rows) -> Tensor:
        """The most likely token after each row's one action."""
        chosen = torch.zeros(len(rows), dtype=torch.long)

        def most_likely(packed: Packed, logits: Tensor) -> None:
            chosen[packed.actions // rows.action_mask.shape[1]] = logits.argmax(-1).cpu()

        self._forward_only(rows, most_likely)
        return chosen

    def _forward_only(self, rows: Rows, use: Callable[[Packed, Tensor], None]) -> None:
        """Every micro-batch; raises micro_batch.Stopped where the pass is stopped between rounds of them."""
        self.engine.eval()
        try:
            with torch.no_grad():
                for i, packed in enumerate(self._micro_batches(rows)):
                    if i % micro_batch.ROUND == 0:
                        micro_batch.require_going_on(self.stop_asked(), self.mesh.device)
                    use(packed, self._logits(packed))
        finally:
            self.engine.train()

    def update(self, rows: Rows, *, entropy_coefficient: float = 0.0) -> dict[str, float]:
        """One optimizer step on the mini-batch that `rows` are this rank's share of; metrics of the whole mini-batch.

        The gradient is that of (sum of losses over all ranks) / (rows or tokens of all ranks), as megatron/step.py has
        it. Raises FloatingPointError when loss or gradient norm is not finite.
        """
        packs = self._micro_batches(rows)
        loss_of = partial(
            micro_batch.policy_loss, rows, loss=self.loss, kl=self.kl, entropy_coefficient=entropy_coefficient
        )
        factor = self.mesh.world_size / self._global_count(rows)  # DeepSpeed takes the mean over ranks
        sums = []
        for packed in packs:
            loss_sum, _, micro_sums = loss_of(packed, self._logits(packed))
            self.engine.backward(loss_sum * factor)
            sums.append(micro_sums)
        over_ranks = micro_batch.total(sums).to(self.mesh.device)
        dist.all_reduce(over_ranks)
        metrics = micro_batch.metrics(over_ranks, reference=rows.reference_logp is not None)
        micro_batch.require_finite("loss", metrics["policy/loss"], "the weights are as before")
        rate = learning_rate(self.optimizer, self.updates, self.total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        micro_batch.require_finite(
            "gradient norm", grad_norm, "this update is in the weights: go back to the last checkpoint"
        )
        self.updates += 1
        return metrics | {"policy/grad_norm": grad_norm, "policy/learning_rate": rate}

    def _global_count(self, rows: Rows) -> int:
        """Rows or tokens of all ranks: what the loss sums are divided by, at least 1."""
        count = objectives.loss_denominator(mask=rows.action_mask.bool(), aggregation=self.loss.aggregation)
        count = count.to(self.mesh.device)
        dist.all_reduce(count)
        return max(int(count), 1)

    def _micro_batches(self, rows: Rows) -> list[Packed]:
        return micro_batches(
            rows, size=self.micro_batch_size, token_cap=self.micro_batch_tokens, agree=self._agree_on_count
        )

    def _agree_on_count(self, count: int) -> int:
        """Micro-batches of every rank: each forward and backward is a collective of all."""
        most = torch.tensor(count, device=self.mesh.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _logits(self, packed: Packed) -> Tensor:
        """Logits [actions, vocabulary] of the micro-batch's actions; each row sees itself alone."""
        device = self.mesh.device
        lengths = packed.bounds.diff()
        starts = torch.repeat_interleave(packed.bounds[:-1], lengths)
        positions = torch.arange(packed.tokens.shape[1]) - starts  # they begin anew where another row begins
        output = self.engine(
            input_ids=packed.tokens.to(device),
            position_ids=positions[None].to(device),
            logits_to_keep=packed.selected.to(device),
            use_cache=False,
        )
        return output.logits[0]


def learning_rate(o: Optimizer, done: int, total_updates: int) -> float:
    """Of the update after `done` others: megatron-core's OptimizerParamScheduler with the settings of megatron/."""
    if done <= o.warmup_updates:
        return o.learning_rate * (1 + done) / (1 + o.warmup_updates)
    if o.schedule == "constant":
        return o.learning_rate
    share = (done - o.warmup_updates) / (max(total_updates, o.warmup_updates + 1) - o.warmup_updates)
    left = 1 - share if o.schedule == "linear" else 0.5 * (math.cos(math.pi * share) + 1)
    return o.min_learning_rate + (o.learning_rate - o.min_learning_rate) * (left if share <= 1 else 0)
