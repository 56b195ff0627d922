"""Draw runs side by side: entropy against its target, reward, and the controller's alpha and T.

Usage: python -m tools.plot_run RUN_DIR [RUN_DIR ...] --output FILE.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

Series = dict[str, list[float]]

# Colours that stay apart for colour-blind readers (Okabe-Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}


class RunError(ValueError):
    """A run folder that cannot be drawn; names file, line and remedy."""


def read_metrics(run: Path) -> Series:
    """Columns of RUN/metrics.jsonl by metric name; NaN where a step lacks one. Steps without training are left out."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise RunError(f"{file}: no such file; name the folder of a run that has finished a step")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{file}, line {number}: not JSON ({error}); is the run still writing it?") from error
        if "train/step" in row:
            rows.append(row)
    if not rows:
        raise RunError(f"{file}: no line has train/step; the run has finished no step")
    names = sorted({name for row in rows for name in row})
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def draw(runs: dict[str, Series], output: Path) -> None:
    """Write the picture (1400 x 500 pixels) of the runs, by label."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(14, 5), dpi=100, layout="constrained")
        panels = figure.subplot_mosaic([["entropy", "reward", "alpha"], ["entropy", "reward", "temperature"]])
        for colour, (label, run) in zip(_colours(len(runs)), runs.items(), strict=True):
            _line(panels["entropy"], run, "entropy/exact", color=colour, label=label)
            _line(panels["reward"], run, "rollout/reward_mean", color=colour, label=label)
            _line(panels["alpha"], run, "dcpo/alpha", color=colour, label=label)
            if any(alpha > 0 for alpha in run.get("dcpo/alpha", [])):  # at alpha = 0 (GRPO) no T takes part
                _line(panels["temperature"], run, "dcpo/temperature", color=colour, drawstyle="steps-mid", label=label)
        _targets(panels["entropy"], runs)
        for panel in panels.values():
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels["entropy"].set(title="Entropy of the policy", ylabel="H [nats/token]", ylim=(0, None))
        panels["reward"].set(title="Mean reward of the samples", ylabel="reward", ylim=(-0.02, 1.02))
        panels["alpha"].set(title="Weight of the regulariser", ylabel="α", xlabel="", ylim=(-0.005, None))
        panels["temperature"].set(title="Temperature of the target policy", ylabel="T")
        panels["entropy"].legend()
        panels["reward"].legend(loc="lower right")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
        plt.close(figure)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _line(axes: Axes, run: Series, metric: str, **style: Any) -> None:
    if metric in run:
        axes.plot(run["train/step"], run[metric], **style)


def _targets(axes: Axes, runs: dict[str, Series]) -> None:
    """One dashed line for each distinct entropy target H_0 of the runs."""
    targets = {value for run in runs.values() for value in run.get("entropy/target", []) if value == value}
    for target in sorted(targets):
        axes.axhline(target, color="#555555", linestyle="--", linewidth=1.3, label=f"target $H_0$ = {target:g}")


def labels(folders: list[Path]) -> list[str]:
    """The folders' names, or their whole paths where two names are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw entropy, reward, alpha and T of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, default=Path("run.png"), help="default: %(default)s")
    args = parser.parse_args()
    try:
        draw({label: read_metrics(run) for label, run in zip(labels(args.runs), args.runs, strict=True)}, args.output)
    except (RunError, OSError) as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
