"""A grading worker: `python -m dcpo_openrlhf.reward.worker SECONDS [FUNCTION]`, one job at a time, killed from outside.

With a reward function it calls that one; without, it compares answers and runs tests.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

READY = b"ready\n"
WORKER_MEMORY_BYTES = 4 * 2**30  # address space; a worker needs 0.1 GiB
Handler = Callable[[dict[str, Any]], Any]


def built_in(deadline_s: float) -> Handler:
    """What answers {"gold", "found"} with whether they are equal, {"program", "code", "cases"} with `code.passes`."""
    import mpmath  # noqa: F401  # before READY, so that no comparison pays for it

    from dcpo_openrlhf.reward import code, sandbox
    from dcpo_openrlhf.reward.cases import Checks
    from dcpo_openrlhf.reward.compare import symbolic_equal

    if sys.platform == "linux":
        sandbox.hide_memory()  # which holds the tests

    def answer(job: dict[str, Any]) -> Any:
        if "program" in job:
            tests = Checks(tuple(job["code"]), tuple((given, expected) for given, expected in job["cases"]))
            return code.passes(job["program"], tests, deadline_s=deadline_s)
        return symbolic_equal(job["gold"], job["found"])

    return answer


def of_function(name: str) -> Handler:
    """What answers {"rows", "queries", "threshold"} with the function's numbers, or with what it raised."""
    from dcpo_openrlhf.reward import functions

    function = functions.load(name)  # before READY: what it imports is no part of a call

    def answer(job: dict[str, Any]) -> Any:
        rows = [functions.Row(*row) for row in job["rows"]]
        try:
            return functions.call(function, name, rows, job["queries"], threshold=job["threshold"])
        except functions.FunctionError as error:
            return {"wrong": str(error)}
        except (Exception, SystemExit) as error:
            return {"raised": functions.said(error)}

    return answer


def main(deadline_s: float, function: str | None = None) -> None:
    """Reads jobs as JSON lines from stdin, answers each with a line of JSON, ends with the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # what a function reads is not a job
    os.dup2(2, 1)  # what a library prints is not a reply
    answer = built_in(deadline_s) if function is None else of_function(function)
    replies.write(READY)
    replies.flush()
    for line in jobs:
        # The kernel ends this process even inside C code, should the parent die before the deadline.
        signal.alarm(math.ceil(deadline_s) + 5)
        reply = json.dumps(answer(json.loads(line))).encode()
        signal.alarm(0)
        replies.write(reply + b"\n")
        replies.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
