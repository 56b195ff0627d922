"""docs/configuration.md is what the schema says."""

from pathlib import Path
from typing import cast

from dcpo_openrlhf.recipe.schema import Recipe, Section
from tools import reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text() == reference.page(), "run: python -m tools.reference > docs/configuration.md"


def test_every_key_has_a_row_with_its_default() -> None:
    page = reference.page()
    for name, field in Recipe.model_fields.items():
        for key in cast(type[Section], field.annotation).model_fields:
            assert page.count(f"| `{name}.{key}` |") == 1
    assert "| `train.group_size` | int, ≥ 1 | `8` |" in page
    assert "| `loss.dual_clip` | number, > 1 or `null` | `null` |" in page
    assert "| `model.path` | path | **required** |" in page
