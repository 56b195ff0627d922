"""The pages' code runs."""

import re
from pathlib import Path

import pytest
import torch

from dcpo_openrlhf import methods, objectives
from dcpo_openrlhf.recipe import families, preflight
from dcpo_openrlhf.recipe.schema import Recipe

DOCS = Path(__file__).parent.parent / "docs"


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.S)


def test_add_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "dcpo_mixed_groups", methods.METHODS["grpo"])  # gone afterwards
    (block,) = code_blocks("add_a_method.md")
    assert len(block.splitlines()) <= 40, "one screen"
    exec(compile(block, "add_a_method.md", "exec"), {})
    recipe = Recipe.model_validate(
        {"model": {"path": "unused"}, "task": {"kind": "arithmetic"}, "method": {"name": "dcpo_mixed_groups"}}
    )
    assert list(preflight._method(recipe)) == []

    reward = torch.tensor([1.0, 0.0, 1.0, 1.0])
    (advantage,) = methods.method_advantage(
        methods.METHODS["dcpo_mixed_groups"],
        group_advantage=objectives.group_advantage(reward=reward, group_size=2),
        success=reward,
        target_ratio=torch.full((4, 1), 0.5),
        alpha=1.0,
        mixing="additive",
    )
    a = 0.5 / (0.5**0.5 + 1e-6)
    torch.testing.assert_close(advantage[:, 0], torch.tensor([a + 0.5, -a, 0.0, 0.0]))


def test_add_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are the table's."""
    rows = {name: families.FAMILIES[name] for name in ("mistral", "olmoe")}
    table = {name: family for name, family in families.FAMILIES.items() if name not in rows}
    monkeypatch.setattr(families, "FAMILIES", table)  # a table of its own: put back, a row would stand at the end
    for block in code_blocks("add_a_model.md"):
        exec(compile(block, "add_a_model.md", "exec"), {"Family": families.Family, "FAMILIES": table})
    assert {name: table[name] for name in rows} == rows
