"""Train the demo model with DCPO on this machine, through a Ray cluster of its own that ends with it.

Usage: python -m tools.demo [--recipe FILE] [--run-dir DIR] [section.key=value ...]
"""

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.job_submission import JobSubmissionClient

from dcpo_openrlhf.local_ray import START_ATTEMPTS, START_BOUNDS, adopt_orphans, descendants, end_descendants
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import RecipeError
from tools.smollm2 import default_output, ensure_smollm2

ROOT = Path(__file__).resolve().parents[1]
# Threads that wait must not spin and workers must not be niced: trainer and engine share the cores.
CLUSTER_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "10",
    "RAY_worker_niceness": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
} | START_BOUNDS
OBJECT_STORE_BYTES = 10**9
SETTLE_S = 1.2
"""`ray start` looks at its servers once a second."""
RETRY_S = 0.25


class DemoError(RuntimeError):
    """The cluster or the job could not be run to its end; says why."""


@dataclass(frozen=True)
class Cluster:
    address: str
    """URL of the job server."""
    folder: Path
    """Ray's temporary folder."""
    head: subprocess.Popen
    """`ray start --block`, leader of its own process group."""
    strangers: frozenset[psutil.Process]
    """Children that this process had before the cluster."""


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing on this machine listens on now.

    Below 32768: from there on the system hands ports out to whoever asks, Ray's other servers included.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken: try the next one
                listener.bind(("", port))
                found.append(port)
            if len(found) == count:
                return found
    raise DemoError(f"no {count} free TCP ports found between 20000 and 32000; end what listens there")


@contextlib.contextmanager
def local_cluster(*, cpus: int, gpus: int, startup_timeout: float = 300.0) -> Iterator[Cluster]:
    """A Ray head on free ports whose job server answers; every process of it is gone afterwards.

    One of Ray's many servers can fail while it starts, a port taken between our look and its use among the reasons, and
    then the head ends: it is started again, START_ATTEMPTS times in all, on other ports.
    """
    adopt_orphans()
    strangers = frozenset(descendants())
    for attempt in range(1, START_ATTEMPTS + 1):
        cluster = start_head(cpus, gpus, strangers)
        try:
            wait_until_ready(cluster, startup_timeout)
            break
        except DemoError as error:
            if cluster.head.poll() is None or attempt == START_ATTEMPTS:
                stop_cluster(cluster)
                raise
            print(f"Ray's head ended while starting, attempt {attempt} of {START_ATTEMPTS}: {error}", file=sys.stderr)
            handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            stop_cluster(cluster)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        except BaseException:
            stop_cluster(cluster)
            raise
    try:
        yield cluster
    finally:
        stop_cluster(cluster)


def start_head(cpus: int, gpus: int, strangers: frozenset[psutil.Process]) -> Cluster:
    """`ray start --head --block` on free ports, in a temporary folder and a session of its own."""
    # Under /tmp: the path of a unix socket inside may have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dcpo-ray-", dir="/tmp"))
    port, dashboard, agent, client = free_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--temp-dir={folder}"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = CLUSTER_ENV | os.environ | {"PYTHONPATH": path}
    env.pop("RAY_ADDRESS", None)
    with (folder / "start.log").open("w") as log:
        head = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return Cluster(f"http://127.0.0.1:{dashboard}", folder, head, strangers)


def wait_until_ready(cluster: Cluster, timeout: float) -> None:
    """Return once `ray start` watches its servers and the job server answers; DemoError with Ray's log else.

    It looks at them once a second, and ends the head when one of them has failed, be it on the way up.
    """

    def watching() -> None:
        if "block forever" not in (cluster.folder / "start.log").read_text(errors="replace"):
            raise DemoError("`ray start` has not come to its end yet")

    until_it_works(watching, cluster, timeout)
    time.sleep(SETTLE_S)
    until_it_works(lambda: JobSubmissionClient(cluster.address).list_jobs(), cluster, timeout)


def until_it_works[T](call: Callable[[], T], cluster: Cluster, timeout: float) -> T:
    """The value of `call`, tried again while it raises; DemoError when the cluster has ended or `timeout` [s] is over.

    Ray's job client raises many kinds while the cluster comes up, or when a busy machine misses a beat.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except Exception as error:
            ended = cluster.head.poll()
            if ended is None and time.monotonic() < deadline:
                time.sleep(RETRY_S)
                continue
            state = f"ended with status {ended}" if ended is not None else f"did not answer for {timeout:.0f} s"
            log = tail(cluster.folder / "start.log")
            raise DemoError(f"the local Ray cluster {state} ({error}); the end of its log:\n{log}") from error


def tail(file: Path, lines: int = 15) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])


class PeakMemory(threading.Thread):
    """Highest sum over the cluster's processes of their proportional set size (shared pages once), every 15 s."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.cluster, self.gib = cluster, 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(15.0):  # the kernel walks every page for it: not more often
            total = 0
            for process in descendants(self.cluster.strangers):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.gib = max(self.gib, total / 2**30)


def stop_cluster(cluster: Cluster) -> None:
    """End every process of the cluster within 14 s: first asked (`ray start --block` stops its own), then killed."""
    ignore_signals()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(cluster.head.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        cluster.head.wait(5)
    end_descendants(cluster.strangers)
    cluster.head.wait()
    shutil.rmtree(cluster.folder, ignore_errors=True)


def ignore_signals() -> None:
    """A second Ctrl-C must not cut the clearing up short."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def run_job(cluster: Cluster, command: list[str], *, poll: float = 1.0, silence: float = 120.0) -> int:
    """Exit status of `command`, run as a Ray job in the repository root, its log copied to stdout.

    DemoError where the job server stays silent for `silence` seconds or the job ends without a status.
    """
    client = JobSubmissionClient(cluster.address)
    job = f"demo-{os.getpid()}"
    entrypoint = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}"

    def submit() -> None:
        if all(known.submission_id != job for known in client.list_jobs()):
            client.submit_job(entrypoint=entrypoint, submission_id=job)

    shown = 0
    try:
        until_it_works(submit, cluster, silence)
        while True:
            info = until_it_works(lambda: client.get_job_info(job), cluster, silence)
            log = until_it_works(lambda: client.get_job_logs(job), cluster, silence)
            print(log[shown:], end="", flush=True)
            shown = len(log)
            if info.status.is_terminal():
                break
            time.sleep(poll)
    except BaseException:
        stop_job(client, job)
        raise
    if info.driver_exit_code is None:
        raise DemoError(f"the job ended as {info.status}: {(info.message or '').partition(os.linesep)[0]}")
    return info.driver_exit_code


def stop_job(client: JobSubmissionClient, job: str, timeout: float = 12.0) -> None:
    """Ask the job to end, and wait at most `timeout` seconds for it; what is left, stop_cluster kills."""

    def ask() -> None:
        with contextlib.suppress(Exception):  # the cluster itself may be what died
            client.stop_job(job)
            while not client.get_job_status(job).is_terminal():
                time.sleep(0.3)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """SIGTERM and Ctrl-C unwind the stack, so that every `finally` runs."""

    def leave(signum: int, frame: object) -> None:
        ignore_signals()
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train SmolLM2-135M-Instruct with DCPO on this machine.")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "dcpo-smollm2-135m-cpu.yaml")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / time.strftime("demo-%Y%m%d-%H%M%S"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    args = parser.parse_args()
    run_dir = args.run_dir.resolve()
    if any(override.startswith("run.dir=") for override in args.overrides):
        parser.error(f"run.dir is given by --run-dir here: --run-dir {run_dir}")
    overrides = [f"model.path={default_output()}", *args.overrides, f"run.dir={run_dir}"]
    try:
        recipe = load_recipe(args.recipe, overrides)
        if recipe.model.path == default_output():
            print(f"Model: {ensure_smollm2()}", flush=True)
        command = [sys.executable, "-m", "dcpo_openrlhf.train_dcpo", "--recipe", str(args.recipe.resolve()), *overrides]
        print(f"Run folder: {run_dir}\nStarting a Ray cluster of our own ...", flush=True)
        with signals_as_exit(), local_cluster(cpus=8, gpus=recipe.run.logical_devices) as cluster:
            memory = PeakMemory(cluster)
            memory.start()
            status = run_job(cluster, command)
            memory.ended.set()
    except (DemoError, RecipeError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if status != 0:
        print(f"demo: the training job ended with status {status}; its log is above", file=sys.stderr)
        return status
    print(f"Peak memory of all processes, Ray's included: {memory.gib:.1f} GiB")
    for report in sorted(run_dir.glob("report*")):
        print(f"Report: {report}")
    print(f"Picture: python -m tools.plot_run {shlex.quote(str(run_dir))} --output run.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
