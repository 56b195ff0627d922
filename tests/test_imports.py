"""The maths needs torch and the standard library alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import HANG_S

ROOT = Path(__file__).resolve().parents[1]
MATHS = ["objectives", "controller", "megatron.token_stats"]
SCRIPT = """
import importlib, sys

FORBIDDEN = {"ray", "vllm", "deepspeed", "megatron", "openrlhf", "transformers"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ImportError(f"the maths must not import {name}")

sys.meta_path.insert(0, Refuse())
importlib.import_module(sys.argv[1])
"""


def run(module: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, module]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)


@pytest.mark.parametrize("module", MATHS)
def test_maths_imports_without_the_stack(module):
    if not (ROOT / "dcpo_openrlhf" / (module.replace(".", "/") + ".py")).is_file():
        pytest.skip(f"{module} is not there")
    result = run(f"dcpo_openrlhf.{module}")
    assert result.returncode == 0, result.stderr


def test_the_refusal_works():
    result = run("ray")
    assert result.returncode != 0 and "the maths must not import ray" in result.stderr
