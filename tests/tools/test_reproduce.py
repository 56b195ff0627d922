"""The reproduction's tool: its grid, task, numbers over seeds, archive, and tables made of committed metrics."""

import contextlib
import itertools
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcpo_openrlhf import train_dcpo
from dcpo_openrlhf.methods import METHODS
from dcpo_openrlhf.recipe import preflight
from dcpo_openrlhf.recipe.load import load_recipe
from tools.reproduce import __main__ as command
from tools.reproduce import again, archive, grid, runner, small_model, tables, tasks
from tools.reproduce import statistics as s
from tools.reproduce.archive import Result
from tools.reproduce.grid import CELLS, RECIPES, Cell, Run
from tools.reproduce.session import session, shared_settings

TINY_TASK = tasks.Signs(largest=8, size=4, target=20, count=450)

# --- the grid --------------------------------------------------------------------------------------------------------


def overrides(cell: Cell) -> list[str]:
    files = ["task.train=x.jsonl", "task.heldout=y.jsonl"] if cell.model == "small" else []
    return [*cell.overrides(3), "model.path=/nowhere", *files]


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_every_cell_is_a_recipe(cell: Cell) -> None:
    recipe = load_recipe(RECIPES[cell.model], overrides(cell))
    assert recipe.run.seed == 3 and recipe.method.name in METHODS
    for key, value in cell.keys.items():
        assert recipe.settings[key] == value


def test_the_grid_of_the_paper() -> None:
    asked = {name for table in tables.TABLES.values() for name in table.cells}
    assert asked == set(CELLS), "a cell that no table asks for, or the other way round"
    assert len(list(grid._cells())) == len(CELLS), "two cells of one name"
    assert {CELLS[name].keys["method.name"] for name in CELLS} == set(METHODS)
    runs = tables.TABLES["figure_2"].runs()
    assert len(runs) == 5 * (len(grid.LEVELS) + 1) and len(set(runs)) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs), "any prefix is balanced over the cells"


@pytest.mark.parametrize("name", [cell.name for cell in grid.QUESTIONS])
def test_a_question_changes_one_thing(name: str) -> None:
    """Of the cell that it is told beside: one key, or two of one section that belong together."""
    keys, beside = CELLS[name].keys, CELLS[tables.BESIDE.get(name, "dcpo")].keys
    changed = {key for key in keys | beside if keys.get(key) != beside.get(key)}
    assert 1 <= len(changed) <= 2 and len({key.split(".")[0] for key in changed}) == 1, changed


def test_runs_that_tables_share_are_made_once() -> None:
    every = [run for table in tables.TABLES.values() for run in table.runs()]
    once = runner.in_order(every)
    assert len(once) == len({run.name for run in every}) < len(every)
    assert [run.seed for run in once] == sorted(run.seed for run in once)


def test_identity_tells_other_keys_and_not_where_a_run_lies() -> None:
    identities = {cell.identity for cell in CELLS.values()}
    assert len(identities) == len({(c.model, json.dumps(c.keys, sort_keys=True)) for c in CELLS.values()})
    assert Cell("a", "", {"method.name": "grpo"}).identity == Cell("b", "x", {"method.name": "grpo"}).identity


def test_small_runs_share_their_engines() -> None:
    """But for those that generate ahead, which share theirs."""
    small = [load_recipe(RECIPES["small"], overrides(c)) for c in CELLS.values() if c.model == "small"]
    for ahead in (0, 1):
        first, *others = (shared_settings(recipe) for recipe in small if recipe.rollout.ahead == ahead)
        assert others and all(settings == first for settings in others)
    first = shared_settings(small[0])
    assert shared_settings(load_recipe(RECIPES["smollm2"], ["model.path=/nowhere"])) != first


# --- the task and its model ------------------------------------------------------------------------------------------


def test_signs_are_taught_right_answers_that_differ() -> None:
    rng, task = random.Random(1), tasks.SIGNS
    for problem in task.problems()[:50]:
        answers = {task.trace(problem, rng) for _ in range(5)}
        assert len(answers) > 1
        assert all(task.right(problem, answer) for answer in answers)


def test_sums_are_taught_what_pupils_write() -> None:
    """Whose slips are seen through, who carries every 2 as 1, and who does neither."""
    problems = tasks.SUMS.problems()
    shares = {}
    for name, slip, forget in (("taught", 0.22, 0.7), ("carries 1", 0.0, 1.0), ("exact", 0.0, 0.0)):
        rng, task = random.Random(1), replace(tasks.SUMS, slip=slip, forget=forget)
        answers = [task.trace(problem, rng) for problem in problems]
        assert all(0 <= int(word) < tasks.TOTALS for answer in answers for word in answer.split())
        shares[name] = sum(map(tasks.SUMS.right, problems, answers)) / len(problems)
    assert shares["exact"] == 1.0
    assert shares["taught"] == pytest.approx(0.35, abs=0.02)
    assert shares["carries 1"] == pytest.approx(0.80, abs=0.02)


@pytest.mark.parametrize(
    ("problem", "response", "is_right"),
    [
        ("reach 5 with 2 4 5 6 :", "+5 +4 =-4 +2 -6 =0", True),
        ("reach 5 with 2 4 5 6 :", "-6 +2 =9 +5 +4 =0", True),
        ("reach 5 with 2 4 5 6 :", "+5 +4 =40 +2 -6 =40", True),  # what is left is not graded
        ("reach 5 with 2 4 5 6 :", "+5 +4 +2 -6", True),
        ("reach 5 with 2 4 5 6 :", "-5 +4 =6 -2 +6 =2", True),  # 3, which is near enough
        ("reach 5 with 2 4 5 6 :", "+5 +4 =-4 +2 +6 =0", False),  # 17
        ("reach 5 with 2 4 5 6 :", "+5 +4 -6 -2", False),  # 1
        ("reach 5 with 2 4 5 6 :", "+5 =0", False),  # numbers are missing
        ("reach 5 with 2 4 5 6 :", "+5 +4 +2 -6 +1 -1", False),
        ("reach 5 with 2 4 5 6 :", "+5 +5 +5 -10", False),
        ("reach 5 with 2 4 5 6 :", "", False),
        ("add 9 8 7 , 1 2 3 , 4 0 0 :", "24 8 4", True),
        ("add 9 8 7 , 1 2 3 , 4 0 0 :", "24 7 4", True),  # one total is wrong
        ("add 9 8 7 , 1 2 3 , 4 0 0 :", "23 8 5", False),
        ("add 9 8 7 , 1 2 3 , 4 0 0 :", "24 8", False),
        ("add 9 8 7 , 1 2 3 , 4 0 0 :", "24 8 4 0", False),
        ("add 9 8 7 , 1 2 3 , 4 0 0 :", "24 8 add", True),
        ("add 9 8 7 , 1 2 3 , 4 0 0 :", "", False),
    ],
)
def test_what_is_right(problem: str, response: str, is_right: bool) -> None:
    task = tasks.SIGNS if problem.startswith("reach") else tasks.SUMS
    assert task.right(problem, response) == is_right


def test_the_grader_of_a_recipe() -> None:
    problem = tasks.SUMS.problems()[0]
    exact = replace(tasks.SUMS, slip=0.0, forget=0.0).trace(problem, random.Random(1))
    good, bad = tasks.grade([(problem, exact, "-", "sums", {}), (problem, "0 0 0 0 0 0", "-", "sums", {})])
    assert (good["reward"], good["success"], good["extracted"]) == (1.0, 1.0, exact)
    assert (bad["reward"], bad["success"]) == (0.0, 0.0)
    totals = exact.split()
    for wrong in range(7):
        answer = " ".join([*("0" for _ in totals[:wrong]), *totals[wrong:]])
        rows = [(problem, answer, "-", "sums", {})]
        found = [grade(rows)[0]["success"] for grade in (tasks.grade, tasks.grade_easy)]
        assert found == [wrong <= 1, wrong <= 4]


def test_what_can_be_reached_by_trying_all_signs() -> None:
    numbers = [3, 5, 8]
    sums = {
        sum(n * sign for n, sign in zip(numbers, signs, strict=True)) for signs in itertools.product((1, -1), repeat=3)
    }
    bits = tasks._reachable(numbers)
    assert {n for n in range(-20, 21) if bits >> (n + tasks.FAR) & 1} == sums


@pytest.mark.parametrize("task", [tasks.SUMS, tasks.SIGNS], ids=["sums", "signs"])
def test_the_tokenizer_goes_there_and_back(task: tasks.Task) -> None:
    rng = random.Random(2)
    tokenizer = small_model.make_tokenizer(task)
    for problem in task.problems()[:20]:
        for text in (problem, task.trace(problem, rng)):
            tokens = tokenizer.encode(text)
            assert len(tokens) == len(text.split()), "a word is a token"
            assert tokenizer.decode(tokens) == text
            assert tokenizer.pad_token_id not in tokens and tokenizer.eos_token_id not in tokens


def test_a_llama_that_is_the_same_network() -> None:
    tokenizer = small_model.make_tokenizer(TINY_TASK)
    qwen = small_model.make_model(small_model.Setting(hidden=64, heads=2, kv_heads=1, layers=2, ffn=64), tokenizer)
    with torch.no_grad():
        for name, parameter in qwen.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(small_model.as_llama(qwen)(tokens).logits, qwen(tokens).logits)


def test_the_small_model_is_made_whole_and_repeats(tmp_path: Path) -> None:
    setting = small_model.Setting(hidden=64, heads=2, kv_heads=1, layers=1, ffn=64, batch=8, updates=2, look_every=1)
    weights = []
    for name in ("a", "b"):
        small_model.make(tmp_path / name, setting, TINY_TASK)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    text = TINY_TASK.problems()[0]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a").encode(text)) == len(text.split()), (
        "read as it was written"
    )
    assert small_model.is_made(tmp_path / "a", setting, TINY_TASK)
    assert not small_model.is_made(tmp_path / "a", small_model.Setting(), TINY_TASK)
    train, heldout = (
        {json.loads(line)["id"] for line in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "heldout")
    )
    assert len(heldout) == small_model.HELD_OUT and not train & heldout


# --- numbers over seeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_interval_by_numpy(count: int) -> None:
    values = np.random.default_rng(count).normal(3.0, 2.0, count)
    # the 0.975 quantile of Student's t by a sum: with t = sqrt(n - 1) tan(u) its density is that of cos(u) ** (n - 2)
    u = np.linspace(-math.pi / 2, math.pi / 2, 400_001)
    mass = np.cumsum(np.cos(u) ** (count - 2))
    quantile = math.sqrt(count - 1) * math.tan(u[np.searchsorted(mass, 0.975 * mass[-1])])
    half = quantile * values.std(ddof=1) / math.sqrt(count)
    found = s.interval(list(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-3)


def test_interval_of_one_seed_says_nothing_of_others() -> None:
    found = s.interval([2.0])
    assert found.mean == 2.0 and math.isnan(found.low) and math.isnan(found.high)
    assert s.sign_of(found) == "undecided"
    with pytest.raises(ValueError, match="1 to 10 values are needed, one a seed, not 0"):
        s.interval([])


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([1.0, 1.1, 1.2], "reproduced"), ([-1.0, -1.1, -1.2], "not reproduced"), ([1.0, -0.1, 0.2], "undecided")],
)
def test_a_verdict_needs_the_whole_interval(values: list[float], verdict: str) -> None:
    assert s.sign_of(s.interval(values)) == verdict


def test_a_claim_of_several_needs_each() -> None:
    assert s.all_of(["reproduced", "reproduced"]) == "reproduced"
    assert s.all_of(["reproduced", "undecided"]) == "undecided"
    assert s.all_of(["undecided", "not reproduced"]) == "not reproduced"
    assert s.all_of(["not reproduced", "not run yet"]) == "not run yet"


def result(
    entropy: list[float],
    *,
    success: float = 0.5,
    target: float = 1.0,
    accuracy: float = 0.5,
    temperature: float = 2.0,
) -> Result:
    steps = [
        {
            "train/step": float(i),
            "entropy/exact": h,
            "entropy/target": target,
            "rollout/success_rate": success,
            "dcpo/regulariser_share": 0.25,
            "dcpo/temperature": temperature,
        }
        for i, h in enumerate(entropy, 1)
    ]
    evaluations = [{"step": 0, "heldout_accuracy": 0.1}, {"step": len(steps), "heldout_accuracy": accuracy}]
    return Result({}, steps, evaluations, {"samples": 4, "right": [0, 4, 2]})


@pytest.mark.parametrize(
    ("entropy", "smoothed", "mean_error", "offset", "overshoot", "settled"),
    [
        ([2.0, 1.5, 0.8, 0.9, 1.05, 1.0], 1, (0.1 + 0.05 + 0.0) / 3, (-0.1 + 0.05) / 3, 0.2, 4),
        ([2.0, 1.5, 1.2, 1.2, 1.2, 1.2], 1, 0.2, 0.2, 0.0, math.inf),
        ([0.2, 0.5, 1.3, 1.0, 1.0, 1.0], 1, 0.0, 0.0, 0.3, 4),
        ([1.0, 1.0, 1.0, 1.0], 1, 0.0, 0.0, 0.0, 1),
        # the means of two steps: 1.6, 1.3, 0.85, 0.93, 1.0, 0.96
        ([1.6, 1.0, 0.7, 1.16, 0.84, 1.08], 2, (0.16 + 0.16 + 0.08) / 3, 0.08 / 3, 0.15, 4),
    ],
)
def test_tracking(
    entropy: list[float], smoothed: int, mean_error: float, offset: float, overshoot: float, settled: float
) -> None:
    found = s.tracking(result(entropy), smoothed)
    assert found == pytest.approx((mean_error, offset, overshoot, settled))


def test_scores_of_a_run() -> None:
    run = result([1.0] * 4)
    assert s.average_at_k(run) == 0.5
    assert s.passed_at(run, 1) == pytest.approx(0.5)
    assert s.passed_at(run, 2) == pytest.approx((0 + 1 + (1 - 1 / 6)) / 3)  # C(2,2) / C(4,2) = 1/6
    assert (s.accuracy_before(run), s.accuracy(run)) == (0.1, 0.5)


@pytest.mark.parametrize(("temperature", "pull"), [(2.0, 0.125), (0.5, 0.0), (1.25, 0.05), (1.0, 0.0)])
def test_pull_is_of_steps_that_lift_the_entropy(temperature: float, pull: float) -> None:
    assert s.pull(result([1.0] * 4, temperature=temperature)) == pytest.approx(pull)


def test_the_rule_of_thumb_says_whether_the_pull_tells_what_holds() -> None:
    holds, falls = result([1.0] * 4), result([0.1] * 4, temperature=1.25)
    for run in (holds, falls):
        run.about["keys"] = {"method.name": "dcpo", "method.target_entropy": 1.0}
    text = tables.rule_of_thumb([holds, falls])
    assert "1 runs of dcpo ended within 25% of H_0, the regulariser's pull 0.12 to 0.12; 1 runs of dcpo did not" in text
    assert text.endswith("The pull alone tells them apart.")
    other = Result(holds.about, result([0.1] * 4).steps)
    assert tables.rule_of_thumb([holds, falls, other]).endswith("The pull alone does not tell them apart.")


@pytest.mark.parametrize(
    ("name", "method", "target"),
    [
        ("smollm2/a", "dcpo", 0.3),
        ("smollm2/a", "grpo", 0.3),
        ("small/a", "dcpo", 0.3),
        ("small/a", "grpo", grid.TARGET),
    ],
)
def test_entropy_is_held_against_the_recipes_target(name: str, method: str, target: float) -> None:
    """But for the small model's GRPO, against that of the others."""
    run = result([0.6] * 4, target=0.3)
    run.about.update(run=name, keys={"method.name": method})
    assert tables.relative_entropy(run) == pytest.approx(0.6 / target)
    assert tables.distance(run) == pytest.approx(abs(0.6 - target) / target)


# --- archive and tables ----------------------------------------------------------------------------------------------


def put(folder: Path, cell: str, seed: int, found: Result, **about: Any) -> None:
    run = Run(CELLS[cell], seed)
    whole = Result(
        {"identity": run.cell.identity, "keys": run.cell.keys, "run": run.name, **about},
        found.steps,
        found.evaluations,
        found.counts,
    )
    archive.write(archive.file_of(run, folder), whole)


def test_the_archive_gives_back_what_it_took_and_repeats(tmp_path: Path) -> None:
    run = Run(CELLS["grpo"], 1)
    first = result([1 / 3, math.nan, 0.5])
    put(tmp_path, "grpo", 1, first)
    data = archive.file_of(run, tmp_path).read_bytes()
    put(tmp_path, "grpo", 1, first)
    assert archive.file_of(run, tmp_path).read_bytes() == data
    found = archive.load(run, tmp_path)
    assert found is not None and found.evaluations == first.evaluations and found.counts == first.counts
    assert found.series("entropy/exact") == pytest.approx([0.333333, math.nan, 0.5], nan_ok=True)
    put(tmp_path, "grpo", 1, first, identity="of other keys")
    assert archive.load(run, tmp_path) is None


def test_a_table_of_committed_metrics(tmp_path: Path) -> None:
    for seed, shift in ((1, 0.0), (2, 0.02), (3, 0.04)):
        for level, name in grid.LEVELS.items():
            accuracy = 0.6 - abs(level - 0.6) + shift
            flat = [2.0, *[level * (1 + shift)] * 19]
            put(tmp_path, name, seed, result(flat, target=level, accuracy=accuracy))
    table = tables.TABLES["figure_2"]
    report = table.report(tmp_path)
    assert [claim.verdict for claim in report.claims] == ["reproduced", "reproduced"]
    text = report.markdown()
    assert "| dcpo, H_0 = 0.6 | 3 | 0.612 [0.582, 0.642] |" in text
    assert text.endswith("Not run yet: grpo.")
    assert (tmp_path / "figure_2.svg").read_text().startswith("<?xml")
    assert "<svg" in report.html(tmp_path)
    put(tmp_path, "dcpo-h0.6", 1, result([2.0, *[0.1] * 19], target=0.6, accuracy=0.1))
    assert [claim.verdict for claim in table.report(tmp_path).claims] == ["undecided", "undecided"]


def test_what_falls_or_stays_is_told(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for cell, end in (("j1", 0.1), ("j2", 1.0), ("j3", 1.0 + 0.01 * seed), ("j4", 0.1 + 0.01 * seed)):
            put(tmp_path, cell, seed, result([2.0, *[end] * 19]))
    verdicts = {c.text: c.verdict for c in tables.TABLES["figure_1"].report(tmp_path).claims}
    for text in ("j3 holds", "j4 collapses", "j1 collapses", "j2 holds", "j3 keeps more entropy than j4"):
        assert verdicts[text] == "reproduced", text
    assert verdicts["grpo collapses"] == "not run yet"


def test_every_table_can_be_told_before_any_run(tmp_path: Path) -> None:
    for table in tables.TABLES.values():
        text = table.report(tmp_path).markdown()
        assert text.startswith("## ") and "reproduced**" not in text.replace("not reproduced", "")


def test_what_was_made_again_lies_inside_or_not(tmp_path: Path) -> None:
    assert "**not run yet**: 0 runs and 0 made again" in again.table("dcpo", tmp_path)
    other, third = (again.folder(name, tmp_path) for name in ("other (R), of 2 cores", "third"))
    assert other.name == "other-R-of-2-cores"
    for seed, shift in ((1, 0.0), (2, 0.02), (3, 0.04)):
        put(tmp_path, "dcpo", seed, result([0.8 + shift] * 4, accuracy=0.5 + shift), machine="one")
        put(other, "dcpo", seed, result([0.81 + shift] * 4, accuracy=0.9), machine="other")
    put(other, "dcpo", 4, result([9.0] * 4), machine="a seed that the cell has not")
    text = again.table("dcpo", tmp_path)
    assert "| one, 3 seeds | other, 3 seeds | inside | difference |" in text
    assert "| H, last quarter [nats/token] | 0.820 [0.770, 0.870] | 0.830 [0.780, 0.880] | yes | 0.010 [0." in text
    accuracy = (
        "| held-out accuracy, T = 0.1 | 0.520 [0.470, 0.570] | 0.900 [0.900, 0.900] | no | 0.380 [0.330, 0.430] |"
    )
    assert accuracy in text
    put(third, "dcpo", 2, result([0.7] * 4), machine="third")
    text = again.table("dcpo", tmp_path)
    assert "| other, 3 seeds | inside | difference | third, 1 seed | inside | difference |" in text
    assert "| yes | 0.010 [0.010, 0.010] | 0.700 | no | -0.120 |" in text


def test_a_cell_is_made_again_from_its_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With --model nothing but the machine differs, and the record says so; its runs have a folder of their own."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(archive, "RESULTS", tmp_path)
    monkeypatch.setattr("tools.reproduce.session.session", lambda: contextlib.nullcontext("engines"))
    monkeypatch.setattr(runner, "make", lambda run, engines, **kw: made.append({"run": run.name, **kw}))
    monkeypatch.setattr(runner, "processor_name", lambda: "X")
    monkeypatch.setattr(runner.processor, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 1)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    put(tmp_path, "dcpo", 2, result([0.8] * 4))
    model = tmp_path / "model"
    with pytest.raises(SystemExit):
        again.main(["--run", "--model", str(model)])
    assert f"--model {model} is no model's folder" in capsys.readouterr().err
    model.mkdir()
    (model / "config.json").write_text("{}")
    for options in (["--model", str(model)], []):
        assert again.main(["--run", *options]) == 0
    assert runner.machine(model) == "1 cores X, bf16 units, the same start"
    first = {"results": tmp_path / "again/1-cores-X-bf16-units-the-same-start", "model": model}
    second = {"results": tmp_path / "again/1-cores-X-bf16-units", "model": None}
    assert made == [{"run": "small/dcpo/seed2", **first}, {"run": "small/dcpo/seed2", **second}]
    files = {"model.path": model, "task.train": model / "train.jsonl", "task.heldout": model / "heldout.jsonl"}
    assert runner.make_model("small", model) == {key: str(file) for key, file in files.items()}


# --- which runs are made ---------------------------------------------------------------------------------------------


def test_finished_runs_are_skipped_and_broken_ones_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(archive, "WORK", tmp_path / "work")
    runs = [Run(CELLS[name], seed) for name in ("grpo", "dcpo") for seed in (1, 2)]
    put(tmp_path / "results", "grpo", 1, result([1.0]))
    broken = runner.folder_of(runs[1])
    broken.mkdir(parents=True)
    (broken / "metrics.jsonl").write_text("")
    assert [runner.state(run) for run in runs] == ["finished", "broken", "not run yet", "not run yet"]
    made: list[str] = []

    def make(run: Run, _: object) -> Result:
        made.append(run.name)
        put(tmp_path / "results", run.cell.name, run.seed, result([1.0]))
        return Result({"minutes": 0.0}, [])

    monkeypatch.setattr(runner, "make", make)
    assert runner.make_all(runs, minutes=0.0, say=lambda _: None) == 3 and made == []
    with runner.claim(runs[1]) as mine, runner.claim(runs[1]) as again:
        assert mine and not again
        assert runner.make_all(runs, minutes=1.0, say=lambda _: None) == 1, "another command makes it"
    assert made == ["small/dcpo/seed1", "small/dcpo/seed2"]
    assert runner.make_all(runs, minutes=1.0, say=lambda _: None) == 0
    assert made == ["small/dcpo/seed1", "small/dcpo/seed2", "small/grpo/seed2"]
    assert "figure_2" in command.progress([tables.TABLES["figure_2"]])


def test_the_machine_is_named_with_what_it_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert "held to" not in runner.machine()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert runner.machine().endswith("bf16 units, held to AVX2")


def test_one_start_of_the_engines_serves_runs_that_may_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcpo_openrlhf.rollout import pool

    log: list[str] = []
    engines = iter(("first", "second"))
    monkeypatch.setattr(preflight, "check", lambda recipe, dry_run: [])
    monkeypatch.setattr(train_dcpo, "join_ray", lambda recipe, stack: stack.callback(log.append, "ray ends"))
    monkeypatch.setattr(train_dcpo, "create_engines", lambda recipe: next(engines))
    monkeypatch.setattr(pool, "shutdown_engines", lambda serving, seconds: log.append(f"{serving} end"))
    monkeypatch.setattr(train_dcpo, "run", lambda recipe, serving, then: log.append(f"{recipe.run.seed} on {serving}"))
    recipes = [load_recipe(RECIPES["small"], [*overrides(CELLS["grpo"]), f"run.seed={seed}"]) for seed in (1, 2)]
    other = load_recipe(RECIPES["small"], [*overrides(CELLS["grpo"]), "rollout.max_new_tokens=8"])
    with session() as shared:
        for recipe in (*recipes, other):
            shared.train(recipe, then=lambda trainer: None)
    ends = ["first end", "ray ends", "3 on second", "second end", "ray ends"]
    assert log == ["1 on first", "2 on first", *ends]


# --- the committed results -------------------------------------------------------------------------------------------


def test_committed_runs_are_of_the_grid() -> None:
    known = {archive.file_of(run): run for table in tables.TABLES.values() for run in table.runs()}
    for file in (archive.RESULTS / "runs").rglob("*.jsonl.gz"):
        assert file in known, f"{file} is no run of the grid"
        found = archive.load(known[file])
        assert found is not None, f"{file} is of another recipe or other keys"
        steps = load_recipe(RECIPES[known[file].cell.model], overrides(known[file].cell)).train.steps
        assert len(found.steps) == steps and len(found.evaluations) >= 2


def test_runs_that_took_turns_on_one_start_of_the_engines_are_equal_while_their_recipes_are() -> None:
    """Until H comes near the highest H_0 the controller's output is saturated, whatever H_0."""
    levels = (0.4, 0.6, 0.8)
    loaded = [archive.load(Run(CELLS[grid.LEVELS[level]], 1)) for level in levels]
    runs = [found for found in loaded if found is not None]
    assert len(runs) == 3
    near = max(levels) + 1 / load_recipe(RECIPES["small"], overrides(CELLS["dcpo"])).method.proportional_gain
    far = next(i for i, h in enumerate(runs[0].series("entropy/exact")) if h < near)
    assert far >= 5
    skipped = ("time/", "cost/", "monitor/", "entropy/target", "entropy/steps_to_leave")
    for first, *others in zip(*(run.steps[:far] for run in runs), strict=True):
        for other in others:
            assert [name for name in first if not name.startswith(skipped) and first[name] != other[name]] == []


def test_results_are_what_the_committed_numbers_say(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(archive.RESULTS, folder)
    text = command.results((table.report(folder) for table in tables.TABLES.values()), folder)
    assert (archive.RESULTS / "results.md").read_text() == text, "write it again: python -m tools.reproduce all"
