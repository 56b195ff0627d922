"""The loop of `train.rollout_only`: responses and grades, without a policy."""

import logging

import torch

from dcpo_openrlhf.grading import mean_logs
from dcpo_openrlhf.phases import Stopwatch
from dcpo_openrlhf.trainer import DCPOTrainer

logger = logging.getLogger(__name__)


def generate_only(trainer: DCPOTrainer) -> None:
    """`train.rollout_only`: the responses of every step, graded, of the model as it is."""
    for step in range(1, trainer.recipe.train.steps + 1):
        clock = Stopwatch()
        samples = trainer.rollout(step)
        clock.lap("rollout")
        metrics = {
            "train/step": step,
            "rollout/reward_mean": float(torch.cat([s.rewards for s in samples]).mean()),
            "rollout/success_rate": float(torch.cat([s.scores for s in samples]).mean()),
            "rollout/length_mean": float(torch.cat([s.response_length for s in samples]).float().mean()),
            "rollout/truncated_fraction": float(torch.cat([s.truncated for s in samples]).float().mean()),
            **mean_logs(trainer.grades),
            **trainer.filtered,
            **clock.seconds(),
        }
        trainer.log.write(step, metrics)
        trainer.timeline.write(step)
        means = metrics["rollout/reward_mean"], metrics["rollout/success_rate"]
        logger.info("step %d/%d  reward %.2f  success %.2f", step, trainer.recipe.train.steps, *means)
    trainer.log.close()
    trainer.timeline.close()
