"""A recipe's relative paths as absolute overrides, one a line: a Ray job runs in a copy of the working directory.

python -m tools.paths --recipe FILE [section.key=value ...]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError


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
    paths = {key: value for key, value in recipe.settings.items() if isinstance(value, Path)}
    return [f"{key}={value.absolute()}" for key, value in paths.items() if not value.is_absolute()]


if __name__ == "__main__":
    sys.exit(main())
