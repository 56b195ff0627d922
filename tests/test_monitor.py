"""Metrics of a step are those of its tokens, and reach metrics.jsonl and the progress line."""

import json
import math
from pathlib import Path

import pytest
import torch

from dcpo_openrlhf.experience import DCPOExperience
from dcpo_openrlhf.monitor import MetricsLog, progress_line, rollout_metrics


def experience(
    probabilities: list[list[float]], engine: list[list[float]], lengths: list[int], rewards: list[float]
) -> DCPOExperience:
    """Rows of response tokens with the trainer's and the engine's probabilities; NaN and 99 outside the mask."""
    mask = torch.arange(len(probabilities[0]))[None] < torch.tensor(lengths)[:, None]
    trainer = torch.tensor(probabilities).log()
    return DCPOExperience(
        action_mask=mask,  # type: ignore[arg-type]
        action_log_probs=trainer.masked_fill(~mask, math.nan),
        rollout_log_probs=torch.tensor(engine).log().masked_fill(~mask, math.nan),
        rewards=torch.tensor(rewards),
        response_length=torch.tensor(lengths),
        truncated=torch.tensor([length == mask.shape[1] for length in lengths]),
        entropy=(2 * trainer.neg()).masked_fill(~mask, 99.0),
        target_ratio=torch.tensor(probabilities).masked_fill(~mask, 99.0) * 2,
    )


def test_metrics_are_means_over_the_tokens_of_all_responses() -> None:
    batch = [
        experience([[0.5, 0.25], [0.5, 0.0]], [[0.5, 0.75], [0.25, 0.0]], [2, 1], [1.0, 0.0]),
        experience([[0.25, 0.0, 0.0]], [[0.25, 0.0, 0.0]], [1], [1.0]),
    ]
    m = rollout_metrics(batch)
    trainer, engine = [0.5, 0.25, 0.5, 0.25], [0.5, 0.75, 0.25, 0.25]  # the four tokens inside the masks
    sampled = -sum(map(math.log, trainer)) / 4
    assert m == pytest.approx(
        {
            "rollout/reward_mean": 2 / 3,
            "rollout/reward_std": (1 / 3) ** 0.5,
            "rollout/length_mean": 4 / 3,
            "rollout/length_max": 2.0,
            "rollout/truncated_fraction": 1 / 3,
            "entropy/exact": 2 * sampled,
            "entropy/sampled": sampled,
            "dcpo/target_ratio_mean": 0.75,
            "dcpo/target_ratio_max": 1.0,
            "mismatch/prob_diff_mean": (0.5 + 0.25) / 4,
            "mismatch/kl": sum(math.log(e / t) for t, e in zip(trainer, engine, strict=True)) / 4,
        },
        rel=1e-5,
        abs=1e-6,
    )


@pytest.mark.parametrize("tensorboard", [False, True])
def test_log_writes_one_object_a_step_with_the_step_first(tmp_path: Path, tensorboard: bool) -> None:
    log = MetricsLog(tmp_path, tensorboard=tensorboard)
    for step in (1, 2):
        log.write(step, {"policy/loss": 0.5 * step, "time/step": 3})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step, "a line is there as soon as its step is done"
    log.close()
    rows = [json.loads(line) for line in lines]
    assert rows == [{"step": s, "policy/loss": 0.5 * s, "time/step": 3} for s in (1, 2)]
    assert [next(iter(row)) for row in rows] == ["step", "step"]
    assert bool(list(tmp_path.glob("tensorboard/events.*"))) == tensorboard


def test_log_of_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for step in (1, 2):
        log = MetricsLog(tmp_path, tensorboard=False)
        log.write(step, {})
        log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_progress_line_tells_where_the_run_stands() -> None:
    metrics = {
        "rollout/reward_mean": 0.25,
        "entropy/exact": 0.31234,
        "entropy/target": 0.5,
        "dcpo/temperature": 2.0,
        "dcpo/alpha": 0.18766,
        "rollout/length_mean": 7.6,
        "policy/grad_norm": 1.234,
        "time/step": 12.3,
    }
    line = progress_line(3, 30, metrics)
    for part in ("step 3/30", "reward 0.25", "entropy 0.312 (target 0.5)", "T 2 ", "alpha 0.188", "length 8", "12 s"):
        assert part in line, line
    assert "ends about" in line and "\n" not in line
