"""The page of model families is that of the code's list, and every family has every proof."""

import importlib
from pathlib import Path

import pytest

from dcpo_openrlhf.recipe.families import FAMILIES, LACKS
from tests.tiny import ARCHITECTURE_FIELDS
from tools import families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) <= set(ARCHITECTURE_FIELDS)
    assert {str(fields.get("model_type", name)) for name, fields in ARCHITECTURE_FIELDS.items()} == set(FAMILIES)
    assert not set(LACKS) & set(FAMILIES)


@pytest.mark.parametrize("column", families.PROOFS)
def test_every_proof_is_a_test_of_every_family(column: str) -> None:
    file, _, name = families.PROOFS[column].partition("::")
    test = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
    cases = [str(case) for mark in test.pytestmark if mark.name == "parametrize" for case in mark.args[1]]
    for family in families.variants():
        assert any(family == case or f"'{family}'" in case for case in cases), family


def test_the_page_is_of_this_list_and_no_proof_has_failed() -> None:
    text = PAGE.read_text()
    assert text.endswith("\n".join(families.limits()) + "\n"), "make it anew: python -m tools.families --run"
    rows = families.rows_of(text)
    assert list(rows) == families.variants()
    for row in rows.values():
        cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
        assert cells[-1] in ("1 passed", "not run"), row  # an engine takes a minute, on a busy machine several
        assert all(cell.endswith(" passed") for cell in cells[:-1]), row


def test_cases_are_counted_by_family() -> None:
    update, statistics = "an update on tp 2, pp 2, ep 2", "statistics as transformers' in fp32"
    test = families.PROOFS[update].rpartition("::")[2]
    other = families.PROOFS[statistics].rpartition("::")[2]
    found = families.read(
        "<testsuites><testsuite>"
        f'<testcase name="{test}[llama_bias-tp2]"/><testcase name="{test}[llama-tp2]"><failure/></testcase>'
        f'<testcase name="{test}[llama_bias-pp2]"/><testcase name="{test}[llama-ep2]"><skipped/></testcase>'
        f'<testcase name="{other}[llama-True-1]"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    assert found[update, "llama_bias"] == {"passed": 2}
    assert found[update, "llama"] == {"failed": 1}
    assert found[statistics, "llama"] == {"failed": 1}
    assert found[statistics, "qwen2"] == {}
