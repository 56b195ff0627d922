"""run.profile: which steps and ranks are recorded, what the files hold, and what a GPU adds; the runs themselves are in
test_end_to_end.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcpo_openrlhf import profiling
from dcpo_openrlhf.phases import phase
from dcpo_openrlhf.policy.actor import PolicyActor
from dcpo_openrlhf.policy.deepspeed.model import ZeroMesh
from dcpo_openrlhf.policy.megatron.mesh import Mesh
from dcpo_openrlhf.profiling import ProfiledSteps, Recording


def names(trace: Path) -> set[str]:
    return {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"}


def test_a_trace_holds_operators_and_phases_between_begin_and_write(tmp_path: Path) -> None:
    torch.ones(2).cumsum(0)
    recording = Recording("cpu")
    with phase("update"):
        torch.ones(2, 2) @ torch.ones(2, 2)
    recording.write(tmp_path / "profile", "step_000001_driver")
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "step_000001_driver.json"
    assert {"aten::mm", "update"} <= names(file) and "aten::cumsum" not in names(file)


class Group:
    """Ranks that note what they are told; their answers come through the test's ray."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def async_run_method(self, *call: Any) -> None:
        self.told.append(call)


def test_the_named_steps_alone_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ray", SimpleNamespace(get=lambda _: None))
    group = Group()
    steps = ProfiledSteps([2, 4], tmp_path, group)
    for step in range(1, 6):
        steps.begin(step)
        steps.end(step)
    folder = str(tmp_path / "profile")
    ends = [("end_profile", folder, f"step_{step:06d}") for step in (2, 4)]
    assert group.told == [("begin_profile",), ends[0], ("begin_profile",), ends[1]]
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "step_000002_driver.json",
        "step_000004_driver.json",
    }


def mesh(**place: int) -> Mesh:
    rest = dict.fromkeys(Mesh.__dataclass_fields__, 0) | {"device": torch.device("cpu")}
    return Mesh(**(rest | place))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "file"),
    [
        (mesh(), "step_000003_policy_stage0.json"),
        (mesh(pipeline_rank=2), "step_000003_policy_stage2.json"),
        (mesh(tensor_rank=1), None),
        (mesh(context_rank=1), None),
        (mesh(data_rank=1), None),
        (ZeroMesh(0, 2, torch.device("cpu")), "step_000003_policy_stage0.json"),
        (ZeroMesh(1, 2, torch.device("cpu")), None),
    ],
)
def test_one_rank_of_each_pipeline_stage_writes(where: Any, file: str | None, tmp_path: Path) -> None:
    actor: Any = SimpleNamespace(mesh=where)
    PolicyActor.begin_profile(actor)
    PolicyActor.end_profile(actor, str(tmp_path), "step_000003")
    assert [path.name for path in tmp_path.iterdir()] == ([] if file is None else [file])


def test_on_a_gpu_a_memory_snapshot_is_written_and_its_history_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("synchronize"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: did.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: did.append(Path(file).name))
    activities: list[Any] = []
    real = torch.profiler.profile

    def profile(*, activities: list[Any], **how: Any) -> Any:
        asked.extend(activities)
        return real(activities=activities[:1], **how)

    asked = activities
    monkeypatch.setattr(torch.profiler, "profile", profile)
    Recording("cuda").write(tmp_path, "x")
    assert [activity.name for activity in activities] == ["CPU", "CUDA"]
    assert did == [{"max_entries": profiling.MEMORY_EVENTS}, "synchronize", "x_memory.pickle", {"enabled": None}]
