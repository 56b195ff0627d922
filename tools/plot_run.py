"""Draw runs side by side: as a picture, and as one HTML page with every metric, the timeline, events and kept samples.

python -m tools.plot_run RUN_DIR [RUN_DIR ...] --output FILE.png --output FILE.html

The page needs nothing but a browser: data, style and script are inside it, and it asks no server for anything.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tools.run_folder import Row, RunError, metrics, optional, read_jsonl, sample_files

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


def read_metrics(run: Path) -> Series:
    """Columns of RUN/metrics.jsonl by metric name; NaN where a step lacks one. Steps without training are left out."""
    rows = metrics(run).values()
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
        panels["reward"].set(title="Mean reward of the samples", ylabel="reward")
        if all(0 <= value <= 1 for run in runs.values() for value in run.get("rollout/reward_mean", [])):
            panels["reward"].set(ylim=(-0.02, 1.02))
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
    """One dashed line for each distinct entropy target H_0 of the runs, a curve where it has a schedule."""
    style = {"color": "#555555", "linestyle": "--", "linewidth": 1.3}
    constant, drawn = set[float](), list[list[float]]()
    for run in runs.values():
        target = [value for value in run.get("entropy/target", []) if value == value]
        if len(set(target)) <= 1:
            constant |= set(target)
        elif target not in drawn:
            drawn.append(target)
            _line(axes, run, "entropy/target", label=f"target $H_0$ = {target[0]:g} to {target[-1]:g}", **style)
    for value in sorted(constant):
        axes.axhline(value, label=f"target $H_0$ = {value:g}", **style)


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).with_name("run_page.html")
MAX_SAMPLE_STEPS = 100
MAX_RESPONSE_CHARS = 6000


def panel(
    title: str, metric: str, unit: str = "", *, reference: str = "", sparse: bool = False, log: bool = False
) -> dict[str, Any]:
    return {"title": title, "metric": metric, "unit": unit, "reference": reference, "sparse": sparse, "log": log}


PANELS = [
    panel("Entropy, and its target", "entropy/exact", "nats/token", reference="entropy/target"),
    panel("Mean reward", "rollout/reward_mean"),
    panel("Share of right responses", "rollout/success_rate"),
    panel("Held-out accuracy", "heldout_accuracy", sparse=True),
    panel("Response length, mean", "rollout/length_mean", "tokens"),
    panel("Cut-off responses", "rollout/truncated_fraction", "share"),
    panel("Weight of the regulariser, alpha", "dcpo/alpha"),
    panel("Temperature of the target policy", "dcpo/temperature"),
    panel("Target ratio rho, mean", "dcpo/target_ratio_mean"),
    panel("Target ratio rho, largest", "dcpo/target_ratio_max", log=True),
    panel("Mismatch of trainer and engine, mean |p - p'|", "mismatch/prob_diff_mean"),
    panel("Mismatch of trainer and engine, KL", "mismatch/kl", "nats/token"),
    panel("Gradient norm", "policy/grad_norm"),
    panel("Clipped above", "policy/clip_fraction_high", "share"),
    panel("Seconds a step", "time/step", "s"),
]


def page_data(runs: dict[str, Path]) -> dict[str, Any]:
    """What the page shows. Raises RunError."""
    pairs = zip(_colours(len(runs)), runs.items(), strict=True)
    return {"panels": PANELS, "runs": [_page_run(label, folder, colour) for colour, (label, folder) in pairs]}


def _page_run(label: str, folder: Path, colour: str) -> dict[str, Any]:
    evaluated = {row["step"]: row for row in optional(folder, "evaluation.jsonl") if isinstance(row.get("step"), int)}
    rows = metrics(folder)
    steps = sorted(rows.keys() | evaluated.keys())
    merged: list[Row] = [evaluated.get(step, {}) | rows.get(step, {}) for step in steps]
    names = sorted({name for row in merged for name, value in row.items() if _finite(value) is not None} - {"step"})
    files = sample_files(folder)
    kept = _spread(list(files), MAX_SAMPLE_STEPS)
    return {
        "label": label,
        "colour": colour,
        "steps": steps,
        "series": {name: [_finite(row.get(name)) for row in merged] for name in names},
        "timeline": _timeline(folder),
        "events": [_event(row, folder) for row in optional(folder, "events.jsonl")],
        "samples": {step: [_plain(_shortened(row)) for row in read_jsonl(files[step])] for step in kept},
        "note": f"{len(kept)} of {len(files)} steps are in this page." if len(kept) < len(files) else "",
    }


def _timeline(folder: Path) -> list[Row]:
    """Rows of timeline.jsonl, all in seconds since the first one began: {label, start, begin, end, bars}.

    Bars are {process: [[phase, begin, end], ...]}. None in runs of before there was such a file.
    """
    rows, file = optional(folder, "timeline.jsonl"), folder / "timeline.jsonl"
    labels = {"start": "start", "step": "", "end": "end, after "}
    found = []
    for row in rows:
        try:
            begin, zero = float(row["begin"]), float(rows[0]["begin"])
            first = row["part"] == "start" and row["step"]  # of a resumed run
            label = f"start, after {row['step']}" if first else labels[row["part"]] + str(row["step"] or "")
            bars = {
                process: [[name, round(begin - zero + b, 4), round(begin - zero + e, 4)] for name, b, e in done]
                for process, done in row["processes"].items()
            }
            times = {"begin": round(begin - zero, 4), "end": round(float(row["end"]) - zero, 4)}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wrong = f"{file}: a row has step, part, begin, end and processes, not {_shortened(row)}"
            raise RunError(wrong) from error
        found.append({"label": label, "start": row["part"] == "start", **times, "bars": bars})
    return found


def _finite(value: object) -> float | None:
    """The number, to seven digits; JSON knows no NaN."""
    return float(f"{value:.7g}") if isinstance(value, int | float) and math.isfinite(value) else None


def _spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _event(row: Row, folder: Path) -> Row:
    """An event as step, cause, and everything else it says as one line."""
    if not isinstance(row.get("step"), int) or not isinstance(row.get("cause"), str):
        raise RunError(f"{folder / 'events.jsonl'}: an event has an integer step and a cause, not {row}")
    parts = []
    for name, value in row.items():
        if name == "text":
            parts.insert(0, str(value))
        elif name not in ("step", "cause"):
            pairs = value.items() if isinstance(value, dict) else [(name, value)]
            parts.append(", ".join(f"{key} = {_brief(inner)}" for key, inner in pairs))
    return {"step": row["step"], "cause": row["cause"], "details": "; ".join(filter(None, parts))}


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """The value with NaN and the infinities as their names, which JSON does not know as numbers."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shortened(row: Row) -> Row:
    """The sample with the middle of a very long response left out."""
    response = row.get("response")
    if not isinstance(response, str) or len(response) <= MAX_RESPONSE_CHARS:
        return row
    head, tail = response[: MAX_RESPONSE_CHARS * 2 // 3], response[-MAX_RESPONSE_CHARS // 3 :]
    left_out = len(response) - len(head) - len(tail)
    return row | {"response": f"{head}\n[... {left_out} characters left out ...]\n{tail}"}


def write_page(runs: dict[str, Path], output: Path) -> None:
    """Write the page of the runs, by label."""
    # "<" is written as an escape: a response that holds </script> must not end the data.
    data = json.dumps(page_data(runs), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(PAGE.read_text(encoding="utf-8").replace("__DATA__", data), encoding="utf-8")


# --- the command -----------------------------------------------------------------------------------------------------


def labels(folders: list[Path]) -> list[str]:
    """The folders' names, or their whole paths where two names are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot_run", description="Draw runs as a picture and as one self-contained HTML page."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--output",
        type=Path,
        action="append",
        metavar="FILE",
        help=".html for the page, .png, .svg or .pdf for the picture; may be repeated; default: run.png and run.html",
    )
    args = parser.parse_args(argv)
    outputs = args.output or [Path("run.png"), Path("run.html")]
    for output in outputs:
        if output.suffix not in (".html", ".png", ".svg", ".pdf"):
            parser.error(f"--output ends in .html, .png, .svg or .pdf, not {str(output)!r}")
    folders = dict(zip(labels(args.runs), args.runs, strict=True))
    if len(folders) < len(args.runs):
        parser.error(f"name each run once, not {', '.join(map(str, args.runs))}")
    try:
        series = {label: read_metrics(folder) for label, folder in folders.items()}
        for output in outputs:
            if output.suffix == ".html":
                write_page(folders, output)
            else:
                draw(series, output)
            print(output)
    except (RunError, OSError) as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
