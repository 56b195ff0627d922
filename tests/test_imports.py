"""Imports run downwards through the rooms of the house, and the maths needs torch and the standard library alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bounds import HANG_S

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dcpo_openrlhf"

LEVELS = (
    ("train_dcpo",),
    ("rollout_only",),
    ("trainer",),
    ("assemble", "prompts", "saving"),
    ("monitor",),
    ("experience_maker", "grading", "group_filter"),
    ("experience",),
    ("policy.actor", "policy.group"),
    ("policy.megatron", "policy.deepspeed"),
    ("policy", "rollout", "reward"),
    ("weight_sync",),
    ("openrlhf_seam",),
    ("recipe",),
    ("checkpoint", "colocation", "signals", "local_ray", "phases", "profiling"),
    ("errors",),
    ("methods", "divergences"),
    ("objectives", "controller"),
)
"""From the entry down to the maths. A module imports from its own room or from a level below, never from beside it."""
MATHS = (
    "objectives",
    "methods",
    "divergences",
    "controller",
    "policy.token_stats",
    "policy.rows",
    "policy.balance",
    "policy.shared_prompts",
    "policy.packing",
)
ROOMS = ("monitor", "policy", "policy.megatron", "policy.deepspeed", "recipe", "reward", "rollout", "weight_sync")
MAY_BE_ANYWHERE = {"jaxtyping"}
"""Shapes in signatures: names for people, checked in tests alone."""

Import = tuple[str, bool]
"""(module, stands at module level)."""


def modules() -> dict[str, Path]:
    """Every module of the package below its name, "policy.rows", with its file."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(source: str) -> Iterator[Import]:
    """Modules that the source imports; `from a import b` gives a.b, which names a module or something in a."""
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def own(source: str, known: dict[str, Path]) -> set[str]:
    """The package's modules that the source imports."""
    found = set()
    for name, _ in imports(source):
        name = name.removeprefix("dcpo_openrlhf.") if name.startswith("dcpo_openrlhf.") else ""
        while name and name not in known:  # something in a module
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def home(module: str) -> tuple[int, str]:
    """(level, entry of LEVELS) of a module: the longest entry that it lies in."""
    entries = [(entry, i) for i, level in enumerate(LEVELS) for entry in level if _lies_in(module, entry)]
    assert entries, f"{module} has no place in LEVELS"
    entry, level = max(entries, key=lambda e: len(e[0]))
    return level, entry


def _lies_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def wrong_arrows(source: str, module: str, known: dict[str, Path]) -> list[str]:
    level, room = home(module)
    wrong = []
    for other in sorted(own(source, known)):
        other_level, other_room = home(other)
        if other_room != room and other_level <= level:
            wrong.append(f"{module} -> {other}: {room} stands below or beside {other_room}")
    return wrong


def test_imports_run_downwards() -> None:
    known = modules()
    assert [w for name, file in known.items() if name for w in wrong_arrows(file.read_text(), name, known)] == []


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("from dcpo_openrlhf.trainer import Stopwatch", "monitor.sinks", "monitor.sinks -> trainer"),
        ("from dcpo_openrlhf.policy.deepspeed import step", "policy.megatron.step", "policy.megatron.step -> policy"),
        ("def f():\n    from dcpo_openrlhf.policy.megatron.names import TABLE", "policy.rows", "policy.rows -> policy"),
        ("from dcpo_openrlhf.reward.pool import Grade", "rollout.checks", "rollout.checks -> reward.pool"),
        ("from dcpo_openrlhf import checkpoint, experience", "recipe.load", "recipe.load -> experience"),
    ],
)
def test_a_wrong_arrow_is_named(source: str, module: str, wrong: str) -> None:
    (line,) = wrong_arrows(source, module, modules())
    assert line.startswith(wrong)


def test_each_room_names_its_door_and_others_use_no_other() -> None:
    known = modules()
    for room in ROOMS:
        text = ast.get_docstring(ast.parse(known[room].read_text())) or ""
        door = set(re.findall(r"\w+", text.partition("Door:")[2]))
        inside = {name.removeprefix(room + ".") for name in known if name.startswith(room + ".")}
        assert door & inside, f"{room}/__init__.py names no door"
        for module, file in known.items():
            if not _lies_in(module, room):
                used = {name.removeprefix(room + ".") for name in own(file.read_text(), known) if _lies_in(name, room)}
                assert {name.split(".")[0] for name in used - {room}} <= door, f"{module} enters {room} by another way"


def test_megatron_core_and_deepspeed_stay_in_their_rooms() -> None:
    for module, file in modules().items():
        for name, at_top in imports(file.read_text()):
            library = name.split(".")[0]
            assert not (library == "megatron" and at_top) or _lies_in(module, "policy.megatron"), (module, name)
            assert library != "deepspeed" or _lies_in(module, "policy.deepspeed"), (module, name)


@pytest.mark.parametrize("module", MATHS)
def test_the_maths_imports_torch_and_the_standard_library_alone(module: str) -> None:
    allowed = sys.stdlib_module_names | {"torch"} | MAY_BE_ANYWHERE
    for name, _ in imports(modules()[module].read_text()):
        assert name.split(".")[0] in allowed or name.removeprefix("dcpo_openrlhf.").startswith(MATHS), (module, name)


def test_no_file_is_longer_than_its_idea() -> None:
    for file in PACKAGE.rglob("*.py"):
        source = file.read_text()
        assert source.count("\n") <= 410, f"{file.relative_to(ROOT)} has {source.count(chr(10))} lines; split it"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 66, f"{file.relative_to(ROOT)}: {node.name} has {lines} lines; split it"


SCRIPT = """
import importlib, sys

FORBIDDEN = {"ray", "vllm", "deepspeed", "megatron", "openrlhf", "transformers"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ImportError(f"the maths must not import {name}")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def run(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)


def test_the_maths_runs_without_the_stack() -> None:
    result = run(*(f"dcpo_openrlhf.{module}" for module in MATHS))
    assert result.returncode == 0, result.stderr
    result = run("ray")
    assert result.returncode != 0 and "the maths must not import ray" in result.stderr
