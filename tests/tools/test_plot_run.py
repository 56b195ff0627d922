"""The picture of runs: read from metrics.jsonl, one line a run, the target drawn, bad input named."""

import json
import sys

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from tools import plot_run


def write_run(folder, *, alpha: float, entropies=(2.0, 0.2, 0.5), target=0.5):
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "train/step": step,
            "entropy/exact": entropy,
            "entropy/target": target,
            "rollout/reward_mean": step / 4,
            "dcpo/alpha": alpha,
            "dcpo/temperature": 1.2,
        }
        for step, entropy in enumerate(entropies)
    ]
    evaluation = {"step": len(rows), "evaluation/accuracy": 0.9}
    lines = [json.dumps(row) for row in [*rows, evaluation]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures drawn during a test, kept open to be looked at."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    return kept


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_two_runs_side_by_side(tmp_path, monkeypatch, figures, capsys):
    runs = [write_run(tmp_path / "dcpo", alpha=0.1), write_run(tmp_path / "grpo", alpha=0.0, entropies=(2.0, 0.1))]
    output = tmp_path / "new" / "picture.png"
    monkeypatch.setattr(sys, "argv", ["plot_run", *map(str, runs), "--output", str(output)])
    assert plot_run.main() == 0
    assert capsys.readouterr().out.strip() == str(output)
    height, width = plt.imread(output).shape[:2]
    assert (width, height) == (1400, 500)

    entropy, reward, alpha, temperature = figures[0].axes
    drawn = lines(entropy)
    assert drawn["dcpo"] == ([0, 1, 2], [2.0, 0.2, 0.5])
    assert drawn["grpo"] == ([0, 1], [2.0, 0.1])
    assert drawn["target $H_0$ = 0.5"][1] == [0.5, 0.5]
    assert lines(reward)["dcpo"][1] == [0.0, 0.25, 0.5]
    assert set(lines(alpha)) == {"dcpo", "grpo"}
    assert set(lines(temperature)) == {"dcpo"}  # no T takes part where alpha is 0
    assert "nats/token" in entropy.get_ylabel()
    assert {entropy.get_xlabel(), temperature.get_xlabel()} == {"step"}


def test_missing_metric_is_a_gap(tmp_path):
    run = write_run(tmp_path / "run", alpha=0.1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/step": 9}\n')
    columns = plot_run.read_metrics(run)
    assert columns["train/step"] == [0, 1, 2, 9]
    assert columns["entropy/exact"][3] != columns["entropy/exact"][3]  # NaN


def test_equal_folder_names_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert plot_run.labels(folders) == [str(folder) for folder in folders]
    assert plot_run.labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("", "finished no step"), ('{"train/step": 0}\n{"train', "line 2: not JSON")],
)
def test_bad_run_is_named(tmp_path, monkeypatch, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(plot_run.RunError, match=message):
        plot_run.read_metrics(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot_run", str(tmp_path), "--output", str(tmp_path / "x.png")])
    assert plot_run.main() == 1
    assert str(tmp_path / "metrics.jsonl") in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
