"""Images, compose, Slurm and KubeRay files: linted, checked against schemas, and their options against Ray and recipes.

No container engine, Slurm or Kubernetes is asked; tests/test_image.py builds the CPU image.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dcpo_openrlhf.recipe import preflight
from dcpo_openrlhf.recipe.load import load_recipe
from tests.bounds import HANG_S

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
KUBERNETES = "1.33"


def lint(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=HANG_S, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def locked(package: str, lock: str = "requirements-cpu.lock") -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (DOCKER / lock).read_text(), flags=re.M)
    return version


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


def unknown_ray_options(command: str) -> set[str]:
    """Options of each `ray start` in the text that this Ray does not have."""
    starts = re.findall(r"\bray\"? start\b([^|&)]*)", command.replace("\\\n", " "))
    assert starts
    return {option for text in starts for option in re.findall(r"--[a-z-]+", text)} - ray_start_options() - {"--"}


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_dockerfiles(name: str) -> None:
    lint(BIN / "hadolint", DOCKER / name)
    text = (DOCKER / name).read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, flags=re.M))
    bases = [arguments.get(base.strip("${}"), base) for base in re.findall(r"^FROM (\S+)", text, flags=re.M)]
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases), "every base is pinned to a release"
    assert bases[-1].startswith(f"python:{sys.version_info.major}.{sys.version_info.minor}.")
    assert re.findall(r"^USER (\S+)$", text, flags=re.M)[-1] == "1000:1000" and "HEALTHCHECK" in text
    lock = f"requirements-{name.partition('.')[2]}.lock"
    assert len(re.findall(rf"-r docker/{lock}$", text, flags=re.M)) == 1
    assert locked("torch", "requirements-torch.lock" if "cpu" in lock else lock)
    for copied in re.findall(r"^COPY --chown=\S+ (docker/\S+)", text, flags=re.M):
        assert (ROOT / copied).is_file()


def test_gpu_image_compiles_the_locks_transformer_engine_with_the_locks_cuda() -> None:
    assert locked("transformer-engine", "requirements-gpu.lock") == locked(
        "transformer-engine-torch", "requirements-gpu.lock"
    )
    (cuda,) = re.findall(r"nvidia/cuda:(\d+)\.", (DOCKER / "Dockerfile.gpu").read_text())
    assert locked("nvidia-cuda-runtime", "requirements-gpu.lock").startswith(f"{cuda}.")


def test_compose_follows_the_schema() -> None:
    lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


def test_compose_services_share_token_and_storage() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {
        "head-cpu": ["cpu"],
        "worker-cpu": ["cpu"],
        "head-gpu": ["gpu"],
        "worker-gpu": ["gpu"],
    }
    for name, service in services.items():
        assert unknown_ray_options(service["command"]) == set(), name
        assert ("--head" in service["command"]) == name.startswith("head")
        assert service["ulimits"]["nofile"] == 65536
        assert service["environment"]["RAY_AUTH_MODE"] == "token" and service["secrets"] == list(compose["secrets"])
        assert [volume.rpartition(":")[2] for volume in service["volumes"]] == ["/models", "/runs"]
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_kuberay_job() -> None:
    """Its own fields were compared with the CRD of KubeRay 1.6.2 when it was written; its pods follow Kubernetes'."""
    job = yaml.safe_load((DOCKER / "kuberay-rayjob.yaml").read_text())
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert cluster["rayVersion"] == locked("ray")
    assert cluster["authOptions"]["mode"] == "token"
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert {f"--{name}" for name in group["rayStartParams"]} <= ray_start_options()
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        pod: dict[str, Any] = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_kuberay_cluster_holds_the_runs_devices(tmp_path: Path) -> None:
    spec = yaml.safe_load((DOCKER / "kuberay-rayjob.yaml").read_text())["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "tools.supervise"]
    words = words[words.index("--") + 1 :]
    assert words[:4] == ["python", "-m", "dcpo_openrlhf.train_dcpo", "--recipe"]
    (tmp_path / "recipe.yaml").write_text("{model: {path: m}, task: {kind: arithmetic}}")
    recipe = load_recipe(tmp_path / "recipe.yaml", words[5:])
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = workers["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert preflight.devices(recipe) == gpus


def test_slurm_script_and_ci_are_clean() -> None:
    lint(BIN / "shellcheck", DOCKER / "slurm.sbatch", ROOT / ".ci" / "run")
    text = (DOCKER / "slurm.sbatch").read_text()
    starts = text.replace('("$bin/ray" start', "ray start").replace('"${start[@]}"', "ray start")
    assert unknown_ray_options(starts) == set()


RECIPE = "recipes/dcpo-qwen3-4b-8xa800.yaml"
# Stand for Slurm and Ray: each call is a line of $CALLS. A job runs until it is stopped where $ENDLESS is set.
FAKES = {
    "scontrol": "printf 'one\\ntwo\\nthree\\n'",
    "srun": """case "$*" in
        *"hostname --ip-address") echo 10.0.0.1 10.1.0.1;;
        *) echo "srun $*" >> "$CALLS"; exec sleep 100;;
        esac""",
    "ray": """case "$1 $2" in
        "list nodes") grep -q -- --head "$CALLS" && echo ALIVE
            grep -q -- --exclude "$CALLS" && printf 'ALIVE\\nALIVE\\n';;
        "job submit") echo "submit token=${#RAY_AUTH_TOKEN} $*" >> "$CALLS"
            while [[ -n ${ENDLESS:-} && ! -e $CALLS.stop ]]; do sleep 0.2; done; exit 7;;
        "job stop") echo "stop $*" >> "$CALLS"; touch "$CALLS.stop";;
        esac""",
    "python": f'exec {sys.executable} "$@"',
}


@pytest.fixture
def start_slurm_script(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "calls").touch()
    slurm = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_ID": "12345", "SLURM_GPUS_ON_NODE": "8"}
    mine = {"PATH": f"{folder}:{os.environ['PATH']}", "VENV": str(tmp_path), "CALLS": str(tmp_path / "calls")}
    command = ["bash", str(DOCKER / "slurm.sbatch"), RECIPE, "train.steps=5"]
    started = []

    def start(**environment: str) -> subprocess.Popen:
        process = subprocess.Popen(command, env=os.environ | slurm | mine | environment, cwd=ROOT, process_group=0)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_slurm_script_starts_head_then_workers_then_the_job(
    tmp_path: Path, start_slurm_script: Callable[..., subprocess.Popen]
) -> None:
    assert start_slurm_script().wait(HANG_S) == 7, "the job's own status"
    head, workers, submit = (tmp_path / "calls").read_text().splitlines()
    assert "--nodelist=one" in head and "--head" in head and "--port=23450" in head
    assert "--nodes=2" in workers and "--exclude=one" in workers and "--address=10.0.0.1:23450" in workers
    assert "token=64" in submit and "--address http://10.0.0.1:23451" in submit
    assert " -m tools.supervise -- " in submit
    command = submit.partition(f"--recipe {RECIPE} ")[2].split()
    assert command[:2] == ["checkpoint.resume=auto", "train.steps=5"]
    assert {f"model.path={ROOT}/models/Qwen3-4B", f"task.train={ROOT}/data/dapo17k.jsonl"} <= set(command[2:])
    assert all(Path(path.partition("=")[2]).is_absolute() for path in command[2:])


def test_slurm_warning_stops_the_job_and_waits_for_it(
    tmp_path: Path, start_slurm_script: Callable[..., subprocess.Popen]
) -> None:
    script = start_slurm_script(ENDLESS="1")
    ends = time.monotonic() + HANG_S
    while "submit" not in (tmp_path / "calls").read_text():
        assert script.poll() is None and time.monotonic() < ends
        time.sleep(0.2)
    script.send_signal(signal.SIGTERM)
    assert script.wait(HANG_S) == 7
    assert (tmp_path / "calls").read_text().splitlines()[-1].endswith("dcpo-12345-0")
