"""From responses to advantages: one forward of pi_old, the controller's T and alpha, target ratio, mixed advantage."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from jaxtyping import Float
from torch import Tensor

from dcpo_openrlhf import methods, objectives
from dcpo_openrlhf.controller import ControllerDecision, EntropyController
from dcpo_openrlhf.divergences import correction_weight, kl_estimate
from dcpo_openrlhf.experience import CHUNK_ROWS, DCPOExperience, batch_entropies, padded
from dcpo_openrlhf.openrlhf_seam import make_importable
from dcpo_openrlhf.phases import phase
from dcpo_openrlhf.rollout.checks import require_possible_statistics

make_importable()

from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

from dcpo_openrlhf.policy.rows import Rows  # noqa: E402
from dcpo_openrlhf.recipe.resume import STOP  # noqa: E402
from dcpo_openrlhf.rollout.tasks import Prompt  # noqa: E402

AEPO_SHARE = 4
"""aepo draws again for one prompt in this many: the first quarter of the step (authors' code)."""


class DCPOExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's experience maker, with token statistics for its forward passes and DCPO's advantage for its own."""

    actor_model_group: Any  # a PolicyActorGroup

    def __init__(self, *args: Any, controller: EntropyController, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = self.strategy.recipe
        self.controller = controller
        self.method = methods.METHODS[self.recipe.method.name]
        self.constants = methods.Constants.of(self.recipe.method)
        self.decision: ControllerDecision | None = None

        self.step = 0
        """The step in hand; the trainer sets it, with its prompts."""
        self.prompts: Sequence[Prompt] = ()
        """Of the step's updates, then of groups that are left out of them."""
        self.fillers: Sequence[int] = ()
        """Places among the former of groups that `train.filter` dropped, and that fill a short step."""
        self.resample: Callable[[float, int], list[Experience]] | None = None
        """(T, n) -> G graded responses of pi_old^T to each of the step's first n prompts; set by the trainer."""
        self.forward: list[Any] = []
        """Forward passes under way, which `stop_forward` ends."""
        self.temperatures = [self.recipe.method.temperature_low, self.recipe.method.temperature_high]
        """Every T that the switching rule may choose: both come out of the one forward, before the entropy is known."""

    @property
    def draws_again(self) -> bool:
        """Does a step ask for rows of pi_old^T too, which takes engines that have pi_old's weights?"""
        return self.method.samples == "policy+tempered"

    def split_rollout_samples(self, rollout_samples: list[Experience]) -> list[DCPOExperience]:
        """One padded experience for each update, groups whole and in prompt order; then groups that are left out."""
        t = self.recipe.train
        size, trained = t.prompts_per_update * t.group_size, t.prompts_per_step * t.group_size
        _require_whole_groups(rollout_samples[:trained], size)
        for i, sample in enumerate(rollout_samples):
            sample.index = [i]
        filler = torch.zeros(t.prompts_per_step, dtype=torch.bool)
        filler[list(self.fillers)] = True
        filler = filler.repeat_interleave(t.group_size)
        found = []
        for i in range(0, len(rollout_samples), size):
            e = padded(rollout_samples[i : i + size], self.tokenizer.pad_token_id)
            e.aside = i >= trained
            e.filler = filler[i : i + size] if self.fillers and not e.aside else None
            found.append(e)
        return found

    @phase("statistics")
    @torch.no_grad()
    def make_experience(self, samples_list: list[DCPOExperience]) -> list[DCPOExperience]:
        """log pi_old, log pi_old^T for every T, and exact entropy, from one forward of the policy over each row."""
        rows = [e.rows() for e in samples_list]
        for experience, stats in zip(samples_list, self.statistics(rows, self.temperatures), strict=True):
            experience.action_log_probs = stats["logp"]
            experience.entropy = stats["entropy"]
            experience.tempered_log_probs = stats["tempered_logp"]
        self._add_reference(samples_list)
        require_possible_statistics(
            samples_list, step=self.step, prompts=self.prompts, group_size=self.recipe.train.group_size
        )
        return samples_list

    def _add_reference(self, experiences: list[DCPOExperience]) -> None:
        """log pi_ref of every row, where the recipe has a KL to it."""
        trained = [e for e in experiences if not e.aside]
        if trained and self.recipe.kl.coefficient:
            found = self.statistics([e.rows() for e in trained], [], reference=True)
            for e, stats in zip(trained, found, strict=True):
                e.base_action_log_probs = stats["logp"]

    def _penalty(self, e: DCPOExperience) -> Float[Tensor, " batch"] | float:
        """What the KL to the starting model takes off each response's reward."""
        kl = self.recipe.kl
        if kl.use_loss or not kl.coefficient:
            return 0.0
        estimate = kl_estimate(
            logp=e.action_log_probs,
            reference_logp=e.base_action_log_probs,
            old_logp=e.action_log_probs,
            mask=e.mask,
            estimator=kl.estimator,
        )
        return kl.coefficient * estimate.sum(1)

    def statistics(
        self, rows: Sequence[Rows], temperatures: list[float], *, reference: bool = False
    ) -> list[dict[str, Tensor]]:
        """Token statistics of the policy, or of the starting model, for each batch of rows, of any size."""
        data = self.recipe.parallel.data  # every data rank takes equally many rows: the first ones fill it up
        full = [r.take(torch.arange(-(-len(r) // data) * data) % len(r)) if len(r) % data else r for r in rows]
        refs = self.actor_model_group.async_run_method_batch(
            "token_statistics",
            rows=full,
            temperatures=[temperatures] * len(full),
            reference=[reference] * len(full),
        )
        self.forward = refs
        found = self.actor_model_group.gather(refs)
        self.forward = []
        return [
            {name: values[: len(r)] for name, values in stats.items()} for r, stats in zip(rows, found, strict=True)
        ]

    def stop_forward(self) -> None:
        """Let the ranks leave a forward pass under way between micro-batches, so that what comes next need not wait."""
        if not self.forward:
            return
        # not ray.cancel: it drops a call that has not begun on one rank, while another waits for that rank inside it
        flag = self.recipe.run.dir / STOP
        flag.touch()
        try:
            ray.wait(self.forward, num_returns=len(self.forward))
        finally:
            flag.unlink(missing_ok=True)

    @phase("advantages")
    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[DCPOExperience]) -> list[DCPOExperience]:
        """T and alpha from this batch's entropy and success rate, then each update's advantages."""
        exact, sampled = batch_entropies(experiences)
        success_rate = float(torch.cat([e.success for e in experiences]).mean())
        self.decision = self.controller.step(exact, sampled, success_rate)
        tempered_logps = self._tempered(experiences, self.decision.temperature)
        for i, (e, tempered_logp) in enumerate(zip(experiences, tempered_logps, strict=True)):
            if e.aside:
                e.target_ratio = objectives.target_ratio(
                    old_logp=e.action_log_probs, tempered_logp=tempered_logp, mask=e.mask
                )
            else:
                self._set_advantages(e, tempered_logp, seed=self._seed() * 2**10 + i)
        if self.draws_again:
            self._add_tempered_rows([e for e in experiences if not e.aside])
        return experiences

    def _set_advantages(
        self, e: DCPOExperience, tempered_logp: Float[Tensor, "batch time-1"], *, tempered: bool = False, seed: int = 0
    ) -> None:
        """Target ratio and advantages of whole groups; `tempered`: of rows drawn from pi_old^T."""
        assert self.decision is not None
        m, rewards, success, t = self.recipe.method, e.rewards, e.success, self.recipe.train
        alpha = self.decision.alpha if self.method.uses_alpha else 0.0
        group = torch.zeros_like(rewards)
        if not tempered:
            group = objectives.group_advantage(reward=rewards - self._penalty(e), group_size=t.group_size)
        if e.filler is not None:
            group = group.masked_fill(e.filler, 0.0)
        tokens = {"old_logp": e.action_log_probs, "mask": e.mask}
        size = max(len(rewards), 1) if self.method.whole_update else CHUNK_ROWS
        e.target_ratio, terms = torch.empty_like(e.action_log_probs), []
        for i in range(0, len(rewards), size):
            some = slice(i, i + size)
            e.target_ratio[some] = objectives.target_ratio(
                old_logp=e.action_log_probs[some], tempered_logp=tempered_logp[some], mask=e.mask[some]
            )
            found = methods.method_advantage(
                self.method,
                group_advantage=group[some],
                success=success[some],
                target_ratio=e.target_ratio[some],
                entropy=e.entropy[some],
                alpha=alpha,
                mixing=m.mixing,
                tempered_rows=torch.full_like(rewards[some], tempered, dtype=torch.bool),
                sample_weight=self.decision.sample_weight,
                seed=seed,
                constants=self.constants,
                **{name: values[some] for name, values in tokens.items()},
            )
            terms = terms or [torch.empty_like(e.target_ratio) for _ in found]
            for whole, part in zip(terms, found, strict=True):
                whole[some] = part
        e.advantage_terms = tuple(terms)
        e.advantages = e.advantage_terms[0]
        if (c := self.recipe.correction).level != "off":
            e.correction, e.outside = correction_weight(
                old_logp=tempered_logp if tempered else e.action_log_probs,
                sampler_logp=e.rollout_log_probs,
                mask=e.mask,
                **c.model_dump(),
            )
        e.entropy_coefficient = self.entropy_coefficient
        e.penalty_weight = methods.penalty_weight(
            self.method, group_advantage=group, constants=self.constants, **tokens
        )
        e.expected_weight = methods.expected_weight(self.method, success=success, alpha=alpha, mixing=m.mixing)
        e.expected_temperature = self.decision.temperature if self.method.expected_regulariser else None

    @property
    def entropy_coefficient(self) -> float:
        """lambda of the entropy's own gradient in this step, 0 for methods without it."""
        assert self.decision is not None
        adaptive = self.method.adaptive_coefficient
        coefficient = self.decision.entropy_coefficient if adaptive else self.recipe.method.entropy_coefficient
        return coefficient if self.method.entropy_gradient else 0.0

    def _seed(self) -> int:
        """Of what this step draws by lot: the same after a resume, and on every mesh."""
        return self.recipe.run.seed * 2**20 + self.step

    def _add_tempered_rows(self, experiences: list[DCPOExperience]) -> None:
        """Rows drawn from pi_old^T for each update: beside its own (j2, j4, scope_rl), or in place of some (aepo)."""
        assert self.decision is not None and self.resample is not None
        t, temperature = self.recipe.train, self.decision.temperature
        if self.method.positive_rows:
            drawn = self.resample(temperature, math.ceil(self.recipe.method.scope_share * t.prompts_per_step))
            self._deal_positive_rows(experiences, drawn)
        elif not self.method.replaces_rows:
            drawn = self.resample(temperature, t.prompts_per_step)
            for e, tempered in zip(experiences, self.split_rollout_samples(drawn), strict=True):
                e.tempered, e.separate_averages = tempered, self.recipe.loss.aggregation
        else:
            drawn = self.resample(temperature, -(-t.prompts_per_step // AEPO_SHARE))
            self._replace_rows(experiences, drawn)
        extra = [e.tempered for e in experiences if e.tempered is not None]
        found = self.statistics([e.rows() for e in extra], [temperature]) if extra else []
        self._add_reference(extra)
        for tempered, stats in zip(extra, found, strict=True):
            tempered.action_log_probs, tempered.entropy = stats["logp"], stats["entropy"]
            tempered.tempered_log_probs = stats["tempered_logp"]
            self._set_advantages(tempered, stats["tempered_logp"][..., 0], tempered=True)

    def _deal_positive_rows(self, experiences: list[DCPOExperience], drawn: list[Experience]) -> None:
        """The correct ones of `drawn`, by lot over the step's updates; copies without an action even the data ranks."""
        pad, generator = self.tokenizer.pad_token_id, torch.Generator().manual_seed(self._seed())
        correct = padded(drawn, pad).success.nonzero().flatten()
        order = correct[torch.randperm(len(correct), generator=generator)].tolist()
        for i, e in enumerate(experiences):
            if mine := [drawn[j] for j in order[i :: len(experiences)]]:
                blank = -len(mine) % self.recipe.parallel.data
                e.tempered, e.separate_averages = padded(mine + mine[:1] * blank, pad), self.recipe.loss.aggregation
                assert e.tempered.action_mask is not None
                e.tempered.action_mask[len(mine) :] = False

    def _replace_rows(self, experiences: list[DCPOExperience], drawn: list[Experience]) -> None:
        """The best of `drawn` take the place of rows chosen at random over all updates of the step."""
        assert self.decision is not None
        reward = torch.cat([sample.rewards for sample in drawn])
        m, group_size = self.recipe.method, self.recipe.train.group_size
        chosen = methods.aepo_rows(
            group_advantage=objectives.group_advantage(reward=reward, group_size=group_size),
            above_target=self.decision.entropy > self.decision.target_entropy,
            limit=m.aepo_max_rows,
        )
        sizes = [len(e.sequences) for e in experiences]
        generator = torch.Generator().manual_seed(self._seed())
        places = torch.randperm(sum(sizes), generator=generator)[: len(chosen)]
        taken = torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, places, True)
        queue = iter(chosen[torch.randperm(len(chosen), generator=generator)].tolist())
        for e, replaced in zip(experiences, taken.split(sizes), strict=True):
            mine = [drawn[next(queue)] for _ in range(int(replaced.sum()))]
            if mine:
                e.tempered, e.replaced = padded(mine, self.tokenizer.pad_token_id), replaced

    def _tempered(self, experiences: list[DCPOExperience], temperature: float) -> list[Float[Tensor, "batch time-1"]]:
        """log pi_old^T; an unforeseen T costs methods that weigh by rho a second forward, and is 1 to the others."""
        if temperature in self.temperatures:
            return [e.tempered_log_probs[..., self.temperatures.index(temperature)] for e in experiences]
        if self.method.ratio_weight in (None, "one"):
            return [e.action_log_probs for e in experiences]
        found = self.statistics([e.rows() for e in experiences], [temperature])
        return [stats["tempered_logp"][..., 0] for stats in found]


def _require_whole_groups(samples: list[Experience], size: int) -> None:
    if not samples or len(samples) % size:
        raise ValueError(
            f"a step needs whole updates of {size} responses (prompts_per_update * group_size), "
            f"got {len(samples)} responses; some were lost between engine and trainer"
        )
