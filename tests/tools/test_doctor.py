"""The doctor: one line a check, and WRONG, naming the tensor, where an engine's weights are not the trainer's."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dcpo_openrlhf.recipe.schema import Recipe
from tests.bounds import HANG_S
from tests.tiny import make_tiny_model
from tools import doctor, examination

Main = Callable[..., tuple[int, dict[str, str], str]]
LIVE = ["start", *examination.Examination.CHECKS, "end"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    values = {
        "run": {"dir": str(folder / "run"), "device": "cpu", "logical_devices": 3},
        "model": {"path": str(make_tiny_model(folder / "model", tie=False)), "dtype": "fp32"},
        "task": {"kind": "arithmetic", "template": "plain"},
        "train": {"steps": 1, "prompts_per_step": 2, "prompts_per_update": 2, "group_size": 2},
        "parallel": {"devices_per_node": 2, "tensor": 2},
        "rollout": {"engines": 1, "max_prompt_tokens": 100, "max_new_tokens": 24, "cpu_kv_cache_gb": 0.1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.fixture
def main(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """(exit status, check -> the rest of its line, last line) of the doctor; nothing may be written into run.dir."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "log_to", lambda _: None)  # it would take pytest's log handlers away

    def call(*overrides: str) -> tuple[int, dict[str, str], str]:
        status = doctor.main(["--recipe", str(recipe), *overrides])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert not (recipe.parent / "run").exists()
        *lines, last = out.splitlines() or [err.rstrip()]
        return status, {line[:18].rstrip(): line[18:] for line in lines}, last

    return call


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "started", lambda _: pytest.fail("a run was started"))


def test_bad_recipe_is_status_2_and_one_error(main: Main, nothing_starts: None) -> None:
    status, lines, last = main("train.stepz=3")
    assert (status, lines) == (2, {})
    assert last.startswith("error: ") and "did you mean 'steps'?" in last


def test_ctrl_c_before_anything_starts_is_told(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "before_start", interrupted)
    assert main() == (130, {}, "ended by SIGINT; every process of this check is gone")


def test_what_preflight_finds_is_told_by_check_and_nothing_starts(main: Main, nothing_starts: None) -> None:
    status, lines, last = main("parallel.tensor=1", "rollout.max_new_tokens=300", "task.kind=jsonl", "task.train=/no")
    assert (status, last) == (1, "2 of 24 checks are WRONG")
    assert lines["model"].startswith("WRONG    rollout.max_prompt_tokens + max_new_tokens = 100 + 300 = 400 exceeds")
    assert lines["data files"].startswith("WRONG    task.train = /no: no such readable file or folder; name one")
    assert {lines[name] for name in LIVE} == {"skipped  (a run could not start: model, data files)"}
    for name in ("method", "weights", "run folder", "devices"):
        assert lines[name] == "ok"
    assert "cores" in lines["machine"] and "torch 2" in lines["packages"]


@pytest.mark.parametrize(("override", "side"), [("train.rollout_only=true", "policy"), ("rollout.replay=/r", "engine")])
def test_a_recipe_without_one_of_the_two_has_nothing_to_compare(
    main: Main, nothing_starts: None, override: str, side: str
) -> None:
    status, lines, _ = main(override)
    assert {lines[name] for name in LIVE} == {f"skipped  ({override.partition('=')[0]}: such a run starts no {side})"}
    assert status == ("replay" in override)  # there is no such recording


def test_a_start_that_fails_is_told_on_one_line(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Recipe) -> Any:
        raise RuntimeError("engine 0 died: ray::Engine\n  File x\n\x1b[36mValueError: no room\x1b[0m\n")

    monkeypatch.setattr(doctor, "started", fails)
    status, lines, last = main()
    assert (status, last) == (1, "1 of 24 checks are WRONG")
    assert lines["start"] == "WRONG    engine 0 died: ray::Engine ... ValueError: no room"
    assert lines["sync"] == "skipped  (start failed)" and lines["end"].startswith("ok")


def test_own_copy_changes_what_is_written_and_nothing_else(recipe: Path) -> None:
    given = doctor.load_recipe(recipe, ["monitor.wandb=online", "weight_sync.verify=false", "checkpoint.resume=auto"])
    own = doctor.own_copy(given, "/tmp/x").model_dump(mode="json")
    changed = {
        f"{section}.{key}": own[section][key]
        for section, keys in given.model_dump(mode="json").items()
        for key, value in keys.items()
        if own[section][key] != value
    }
    assert changed == {
        "run.dir": "/tmp/x",
        "weight_sync.verify": True,
        "checkpoint.every": 0,
        "checkpoint.resume": "never",
        "checkpoint.export_hf": False,
        "monitor.tensorboard": False,
        "monitor.wandb": "off",
    }


def test_unequal_names_tensor_engine_and_worker() -> None:
    sent = {"a": 1, "b": 2, "c": -1}
    assert examination.unequal(sent, [[dict(sent)], [dict(sent), dict(sent)]]) == []
    assert examination.unequal(sent, [[dict(sent)], [dict(sent), {"a": 1, "b": 3, "d": 4}]]) == [
        "b: sent 0x2, engine 1 worker 1 has 0x3",
        "c: sent 0xffffffffffffffff, engine 1 worker 1 has none",
        "d: sent none, engine 1 worker 1 has 0x4",
    ]


def test_mismatch_by_hand() -> None:
    trainer = torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.7, 0.7]]).log()
    engine = torch.tensor([[0.4, 0.2, 0.1], [0.2, 0.1, 0.1]]).log()
    found = examination.mismatch(trainer, engine, torch.tensor([[True, True, False], [True, False, False]]))
    assert found == pytest.approx(
        ((0.1 + 0 + 0.1) / 3, 0.1, (math.log(0.5 / 0.4) + math.log(2)) / 3, (math.log(0.4 / 0.5) + math.log(2)) / 3, 3)
    )


@pytest.fixture(scope="module")
def trainer(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One started run for the tests below, in their order: the last one leaves it spoiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        own = doctor.own_copy(doctor.load_recipe(recipe), str(tmp_path_factory.mktemp("own")))
        with doctor.started(own) as made:
            yield made


@pytest.fixture
def running(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The doctor finds that run started."""
    monkeypatch.setattr(doctor, "started", lambda _: contextlib.nullcontext(trainer))
    return trainer


@pytest.mark.slow
def test_trainer_and_engine_hold_the_same_weights(main: Main, running: Any) -> None:
    status, lines, last = main()
    assert (status, last) == (0, "all well"), lines
    assert all(lines[name].startswith("ok ") for name in LIVE), lines
    assert "report version 1" in lines["sync"] and "report version 2" in lines["second sync"]
    assert "21 tensors arrived as sent, on 1 workers" in lines["checksums"]
    assert "21 of 21 with another checksum than before" in lines["new checksums"]
    assert "4 of 4 continuations of 12 tokens are equal" in lines["greedy"]
    for name in ("probabilities", "new probabilities"):
        assert float(lines[name].split("mean ")[1].split(",")[0]) < 1e-5, "fp32 on both sides"


@pytest.mark.slow
def test_a_sync_that_brings_the_old_weights_is_wrong(main: Main, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    sync, calls = running.sync_weights, []

    def second_changes_the_version_alone() -> None:
        calls.append(1)
        if len(calls) == 1:
            return sync()
        ray.get([e.update_weight_version.remote(str(running.weights_version + 1)) for e in running.vllm_engines])

    monkeypatch.setattr(running, "sync_weights", second_changes_the_version_alone)
    status, lines, _ = main()
    assert (status, len(calls)) == (1, 2)
    assert lines["new checksums"].startswith("WRONG ") and "sent the old weights" in lines["new checksums"]
    assert lines["new probabilities"].startswith("WRONG ") and "still answer with the old" in lines["new probabilities"]
    assert [name for name in LIVE if not lines[name].startswith("ok ")] == ["new checksums", "new probabilities"]


@pytest.mark.slow
def test_spoiled_weights_are_named(main: Main, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the trainer's sync another one brings the engine, under the same version, one other tensor."""
    import ray

    from dcpo_openrlhf.weight_sync import connect
    from tests.weight_sync.engines import FolderSource

    ray.get(running.actor_model_group.async_run_method("save_model", str(tmp_path / "now")))
    spoiled, source = "model.layers.1.mlp.down_proj.weight", FolderSource(tmp_path / "now")
    source.tensors[spoiled] *= -1
    sync = running.sync_weights

    def sync_and_spoil() -> None:
        sync()
        other = connect(
            transport="shared_memory", rank=0, engines=running.vllm_engines, source=source, deadline_s=HANG_S
        )
        other.send_weights(version=running.weights_version)

    monkeypatch.setattr(running, "sync_weights", sync_and_spoil)
    status, lines, _ = main()
    assert status == 1
    assert lines["checksums"].startswith(f"WRONG    {spoiled}: sent 0x")
    assert "engine 0 worker 0 has 0x" in lines["checksums"] and "more" not in lines["checksums"]
    assert lines["probabilities"].startswith("WRONG ") and "must not exceed" in lines["probabilities"]
    assert lines["greedy"].startswith("WRONG ") and "which rounding does not explain" in lines["greedy"]
    # the first connection's memory is no longer the engine's
    assert "arrived with checksum" in lines["second sync"]
    assert lines["new checksums"] == "skipped  (second sync failed)"
