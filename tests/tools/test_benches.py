"""Every benchmark that starts the recipe's own processes runs to its page, in its smallest form.

What such a form measures says nothing and is not looked at.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALLEST = {
    "against_openrlhf": "--prompts 2 --group-size 2 --new-tokens 4 --steps 2",
    "ahead": "--steps 4 --rounds 1 train.prompts_per_step=2 train.prompts_per_update=2 train.group_size=2",
    "driver": "--responses 64 --tokens 16 --group 4 --updates 2 --repeats 1",
    "faults": "rollout.heartbeat=60 --only kill-worker",
    "rollout": "--repeats 1 --workloads 2x2x4",
    "shared_prompts": "--shapes 8/4 --prompts 1 --group-size 2 --repeats 1",
    "startup": "train.prompts_per_step=2 train.prompts_per_update=2 train.group_size=2",
    "weight_sync": "--repeats 1 --dtypes fp32",
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs_to_its_page(name: str) -> None:
    command = [sys.executable, "-m", f"tools.bench.{name}", *SMALLEST[name].split()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "\n|" in ended.stdout, "no table"
