"""The loop, as the algorithm reads: rollout, reward, forward of pi_old, controller, update, weight sync, metrics."""

import json
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import PreTrainedTokenizerBase

from dcpo_openrlhf import signals
from dcpo_openrlhf.assemble import (
    make_controller,
    make_cost,
    make_generator,
    make_log,
    make_monitor,
    make_watchers,
    recorded,
)
from dcpo_openrlhf.checkpoint import Checkpoint
from dcpo_openrlhf.colocation import Colocation
from dcpo_openrlhf.experience import DCPOExperience, put
from dcpo_openrlhf.experience_maker import DCPOExperienceMaker
from dcpo_openrlhf.grading import failures, grade_samples, keep_samples, mean_logs
from dcpo_openrlhf.group_filter import Group, draw_step
from dcpo_openrlhf.monitor.causes import MonitorStop
from dcpo_openrlhf.monitor.sinks import final_table, progress_line
from dcpo_openrlhf.monitor.statistics import age_metrics, batch_metrics, correction_metrics
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.phases import Stopwatch, phase
from dcpo_openrlhf.recipe.resume import REPORT, starting_model, what_is_kept
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import Grade, GraderPool
from dcpo_openrlhf.rollout import tasks
from dcpo_openrlhf.rollout.ahead import FILE as AHEAD
from dcpo_openrlhf.rollout.checks import require_possible_samples
from dcpo_openrlhf.rollout.generator import arguments
from dcpo_openrlhf.rollout.replay import EVALUATION_STEP, TEMPERED_STEP
from dcpo_openrlhf.saving import Saving

from openrlhf.trainer.ppo_trainer import BasePPOTrainer  # isort: skip  (rollout installs the stub it needs)

logger = logging.getLogger(__name__)


class DCPOTrainer(BasePPOTrainer):
    """OpenRLHF's trainer with DCPO's experience maker, entropy controller and metrics."""

    def __init__(
        self,
        strategy: RecipeStrategy,
        actor_group: Any,
        engines: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompts: tasks.PromptStream,
        heldout: Sequence[tasks.Prompt],
        grader: GraderPool,
        point: Checkpoint | None = None,
    ) -> None:
        super().__init__(strategy, actor_group, None, None, None, engines, tokenizer)  # type: ignore[arg-type]
        recipe: Recipe = strategy.recipe
        self.recipe, self.prompts, self.heldout, self.grader = recipe, prompts, heldout, grader
        self.controller = make_controller(recipe)
        self.experience_maker = DCPOExperienceMaker(
            actor_group, None, None, None, self.kl_ctl, strategy, tokenizer, controller=self.controller
        )
        self.devices = Colocation(actor_group, engines, shared=recipe.parallel.colocate)
        self.experience_maker.resample = self.tempered_rollout
        self.ahead = make_generator(strategy, engines, tokenizer)
        self.generator = recorded(self.ahead, recipe)
        self.monitor, self.log = make_monitor(recipe), make_log(recipe, done=point.step if point else 0)
        self.timeline, self.profile = make_watchers(recipe, actor_group, engines)
        self.weights_version, self.starting_model = 0, starting_model(recipe)
        self.saving = Saving(
            recipe,
            actor_group,
            self.ahead,
            stop_forward=self.experience_maker.stop_forward,
            policy_back=self.devices.policy_back,
        )
        self.point = point
        self.begin = time.monotonic()
        self.history: list[dict[str, float]] = []
        self.before: float | None = None

    def fit(self, global_step: int = 0) -> None:
        """Run the recipe, or the rest of it: evaluation, `train.steps` steps, evaluation, export, report."""
        recipe, done = self.recipe, self.start()
        self.timeline.write(done, "start")
        for step in range(done + 1, recipe.train.steps + 1):
            self.profile.begin(step)
            clock = Stopwatch()
            samples = self.rollout(step)
            clock.lap("rollout")
            self.saving.finish()
            clock.lap("checkpoint")
            experiences: list[Any] = self.experience_maker.make_experience_batch(samples)
            clock.lap("token_stats")
            with signals.held():  # a signal that arrives during an update waits for its end
                self.saving.in_hand = step
                with phase("update"):
                    put(experiences, self.actor_model_group)
                    status = self.ppo_train(step)
                clock.lap("train")
                try:
                    self.sync_weights()
                finally:  # a sync that fails loses no step
                    clock.lap("weight_sync")
                    self.history.append(self.record(step, experiences, status | clock.seconds()))
                    self.settle(step)
            self.profile.end(step)
            del samples, experiences  # before the next step's come: gigabytes of a large one
            self.evaluate_between(step)
            if recipe.checkpoint.every and (step % recipe.checkpoint.every == 0 or self.monitor.stopping):
                self.saving.begin()
            self.timeline.write(step)
            if self.monitor.stopping:
                break
        self.end(int(self.history[-1]["train/step"]))

    def end(self, step: int) -> None:
        """What follows the last step: evaluation, export, report."""
        after = self.evaluate(step)
        self.saving.finish()
        self.saving.checkpoints.score(step, {} if after is None else {"heldout_accuracy": after})
        exported = self.export()
        self.report(after, exported)
        self.timeline.write(step, "end")
        self.close()

    def start(self) -> int:
        """The step after which this run continues, 0 for one that begins; engines hold that step's weights then."""
        self.cost = make_cost(self.recipe, ray.get(self.actor_model_group.async_run_method("peak_flops"))[0])
        if self.point is None:
            self.sync_weights()
            self.before = self.evaluate(0)
            return 0
        state, folder = self.point.state(), str(self.point.path)
        # the sync below repeats the checkpoint's last one, for engines that have just started
        self.weights_version = state["weights_version"] - 1
        ray.get(self.actor_model_group.async_run_method("load_checkpoint", folder, self.weights_version))
        self.sync_weights()
        self.ahead.load(self.point.path / AHEAD, step=self.point.step + 1)
        self.prompts.load_state_dict(state["prompts"])
        self.controller.load_state_dict(state["controller"])
        self.monitor.load_state_dict(state["monitor"])
        counts = [*state["grader"], 0]  # older checkpoints know no failures
        self.grader.timeouts, self.grader.crashes, self.grader.failures = counts[:3]
        self.history, self.before = state["history"], state["heldout_before"]
        self.begin -= 60 * state["minutes"]
        self.saving.checkpoints.saved_step = self.point.step
        self.evaluate_between(self.point.step, made=self.point.scores())  # a signal or an error may have come before it
        return self.point.step

    def settle(self, step: int, *, heldout_accuracy: float | None = None) -> None:
        """Remember what a checkpoint of this step saves beside the policy: everything that the next step reads."""
        scores = {name: self.history[-1][f"rollout/{name}"] for name in ("reward_mean", "success_rate")}
        if heldout_accuracy is not None:
            scores["heldout_accuracy"] = heldout_accuracy
        state = {
            "step": step,
            "weights_version": self.weights_version,
            "prompts": self.prompts.state_dict(),
            "controller": self.controller.state_dict(),
            "monitor": self.monitor.state_dict(),
            "grader": [self.grader.timeouts, self.grader.crashes, self.grader.failures],
            "history": list(self.history),
            "heldout": tasks.fingerprint(self.heldout),
            "heldout_before": self.before,
            "reference": self.starting_model,
            "minutes": self.minutes(),
            "recipe": self.recipe.model_dump(mode="json"),
        }
        self.saving.settle(state, scores)

    def minutes(self) -> float:
        """Minutes of this run, those before its checkpoint included."""
        return (time.monotonic() - self.begin) / 60

    def rollout(self, step: int) -> list[Any]:
        """G responses of the current policy to each of the step's prompts, graded; then those that it leaves."""
        r, t, maker = self.recipe.rollout, self.recipe.train, self.experience_maker

        def draw(count: int, drawn: int) -> list[Group]:
            prompts = self.prompts.take(count)
            found = self._rollout(prompts, step=step, request=step, temperature=r.temperature, first=drawn)
            return Group.split(prompts, *found)

        drawn = draw_step(draw, prompts=t.prompts_per_step, group_filter=t.filter, rounds=t.filter_rounds)
        if t.filter != "none" and not maker.draws_again:  # the last round is over
            self.ahead.begin_step(step + 1, self.prompts, self.recipe)
        if drawn.shortage:
            self.log.line({"step": step, "cause": "filter", "text": drawn.shortage})
            logger.warning("step %d: %s", step, drawn.shortage)
        maker.step, maker.prompts, maker.fillers = step, drawn.prompts, drawn.fillers
        self.grades, self.filtered = drawn.grades, drawn.metrics
        if kept := drawn.texts[: self.recipe.monitor.samples_per_step]:
            file = self.recipe.run.dir / "samples" / f"step_{step:06d}.jsonl"
            keep_samples(file, drawn.prompts, kept, self.grades, group_size=t.group_size)
        return drawn.samples

    def tempered_rollout(self, temperature: float, count: int) -> list[Any]:
        """G graded responses of pi_old^T to each of the step's first `count` prompts (j2, j4, aepo)."""
        step, prompts = self.experience_maker.step, self.experience_maker.prompts[:count]
        return self._rollout(prompts, step=step, request=TEMPERED_STEP + step, temperature=temperature)[0]

    @phase("rollout")
    def _rollout(
        self, prompts: Sequence[tasks.Prompt], *, step: int, request: int, temperature: float, first: int = 0
    ) -> tuple[list[Any], list[str], list[Grade]]:
        """Responses of the engines' weights, or drawn ahead, their texts and their grades; every value is checked."""
        r, t, again = self.recipe.rollout, self.recipe.train, self.experience_maker.draws_again
        refill = {"first": first} if first else {}  # unnamed in older records
        sampling = {"n_samples": t.group_size, "temperature": temperature, "top_p": r.top_p, **refill}
        samples = self._generate(prompts, step=request, **sampling)
        if request != step if again else t.filter == "none":  # engines have no more to do for this step
            self.ahead.begin_step(step + 1, self.prompts, self.recipe)
        texts, grades = self._grade(samples, prompts, step)
        for sample, grade in zip(samples, grades, strict=True):
            sample.rewards = sample.info["reward"] = torch.tensor([grade.reward])
            sample.scores = sample.info["success"] = torch.tensor([grade.success])
        oldest = self.weights_version - (r.ahead if request == step else 0)
        versions = range(oldest, self.weights_version + 1) if self.recipe.monitor.on_policy_only else None
        require_possible_samples(samples, step=step, prompts=prompts, group_size=t.group_size, versions=versions)
        return samples, texts, grades

    @phase("sync")
    def sync_weights(self) -> None:
        """Send the policy to every engine and check that each reports the new version; a replay has none.

        Engines that draw responses ahead are waited for, by a signal no longer than half of its bound.
        """
        self.weights_version += 1
        if not self.vllm_engines:
            return
        self.ahead.wait(lambda: signals.leave(keep=self.recipe.checkpoint.signal_timeout / 2))
        with self.devices.engines_awake(["weights"], policy_away=False):
            self.vllm_engines.sync(self.actor_model_group, self.weights_version)

    @phase("monitor")
    def record(self, step: int, experiences: list[DCPOExperience], status: dict[str, float]) -> dict[str, float]:
        """Write the step's metrics and the progress line; returns the metrics."""
        decision, begin = self.experience_maker.decision, time.monotonic()
        assert decision is not None
        m, method = self.recipe.method, self.experience_maker.method
        alpha = decision.alpha if method.uses_alpha else 0.0
        found = batch_metrics(
            experiences, grades=self.grades, prompts=self.experience_maker.prompts, alpha=alpha, mixing=m.mixing
        )
        metrics, alerts = self.monitor.observe(
            step,
            {
                "train/step": step,
                **found,
                **self.filtered,
                **self.ahead.times,
                **age_metrics(experiences, policy_version=self.weights_version - 1),
                **correction_metrics(experiences, policy_version=self.weights_version - 1),
                **self.cost.metrics(experiences, status | self.ahead.times),
                "entropy/target": decision.target_entropy,
                "dcpo/temperature": decision.temperature,
                "dcpo/alpha": alpha,
                "dcpo/entropy_coefficient": self.experience_maker.entropy_coefficient,
                "dcpo/sample_weight": decision.sample_weight if method.uses_sample_weight else 0.0,
                "dcpo/no_success_steps": float(self.controller.no_success_count),
                "reward/timeouts": float(self.grader.timeouts),
                "reward/crashes": float(self.grader.crashes),
                "reward/failures": float(self.grader.failures),
                **mean_logs(self.grades),
                "weights/version": self.weights_version,
                **status,
            },
        )
        metrics["time/monitor"] = time.monotonic() - begin
        self.log.write(step, metrics)
        logger.info(progress_line(step, self.recipe.train.steps, metrics))
        for alert in alerts:
            self.log.event(alert)
            logger.warning(str(alert))
        return metrics

    def close(self) -> None:
        """Close the sinks; raises MonitorStop where the monitor ended the run."""
        self.log.close()
        self.timeline.close()
        if self.monitor.stopping:
            saved = what_is_kept(self.recipe, self.saving.checkpoints.saved_step)
            raise MonitorStop(self.monitor.stopping, saved=saved)

    def evaluate_between(self, step: int, made: Collection[str] = ()) -> None:
        """What evaluation.every asks for after a step before the last; `made`: the scores of its checkpoint."""
        every = self.recipe.evaluation.every
        if every and step % every == 0 and step < self.recipe.train.steps and "heldout_accuracy" not in made:
            self.settle(step, heldout_accuracy=self.evaluate(step))
            assert self.saving.settled is not None
            self.saving.checkpoints.score(step, self.saving.settled[1])

    @phase("evaluation")
    def evaluate(self, global_step: int, **_: Any) -> float | None:  # type: ignore[override]
        """Held-out accuracy (Avg@samples) of the engines' weights; None without held-out problems."""
        e = self.recipe.evaluation
        if not self.heldout:
            return None
        sampling = {"n_samples": e.samples, "temperature": e.temperature, "top_p": e.top_p}
        grades = self.heldout_grades(self.heldout, step=global_step, **sampling)
        accuracy, reward = (
            sum(values) / len(grades) for values in ([g.success for g in grades], [g.reward for g in grades])
        )
        logger.info(
            "held-out accuracy after step %d: %.3f (%d problems x %d)",
            global_step,
            accuracy,
            len(self.heldout),
            e.samples,
        )
        with (self.recipe.run.dir / "evaluation.jsonl").open("a") as file:
            means = {"heldout_accuracy": accuracy, "heldout_reward": reward}
            file.write(json.dumps({"step": global_step, **means, "responses": len(grades)}) + "\n")
        return accuracy

    def heldout_grades(self, prompts: Sequence[tasks.Prompt], *, step: int, **sampling: Any) -> list[Grade]:
        """What responses of the engines' weights to these prompts earn; `step` makes their seeds."""
        samples = self._generate(prompts, step=EVALUATION_STEP + step, **sampling)
        return self._grade(samples, prompts, step)[1]

    @phase("export")
    def export(self) -> Path | None:
        """The policy as a Hugging Face folder in the run folder."""
        if not self.recipe.checkpoint.export_hf:
            return None
        output = self.recipe.run.dir / "hf"
        ray.get(self.actor_model_group.async_run_method("save_model", str(output)))
        logger.info("exported the policy to %s", output)
        return output

    def report(self, after: float | None, exported: Path | None) -> None:
        """The table at the end, on the screen and in report.md, a run's last file."""
        table = final_table(
            self.history,
            method=self.recipe.method.name,
            problems=len(self.heldout),
            accuracies=(self.before, after),
            minutes=self.minutes(),
            peak_gib=max(ray.get(self.actor_model_group.async_run_method("peak_memory_gib"))),
        )
        (self.recipe.run.dir / REPORT).write_text(table + "\n")
        logger.info("\n%s", table)
        if exported is not None:
            logger.info("load it: transformers.AutoModelForCausalLM.from_pretrained(%r)", str(exported))

    def _generate(self, prompts: Sequence[tasks.Prompt], **sampling: Any) -> list[Any]:
        with self.devices.engines_awake(policy_away=True):
            return self.generator.generate(**arguments(prompts, self.recipe.rollout, **sampling))

    @phase("grade")
    def _grade(self, samples: list[Any], prompts: Sequence[tasks.Prompt], step: int) -> tuple[list[str], list[Grade]]:
        """The text of each response and what it earns; what a reward function failed on is told."""
        texts, grades = grade_samples(
            samples,
            prompts,
            tokenizer=self.tokenizer,
            grader=self.grader,
            reward=self.recipe.reward,
            max_new_tokens=self.recipe.rollout.max_new_tokens,
        )
        for event in failures(grades, prompts, step=step):
            self.log.line(event)
            logger.warning("step %d: %s", step, event["text"])
        return texts, grades
