"""The CPU image, built by buildah on a Debian with this Python, and the shortened demo recipe run in it.

Proven: docker/Dockerfile.cpu builds; what is installed is the lock file; user 1000 trains with it, by the image's own
command, on a system that has no compiler. Not proven: Docker and BuildKit, the public Python image as the base, the
health check as an engine calls it, and a container's own network and limits, which isolation by chroot shares.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile.cpu"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BASE, IMAGE = "localhost/dcpo-base", "localhost/dcpo-openrlhf:cpu"
BASE_PACKAGES = [
    "ca-certificates",
    "libbz2-1.0",
    "libexpat1",
    "libffi8",
    "liblzma5",
    "libreadline8",
    "libsqlite3-0",
    "libssl3",
    "zlib1g",
]
"""And what CPython's own modules link."""
FREE_BYTES = 30 * 10**9
# Killed with this process; their mounts and what they started go with them.
WITH_US = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
SHORT = [
    "train.steps=2",
    "train.prompts_per_step=2",
    "train.prompts_per_update=2",
    "train.group_size=4",
    "train.micro_batch_size=4",
    "evaluation.problems=0",
    "checkpoint.export_hf=false",
]


def why_not(folder: Path) -> str | None:
    """What this machine lacks to build an image; None where the test can run."""
    missing = [name for name in ("buildah", "debootstrap", "setpriv", "unshare") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian packages buildah, debootstrap, util-linux)"
    if os.geteuid() != 0:
        return "needs root, for debootstrap and isolation by chroot"
    free = shutil.disk_usage(folder).free
    return None if free >= FREE_BYTES else f"needs {FREE_BYTES / 1e9:.0f} GB on {folder}, {free / 1e9:.0f} are free"


def run(*command: str | Path) -> str:
    """Output of the command; AssertionError with the end of its log when it fails."""
    line = [*WITH_US, *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


class Buildah:
    """Commands of buildah on a storage of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str | Path) -> str:
        storage = ["--root", self.folder / "storage", "--runroot", self.folder / "runroot"]
        return run("buildah", *storage, *arguments)

    def inside(self, *command: str) -> str:
        volume = ["--volume", f"{self.folder}/runs:/runs"]
        return self("run", "--isolation", "chroot", *volume, "app", "--", *command)


@pytest.fixture
def buildah(tmp_path: Path) -> Iterator[Buildah]:
    reason = why_not(tmp_path)
    if reason:
        pytest.skip(reason)
    try:
        yield Buildah(tmp_path)
    finally:
        for folder in tmp_path.iterdir():  # pytest keeps what tests leave
            shutil.rmtree(folder)


def make_base(buildah: Buildah) -> None:
    """An image of Debian 12 with the Python of this test, and this machine's certificates, for a proxy's packages.

    Debian 12 has no Python 3.12: the installation goes to /usr/local, as in the public Python images.
    """
    system = buildah.folder / "system"
    run("debootstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}", "bookworm", system)
    shutil.copytree(sys.base_prefix, system / "usr/local", symlinks=True, dirs_exist_ok=True)
    run("chroot", system, "ldconfig")  # libpython, where Python has one
    variables = []
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, system / CERTIFICATES.relative_to("/"))
        variables = [f"--env={name}={CERTIFICATES}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
    buildah("from", "--name", "base", "scratch")
    buildah("add", "base", system, "/")
    buildah("config", *variables, "base")
    buildah("commit", "--quiet", "--rm", "base", BASE)


def package_sources(folder: Path) -> list[str]:
    """Options of the build for what pip is told on this machine: a mirror, and a folder of wheels as torch's index."""
    options = []
    if mirror := os.environ.get("PIP_INDEX_URL"):
        options += ["--build-arg", f"PYPI_INDEX={mirror}"]
    wheels = list(Path(os.environ.get("PIP_FIND_LINKS", "/nonexistent")).glob("torch-*.whl"))
    if not wheels:
        return options
    index = folder / "wheels" / "torch"
    index.mkdir(parents=True)
    for wheel in wheels:
        shutil.copy(wheel, index)
    links = [f'<a href="{urllib.parse.quote(wheel.name)}">{wheel.name}</a>' for wheel in wheels]
    (index / "index.html").write_text("\n".join(links))
    return [*options, "--build-arg", "TORCH_INDEX=file:///wheels", "--volume", f"{index.parent}:/wheels:ro"]


def pins(lock: Path) -> list[str]:
    return re.findall(r"^\S+==\S+", lock.read_text(), flags=re.M)


@pytest.mark.image
@pytest.mark.timeout(14400)
def test_cpu_image_is_built_and_trains(buildah: Buildah) -> None:
    make_base(buildah)
    build = ["bud", "--isolation", "chroot", "--format", "docker", "--build-arg", f"BASE={BASE}"]
    build += [*package_sources(buildah.folder), "--file", str(DOCKERFILE), "--tag", IMAGE, "."]
    buildah(*build)
    config: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    assert config["User"] == "1000:1000" and config["Healthcheck"]["Test"][0] == "CMD"

    runs = buildah.folder / "runs"
    runs.mkdir()
    os.chown(runs, 1000, 1000)
    buildah("from", "--name", "app", "--ulimit", "nofile=8192:8192", IMAGE)
    assert buildah.inside("bash", "-c", "command -v c++ g++ cc clang || echo none").split() == ["none"]
    lock, of_torch = (pins(ROOT / "docker" / f"requirements-{name}.lock") for name in ("cpu", "torch"))
    (torch,) = (pin for pin in of_torch if pin.startswith("torch=="))
    installed = buildah.inside("uv", "pip", "freeze", "--exclude-editable").split()
    installed = [package for package in installed if not package.startswith("pip==")]  # venv's own
    # torch's CPU build, or PyPI's where there is none for this Python
    assert sorted(installed) in (sorted([*lock, f"{torch}+cpu"]), sorted([*lock, *of_torch]))

    output = buildah.inside(*config["Entrypoint"], *config["Cmd"], *SHORT)
    assert "Report: /runs/demo/report.md" in output, output[-5000:]
    metrics = [json.loads(line) for line in (runs / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert [row["weights/version"] for row in metrics] == [2, 3]
    assert all(0 < row["entropy/exact"] < 11 and row["policy/grad_norm"] >= 0 for row in metrics)
    assert {file.stat().st_uid for file in (runs / "demo").rglob("*")} == {1000}
