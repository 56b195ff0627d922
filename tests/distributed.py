"""Run a test function on several CPU ranks: one process a rank, gloo over loopback."""

import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tests.bounds import HANG_S

# A server process that has imported torch and started no thread is forked for every rank:
# tens of milliseconds a rank instead of the seconds that a fresh interpreter takes.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "dcpo_openrlhf.policy.megatron.step"])
_GRACE_SECONDS = 2.0
"""After a first failure, time the other ranks get to report their own before they are killed."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = HANG_S) -> list[Any]:
    """[fn(rank, world_size, *args) for every rank], each in its own process inside one gloo process group.

    fn is a module-level function; args and results must pickle (tensors do). Raises RuntimeError with rank and
    traceback when a rank fails or dies, and TimeoutError after `timeout` seconds; no process is left behind.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    payload = pickle.dumps((fn, args))
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank_main, args=(rank, world_size, store.port, dict(os.environ), timeout, payload, sender)
            )
            process.start()
            sender.close()  # so that a rank that dies reads as end of file here
            processes.append(process)
            pipes.append(receiver)
        results, failures = _collect(pipes, deadline=time.monotonic() + timeout)
    finally:
        _stop(processes)
    if failures:
        raise RuntimeError("\n".join(f"rank {rank} of {world_size}: {text}" for rank, text in failures.items()))
    if missing := sorted(set(range(world_size)) - set(results)):
        raise TimeoutError(f"ranks {missing} of {world_size} did not finish {fn.__name__} in {timeout} s")
    return [results[rank] for rank in range(world_size)]


def _collect(pipes: list[Connection], *, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and failures by rank, first failure first; returns early once a failure is a grace period old."""
    pending = {pipe: rank for rank, pipe in enumerate(pipes)}
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while pending and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(pending), timeout=left):
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, "the process died without a result (killed or crashed)"
            (results if ok else failures)[rank] = value
            if not ok:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return results, failures


def _stop(processes: list[Any]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


_world: dict[str, Any] = {}


def renew_process_group() -> None:
    """In a rank: end every process group, whose threads would go on waiting, and begin anew with the one of all."""
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another rank still reads from it
        dist.destroy_process_group()
    _world["generation"] += 1
    dist.init_process_group(
        "gloo",
        store=PrefixStore(str(_world["generation"]), _world["store"]),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_world["timeout"],
    )


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    timeout: float,
    payload: bytes,
    sender: Connection,
) -> None:
    faulthandler.dump_traceback_later(0.95 * timeout)  # where a rank hangs, on stderr, before it is killed
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ.clear()  # the server keeps the environment of its first call
    os.environ.update(environment | ranks | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    try:
        _world.update(
            store=TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout)),
            timeout=timedelta(seconds=timeout),
            generation=0,
        )
        renew_process_group()
        fn, args = pickle.loads(payload)
        report = pickle.dumps((True, fn(rank, world_size, *args)))
        if dist.is_initialized():  # fn may have taken it down itself
            dist.barrier()  # nobody leaves while another rank still reads from it
    except BaseException:
        report = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(report)
    if dist.is_initialized():
        dist.destroy_process_group()
