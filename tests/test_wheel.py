"""The wheel: made without a network, it carries dcpo_openrlhf alone, and what is installed from it imports."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.bounds import HANG_S

ROOT = Path(__file__).parents[1]
SOURCES = ("dcpo_openrlhf", "tools", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder),
    ]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANG_S)
    assert made.returncode == 0, made.stdout + made.stderr
    (file,) = (folder / "dist").iterdir()
    return file


def test_it_carries_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dcpo_openrlhf"}
    assert "dcpo_openrlhf/py.typed" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dcpo_openrlhf").rglob("*.py")}
    assert modules <= set(names)


def test_what_is_installed_from_it_imports(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=HANG_S)
    python = str(venv / "bin/python")
    install = [sys.executable, "-m", "uv", "pip", "install", "--python", python, "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=HANG_S, capture_output=True)
    code = "import setuptools, dcpo_openrlhf.train_dcpo as t, dcpo_openrlhf.trainer, dcpo_openrlhf.policy.actor"
    # what it stands on comes from this environment, whose links PYTHONPATH does not follow: neither that to the sources
    # nor setuptools' to distutils, which deepspeed imports
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [python, "-c", code + "; print(t.__file__)"], cwd=tmp_path, env=environment, capture_output=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr.decode()
    assert Path(done.stdout.decode().splitlines()[-1]).is_relative_to(venv.resolve())
