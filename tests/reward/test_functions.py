"""Reward functions of the user's: their forms, what they answer wrongly, which response pays, what they may see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcpo_openrlhf.reward.functions import FunctionError, load
from dcpo_openrlhf.reward.pool import Grade, GraderPool, Question, chosen_grader
from tests.bounds import HANG_S

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = '''
import os, sys, time
import numpy as np
from collections import namedtuple

def openrlhf(queries, prompts, labels):
    """Two numbers of each response, as tensors, and a log."""
    assert all(q.startswith(p) for q, p in zip(queries, prompts))
    reward = np.array([float(len(q) - len(p)) for q, p in zip(queries, prompts)])
    right = np.array([float(q.endswith(label)) for q, label in zip(queries, labels)])
    return {"rewards": reward, "scores": right, "extra_logs": {"half": reward / 2, "rows": len(queries)}}

def plain(batch):
    return [
        {"reward": -1.5, "success": True, "logs": {"bonus": metadata.get("bonus", 0)}} if response == answer else 0.25
        for prompt, response, answer, source, metadata in batch
    ]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.5, "acc": solution_str == ground_truth, "depth": extra_info["depth"]}

async def slow_but_async(batch):
    return [row.source == "a" for row in batch]

def by_response(batch):
    """What each response asks for."""
    for row in batch:
        if row.response == "hang":
            time.sleep(10**6)
        if row.response == "die":
            os._exit(3)
        if row.response == "exit":
            sys.exit("enough")
        if row.response == "raise":
            raise RuntimeError("broken on purpose")
        if row.response == "memory":
            x = bytearray(10**10)
    odd = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "x", "half": {"reward": 1.0, "success": 0.5},
           "other": {"points": 1.0}, "taken": {"reward": 1.0, "logs": {"crashes": 1.0}}}
    return [odd.get(row.response, 1.0) for row in batch]

def short(batch):
    return [1.0]

def nothing(batch):
    pass

def environment(batch):
    print("not a reply")
    return [{"reward": 0.0, "extracted": " ".join(sorted(os.environ))} for _ in batch]

def size(batch):
    return [len(batch)] * len(batch)

async_object, four = 7, lambda a, b, c, d: 0
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("functions") / "mine.py"
    file.write_text(FUNCTIONS)
    return file


def pool(file: Path, name: str, **options: object) -> GraderPool:
    values = {"workers": 2, "deadline_s": HANG_S} | options
    return GraderPool(extractor=f"{file}:{name}", **values)  # type: ignore[arg-type]


def question(answer: str = "7", **more: object) -> Question:
    return Question(answer, **({"prompt": "What? ", "id": "p"} | more))  # type: ignore[arg-type]


def test_openrlhfs_form(file: Path) -> None:
    with pool(file, "openrlhf") as grader:
        first, second = grader.grade(["It is 7", "8"], [question()] * 2)
    assert first == Grade(7.0, "", success=1.0, logs={"half": 3.5, "rows": 2.0})
    assert (second.reward, second.success) == (1.0, 0.0)


def test_a_plain_function_gives_numbers_or_reward_success_and_logs(file: Path) -> None:
    with pool(file, "plain") as grader:
        grades = grader.grade(["7", "8"], [question(metadata={"bonus": 2, "more": [1]})] * 2)
        assert grades == [Grade(-1.5, "", success=1.0, logs={"bonus": 2.0}), Grade(0.25, "", success=0.0)]
    with pool(file, "plain", success_threshold=0.25) as grader:
        assert grader.grade(["8"], [question()])[0].success == 1.0


def test_verls_form_and_a_coroutine(file: Path) -> None:
    with pool(file, "compute_score") as grader:
        assert grader.grade(["7"], [question(metadata={"depth": 3})]) == [
            Grade(0.5, "", success=1.0, logs={"acc": 1.0, "depth": 3.0})
        ]
        of_its_file = {"extra_info": {"depth": 4}, "depth": 3, "ability": "math"}
        assert grader.grade(["7"], [question(metadata=of_its_file)])[0].logs["depth"] == 4.0
    with pool(file, "slow_but_async") as grader:
        assert [g.reward for g in grader.grade(["", ""], [question(source=s) for s in "ab"])] == [1.0, 0.0]


def test_whole_batches_at_a_time_or_whole_groups(file: Path) -> None:
    questions = [question(id=f"p{i // 3}") for i in range(12)]
    with pool(file, "size") as grader:
        assert {g.reward for g in grader.grade([""] * 12, questions)} == {12.0}
    with pool(file, "size", batch_size=4) as grader:
        assert {g.reward for g in grader.grade([""] * 12, questions)} == {6.0}


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise", "RuntimeError: broken on purpose"),
        ("exit", "SystemExit: enough"),
        ("memory", "MemoryError"),
        ("die", "its process died"),
        ("nan", "reward = nan is not finite"),
        ("inf", "reward = inf is not finite"),
        ("none", "reward = None is no number"),
        ("text", "reward = 'x' is no number"),
        ("half", "success = 0.5 must be 0 or 1"),
        ("other", "unknown keys ['points']"),
        ("taken", "'crashes' names no log"),
    ],
)
def test_one_bad_answer_costs_its_response_alone(response: str, reason: str, file: Path) -> None:
    with pool(file, "by_response") as grader:
        grades = grader.grade(["fine", "fine", response, "fine", "fine"], [question()] * 5)
        assert [g.reward for g in grades] == [g.success for g in grades] == [1.0, 1.0, 0.0, 1.0, 1.0]
        assert reason in grades[2].failure and grades[2].failure.startswith(f"{file}:by_response: ")
        assert (grader.timeouts, grader.crashes, grader.failures) == (0, response == "die", response != "die")
        assert grader.grade(["fine"], [question()])[0].reward == 1.0


def test_a_hang_is_ended_and_costs_its_response_alone(file: Path) -> None:
    with pool(file, "by_response", deadline_s=2.0) as grader:
        grades = grader.grade(["fine", "hang", "fine"], [question()] * 3)
        assert [g.reward for g in grades] == [1.0, 0.0, 1.0]
        assert grades[1].timed_out and "ran past reward.deadline" in grades[1].failure
        assert (grader.timeouts, grader.crashes, grader.failures) == (1, 0, 0)


@pytest.mark.parametrize(("name", "reason"), [("short", "1 rewards for 3 responses"), ("nothing", "NoneType instead")])
def test_an_answer_of_another_length_is_zero_for_the_batch(name: str, reason: str, file: Path) -> None:
    with pool(file, name) as grader:
        grades = grader.grade([""] * 3, [question()] * 3)
        assert [g.reward for g in grades] == [0.0] * 3 and all(reason in g.failure for g in grades)
        assert grader.failures == 3


def test_the_worker_sees_no_secret_of_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("ANYTHING_ELSE", "secret")
    with pool(file, "environment") as grader:
        names = (grader.grade([""], [question()])[0].extracted or "").split()
    assert "PATH" in names and not {"WANDB_API_KEY", "ANYTHING_ELSE"} & set(names)


def test_long_batches_pass_whole(file: Path) -> None:
    with pool(file, "openrlhf") as grader:
        grades = grader.grade(["x" * 10_000] * 100, [question()] * 100)
    assert {g.reward for g in grades} == {10_000.0}


@pytest.mark.parametrize(
    ("source", "grader"),
    [("gsm8k", "last_integer"), ("hub/mmlu_pro test", "f.py:a"), ("other", "boxed"), ("mmlu", "boxed")],
)
def test_the_source_chooses_by_name_then_by_pattern(source: str, grader: str) -> None:
    by_source = {"*mmlu_pro*": "f.py:a", "g*": "f.py:b", "gsm8k": "last_integer"}
    assert chosen_grader(source, default="boxed", by_source=by_source) == grader


def test_a_mix_of_sources_is_graded_in_one_call(file: Path) -> None:
    by_source = {"gsm8k": "last_integer", "math": "boxed"}
    with GraderPool(workers=1, extractor=f"{file}:plain", by_source=by_source, deadline_s=HANG_S) as grader:
        responses = ["It is 7", "\\boxed{\\sin\\frac{\\pi}{6}}", "7", "\\boxed{7}"]
        questions = [question(source="gsm8k"), question("1/2", source="math"), question(source="x"), question()]
        assert [g.reward for g in grader.grade(responses, questions)] == [1.0, 1.0, -1.5, 0.25]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mine.py:gone", "AttributeError"),
        ("nowhere.py:plain", "FileNotFoundError"),
        ("no.such.module:plain", "ModuleNotFoundError"),
        ("mine.py:async_object", "is a int, no function"),
        ("mine.py:four", r"takes \(a, b, c, d\); a reward function takes \(batch\)"),
        ("broken.py:f", "SyntaxError"),
        ("leaves.py:f", "SystemExit"),
    ],
)
def test_what_cannot_be_imported_is_named(name: str, reason: str, file: Path) -> None:
    (file.parent / "broken.py").write_text("def f(:\n")
    (file.parent / "leaves.py").write_text("print('words')\nimport sys\nsys.exit(0)\n")
    given = str(file.parent / name) if ".py:" in name else name
    with pytest.raises(FunctionError, match=reason):
        load(given)
    tried = subprocess.run(
        [sys.executable, "-m", "dcpo_openrlhf.reward.functions", given], cwd=ROOT, capture_output=True, text=True
    )
    (said,) = json.loads(tried.stdout)
    assert tried.returncode == 1 and said.startswith(given)


def test_a_module_on_the_path_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(file.parent), os.environ.get("PYTHONPATH", "")]))
    with GraderPool(workers=1, extractor="mine:plain", deadline_s=HANG_S) as grader:
        assert grader.grade(["7"], [question()])[0].reward == -1.5
