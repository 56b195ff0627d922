"""A grading worker: `python -m dcpo_openrlhf.reward.worker SECONDS`, one comparison at a time, killed from outside."""

import json
import math
import os
import signal
import sys

from dcpo_openrlhf.reward.compare import symbolic_equal

READY, EQUAL, UNEQUAL = b"r", b"1", b"0"  # a worker's replies are single bytes: no partial reads
WORKER_MEMORY_BYTES = 4 * 2**30  # address space; a worker needs 0.1 GiB


def main(deadline_s: float) -> None:
    """Reads pairs [gold, found] as JSON lines from stdin, answers each with one byte, ends with the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not a reply
    import mpmath  # noqa: F401  # before READY, so that no comparison pays for it

    os.write(replies, READY)
    for line in sys.stdin:
        # The kernel ends this process even inside C code, should the parent die before the deadline.
        signal.alarm(math.ceil(deadline_s) + 5)
        equal = symbolic_equal(*json.loads(line))
        signal.alarm(0)
        os.write(replies, EQUAL if equal else UNEQUAL)


if __name__ == "__main__":
    main(float(sys.argv[1]))
