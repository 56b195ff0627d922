"""The loop, as the algorithm reads: rollout, reward, forward of pi_old, controller, update, weight sync, metrics."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import PreTrainedTokenizerBase

from dcpo_openrlhf import tasks
from dcpo_openrlhf.config import Recipe
from dcpo_openrlhf.controller import EntropyController
from dcpo_openrlhf.experience import DCPOExperience, DCPOExperienceMaker, put
from dcpo_openrlhf.monitor import MetricsLog, progress_line, rollout_metrics
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.rewards import Grade, GraderPool
from dcpo_openrlhf.rollout import DCPOSamplesGenerator

from openrlhf.trainer.ppo_trainer import BasePPOTrainer  # isort: skip  (rollout installs the stub it needs)

logger = logging.getLogger(__name__)

EVALUATION_STEP = 1 << 30
"""Added to the step in the seeds of evaluation requests, so that they never repeat those of training."""


class DCPOTrainer(BasePPOTrainer):
    """OpenRLHF's trainer with DCPO's experience maker, entropy controller and metrics."""

    def __init__(
        self,
        strategy: RecipeStrategy,
        actor_group: Any,
        engines: list[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompts: tasks.PromptStream,
        heldout: Sequence[tasks.Prompt],
        grader: GraderPool,
    ) -> None:
        super().__init__(strategy, actor_group, None, None, None, engines, tokenizer)  # type: ignore[arg-type]
        recipe: Recipe = strategy.recipe
        self.recipe, self.prompts, self.heldout, self.grader = recipe, prompts, heldout, grader
        self.controller = make_controller(recipe)
        self.experience_maker = DCPOExperienceMaker(
            actor_group, None, None, None, self.kl_ctl, strategy, tokenizer, controller=self.controller
        )
        self.generator = DCPOSamplesGenerator(
            strategy, None, None, tokenizer, engines, seed=recipe.run.seed, timeout_s=recipe.rollout.timeout
        )
        self.log = MetricsLog(recipe.run.dir, tensorboard=recipe.monitor.tensorboard)
        self.weights_version = 0

    def fit(self, global_step: int = 0) -> None:
        """Run the recipe: evaluation, `train.steps` steps, evaluation, export, report."""
        recipe, begin = self.recipe, time.monotonic()
        self.sync_weights()
        history, before = [], self.evaluate(0)
        for step in range(1, recipe.train.steps + 1):
            clock = Stopwatch()
            samples = self.rollout(step)
            clock.lap("rollout")
            experiences: list[Any] = self.experience_maker.make_experience_batch(samples)
            clock.lap("token_stats")
            put(experiences, self.actor_model_group)
            status = self.ppo_train(step)
            clock.lap("train")
            self.sync_weights()
            clock.lap("weight_sync")
            history.append(self.record(step, experiences, status | clock.seconds()))
            if recipe.evaluation.every and step % recipe.evaluation.every == 0 and step < recipe.train.steps:
                self.evaluate(step)
        after = self.evaluate(recipe.train.steps)
        exported = self.export()
        self.report(before, after, history, minutes=(time.monotonic() - begin) / 60, exported=exported)
        self.log.close()

    def rollout(self, step: int) -> list[Any]:
        """G responses of the current policy to each of the step's prompts, graded."""
        r, t = self.recipe.rollout, self.recipe.train
        prompts = self.prompts.take(t.prompts_per_step)
        samples = self._generate(prompts, step=step, n_samples=t.group_size, temperature=r.temperature, top_p=r.top_p)
        self._require_current_weights(samples, step)
        texts, grades = self._grade(samples)
        for sample, grade in zip(samples, grades, strict=True):
            sample.rewards = sample.info["reward"] = torch.tensor([grade.reward])
        self._keep_samples(step, prompts, texts, grades)
        return samples

    def sync_weights(self) -> None:
        """Send the policy to every engine and check that each reports the new version."""
        self.broadcast_to_vllm()
        versions = set(ray.get([engine.weight_version.remote() for engine in self.vllm_engines]))
        self.weights_version += 1
        if versions != {self.weights_version}:
            raise RuntimeError(
                f"engines serve weight versions {sorted(versions)} after the sync of version {self.weights_version}"
            )

    def record(self, step: int, experiences: list[DCPOExperience], status: dict[str, float]) -> dict[str, float]:
        """Write the step's metrics and the progress line; returns the metrics."""
        decision = self.experience_maker.decision
        assert decision is not None
        metrics = {
            "train/step": step,
            **rollout_metrics(experiences),
            "entropy/target": self.recipe.method.target_entropy,
            "dcpo/temperature": decision.temperature,
            "dcpo/alpha": decision.alpha if self.experience_maker.method.uses_alpha else 0.0,
            "dcpo/no_success_steps": float(self.controller.no_success_count),
            "reward/timeouts": float(self.grader.timeouts),
            "reward/crashes": float(self.grader.crashes),
            "weights/version": self.weights_version,
            **status,
        }
        self.log.write(step, metrics)
        logger.info(progress_line(step, self.recipe.train.steps, metrics))
        if metrics["mismatch/prob_diff_mean"] > self.recipe.monitor.mismatch_bound:
            logger.warning(
                "trainer and engine disagree: mean |p - p'| = %.4f > monitor.mismatch_bound = %g",
                metrics["mismatch/prob_diff_mean"],
                self.recipe.monitor.mismatch_bound,
            )
        return metrics

    def evaluate(self, global_step: int, **_: Any) -> float | None:  # type: ignore[override]
        """Held-out accuracy (Avg@samples) of the engines' weights; None without held-out problems."""
        e = self.recipe.evaluation
        if not self.heldout:
            return None
        samples = self._generate(
            self.heldout,
            step=EVALUATION_STEP + global_step,
            n_samples=e.samples,
            temperature=e.temperature,
            top_p=e.top_p,
        )
        grades = self._grade(samples)[1]
        accuracy = sum(g.reward for g in grades) / len(grades)
        logger.info(
            "held-out accuracy after step %d: %.3f (%d problems x %d)",
            global_step,
            accuracy,
            len(self.heldout),
            e.samples,
        )
        with (self.recipe.run.dir / "evaluation.jsonl").open("a") as file:
            file.write(json.dumps({"step": global_step, "heldout_accuracy": accuracy, "responses": len(grades)}) + "\n")
        return accuracy

    def export(self) -> Path | None:
        """The policy as a Hugging Face folder in the run folder."""
        if not self.recipe.checkpoint.export_hf:
            return None
        output = self.recipe.run.dir / "hf"
        ray.get(self.actor_model_group.async_run_method("save_model", str(output)))
        logger.info("exported the policy to %s", output)
        return output

    def report(
        self,
        before: float | None,
        after: float | None,
        history: list[dict[str, float]],
        *,
        minutes: float,
        exported: Path | None,
    ) -> None:
        """The table at the end, on the screen and in report.md."""
        first, last = history[0], history[-1]
        memory = ray.get(self.actor_model_group.async_run_method("peak_memory_gib"))

        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        def row(title: str, name: str) -> str:
            return f"| {title} | {number(first[name])} | {number(last[name])} |"

        lines = [
            f"| {self.recipe.method.name}, {len(history)} steps | before | after |",
            "|---|---|---|",
            f"| held-out accuracy ({len(self.heldout)} problems) | {number(before)} | {number(after)} |",
            row("reward of the step's responses", "rollout/reward_mean"),
            row(f"entropy, nats/token (target {first['entropy/target']:g})", "entropy/exact"),
            f"| minutes, evaluation and export included | | {minutes:.1f} |",
            f"| peak memory of a policy process, GiB | | {max(memory):.2f} |",
        ]
        (self.recipe.run.dir / "report.md").write_text("\n".join(lines) + "\n")
        logger.info("\n%s", "\n".join(lines))
        if exported:
            logger.info("load it: transformers.AutoModelForCausalLM.from_pretrained(%r)", str(exported))

    def _generate(self, prompts: Sequence[tasks.Prompt], **sampling: Any) -> list[Any]:
        r = self.recipe.rollout
        return self.generator.generate(
            [p.text for p in prompts],
            [p.problem.answer for p in prompts],
            max_new_tokens=r.max_new_tokens,
            max_len=r.context,
            **sampling,
        )

    def _grade(self, samples: list[Any]) -> tuple[list[str], list[Grade]]:
        """The text of each response and what it earns."""
        tokens = [s.sequences[0, 1:][s.action_mask[0].bool()].tolist() for s in samples]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        grades = self.grader.grade(texts, [s.labels[0] for s in samples])
        if self.recipe.reward.require_end:
            cut_off = [bool(s.truncated[0]) for s in samples]
            grades = [replace(g, reward=0.0) if cut else g for g, cut in zip(grades, cut_off, strict=True)]
        return texts, grades

    def _require_current_weights(self, samples: list[Any], step: int) -> None:
        made_with = {int(s.info["weight_version"]) for s in samples}
        if self.recipe.monitor.on_policy_only and made_with != {self.weights_version}:
            raise RuntimeError(
                f"step {step}: responses were made with weight versions {sorted(made_with)}, "
                f"the policy is at {self.weights_version}; they are not on-policy. "
                "Look for a failed sync, or set monitor.on_policy_only=false"
            )

    def _keep_samples(self, step: int, prompts: Sequence[tasks.Prompt], texts: list[str], grades: list[Any]) -> None:
        keep = self.recipe.monitor.samples_per_step
        if not keep:
            return
        folder = self.recipe.run.dir / "samples"
        folder.mkdir(exist_ok=True)
        group = self.recipe.train.group_size
        with (folder / f"step_{step:06d}.jsonl").open("w") as file:
            for i, (text, grade) in enumerate(zip(texts[:keep], grades, strict=False)):
                problem = prompts[i // group].problem
                row = {
                    "id": problem.id,
                    "answer": problem.answer,
                    "response": text,
                    "reward": grade.reward,
                    "extracted": grade.extracted,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Stopwatch:
    """Seconds of each phase of a step, as time/* metrics."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[f"time/{name}"] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"time/step": self._last - self._begin}


def make_controller(recipe: Recipe) -> EntropyController:
    m = recipe.method
    return EntropyController(
        target_entropy=m.target_entropy,
        temperature_low=m.temperature_low,
        temperature_high=m.temperature_high,
        temperature_rule=m.temperature_rule,
        alpha_schedule=m.alpha_schedule,
        alpha_max=m.alpha_max,
        proportional_gain=m.proportional_gain,
        integral_gain=m.integral_gain,
        entropy_source=m.entropy_source,
    )
