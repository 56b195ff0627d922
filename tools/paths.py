"""A recipe's relative paths as absolute overrides, one a line: a Ray job runs in a copy of the working directory.

python -m tools.paths --recipe FILE [section.key=value ...]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import DataFile, Recipe, RecipeError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a recipe that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m tools.paths", description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as the run is to have them")
    arguments = parser.parse_args(argv)
    try:
        lines = absolute(load_recipe(arguments.recipe, arguments.overrides))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def absolute(recipe: Recipe) -> list[str]:
    """ "section.key=/path" of every relative path, seen from the folder that this is started in."""
    relative = {".".join(key.split(".")[:2]) for key, path in recipe.paths.items() if not path.is_absolute()}
    return [f"{key}={_absolute(value)}" for key, value in recipe.settings.items() if key in relative]


def _absolute(value: Path | list[DataFile]) -> str:
    """A path, or a list of data files in JSON, which is YAML; without a space, for shells part the lines at them."""
    if isinstance(value, Path):
        return str(value.absolute())
    files = [file.model_copy(update={"path": file.path.absolute()}) for file in value]
    shown = [file.model_dump(mode="json", exclude_none=True) for file in files]
    return json.dumps(shown, separators=(",", ":"))


if __name__ == "__main__":
    sys.exit(main())
