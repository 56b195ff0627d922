"""The rows of one update, with what pi_old says of their tokens, as one padded OpenRLHF Experience."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from dcpo_openrlhf import objectives
from dcpo_openrlhf.openrlhf_seam import make_importable

make_importable()

from openrlhf.trainer.ppo_utils.experience import Experience, tensor_field  # noqa: E402

from dcpo_openrlhf.policy.rows import Rows, join  # noqa: E402

CHUNK_ROWS = 64
"""Rows looked at together: 64 x 8,192 fp32 values stay in the processor's cache over all passes."""


@dataclass
class DCPOExperience(Experience):
    """The rows of one update and what pi_old says of their tokens; inherited fields keep their meaning."""

    entropy: Float[Tensor, "batch time-1"] = tensor_field("step", default=None)  # noqa: RUF009
    """H_t [nats/token], exact, of pi_old at T = 1."""
    tempered_log_probs: Float[Tensor, "batch time-1 temperatures"] = tensor_field("step", default=None)  # noqa: RUF009
    """log pi_old^T of the sampled tokens for each T of `DCPOExperienceMaker.temperatures`."""
    target_ratio: Float[Tensor, "batch time-1"] = tensor_field("step", default=None)  # noqa: RUF009
    """rho_{i,t} at the temperature that the controller chose; 1 outside the action mask."""
    correction: Float[Tensor, "batch time-1"] = tensor_field("step", default=None)  # noqa: RUF009
    """pi_old / mu of the sampled tokens, masked or clipped; None where the recipe corrects nothing."""
    outside: Bool[Tensor, "batch time-1"] = tensor_field("step", default=None)  # noqa: RUF009
    """The tokens that were masked or clipped."""
    advantage_terms: tuple[Float[Tensor, "batch time-1"], ...] = ()
    """Advantages whose clipped surrogates are summed."""

    entropy_coefficient: float = 0.0
    """lambda of avg H_t in the objective, with gradient (entropy_reg)."""
    expected_weight: Float[Tensor, " batch"] | None = None
    """Weight of sum_a pi_old^T(a) log pi_theta(a) on each row's tokens; None for every method but dcpo_expected."""
    expected_temperature: float | None = None
    """T of that sum."""
    penalty_weight: Float[Tensor, "batch time-1"] | None = None
    """Weight of |log pi_theta - log pi_old| of each token; None for every method but kl_cov."""
    tempered: "DCPOExperience | None" = None
    """Rows of this update that were drawn from pi_old^T: trained on, and no part of the step's metrics."""
    replaced: Bool[Tensor, " batch"] | None = None
    """Rows whose place those take; None: they stand beside all rows."""
    aside: bool = False
    """Groups that train.filter leaves: part of the step's metrics, and not trained on."""
    filler: Bool[Tensor, " batch"] | None = None
    """Rows of groups that train.filter dropped and a short step is filled up with: their group advantage is 0."""
    separate_averages: objectives.Aggregation | None = None
    """Aggregation of a method that averages the two populations apart; None: one average over all rows."""

    @property
    def mask(self) -> Tensor:
        assert self.action_mask is not None
        return self.action_mask.bool()

    @property
    def success(self) -> Float[Tensor, " batch"]:
        """R in {0, 1} of each row, OpenRLHF's `scores`; the reward for rows that name none, where that is 0 or 1."""
        success = self.rewards if self.scores is None else self.scores
        if not bool(((success == 0) | (success == 1)).all()):
            raise ValueError(f"success must be 0 or 1, got {success.tolist()[:8]}; grade these rows with a success")
        return success

    def rows(self) -> Rows:
        """What the policy is trained on in this update."""
        own = Rows(
            self.sequences,
            self.attention_mask.bool(),
            self.mask,
            self.action_log_probs,
            self.advantage_terms,
            entropy_coefficient=self.entropy_coefficient,
            expected_weight=self.expected_weight,
            expected_temperature=self.expected_temperature,
            correction=self.correction,
            reference_logp=self.base_action_log_probs,
            penalty_weight=self.penalty_weight,
        )
        if self.tempered is None:
            return own
        if self.replaced is not None:
            own = own.take((~self.replaced).nonzero().flatten())
        rows = join(own, self.tempered.rows())
        if self.separate_averages is None:
            return rows
        scale = objectives.population_scale(
            mask=rows.action_mask,
            tempered_rows=torch.arange(len(rows)) >= len(own),
            aggregation=self.separate_averages,
        )
        return replace(rows, scale=scale)


def padded(samples: Sequence[Experience], pad_token_id: int) -> DCPOExperience:
    """The rows of all samples, padded on the right: what OpenRLHF's concat_experiences gives, each token copied once.

    Tokens are int32 and masks bool, whatever the samples hold.
    """
    merged = {}
    for field in fields(Experience):
        values: list[Any] = [getattr(sample, field.name) for sample in samples]
        if values[0] is not None and Experience.is_step_tensor_field(field.name):
            kind = {"sequences": torch.int32, "attention_mask": torch.bool, "action_mask": torch.bool}
            fill = pad_token_id if field.name == "sequences" else 0
            merged[field.name] = _padded(values, fill=fill, dtype=kind.get(field.name) or values[0].dtype)
        else:
            merged[field.name] = _merged(values)
    return DCPOExperience(**merged)


def _padded(values: list[Tensor], *, fill: int, dtype: torch.dtype) -> Shaped[Tensor, "batch time"]:
    rows, time = sum(map(len, values)), max(v.shape[1] for v in values)
    out, row = torch.full((rows, time), fill, dtype=dtype), 0
    for v in values:
        out[row : row + len(v), : v.shape[1]] = v
        row += len(v)
    return out


def _merged(values: list[Any]) -> Any:
    """Tensors and lists end to end, dicts by their keys; None stays None."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, dict):
        return {key: _merged([v[key] for v in values]) for key in first}
    return first if first is None else list(chain.from_iterable(values))


def batch_entropies(experiences: list[DCPOExperience]) -> tuple[float, float]:
    """(H, sampled entropy) [nats/token]: masked means over every token of the batch."""
    tokens = sum(int(np.count_nonzero(e.mask.numpy())) for e in experiences)
    exact = sum(_sum_inside(e.entropy, e.mask) for e in experiences)
    sampled = -sum(_sum_inside(e.action_log_probs, e.mask) for e in experiences)
    return exact / max(tokens, 1), sampled / max(tokens, 1)


def _sum_inside(values: Tensor, mask: Tensor) -> float:
    """The sum over the mask in float64; numpy selects runs of tokens twenty times as fast as torch."""
    return float(torch.from_numpy(values.numpy()[mask.numpy()].astype(np.float64)).sum())


def put(experiences: list[DCPOExperience], group: Any) -> None:
    """Hand every update's rows to the policy actors."""
    ray.get(group.async_run_method_batch("append", experience=[e.rows() for e in experiences if not e.aside]))
