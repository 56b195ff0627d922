"""Real engines and a real policy, hurt in the middle of a run: the run ends as one that nothing disturbed."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcpo_openrlhf import checkpoint
from tools.bench import faults

STEPS = faults.STEPS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.tiny_recipe(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> faults.Outcome:
    """The run that nothing disturbs."""
    outcome = faults.run("none", recipe.parent, str(recipe), [])
    assert outcome.status == 0 and outcome.left == [], outcome.log[-3000:]
    return outcome


@pytest.mark.long
@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_hurt_run_ends_with_the_metrics_of_the_whole_one(name: str, recipe: Path, whole: faults.Outcome) -> None:
    hangs = ["rollout.heartbeat=30"] if "stop" in name else []
    outcome = faults.run(name, recipe.parent, str(recipe), hangs)
    assert outcome.status == 0, outcome.log[-3000:]
    assert "done" in outcome.seconds, "the fault did not come"
    assert name in ("kill-rank", "full-store") or "noticed" in outcome.seconds, outcome.log[-3000:]
    assert [row["step"] for row in outcome.rows] == list(range(1, STEPS + 1))
    assert [row["weights/version"] for row in outcome.rows] == list(range(2, STEPS + 2))
    assert faults.difference(outcome.rows, whole.rows) == 0.0, "fp32, equal batches"
    assert outcome.left == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["kill-actor", "sync-kill"])
def test_the_last_failure_saves_the_finished_step_and_is_one_message(name: str, recipe: Path) -> None:
    folder = recipe.parent / f"last-{name}"
    folder.mkdir()
    outcome = faults.run(name, folder, str(recipe), ["rollout.restarts=0", "checkpoint.every=50"])
    assert outcome.status == 1 and outcome.left == []
    errors = [line for line in outcome.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: rollout engine 0 died"), outcome.log[-3000:]
    assert "Traceback" not in outcome.log
    newest = checkpoint.newest_whole(folder / name / "checkpoints")
    assert newest is not None and newest.step == (2 if name == "sync-kill" else 1), "trained is trained"


@pytest.mark.long
def test_with_two_engines_the_other_one_takes_the_prompts(recipe: Path) -> None:
    two = ["rollout.engines=2", "rollout.heartbeat=300"]
    folder = recipe.parent / "two"
    folder.mkdir()
    outcomes = [faults.run(name, folder, str(recipe), two) for name in ("none", "kill-worker")]
    for outcome in outcomes:
        assert outcome.status == 0 and outcome.left == [], outcome.log[-3000:]
    assert "noticed" in outcomes[1].seconds
    assert faults.difference(outcomes[1].rows, outcomes[0].rows) < 1e-3, "other batches round differently"


AHEAD = ["rollout.ahead=1", "correction.level=token", "correction.mode=clip"]


@pytest.mark.long
@pytest.mark.parametrize("engines", [1, 2])
def test_what_is_lost_of_the_responses_drawn_ahead(engines: int, recipe: Path) -> None:
    """A second engine draws them by the same weights; without one, the next weights do."""
    folder = recipe.parent / f"ahead-{engines}"
    folder.mkdir()
    settings = [*AHEAD, f"rollout.engines={engines}", "rollout.heartbeat=300"]
    whole, hurt = (faults.run(name, folder, str(recipe), settings) for name in ("none", "kill-before"))
    for outcome in (whole, hurt):
        assert outcome.status == 0 and outcome.left == [], outcome.log[-3000:]
        assert [row["weights/version"] for row in outcome.rows] == list(range(2, STEPS + 2))
    assert "noticed" in hurt.seconds
    ages = [[row["rollout/age_mean"] for row in outcome.rows] for outcome in (whole, hurt)]
    assert ages == [[0, 1, 1], [0, 1 if engines == 2 else 0, 1]]
    if engines == 2:
        assert faults.difference(hurt.rows, whole.rows) < 1e-3, "other batches round differently"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 100 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.long
@pytest.mark.parametrize(("left", "asynchronous"), [(0, False), (200_000, False), (200_000, True)])
def test_a_full_disk_ends_the_run_with_what_is_whole(
    left: int, asynchronous: bool, recipe: Path, whole: faults.Outcome, small_disk: Path
) -> None:
    """No room for a step's samples, or for the second checkpoint alone; with room again the run goes on."""
    words = ["--recipe", str(recipe), f"run.dir={small_disk}/run", f"checkpoint.asynchronous={asynchronous}"]
    command = [sys.executable, "-m", "dcpo_openrlhf.train_dcpo", *words]
    filler, saved = small_disk / "filler", small_disk / "run" / "checkpoints" / "step_000001"
    with subprocess.Popen(command, cwd=faults.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not saved.exists():
            time.sleep(0.02)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while (free := shutil.disk_usage(small_disk).free) > left:
                file.write(bytes(min(free - left, 1 << 16)))
        _, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: no room to write into run.dir = {small_disk}/run: "), errors[-3000:]
    assert "its newest checkpoint is step 1, which is whole" in last and "checkpoint.resume=auto" in last
    filler.unlink()
    done = subprocess.run([*command, "checkpoint.resume=auto"], cwd=faults.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert faults.difference(rows, whole.rows) == 0.0
