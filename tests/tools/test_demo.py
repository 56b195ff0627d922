"""The demo's own cluster: the job's log and exit status come through, and nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.bounds import ENDS_S, HANG_S
from tools import demo

ROOT = Path(__file__).resolve().parents[2]

RUNNER = """
import sys
from tools import demo
with demo.signals_as_exit(), demo.local_cluster(cpus=2, gpus=3) as cluster:
    print("folder", cluster.folder, flush=True)
    status = demo.run_job(cluster, sys.argv[1:])
sys.exit(status)
"""

FAILING_JOB = """
import os, ray
ray.init()
print("devices", ray.cluster_resources()["GPU"], "in", os.getcwd())
raise SystemExit(7)
"""

# A driver and a child that both ignore SIGTERM, the child renamed as vLLM's are, and an orphan in a session of its own.
STUBBORN_JOB = """
import os, signal, subprocess, sys, time
import ray

CHILD = '''
import os, setproctitle, signal, time
setproctitle.setproctitle("VLLM::EngineCore")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
'''
ORPHAN = '''
import os, time
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    time.sleep(600)
'''

@ray.remote
class Engine:
    def start(self):
        self.children = [subprocess.Popen([sys.executable, "-c", code], stdout=-1) for code in (CHILD, ORPHAN)]
        return [os.getpid(), *(int(child.stdout.readline()) for child in self.children)]

ray.init()
engine = Engine.remote()
pids = ray.get(engine.start.remote())
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("pids", os.getpid(), *pids, flush=True)
time.sleep(600)
"""


def start(tmp_path: Path, job: str) -> subprocess.Popen:
    (tmp_path / "runner.py").write_text(RUNNER)
    (tmp_path / "job.py").write_text(job)
    command = [sys.executable, str(tmp_path / "runner.py"), sys.executable, str(tmp_path / "job.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)


def folder_of(output: str) -> Path:
    return Path(next(line.split()[1] for line in output.splitlines() if line.startswith("folder ")))


@pytest.mark.slow
def test_log_and_status_come_through(tmp_path):
    runner = start(tmp_path, FAILING_JOB)
    output, _ = runner.communicate(timeout=HANG_S)
    assert f"devices 3.0 in {ROOT}" in output
    assert runner.returncode == 7
    assert not folder_of(output).exists()


def test_a_head_that_ends_while_starting_is_started_again_and_signals_still_work(monkeypatch, tmp_path):
    """Stand-ins for the head: each ends at once, so the last attempt's error comes through."""
    started = []

    def start_head(cpus, gpus, strangers):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        (folder / "start.log").write_text("a port was taken")
        head = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], start_new_session=True)
        head.wait()
        started.append(signal.getsignal(signal.SIGTERM))
        return demo.Cluster("http://127.0.0.1:1", folder, head, strangers)

    monkeypatch.setattr(demo, "start_head", start_head)
    with (
        pytest.raises(demo.DemoError, match=r"(?s)ended with status 1.*a port was taken"),
        demo.signals_as_exit(),
        demo.local_cluster(cpus=1, gpus=1),
    ):
        pass
    assert len(started) == demo.START_ATTEMPTS and len(set(started)) == 1
    assert started[0] is not signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unwind_the_stack_once(number):
    with pytest.raises(SystemExit) as ended, demo.signals_as_exit():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGINT)  # a second one, while clearing up, is ignored
    assert ended.value.code == 128 + number


def test_orphans_in_sessions_of_their_own_are_ended_and_strangers_are_not(tmp_path):
    """A stand-in for the cluster's head ends at once and leaves an orphan that ignores SIGTERM."""
    head_code = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        demo.adopt_orphans()
        strangers = frozenset(psutil.Process().children(recursive=True))
        head = subprocess.Popen([sys.executable, "-c", head_code], stdout=subprocess.PIPE, start_new_session=True)
        assert head.stdout is not None
        orphan = int(head.stdout.readline())
        head.wait()
        with demo.signals_as_exit():
            demo.stop_cluster(demo.Cluster("", tmp_path, head, strangers))
        assert not psutil.pid_exists(orphan)
        assert stranger.poll() is None
        assert not tmp_path.exists()
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
def test_signal_ends_everything(tmp_path):
    runner = start(tmp_path, STUBBORN_JOB)
    assert runner.stdout is not None
    lines = []
    for line in runner.stdout:
        lines.append(line)
        if line.startswith("pids "):
            break
    pids = [int(word) for word in lines[-1].split()[1:]]
    family = psutil.Process(runner.pid).children(recursive=True)
    assert len(pids) == 4 and all(psutil.pid_exists(pid) for pid in pids)
    runner.send_signal(signal.SIGTERM)
    runner.communicate(timeout=ENDS_S)
    assert runner.returncode == 128 + signal.SIGTERM
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert [process for process in family if process.is_running()] == []
    assert not folder_of("".join(lines)).exists()


def test_cluster_that_cannot_start_says_why(monkeypatch):
    ports = demo.free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="dcpo-ray-", dir="/tmp"))
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda **where: str(folder))
    monkeypatch.setattr(demo, "free_ports", lambda count: ports)
    monkeypatch.setattr(demo, "START_ATTEMPTS", 1)
    with socket.socket() as taken:
        taken.bind(("", ports[0]))
        taken.listen()
        with (
            pytest.raises(demo.DemoError, match=f"local Ray cluster ended(?s:.)*{ports[0]}"),
            demo.signals_as_exit(),
            demo.local_cluster(cpus=1, gpus=0, startup_timeout=HANG_S),
        ):
            pass
    assert not folder.exists()


def test_bad_recipe_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {stepz: 3}\n")
    monkeypatch.setattr(demo, "local_cluster", lambda **_: pytest.fail("a cluster was started"))
    monkeypatch.setattr(demo, "ensure_smollm2", lambda: pytest.fail("the model was made"))
    monkeypatch.setattr(sys, "argv", ["demo", "--recipe", str(recipe)])
    assert demo.main() == 1
    assert "did you mean 'steps'" in capsys.readouterr().err
