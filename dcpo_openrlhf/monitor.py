"""What a step is worth knowing: its metrics by name, and the sinks they go to."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from dcpo_openrlhf.experience import DCPOExperience, batch_entropies


def rollout_metrics(experiences: list[DCPOExperience]) -> dict[str, float]:
    """rollout/*, entropy/*, mismatch/* and dcpo/target_ratio_* of one step's responses."""
    exact, sampled = batch_entropies(experiences)
    reward = torch.cat([e.rewards for e in experiences]).float()
    length = torch.cat([e.response_length for e in experiences]).float()
    truncated = torch.cat([e.truncated for e in experiences]).float()
    ratio = torch.cat([e.target_ratio[e.mask] for e in experiences if e.target_ratio is not None])
    trainer = torch.cat([e.action_log_probs[e.mask] for e in experiences])
    engine = torch.cat([e.rollout_log_probs[e.mask] for e in experiences])
    return {
        "rollout/reward_mean": float(reward.mean()),
        "rollout/reward_std": float(reward.std()),
        "rollout/length_mean": float(length.mean()),
        "rollout/length_max": float(length.max()),
        "rollout/truncated_fraction": float(truncated.mean()),
        "entropy/exact": exact,
        "entropy/sampled": sampled,
        "dcpo/target_ratio_mean": float(ratio.mean()),
        "dcpo/target_ratio_max": float(ratio.max()),
        "mismatch/prob_diff_mean": float((trainer.exp() - engine.exp()).abs().mean()),
        "mismatch/kl": float((engine - trainer).mean()),  # KL(engine || trainer) from the engine's samples [nats/token]
    }


class MetricsLog:
    """metrics.jsonl, one object a step, and TensorBoard beside it."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self._file = (folder / "metrics.jsonl").open("a", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def progress_line(step: int, steps: int, m: dict[str, float]) -> str:
    """One line a person reads while it runs: reward, entropy against target, T, alpha, lengths, estimated end."""
    ends = time.strftime("%H:%M", time.localtime(time.time() + (steps - step) * m["time/step"]))
    return (
        f"step {step}/{steps}  reward {m['rollout/reward_mean']:.2f}  "
        f"entropy {m['entropy/exact']:.3f} (target {m['entropy/target']:g})  "
        f"T {m['dcpo/temperature']:g}  alpha {m['dcpo/alpha']:.3f}  length {m['rollout/length_mean']:.0f}  "
        f"grad {m['policy/grad_norm']:.2f}  {m['time/step']:.0f} s  ends about {ends}"
    )
