"""The check of a machine's GPUs, proven on logical devices: its sections end, are kept, and make one JSON and table."""

import json
from pathlib import Path

import pytest

from tools import gpu_check


@pytest.mark.slow
def test_sections_run_once_and_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--device", "cpu", "--output", str(tmp_path), "--minutes", "60", "--steps", "1"]
    assert gpu_check.main([*run, "--only", "machine", "tests", "demo"]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["sections"]
    assert report["device"] == "cpu" and list(found) == ["machine", "demo", "tests"]
    assert "vllm 0.29.0" in found["machine"]["packages"]
    assert found["demo"]["steps"] == 1 and found["demo"]["response tokens/s of a step"] > 0
    assert found["demo"]["peak GiB"] > 0 and found["demo"]["planned GiB"] > 0 and found["demo"]["mismatch"] < 1e-3
    assert "passed" not in found["tests"] or not found["tests"].get("failed")
    table = (tmp_path / "report.md").read_text()
    assert table == capsys.readouterr().out and "| demo | passed |" in table

    before = (tmp_path / "demo.log").stat().st_mtime_ns
    assert gpu_check.main([*run, "--only", "demo"]) == 0
    assert (tmp_path / "demo.log").stat().st_mtime_ns == before, "what has ended is not run again"


def test_what_has_no_time_or_devices_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "device_count", lambda: 1)
    run = ["--output", str(tmp_path), "--minutes", "0", "--only", "doctor", "nccl"]
    assert gpu_check.main(run) == 1
    found = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert {name: result["status"] for name, result in found.items()} == {"doctor": "out of time", "nccl": "not here"}
    assert not (tmp_path / "doctor.json").exists(), "another call runs it"
    monkeypatch.setattr(gpu_check.torch.cuda, "device_count", lambda: 0)
    assert gpu_check.main(run) == 1


def test_a_section_that_does_not_end_is_ended(tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, "cpu", 1, ends=0.0)
    status, _ = check.run("late", "http.server", "0")
    assert status is None and gpu_check._status(status) == "out of time"


@pytest.mark.parametrize("name", ["doctor", "demo", "nccl", "tensor", "pipeline"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_run_is_a_recipe_that_can_be_planned(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcpo_openrlhf.recipe import preflight
    from dcpo_openrlhf.recipe.load import load_recipe
    from tests.tiny import make_biased_model

    model = make_biased_model(tmp_path / "model")
    monkeypatch.setattr(gpu_check.Check, "model", lambda self, *, tiny: model)
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(gpu_check.Check, "run", lambda self, name, *command: commands.append(command) or (0, ""))
    gpu_check.SECTIONS[name][1](gpu_check.Check(tmp_path, device, 10, 0.0))
    (command,) = commands
    recipe = load_recipe(command[2], list(command[3:]))
    preflight.check(recipe, dry_run=True)
    assert recipe.train.steps == 10 and recipe.run.device == device
    assert device == "cpu" or recipe.transport == ("nccl" if name == "nccl" else "ipc")
