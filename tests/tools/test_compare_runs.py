"""The first difference between two runs is found, and only differences."""

import json
from pathlib import Path

import pytest

from tools.compare_runs import main


def make(folder: Path, *, steps: int = 3, seed: int = 1) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"run: {{dir: {folder}, seed: {seed}}}\nmethod: {{name: dcpo}}\n")
    rows = [
        {"step": n, "train/step": n, "entropy/exact": 1 / n, "x": float("nan"), "time/step": hash(folder) % 97}
        for n in range(1, steps + 1)
    ]
    write(folder / "metrics.jsonl", rows)
    for n in range(1, steps + 1):
        write(folder / "samples" / f"step_{n:06d}.jsonl", [{"id": f"p{k}", "response": f"{n} {k}"} for k in range(2)])
    return folder


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    return make(tmp_path / "a"), make(tmp_path / "b")


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def compare(capsys, *arguments) -> tuple[int, str]:
    code = main(list(map(str, arguments)))
    output = capsys.readouterr()
    return code, output.out + output.err


def test_equal_but_for_place_and_time(runs, capsys):
    assert compare(capsys, *runs) == (0, "equal: 3 steps, samples of 3 of them\n")


def test_metric(runs, capsys):
    change(runs[1] / "metrics.jsonl", "0.5", "0.50000001")
    code, text = compare(capsys, *runs)
    assert (code, text) == (1, f"step 2, entropy/exact: 0.5 in {runs[0]}, 0.50000001 in {runs[1]}\n")
    assert compare(capsys, *runs, "--tolerance", "1e-6")[0] == 0
    assert compare(capsys, *runs, "--ignore", "entropy/")[0] == 0


def test_order_is_recipe_then_steps_and_metrics_before_samples(runs, capsys):
    first, second = runs
    change(second / "recipe.yaml", "dcpo", "grpo")
    change(second / "samples" / "step_000001.jsonl", "1 1", "other")
    change(second / "metrics.jsonl", "0.5", "0.7")
    code, text = compare(capsys, first, second)
    assert (code, text) == (1, f"recipe/method.name: 'dcpo' in {first}, 'grpo' in {second}\n")
    places = [line.split(":")[0] for line in compare(capsys, first, second, "--all")[1].splitlines()]
    assert places == ["recipe/method.name", "step 1, samples/2/response", "step 2, entropy/exact"]
    assert "samples/2/response: '1 1'" in compare(capsys, first, second, "--ignore", "recipe/")[1]


def test_seed_is_compared(tmp_path, capsys):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", seed=2)
    assert compare(capsys, first, second)[1].startswith("recipe/run.seed: 1 in")


def test_missing_metric_step_and_sample(runs, tmp_path, capsys):
    first, second = runs
    assert compare(capsys, first, make(tmp_path / "c", steps=2))[1].startswith("step 3, metrics: 'present'")
    change(second / "metrics.jsonl", '"x": NaN, ', "")
    assert compare(capsys, first, second)[1].startswith("step 1, x: nan in")
    change(first / "metrics.jsonl", '"x": NaN, ', "")
    (second / "samples" / "step_000002.jsonl").unlink()
    assert compare(capsys, first, second)[1].startswith("step 2, samples/1/id: 'p0' in")


def test_a_step_made_again_after_a_resume_counts_once(runs, capsys):
    file = runs[1] / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace("0.5", "9"), lines[1], lines[2]]) + "\n")
    assert compare(capsys, *runs)[0] == 0


def test_a_line_that_the_run_is_still_writing_is_left_out(runs, capsys):
    for run in runs:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"train/step": 4, "x')
    code, text = compare(capsys, *runs)
    assert code == 0 and "equal: 3 steps" in text
    for run in runs:
        assert text.count(f"{run / 'metrics.jsonl'}, line 4: left out, its end is not written") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: no such file"),
        ("", "finished no step"),
        ('{"train/step": 1}\n{"tr\n', "metrics.jsonl, line 2: not JSON"),
        ('{"tr\n{"train/step": 1}\n', "metrics.jsonl, line 1: not JSON"),
        ("[]\n", "line 1: list instead of an object"),
    ],
)
def test_bad_runs_are_named(runs, capsys, content, message):
    file = runs[1] / "metrics.jsonl"
    file.unlink()
    if content is not None:
        file.write_text(content)
    code, text = compare(capsys, *runs)
    assert code == 2 and message in text and text.count("\n") == 1


def test_missing_folder_and_bad_recipe(runs, capsys):
    assert compare(capsys, runs[0], runs[0] / "none") == (
        2,
        f"compare_runs: {runs[0] / 'none'}: no such folder; name the folder of a run\n",
    )
    (runs[1] / "recipe.yaml").write_text("a: [")
    code, text = compare(capsys, *runs)
    assert code == 2 and "recipe.yaml: not YAML" in text and text.count("\n") == 1
