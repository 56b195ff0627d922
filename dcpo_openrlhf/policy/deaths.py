"""What to say where a process of the run has died."""

from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dcpo_openrlhf.errors import RunError
from dcpo_openrlhf.local_ray import out_of_memory

DEAD_S = 10.0
"""Seconds for Ray to tell which policy ranks are dead."""


def told(error: Exception, group: Any) -> RunError | None:
    """What to say where a process of the run has died: Ray tells class and id alone, and a policy rank that waits for a
    dead one tells of its connection.
    """
    if isinstance(error, RayTaskError):
        dead = dead_ranks(group) if group is not None else []
        if not dead:
            return None
        died = f"policy rank {', '.join(map(str, dead))}"
    elif isinstance(error, RayError):
        killed = out_of_memory(error)
        died = " ".join(str(error).split()) if killed is None else f"it {killed}"
    else:
        return None
    return RunError(
        f"a process of this run died: {died}\n"
        "Its last words are in Ray's session folder (logs/worker-*.err), the kernel's in `dmesg` if memory ran out; "
        "continue with checkpoint.resume=auto"
    )


def dead_ranks(group: Any) -> list[int]:
    """Policy ranks whose process is gone; one that is at work, and so does not answer, is not."""
    calls, dead = [actor.__ray_ready__.remote() for actor in group._actor_handlers], []
    for call in ray.wait(calls, num_returns=len(calls), timeout=DEAD_S)[0]:
        try:
            ray.get(call)
        except RayError:  # of an actor that died, or that Ray killed for want of memory
            dead.append(calls.index(call))
    return dead
