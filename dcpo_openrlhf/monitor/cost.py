"""What a step costs: tokens per second of a device, model FLOPs against the device's peak, idle shares. cost/*."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dcpo_openrlhf.experience import DCPOExperience
from dcpo_openrlhf.recipe.families import Sizes


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts are those of the model (Korthikanti et al. 2022): recomputation is not among them."""

    sizes: Sizes | None
    """None: of a model that is not known here; no MFU."""
    peak_flops: float | None
    """FLOP/s of one training device in the model's format; None: unknown, no MFU."""
    training_devices: int
    engine_devices: int
    group_size: int
    share_prompts: bool
    """Each prompt of a group is computed once, and counted once."""

    def metrics(self, experiences: Sequence[DCPOExperience], seconds: Mapping[str, float]) -> dict[str, float]:
        """cost/* of one step; `seconds` holds its time/*."""
        responses = torch.cat([e.response_length for e in experiences]).double()
        totals = torch.cat([e.attention_mask.sum(1) for e in experiences]).double()
        rows = torch.cat([torch.full((len(e.attention_mask),), not e.aside) for e in experiences])
        trained = seconds["time/token_stats"] + seconds["time/train"]
        generated = seconds["time/rollout"] + seconds.get("time/generation", 0.0)
        found = {
            "cost/generation_tokens_per_second": float(responses.sum()) / max(generated, 1e-9) / self.engine_devices,
            "cost/training_tokens_per_second": float(totals[rows].sum()) / max(trained, 1e-9) / self.training_devices,
            "cost/engine_idle": max(1 - generated / max(seconds["time/step"], 1e-9), 0.0),
            "cost/trainer_idle": 1 - trained / max(seconds["time/step"], 1e-9),
        }
        if self.sizes is not None and self.peak_flops:
            # token statistics of all rows, and thrice as many for updates on those that are trained on
            flops = self.forward_flops(totals, responses) + 3 * self.forward_flops(totals[rows], responses[rows])
            found["cost/mfu"] = flops / max(trained, 1e-9) / (self.training_devices * self.peak_flops)
        return found

    def forward_flops(self, totals: torch.Tensor, responses: torch.Tensor) -> float:
        """FLOPs of one forward pass of rows of these lengths [tokens], consecutive rows of a group sharing a prompt."""
        assert self.sizes is not None
        prompts = totals - responses
        tokens, pairs = totals.sum(), totals.square().sum()
        if self.share_prompts:
            repeated = prompts.sum() - prompts[:: self.group_size].sum()
            tokens, pairs = (
                tokens - repeated,
                pairs - (prompts.square().sum() - prompts[:: self.group_size].square().sum()),
            )
        # a causal query sees half of the keys: 2 multiplies of 2 FLOPs for half of the pairs
        return float(2 * self.sizes.active_parameters * tokens + 2 * self.sizes.layers * self.sizes.query * pairs)
