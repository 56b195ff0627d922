"""Three hosts on this machine: a Ray cluster with token authentication, training across them, one host lost, resume.

A host is a network, mount, process, host-name and IPC namespace: its own address, /tmp, /dev/shm, process ids and name.
Nothing but the network and /mnt, the shared storage, joins them.

Proven: a job submitted from a fourth host that has no Ray, and refused without the token; two data-parallel replicas of
two tensor ranks, which share a host, and an engine, each on a host of its own; gradients (gloo), weights (gloo,
checksums compared) and checkpoints across hosts; a host that falls silent ends the run, and the same command resumes
with a host that took its place.
Not proven: NCCL, InfiniBand, GPUDirect, a real network's latency and losses, clocks that differ, storage that is slow
to show what another host wrote.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.bounds import ENDS_S, HANG_S
from tests.tiny import make_biased_model
from tools.demo import CLUSTER_ENV, tail

ROOT = Path(__file__).parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SHARED = "/mnt"
"""Where every host sees the shared folder."""
# A silent host is lost after half a minute instead of one: five checks in a row fail.
QUICK_TO_NOTICE = {"RAY_health_check_period_ms": "2000", "RAY_health_check_timeout_ms": "4000"}
# Killed with this process, be it by SIGKILL: nothing stays behind.
WITH_US = ["setpriv", "--pdeathsig", "KILL"]
# The host's own name, network devices in /sys, /etc/hosts, shared storage, /tmp and /dev/shm; then the command.
HOST_SETUP = """set -e
hostname "$1"
mount -t sysfs sysfs /sys
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/shared" /mnt
mount -t tmpfs -o size=1g tmpfs /dev/shm
case "$PWD" in /tmp/*)  # a checkout there is to be seen too
  mkdir -p "$2/tmp-$1${PWD#/tmp}"
  mount --bind "$PWD" "$2/tmp-$1${PWD#/tmp}"
esac
mount --rbind "$2/tmp-$1" /tmp
cd "$PWD"
shift 2
exec "$@"
"""


# What the hosts are made of, tried in namespaces that end with it.
PROBE = """ip link add probe type bridge && ip link add one type veth peer name other && hostname probe &&
mount -t tmpfs tmpfs /mnt && mount -t sysfs sysfs /sys"""


def why_not() -> str | None:
    """What this machine lacks for namespaces; None where the test can run."""
    missing = [name for name in ("ip", "setpriv", "unshare", "nsenter", "hostname") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, util-linux, hostname)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    command = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c", PROBE]
    made = subprocess.run(command, capture_output=True, text=True)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


def inhabitants(namespaces: set[str]) -> list[int]:
    """Processes of this machine that live in one of these network namespaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.readlink(entry) in namespaces:
                found.append(int(entry.parts[2]))
    return found


@dataclass
class Network:
    """Hosts on one switch that leads nowhere else. Host N has the address 10.231.77.N."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    holders: dict[str, subprocess.Popen] = field(default_factory=dict)
    """For each network namespace the process that sleeps in it, so that it exists without a name or a mount."""
    running: dict[str, subprocess.Popen] = field(default_factory=dict)
    names: tuple[str, ...] = ("head", "second", "third", "spare", "client")

    def address(self, name: str) -> str:
        return f"10.231.77.{self.names.index(name) + 1}"

    def build(self) -> None:
        (self.folder / "shared").mkdir()
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self._namespace("switch")
        self._ip("switch", "link", "add", "bridge", "type", "bridge")
        self._ip("switch", "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            (self.folder / f"tmp-{name}").mkdir()
            self._namespace(name)
            peer = ["peer", "name", f"port{number}", "netns", str(self.holders["switch"].pid)]
            self._ip(name, "link", "add", "eth0", "type", "veth", *peer)
            self._ip("switch", "link", "set", f"port{number}", "master", "bridge", "up")
            self._ip(name, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            self._ip(name, "link", "set", "eth0", "up")
            self._ip(name, "link", "set", "lo", "up")
            # libraries find a host's own address by the route to the outside; here it ends at the switch
            self._ip(name, "route", "add", "default", "dev", "eth0")

    def _namespace(self, name: str) -> None:
        command = [*WITH_US, "unshare", "--net", "sh", "-c", "echo made; exec sleep infinity"]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.holders[name] = holder
        assert holder.stdout is not None and holder.stdout.readline() == "made\n"

    def _enter(self, name: str) -> list[str]:
        return [*WITH_US, "nsenter", f"--net=/proc/{self.holders[name].pid}/ns/net"]

    def _ip(self, name: str, *arguments: str) -> None:
        subprocess.run([*self._enter(name), "ip", *arguments], check=True)

    def start(self, name: str, *command: str, log: Path, token: bool = True) -> subprocess.Popen:
        """`command` on that host; killing the process returned ends everything that it started there."""
        enter = [*self._enter(name), "unshare", "--mount", "--uts", "--ipc", "--pid"]
        enter += ["--fork", "--kill-child", "--mount-proc", "bash", "-c", HOST_SETUP, "bash", name, str(self.folder)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
        environment |= CLUSTER_ENV | {"RAY_AUTH_MODE": "token"} | QUICK_TO_NOTICE
        if token:
            environment["RAY_AUTH_TOKEN"] = self.token
        with log.open("a") as output:
            return subprocess.Popen(
                [*enter, *command],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def run(self, name: str, *command: str, token: bool = True) -> tuple[int, str]:
        """Exit status and output of `command` on that host."""
        log = self.folder / f"{name}-{secrets.token_hex(4)}.log"
        process = self.start(name, *command, log=log, token=token)
        try:
            status = process.wait(HANG_S)
        finally:
            process.kill()
        return status, log.read_text()

    def start_ray(self, name: str) -> None:
        """A Ray node with two logical devices, one for the head, which is the node named so."""
        command = [*RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={self.address(name)}"]
        count = 1 if name == "head" else 2
        command += [f"--num-cpus={count}", f"--num-gpus={count}", "--object-store-memory=100000000"]
        if name == "head":
            command += ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--dashboard-port=8265"]
        else:
            command += [f"--address={self.address('head')}:6379"]
        self.running[name] = self.start(name, *command, log=self.folder / f"ray-{name}.log")

    def lose(self, name: str) -> None:
        """The host's cable is pulled, then it dies: nobody is told."""
        self._ip(name, "link", "set", "eth0", "down")
        self._kill(name)

    def _kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def remove(self) -> None:
        """End every process of every host, then the hosts; AssertionError where one is left after a while."""
        spaces = {os.readlink(f"/proc/{holder.pid}/ns/net") for holder in self.holders.values()}
        for name in list(self.running):
            self._kill(name)
        for holder in self.holders.values():
            holder.kill()
            holder.communicate()
        ends = time.monotonic() + ENDS_S
        while left := inhabitants(spaces):
            assert time.monotonic() < ends, f"processes {left} of the hosts do not end"
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.2)

    def job(self, *arguments: str) -> list[str]:
        return [*RAY, "job", *arguments, "--address", f"http://{self.address('head')}:8265"]

    def state(self, what: str) -> list[dict]:
        """Living "nodes" or "actors" of the cluster, as the state server tells the client; nothing while it is down."""
        alive = "detail=1&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        url = f"http://{self.address('head')}:8265/api/v0/{what}?{alive}"
        code = (
            "import sys; from urllib.request import Request, urlopen; "
            "print(urlopen(Request(sys.argv[1], headers={'Authorization': sys.argv[2]}), timeout=20).read().decode())"
        )
        python = [sys.executable, "-I", "-S", "-c", code]  # no site-packages: it runs often
        status, output = self.run("client", *python, url, f"Bearer {self.token}")
        return json.loads(output)["data"]["result"]["result"] if status == 0 else []

    def wait_for_devices(self, count: int) -> None:
        """Return when Ray nodes with `count` devices in all have joined."""
        ends = time.monotonic() + HANG_S
        while not self._all_up(count):
            logs = [tail(self.folder / f"ray-{name}.log") for name in self.running]
            assert time.monotonic() < ends, "\n".join(logs)
            time.sleep(3)

    def _all_up(self, devices: int) -> bool:
        ended = [name for name, process in self.running.items() if process.poll() is not None]
        for name in ended:  # Ray gives a node's servers 30 s to start, too few for busy cores
            self.start_ray(name)
        found = [] if ended else self.state("nodes")
        return sum(node["resources_total"].get("GPU", 0) for node in found) == devices

    def healthy(self, name: str) -> bool:
        """What the images' health check says on that host."""
        status, _ = self.run(name, sys.executable, "-S", "docker/healthcheck.py")
        return status == 0

    def nodes_of_actors(self) -> dict[str, list[str]]:
        """Class name -> node of each living actor of it."""
        found: dict[str, list[str]] = {}
        for actor in self.state("actors"):
            found.setdefault(actor["class_name"], []).append(actor["node_id"])
        return found


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        built = Network(tmp_path)
        stack.callback(built.remove)
        built.build()
        yield built


def write_recipe(shared: Path) -> None:
    make_biased_model(shared / "model")
    rows = [{"id": f"sum-{n}", "problem": f"What is {n} + {7 - n}?", "answer": "7", "source": "test"} for n in range(8)]
    (shared / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shared / "recipe.yaml").write_text(
        f"""
        run: {{dir: {SHARED}/run, device: cpu}}
        model: {{path: {SHARED}/model, dtype: fp32}}
        task: {{train: {SHARED}/data.jsonl, template: plain}}
        reward: {{extractor: last_integer, workers: 1}}
        method: {{target_entropy: 3.0, alpha_max: 1.0}}
        optimizer: {{learning_rate: 1.0e-3}}
        train: {{steps: 50, prompts_per_step: 4, prompts_per_update: 4, group_size: 4, micro_batch_size: 8}}
        parallel: {{nodes: 2, devices_per_node: 2, tensor: 2}}
        rollout: {{engines: 1, max_prompt_tokens: 200, max_new_tokens: 16, cpu_kv_cache_gb: 0.1}}
        checkpoint: {{every: 1, asynchronous: false, keep_best: false, resume: auto, export_hf: false}}
        monitor: {{tensorboard: false}}
        """
    )


def metrics(shared: Path) -> list[dict]:
    file = shared / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(true, process: subprocess.Popen, log: Path) -> None:
    ends = time.monotonic() + HANG_S
    while not true():
        assert process.poll() is None and time.monotonic() < ends, log.read_text()[-5000:]
        time.sleep(2)


@pytest.mark.multinode
@pytest.mark.timeout(7200)
def test_hosts_train_together_and_a_lost_one_is_replaced(network: Network) -> None:
    shared = network.folder / "shared"
    write_recipe(shared)
    network.start_ray("head")
    network.wait_for_devices(1)
    network.start_ray("second")
    network.start_ray("third")
    network.wait_for_devices(5)
    wait_until(lambda: network.healthy("second"), network.running["second"], network.folder / "ray-second.log")
    assert not network.healthy("spare"), "no Ray node there yet"

    status, output = network.run("client", *network.job("list"), token=False)
    assert status != 0 and "oken" in output, output

    train = [sys.executable, "-m", "dcpo_openrlhf.train_dcpo", "--recipe", f"{SHARED}/recipe.yaml"]
    submit = [*network.job("submit"), "--working-dir", str(ROOT), "--"]
    first_log = network.folder / "first-job.log"
    first = network.start("client", *submit, *train, log=first_log)
    try:
        wait_until(lambda: len(metrics(shared)) >= 1, first, first_log)
        actors = network.nodes_of_actors()
        wait_until(lambda: len(metrics(shared)) >= 2, first, first_log)
        network.lose("third")
        network.start_ray("spare")  # up by the time that the loss is noticed
        assert first.wait(HANG_S) != 0, first_log.read_text()[-5000:]
    finally:
        first.kill()
    ranks, engine = actors["MegatronActorBase"], actors["RolloutRayActor"]
    assert len(ranks) == 4 and len(engine) == 1 and len({*ranks, *engine}) == 3, actors
    hosts = sorted(network.address(name) for name in ("second", "third"))
    assert f"policy ranks, in their order: 2 devices on {hosts[0]}, 2 on {hosts[1]}" in first_log.read_text()

    done = int(max((shared / "run" / "checkpoints").glob("step_*")).name.removeprefix("step_"))
    network.wait_for_devices(5)
    status, output = network.run("client", *submit, *train, f"train.steps={done + 1}")
    assert status == 0, output[-5000:]
    rows = metrics(shared)
    assert [row["step"] for row in rows] == list(range(1, done + 2))
    assert [row["weights/version"] for row in rows] == list(range(2, done + 3))
    # fp32 on both sides: the engine on its host has the trainers' weights, also after the resume
    assert max(row["mismatch/prob_diff_mean"] for row in rows) < 1e-4
    assert max(row["policy/grad_norm"] for row in rows[:2]) > 0
