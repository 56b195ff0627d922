"""A Ray of this process's own, started so that a busy machine can: bounds raised, tried again, failures ended whole."""

import contextlib
import ctypes
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from dcpo_openrlhf.errors import RunError

logger = logging.getLogger("dcpo_openrlhf")

START_ATTEMPTS = 3
"""Ray's node waits 30 s for the ports of its agents, which no setting raises; at the next attempt they load faster."""
START_BOUNDS = {
    # the head waits so long for its own node; the node itself gives up after twice the 30 s above
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "600",
    # connections to servers that are still starting
    "RAY_gcs_rpc_server_connect_timeout_s": "30",
    "RAY_py_gcs_connect_timeout_s": "120",
    "RAY_raylet_client_num_connect_attempts": "100",
    # the dashboard, part of which runs without one too
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300",
}
"""Ray's own are 1 to 60 s. It reads them when it is imported, its servers when they start."""
ORPHANS_END = {"RAY_process_group_cleanup_enabled": "true"}
"""The node ends what a worker that died leaves behind: vLLM's process watches its actor only once it has begun."""
OUR_MISTAKE = (ValueError, TypeError, LookupError, AssertionError, ImportError, PermissionError)
"""Errors of a start that load does not explain."""


class StartupError(RunError):
    """What the start of a run waits for did not come; says what, for how long it waited, and what to do."""


class LocalRayError(StartupError):
    """Ray did not start on this machine; says how often it was tried, within which bounds, and what to do."""


def raise_bounds() -> None:
    """Set START_BOUNDS for this process and those it starts; what the user has set stays."""
    for name, value in START_BOUNDS.items():
        os.environ.setdefault(name, value)


def start(**options: Any) -> Any:
    """ray.init(**options) without an address, tried START_ATTEMPTS times; `ray.shutdown` ends what it started.

    Everything that a failed attempt began is ended, also where it is not tried again: after an error that load does not
    explain, one that came before Ray had a folder for its session, or a signal. No other thread may start processes
    meanwhile.
    """
    raise_bounds()
    for name, value in ORPHANS_END.items():
        os.environ.setdefault(name, value)
    import ray  # not before: it would read its own bounds

    with orphans_adopted(), _signals_left_alone():
        for attempt in range(1, START_ATTEMPTS + 1):
            strangers, before = frozenset(descendants()), _sessions(options.get("_temp_dir"))
            try:
                return ray.init(**options)
            except BaseException as error:
                begun = [folder for folder in _sessions(options.get("_temp_dir")) if folder not in before]
                if ray.is_initialized():
                    ray.shutdown()
                end_descendants(strangers)
                if isinstance(error, OUR_MISTAKE) or not isinstance(error, Exception) or not begun:
                    raise
                if attempt == START_ATTEMPTS:
                    raise LocalRayError(_told(error, begun[-1] / "logs")) from error
                logger.warning("Ray did not start, attempt %d of %d: %s", attempt, START_ATTEMPTS, _first_line(error))
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Ray puts a handler of its own in the place of SIGTERM's, which ends the process without a word: not inside."""
    from ray._private import utils

    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs


def _sessions(temp_dir: str | None) -> list[Path]:
    """Folders of the starts that this process has begun, in their order; Ray names them by time and process."""
    from ray._common.utils import get_default_ray_temp_dir

    return sorted(Path(temp_dir or get_default_ray_temp_dir()).glob(f"session_2*_{os.getpid()}"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _told(error: Exception, logs: Path) -> str:
    """Rule and outcome on the first line, what to do on the last one; bounds, Ray's words and its log between them."""
    bounds = ", ".join(f"{name}={os.environ[name]}" for name in START_BOUNDS)
    return (
        f"Ray must start on this machine, but did not in {START_ATTEMPTS} attempts, of which nothing is left: "
        f"{_first_line(error)}\n"
        f"Bounds: {bounds}\n"
        f"{error}\n{_end_of_log(logs)}\n"
        f"Let other work on this machine end, or set these variables to higher bounds; Ray's logs are in {logs}"
    )


def _end_of_log(logs: Path, lines: int = 15) -> str:
    """What the node said last, or the first of Ray's servers where the node never ran."""
    for name in ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err"):
        file = logs / name
        if file.is_file() and (text := file.read_text(errors="replace").strip()):
            return "\n".join([f"The end of {name}:", *text.splitlines()[-lines:]])
    return "Its servers have logged nothing."


def out_of_memory(error: BaseException) -> str | None:
    """What Ray's memory monitor did to a process, with what helps, on one line; None for any other error."""
    from ray.exceptions import OutOfMemoryError  # not before: see `start`

    if not isinstance(error, OutOfMemoryError):
        return None
    seen = re.search(r"was ([\d.]+ ?\w?B) / ([\d.]+ ?\w?B)", str(error))
    used = f"{seen[1]} of {seen[2]} of its host's memory" if seen else "too much of its host's memory"
    return (
        f"was killed by Ray, which saw {used} in use (let other work on that host end, let the run hold less: "
        "--dry-run says what it takes, or start Ray with a higher RAY_memory_usage_threshold)"
    )


def descendants(strangers: frozenset[psutil.Process] = frozenset()) -> list[psutil.Process]:
    """All processes that descend from this one and are no strangers."""
    return [process for process in psutil.Process().children(recursive=True) if process not in strangers]


def end_descendants(strangers: frozenset[psutil.Process]) -> int:
    """End all descendants but the strangers, within 9 s: first asked, then killed. How many there were.

    It finds those in sessions of their own too; those that have lost their parent, where orphans are adopted.
    """
    ended: set[psutil.Process] = set()
    # Killed twice: a process may have started another one meanwhile.
    for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        left = descendants(strangers)
        ended.update(left)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        psutil.wait_procs(left, timeout=3)
    return len(ended)


PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


def adopt_orphans(adopt: bool = True) -> bool:
    """From here on, descendants that lose their parent become children of this process, so that none can hide.

    Returns whether it was so before.
    """
    before = ctypes.c_int()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) != 0 or (
        libc.prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0) != 0
    ):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed; it needs Linux 3.4 or newer")
    return bool(before.value)


@contextlib.contextmanager
def orphans_adopted() -> Iterator[None]:
    """adopt_orphans inside, as it was before outside."""
    before = adopt_orphans()
    try:
        yield
    finally:
        adopt_orphans(before)
