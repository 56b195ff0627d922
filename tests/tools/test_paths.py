"""A job that is submitted with the checkout leaves models and data where they are, and finds them all the same."""

import io
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.job_submission import JobSubmissionClient

from tools import paths

ROOT = Path(__file__).parents[2]


def test_relative_paths_become_absolute_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("{model: {path: models/m}, task: {train: /data/d.jsonl, heldout: data/h.jsonl}}")
    monkeypatch.chdir(tmp_path)
    assert paths.main(["--recipe", "r.yaml", "run.dir=runs/a b", "checkpoint.resume=auto"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run.dir={tmp_path}/runs/a b",
        f"model.path={tmp_path}/models/m",
        f"task.heldout={tmp_path}/data/h.jsonl",
    ]
    listed = [
        "run.dir=/r",
        "model.path=/m",
        "task.heldout=null",
        "task.train=[{path: a, weight: 2}, {path: /b, weight: 1}]",
    ]
    assert paths.main(["--recipe", "r.yaml", *listed]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f'task.train=[{{"path":"{tmp_path}/a","weight":2.0}},{{"path":"/b","weight":1.0}}]'
    assert paths.main(["--recipe", "r.yaml", *listed, line]) == 0 and capsys.readouterr().out == "\n"
    assert paths.main(["--recipe", "r.yaml", "run.dirr=x"]) == 2
    assert "run.dirr" in capsys.readouterr().err


def test_large_models_folder_is_no_part_of_a_submitted_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"recipes/r.yaml", "dcpo_openrlhf/__init__.py", "tests/model_configs/m.json", "dcpo_openrlhf/data/x.py"}
    left = {"models/m/model.safetensors", "data/d.jsonl", "runs/a/metrics.jsonl", ".git/objects/x", "environment/x.py"}
    for name in here | left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with (tmp_path / "models/m/model.safetensors").open("wb") as file:
        file.truncate(600 * 2**20)  # Ray refuses from 500 on; no byte of it is on the disk
    (tmp_path / "environment").rename(tmp_path.parent / f"{tmp_path.name}-environment")
    (tmp_path / ".venv").symlink_to(tmp_path.parent / f"{tmp_path.name}-environment")
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)

    uploaded = bytearray()

    def answer(_: Any, method: str, endpoint: str, *, data: Any = None, **__: Any) -> Any:
        if method == "PUT":
            uploaded.extend(data if isinstance(data, bytes) else data.read())
        found = 404 if method == "GET" and "packages" in endpoint else 200
        told = {"submission_id": "a", "job_id": "a"} if method == "POST" else {"ray_version": ray.__version__}
        return SimpleNamespace(status_code=found, raise_for_status=lambda: None, json=lambda: told)

    monkeypatch.setattr(JobSubmissionClient, "_do_request", answer)
    client = JobSubmissionClient("http://127.0.0.1:1")
    client.submit_job(entrypoint="true", runtime_env={"working_dir": str(tmp_path)})
    assert len(uploaded) < 2**20
    names = set(zipfile.ZipFile(io.BytesIO(bytes(uploaded))).namelist())
    assert names == here | {".rayignore", ".gitignore"}
