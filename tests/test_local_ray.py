"""A start of Ray that a busy machine makes fail: what it began is ended, it is tried again, and at last told."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from dcpo_openrlhf import local_ray
from tests.bounds import ENDS_S, HANG_S

ROOT = Path(__file__).parents[1]
TIMED_OUT = "The current node timed out during startup.\nThe rest of it."

# A server and an orphan in a session of its own; both ignore SIGTERM.
SERVER = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(3600)
os.setsid()
if os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(3600)
"""


class Starts:
    """Stands for ray.init: each call makes a session's folder and log, starts SERVER, and raises the next error."""

    def __init__(self, folder: Path, errors: list[BaseException | None]) -> None:
        self.folder, self.errors = folder, errors
        self.pids: list[list[int]] = []
        self.left: list[list[int]] = []
        """For each call, which processes of the earlier ones it found."""

    def __call__(self, **options: Any) -> str:
        self.left.append([pid for pids in self.pids for pid in pids if psutil.pid_exists(pid)])
        logs = self.folder / f"session_2026-01-01_00-00-0{len(self.pids)}_{os.getpid()}" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.out").write_text(f"log of attempt {len(self.pids) + 1}\n")
        process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
        assert process.stdout is not None
        self.pids.append([int(process.stdout.readline()) for _ in range(2)])
        error = self.errors[len(self.pids) - 1]
        if error is not None:
            raise error
        return "started"


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Starts]]:
    made: list[Starts] = []

    def make(*errors: BaseException | None) -> Starts:
        made.append(Starts(tmp_path, list(errors)))
        monkeypatch.setattr(ray, "init", made[-1])
        return made[-1]

    yield make
    for pid in [pid for one in made for pids in one.pids for pid in pids if psutil.pid_exists(pid)]:
        os.kill(pid, signal.SIGKILL)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_the_third_attempt_works_and_nothing_is_left_of_the_first_two(starts, tmp_path, caplog) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    try:
        attempts = starts(Exception(TIMED_OUT), ConnectionError("no GCS"), None)
        assert local_ray.start(_temp_dir=str(tmp_path)) == "started"
        assert attempts.left == [[], [], []]
        assert len(alive(attempts.pids[2])) == 2 and stranger.poll() is None
        assert caplog.messages == [
            "Ray did not start, attempt 1 of 3: The current node timed out during startup.",
            "Ray did not start, attempt 2 of 3: no GCS",
        ]
    finally:
        stranger.kill()
        stranger.wait()


def test_the_last_failure_names_bounds_log_and_remedy(starts, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "77")
    attempts = starts(*[Exception(TIMED_OUT)] * 3)
    with pytest.raises(local_ray.LocalRayError) as caught:
        local_ray.start(_temp_dir=str(tmp_path))
    first, bounds, *middle, last = str(caught.value).splitlines()
    assert first.startswith("Ray must start on this machine, but did not in 3 attempts, of which nothing is left: The")
    assert "RAY_agent_register_timeout_ms=77" in bounds and "RAY_raylet_start_wait_time_s=" in bounds
    assert middle[-2:] == ["The end of raylet.out:", "log of attempt 3"] and "The rest of it." in middle
    assert last.startswith("Let other work on this machine end, or set these variables to higher bounds; Ray's logs")
    assert last.endswith("/logs")
    assert [alive(pids) for pids in attempts.pids] == [[], [], []]


@pytest.mark.parametrize("error", [ValueError("num_cpus"), AssertionError(), KeyboardInterrupt(), SystemExit(15)])
def test_what_load_does_not_explain_is_not_tried_again_but_ended(starts, tmp_path, error) -> None:
    attempts = starts(error)
    with pytest.raises(type(error)) as caught:
        local_ray.start(_temp_dir=str(tmp_path))
    assert caught.value is error
    assert [alive(pids) for pids in attempts.pids] == [[]]


def test_an_unknown_option_is_refused_once(monkeypatch) -> None:
    calls, init = [], ray.init
    monkeypatch.setattr(ray, "init", lambda **options: (calls.append(options), init(**options)))
    with pytest.raises(RuntimeError, match="Unknown keyword argument"):
        local_ray.start(no_such_option=1)
    assert len(calls) == 1


def test_orphans_are_adopted_during_the_start_alone(starts, tmp_path) -> None:
    before = local_ray.adopt_orphans(False)
    try:
        starts(None)
        local_ray.start(_temp_dir=str(tmp_path))
        assert local_ray.adopt_orphans(False) is False
        with local_ray.orphans_adopted():
            assert local_ray.adopt_orphans(True) is True
    finally:
        local_ray.adopt_orphans(before)


def test_the_users_bounds_stay(monkeypatch) -> None:
    names = list(local_ray.START_BOUNDS)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(names[0], "5")
    local_ray.raise_bounds()
    assert {name: os.environ[name] for name in names} == local_ray.START_BOUNDS | {names[0]: "5"}


# --- Ray itself ------------------------------------------------------------------------------------------------------

REAL = """
import logging, os, sys
from dcpo_openrlhf import local_ray

local_ray.START_ATTEMPTS = int(sys.argv[1])

class AtTheSecondAttempt(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), "left:", local_ray.descendants(), flush=True)
        os.environ.pop("RAY_testing_asio_delay_us")

logging.getLogger("dcpo_openrlhf").addHandler(AtTheSecondAttempt())
try:
    local_ray.start(num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[2])
except local_ray.LocalRayError as error:
    sys.exit(f"LocalRayError: {error}")
import ray
print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
ray.shutdown()
"""
SLOW_NODE = {"RAY_testing_asio_delay_us": "NodeInfoGcsService.grpc_server.RegisterNode=40000000:40000000"}
"""The node comes up after 40 s, as on a machine that is busy; Ray itself waits for 30 s."""


def start_really(folder: Path, attempts: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script's end; no process on this machine then names its folder."""
    folder = folder / "r"  # Ray's socket names must be short
    known = {name: value for name, value in os.environ.items() if name not in local_ray.START_BOUNDS}
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(attempts), str(folder)],
        cwd=ROOT,
        env=known | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert [line for line in lines if any(str(folder) in word for word in line)] == []
    return done


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lr-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_server_that_cannot_start_is_told_and_nothing_is_left(short: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        quick = {"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "1"}
        done = start_really(short, 1, RAY_GCS_SERVER_PORT=port, **quick)
    assert done.returncode == 1
    assert re.search(rf"(?s)LocalRayError: .* 1 attempts.*RAY_gcs_rpc_server_connect_timeout_s=1.*{port}", done.stderr)


@pytest.mark.slow
def test_a_node_that_is_late_fails_within_rays_bounds_and_is_ended_and_the_next_one_works(short: Path) -> None:
    done = start_really(short, 2, RAY_raylet_start_wait_time_s="1", **SLOW_NODE)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("Ray did not start, attempt 1 of 2: The current node timed out") and "left: []" in first
    assert last == "answer 42"


@pytest.mark.slow
def test_a_node_that_is_late_is_up_within_the_raised_bounds(short: Path) -> None:
    done = start_really(short, 1, **SLOW_NODE)
    assert (done.returncode, done.stdout) == (0, "answer 42\n"), done.stderr


ORPHAN = """
import os, signal, subprocess, sys
import psutil
from dcpo_openrlhf import local_ray

local_ray.start(num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
import ray

@ray.remote
class Engine:
    def begin(self):
        return os.getpid(), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid

engine = Engine.remote()
actor, child = ray.get(engine.begin.remote())
process = psutil.Process(child)
os.kill(actor, signal.SIGKILL)
try:
    process.wait(float(sys.argv[2]))
finally:
    ray.shutdown()
"""


def test_what_a_killed_worker_began_ends_with_it(short: Path) -> None:
    """As vLLM's process of an engine that is killed while it starts, before anything there watches the actor."""
    known = {name: value for name, value in os.environ.items() if name not in local_ray.ORPHANS_END}
    words = [sys.executable, "-c", ORPHAN, str(short / "r"), str(ENDS_S)]
    done = subprocess.run(words, cwd=ROOT, env=known, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
