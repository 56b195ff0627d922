"""From responses to advantages: one forward of pi_old, the controller's T and alpha, target ratio, mixed advantage."""

from dataclasses import dataclass
from typing import Any

import ray
import torch
from jaxtyping import Float
from torch import Tensor

from dcpo_openrlhf import objectives
from dcpo_openrlhf.controller import ControllerDecision, EntropyController
from dcpo_openrlhf.openrlhf_seam import install_flash_attn_stub

install_flash_attn_stub()

from openrlhf.trainer.ppo_utils.experience import Experience, tensor_field  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

from dcpo_openrlhf.megatron.batch import Rows  # noqa: E402


@dataclass
class DCPOExperience(Experience):
    """The rows of one update and what pi_old says of their tokens; inherited fields keep their meaning."""

    entropy: Float[Tensor, "batch time-1"] = tensor_field("step", default=None)  # noqa: RUF009
    """H_t [nats/token], exact, of pi_old at T = 1."""
    tempered_log_probs: Float[Tensor, "batch time-1 temperatures"] = tensor_field("step", default=None)  # noqa: RUF009
    """log pi_old^T of the sampled tokens for each T of `DCPOExperienceMaker.temperatures`."""
    target_ratio: Float[Tensor, "batch time-1"] = tensor_field("step", default=None)  # noqa: RUF009
    """rho_{i,t} at the temperature that the controller chose; 1 outside the action mask."""
    advantage_terms: tuple[Float[Tensor, "batch time-1"], ...] = ()
    """Advantages whose clipped surrogates are summed."""

    @property
    def mask(self) -> Tensor:
        assert self.action_mask is not None
        return self.action_mask.bool()

    def rows(self) -> Rows:
        return Rows(self.sequences, self.attention_mask.bool(), self.mask, self.action_log_probs, self.advantage_terms)


class DCPOExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's experience maker, with token statistics for its forward passes and DCPO's advantage for its own."""

    actor_model_group: Any  # a MegatronActorGroup

    def __init__(self, *args: Any, controller: EntropyController, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = self.strategy.recipe
        self.controller = controller
        self.method = objectives.METHODS[self.recipe.method.name]
        self.decision: ControllerDecision | None = None

        self.temperatures = [self.recipe.method.temperature_low, self.recipe.method.temperature_high]
        """Every T that the switching rule may choose: both come out of the one forward, before the entropy is known."""

    def split_rollout_samples(self, rollout_samples: list[Experience]) -> list[DCPOExperience]:
        """One padded experience for each update, groups whole and in prompt order."""
        size = self.recipe.train.prompts_per_update * self.recipe.train.group_size
        _require_whole_groups(rollout_samples, size)
        for i, sample in enumerate(rollout_samples):
            sample.index = [i]
        chunks = (rollout_samples[i : i + size] for i in range(0, len(rollout_samples), size))
        merged = (Experience.concat_experiences(chunk, self.tokenizer.pad_token_id) for chunk in chunks)
        return [DCPOExperience(**vars(m)) for m in merged]

    @torch.no_grad()
    def make_experience(self, samples_list: list[DCPOExperience]) -> list[DCPOExperience]:
        """log pi_old, log pi_old^T for every T, and exact entropy, from one forward of the policy over each row."""
        for experience, stats in zip(samples_list, self._statistics(samples_list, self.temperatures), strict=True):
            experience.action_log_probs = stats["logp"]
            experience.entropy = stats["entropy"]
            experience.tempered_log_probs = stats["tempered_logp"]
        return samples_list

    def _statistics(self, experiences: list[DCPOExperience], temperatures: list[float]) -> list[dict[str, Tensor]]:
        refs = self.actor_model_group.async_run_method_batch(
            "token_statistics",
            rows=[e.rows() for e in experiences],
            temperatures=[temperatures] * len(experiences),
        )
        return self.actor_model_group.gather(refs)

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[DCPOExperience]) -> list[DCPOExperience]:
        """T and alpha from this batch's entropy and success rate, then each update's advantages."""
        exact, sampled = batch_entropies(experiences)
        success_rate = float(torch.cat([e.rewards for e in experiences]).mean())
        self.decision = self.controller.step(exact, sampled, success_rate)
        m = self.recipe.method
        alpha = self.decision.alpha if self.method.uses_alpha else 0.0
        for e, tempered_logp in zip(experiences, self._tempered(experiences, self.decision.temperature), strict=True):
            e.target_ratio = objectives.target_ratio(
                old_logp=e.action_log_probs, tempered_logp=tempered_logp, mask=e.mask
            )
            e.advantage_terms = objectives.method_advantage(
                self.method,
                group_advantage=objectives.group_advantage(reward=e.rewards, group_size=self.recipe.train.group_size),
                success=e.rewards,
                target_ratio=e.target_ratio,
                entropy=e.entropy,
                alpha=alpha,
                mixing=m.mixing,
                entropy_adv_beta=m.entropy_adv_beta,
                entropy_adv_kappa=m.entropy_adv_kappa,
            )
            e.advantages = e.advantage_terms[0]
        return experiences

    def _tempered(self, experiences: list[DCPOExperience], temperature: float) -> list[Float[Tensor, "batch time-1"]]:
        """log pi_old^T at the chosen T; a T that was not foreseen (the continuous rule) costs a second forward."""
        if temperature in self.temperatures:
            return [e.tempered_log_probs[..., self.temperatures.index(temperature)] for e in experiences]
        return [stats["tempered_logp"][..., 0] for stats in self._statistics(experiences, [temperature])]


def batch_entropies(experiences: list[DCPOExperience]) -> tuple[float, float]:
    """(H, sampled entropy) [nats/token]: masked means over every token of the batch."""
    tokens = sum(int(e.mask.sum()) for e in experiences)
    exact = sum(float(e.entropy[e.mask].double().sum()) for e in experiences)
    sampled = -sum(float(e.action_log_probs[e.mask].double().sum()) for e in experiences)
    return exact / max(tokens, 1), sampled / max(tokens, 1)


def _require_whole_groups(samples: list[Experience], size: int) -> None:
    if not samples or len(samples) % size:
        raise ValueError(
            f"a step needs whole updates of {size} responses (prompts_per_update * group_size), "
            f"got {len(samples)} responses; some were lost between engine and trainer"
        )


def put(experiences: list[DCPOExperience], group: Any) -> None:
    """Hand every update's rows to the policy actors."""
    ray.get(group.async_run_method_batch("append", experience=[e.rows() for e in experiences]))
