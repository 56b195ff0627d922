"""What a step of a recipe takes on N devices, from constants with their sources; docs/scale.md is its page.

python -m tools.scale RECIPE [section.key=value ...] [--devices 8 64 512 4096] [--device A800] [--batch recipe|grown]
python -m tools.scale --output docs/scale.md

Without a recipe: the page, with published steps and the model's error on each. Nothing is started, no GPU is asked.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import RecipeError
from tools.scale.constants import DEVICES
from tools.scale.page import SIZES, case_of, page, table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a recipe that cannot be simulated."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--devices", type=int, nargs="+", default=SIZES, metavar="N", help="in all, engines' included")
    parser.add_argument("--device", choices=DEVICES, default="A800")
    parser.add_argument(
        "--batch", choices=("recipe", "grown"), default="recipe", help="grown: prompts in proportion to the devices"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the text goes; standard output otherwise")
    arguments = parser.parse_args(argv)
    try:
        if min(arguments.devices) < 1:
            raise RecipeError(
                f"--devices = {' '.join(map(str, arguments.devices))} must be at least 1 each; raise them"
            )
        if arguments.recipe is None:
            lines = page(arguments.devices, arguments.device)
        else:
            case = case_of(load_recipe(arguments.recipe, arguments.overrides), arguments.device)
            lines = table(case, arguments.devices, grown=arguments.batch == "grown")
        text = "\n".join(lines) + "\n"
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
