"""A run that a fault ended is started again, within bounds; with a script in the place of the run."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dcpo_openrlhf import checkpoint
from tests.bounds import ENDS_S, HANG_S
from tools import supervise

ROOT = Path(__file__).parents[2]
# One line of starts.txt a start; the plan says for each start how many steps it finishes and how it ends.
RUN = """
import json, os, signal, sys, time
folder, plan = sys.argv[1], json.loads(sys.argv[2])
with open(f"{folder}/starts.txt", "a") as file:
    file.write(" ".join(sys.argv[3:]) + "\\n")
begun = len(open(f"{folder}/starts.txt").readlines())
steps, end = plan[begun - 1]
os.makedirs(f"{folder}/run", exist_ok=True)
with open(f"{folder}/run/metrics.jsonl", "a") as file:
    for step in steps:
        file.write(json.dumps({"step": step}) + "\\n")
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waiting", flush=True)
    time.sleep(3600)
sys.exit(end)
"""


def command(folder: Path, plan: list) -> list[str]:
    values = {
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        "model": {"path": "unused"},
        "task": {"kind": "arithmetic"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "run.py").write_text(RUN)
    run = [sys.executable, str(folder / "run.py"), str(folder), json.dumps(plan)]
    return [*run, "--recipe", str(folder / "recipe.yaml"), "train.steps=9"]


@pytest.fixture
def handlers() -> Iterator[None]:
    """The process's own signal handlers, put back after the test."""
    before = {number: signal.getsignal(number) for number in supervise.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def starts(folder: Path) -> list[str]:
    return (folder / "starts.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("plan", "status", "count", "said"),
    [
        ([([1, 2], 0)], 0, 1, ""),
        ([([1], 1), ([2], "kill"), ([3], 0)], 0, 3, "ended with status 137 after step 2; start 2 of --restarts 3"),
        ([([1], 2)], 2, 1, ""),
        ([([1], 3)], 3, 1, ""),
        ([([1], 143)], 143, 1, ""),
        ([([1], 1), ([2], 1), ([], 1)], 1, 3, "after step 2, as an earlier time: it is not started again"),
        ([([], 1), ([], 1)], 1, 2, "after step 0, as an earlier time"),
        ([([step], 1) for step in range(5)], 1, 4, "3 of --restarts 3 are used"),
    ],
)
def test_a_fault_is_followed_by_another_start_but_no_crash_loop(
    plan: list, status: int, count: int, said: str, tmp_path: Path, handlers: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise.main(["--restarts", "3", "--wait", "0", "--", *command(tmp_path, plan)]) == status
    assert len(starts(tmp_path)) == count
    assert all(line.endswith("train.steps=9 checkpoint.resume=auto") for line in starts(tmp_path))
    assert said in capfd.readouterr().out


@pytest.mark.parametrize(
    ("saved", "then"), [(True, "auto"), (False, "{0}/step_000040")], ids=["saved", "nothing saved"]
)
def test_a_named_checkpoint_is_where_a_run_resumes_until_it_has_one_of_its_own(
    saved: bool, then: str, tmp_path: Path, handlers: None
) -> None:
    words = [*command(tmp_path, [([1], 1), ([2], 0)]), f"checkpoint.resume={tmp_path}/step_000040"]
    if saved:
        (folder := tmp_path / "run/checkpoints/step_000041").mkdir(parents=True)
        checkpoint.write_manifest(folder, step=41, scores={})
    assert supervise.main(["--wait", "0", "--", *words]) == 0
    assert [line.rpartition("checkpoint.resume=")[2] for line in starts(tmp_path)] == [
        f"{tmp_path}/step_000040",
        then.format(tmp_path),
    ]


def test_the_first_start_resumes_what_the_recipe_itself_says(tmp_path: Path, handlers: None) -> None:
    words = command(tmp_path, [([1], 0)])
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write(f"checkpoint: {{resume: {tmp_path}/step_000040}}\n")
    assert supervise.main(["--", *words]) == 0
    assert starts(tmp_path)[0].endswith("train.steps=9")


def test_the_recipe_may_stand_behind_an_equals_sign(tmp_path: Path) -> None:
    *before, option, file, override = command(tmp_path, [])
    recipe = supervise.recipe_of([*before, f"{option}={file}", override])
    assert recipe.run.dir == tmp_path / "run" and recipe.train.steps == 9


@pytest.mark.parametrize("count", ["-1", "x"])
def test_a_count_below_0_is_refused(count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        supervise.main(["--restarts", count, "--", *command(tmp_path, [])])
    assert ended.value.code == 2 and "--restarts" in capsys.readouterr().err
    assert not (tmp_path / "starts.txt").exists()


def test_a_signal_before_there_is_a_process_ends_it_when_there_is(tmp_path: Path) -> None:
    supervisor = supervise.Supervisor()
    supervisor.pass_on(signal.SIGTERM, None)
    status = supervisor.run([sys.executable, "-c", f"import time; time.sleep({HANG_S})"])
    assert status == 128 + signal.SIGTERM


def test_a_signal_ends_the_run_and_the_supervision(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tools.supervise", "--", *command(tmp_path, [([1], "wait")])]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDS_S) == 143
    finally:
        process.kill()
    assert len(starts(tmp_path)) == 1


def test_a_command_without_a_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise.main(["--", "python", "train.py"]) == 2
    assert "COMMAND must name a recipe" in capsys.readouterr().err


def test_overrides_before_the_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse would refuse what is added after it, and the run's folder would be looked for in the wrong place."""
    words = command(tmp_path, [])
    assert supervise.main(["--", *words[:-3], "run.dir=runs/a", *words[-3:]]) == 2
    assert "COMMAND sets run.dir=runs/a before --recipe; put overrides after" in capsys.readouterr().err
