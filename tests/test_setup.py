"""`make setup`: where torch's CPU build comes from, and which Python it takes; stand-ins, so nothing is installed."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = "--extra-index-url https://download.pytorch.org/whl/cpu"
ANNOUNCING = ("PIP_FIND_LINKS", "UV_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX", "TORCH_INDEX")


def recipe_of_setup(**environment: str) -> str:
    """What `make setup` would run, with nothing announced but what is given."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ANNOUNCING and not name.startswith("MAKE")
    }
    command = ["make", "--always-make", "--dry-run", "setup"]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True).stdout


def test_torch_comes_from_its_public_index_by_itself() -> None:
    assert PUBLIC in recipe_of_setup()


@pytest.mark.parametrize("name", [name for name in ANNOUNCING if name != "TORCH_INDEX"])
def test_an_announced_place_of_wheels_wins(name: str) -> None:
    assert "--extra-index-url" not in recipe_of_setup(**{name: "/wheels"})


def test_an_announced_place_is_named_once() -> None:
    """uv's variable is set from pip's."""
    assert "no CPU build of torch in: /a /b (name" in recipe_of_setup(PIP_FIND_LINKS="/a", PIP_EXTRA_INDEX_URL="/b")


def test_another_index_wins() -> None:
    said = recipe_of_setup(TORCH_INDEX="https://mirror.example/cpu")
    assert "--extra-index-url https://mirror.example/cpu" in said and PUBLIC not in said
    assert "--extra-index-url https://mirror.example/cpu" in recipe_of_setup(
        TORCH_INDEX="https://mirror.example/cpu", PIP_FIND_LINKS="/wheels"
    )


def test_an_environment_of_another_python_is_made_anew() -> None:
    first, second, *_ = [line for line in recipe_of_setup().splitlines() if ".venv" in line]
    assert "sys.version_info[:2] != (3, 12)" in first and "|| rm -rf .venv" in first and "tools/venv.sh .venv" in second


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH with the tools that the script calls, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "mktemp", "rm", "sh", "mkdir", "dirname", "cat", "chmod"):
        (folder / tool).symlink_to(Path("/bin") / tool)
    return folder


def make_venv(programs: Path, *python: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools/venv.sh"), str(programs.parent / "venv"), "uv==1", *python]
    environment = {"PATH": str(programs), "LOG": str(programs.parent / "log")}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


SHIM = 'echo "pyenv: $0: command not found" >&2; exit 127'
OTHER = f'case "$*" in *version_info*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac'
"""A Python of another version."""
FAKE_UV = """
echo "uv $*" >> "$LOG"
for folder; do :; done
mkdir -p "$folder/bin"
printf '#!/bin/sh\\necho "venv $*" >> "$LOG"\\n' > "$folder/bin/python"
chmod +x "$folder/bin/python"
"""


def test_a_shim_that_only_says_command_not_found_is_passed_over(programs: Path) -> None:
    program(programs, "python3.12", SHIM)
    program(programs, "python3", OTHER)
    program(programs, "uv", FAKE_UV)
    done = make_venv(programs)
    assert done.returncode == 0, done.stderr
    log = (programs.parent / "log").read_text()
    assert "uv venv --quiet --seed --python 3.12" in log
    assert "venv -m pip install --quiet uv==1" in log


def test_a_version_beside_pyenvs_shims_is_taken(tmp_path: Path) -> None:
    shims, beside = tmp_path / "pyenv/shims", tmp_path / "pyenv/versions/3.12.1/bin"
    for folder in (shims, beside):
        folder.mkdir(parents=True)
    program(shims, "python3.12", SHIM)
    log = tmp_path / "log"
    works = f'echo "beside $*" >> {log}; case "$*" in *venv*) mkdir -p "$3/bin"; ln -s "$0" "$3/bin/python" ;; esac'
    program(beside, "python3", works)
    command = ["bash", str(ROOT / "tools/venv.sh"), str(tmp_path / "venv"), "uv==1"]
    done = subprocess.run(command, env={"PATH": f"{shims}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"beside -m venv {tmp_path}/venv" in log.read_text()


def test_without_any_python_the_remedy_is_named(programs: Path) -> None:
    program(programs, "python3.12", SHIM)
    done = make_venv(programs)
    assert done.returncode == 1
    assert "setup needs Python 3.12" in done.stderr and "PYTHON=/path/to/python3.12" in done.stderr


def test_where_uv_may_not_fetch_the_remedy_is_named(programs: Path) -> None:
    program(programs, "uv", 'echo "no download" >&2; exit 2')
    done = make_venv(programs)
    assert done.returncode == 1
    assert "no download" in done.stderr and "uv neither found nor could fetch one" in done.stderr


def test_a_given_python_must_be_the_right_one(programs: Path) -> None:
    program(programs, "mine", 'case "$*" in --version) echo Python 3.9.1 ;; *) exit 1 ;; esac')
    done = make_venv(programs, str(programs / "mine"))
    assert done.returncode == 1
    assert "Python 3.9.1" in done.stderr and "PYTHON=/path/to/python3.12" in done.stderr
