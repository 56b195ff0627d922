"""Where metrics and alerts go: metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases, and a line on the screen."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from dcpo_openrlhf.monitor.causes import Alert
from dcpo_openrlhf.recipe.schema import Monitor


class Sink(Protocol):
    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One object a line, there as soon as it is written."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", buffering=1)

    def line(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.line({"step": step, **metrics})

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Points from `first_step` on that an earlier part of the run left are hidden: they are made again."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of wandb in RUN/wandb. A resumed run folder goes on in it, or, where that holds points of steps that are
    made again, which wandb cannot take back, in another one of the same group.
    """

    def __init__(self, folder: Path, *, mode: str, project: str, config: dict[str, Any], first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"monitor.wandb = {mode} needs the package wandb, which cannot be imported ({error}); "
                "install it (pip install wandb) or set monitor.wandb=off"
            ) from error
        self._identity = folder / "wandb_id"
        known = self._identity.read_text().split() if self._identity.exists() else []
        last = int(known[1]) if len(known) > 1 else 0
        self._id = known[0] if known and last < first_step else uuid4().hex[:16]
        self._note(first_step - 1)
        self._end = wandb.teardown
        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=folder,
            project=project,
            name=folder.name,
            group=folder.name,
            id=self._id,
            resume="allow",
            config=config,
            settings=wandb.Settings(console="off", disable_git=True),
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)
        self._note(step)

    def _note(self, step: int) -> None:
        self._identity.write_text(f"{self._id} {step}")

    def close(self) -> None:
        self._run.finish()
        self._end()  # finish alone returns before wandb's own process has written the file


class MetricsLog:
    """The sinks of a run, in its folder; `config` is the whole recipe, for those that keep it."""

    def __init__(self, folder: Path, m: Monitor, *, config: dict[str, Any], first_step: int = 1) -> None:
        self._events = JsonLines(folder / "events.jsonl")
        self._sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl")]
        if m.tensorboard:
            self._sinks.append(TensorBoard(folder / "tensorboard", first_step=first_step))
        if m.wandb != "off":
            settings: dict[str, Any] = {"mode": m.wandb, "project": m.wandb_project, "config": config}
            self._sinks.append(WeightsAndBiases(folder, first_step=first_step, **settings))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def event(self, alert: Alert) -> None:
        self.line(asdict(alert))

    def line(self, event: dict[str, Any]) -> None:
        """An event of another kind: it has a step and a cause."""
        self._events.line(event)

    def close(self) -> None:
        for sink in (self._events, *self._sinks):
            sink.close()


def progress_line(step: int, steps: int, m: dict[str, float]) -> str:
    """One line a person reads while it runs: reward, success, entropy against target, T, alpha, length, its end."""
    ends = time.strftime("%H:%M", time.localtime(time.time() + (steps - step) * m["time/step"]))
    return (
        f"step {step}/{steps}  reward {m['rollout/reward_mean']:.2f}  success {m['rollout/success_rate']:.2f}  "
        f"entropy {m['entropy/exact']:.3f} (target {m['entropy/target']:.4g})  "
        f"T {m['dcpo/temperature']:g}  alpha {m['dcpo/alpha']:.3f}  length {m['rollout/length_mean']:.0f}  "
        f"grad {m['policy/grad_norm']:.2f}  {m['time/step']:.0f} s"
        + (f" (MFU {m['cost/mfu']:.2f})" if "cost/mfu" in m else "")
        + f"  ends about {ends}"
    )


def success_rate(metrics: dict[str, float]) -> float:
    """Share of a step's responses that are right; in records of before it had a name, the mean of rewards 0 and 1."""
    return metrics.get("rollout/success_rate", metrics["rollout/reward_mean"])


def final_table(
    history: Sequence[dict[str, float]],
    *,
    method: str,
    problems: int,
    accuracies: tuple[float | None, float | None],
    minutes: float,
    peak_gib: float,
) -> str:
    """The run in one Markdown table: held-out accuracy, reward and entropy of the first and of the last step."""
    first, last = history[0], history[-1]
    targets = " to ".join(dict.fromkeys(f"{m['entropy/target']:g}" for m in (first, last)))

    def row(title: str, before: float | None, after: float | None) -> str:
        numbers = ("-" if value is None else f"{value:.3f}" for value in (before, after))
        return f"| {title} | {' | '.join(numbers)} |"

    lines = [
        f"| {method}, {len(history)} steps | before | after |",
        "|---|---|---|",
        row(f"held-out accuracy ({problems} problems)", *accuracies),
        row("reward of the step's responses", first["rollout/reward_mean"], last["rollout/reward_mean"]),
        row("share of them that are right", success_rate(first), success_rate(last)),
        row(f"entropy, nats/token (target {targets})", first["entropy/exact"], last["entropy/exact"]),
        f"| minutes, evaluation and export included | | {minutes:.1f} |",
        f"| peak memory of a policy process, GiB | | {peak_gib:.2f} |",
    ]
    return "\n".join(lines)
