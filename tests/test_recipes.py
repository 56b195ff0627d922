"""Every shipped recipe loads, fits its model's published config.json and its devices, and can be planned anywhere."""

import json
import re
from pathlib import Path

import pytest

from dcpo_openrlhf import memory, preflight
from dcpo_openrlhf.config import Recipe, RecipeError, load_recipe
from dcpo_openrlhf.objectives import METHODS

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "model_configs"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MAIN = ROOT / "recipes" / "dcpo-qwen2.5-math-7b-8xa800.yaml"
HERE = ("model.path = ", "task.", "the run needs ", "run.dir = ", "not installed: ")
"""How a line begins that says what this machine lacks."""


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipes' paths are relative to it
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def load(path: Path, *overrides: str) -> Recipe:
    """The recipe; the CPU ones plan with the demo model's config.json, which they make themselves."""
    config = [f"model.config={CONFIGS / 'SmolLM2-135M-Instruct.json'}"] if path.stem.endswith("-cpu") else []
    return load_recipe(path, [*config, *overrides])


def sizes(recipe: Recipe) -> memory.Sizes:
    assert recipe.model.config is not None
    return memory.Sizes.of(json.loads(recipe.model.config.read_text()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_can_be_planned(path: Path) -> None:
    recipe = load(path)
    lacking = preflight.check(recipe, dry_run=True)
    assert all(line.startswith(HERE) for line in lacking), lacking
    plan = preflight.plan(recipe, lacking)
    assert all(line.startswith("# ") for line in plan.splitlines())
    assert len(path.read_text().splitlines()) <= 20, "only what differs from the schema"
    if recipe.model.config and not path.stem.endswith("-cpu"):
        model = path.stem.split("-", 1)[1].rsplit("-8xa800", 1)[0]
        assert re.sub(r"-\d+x8xa800$", "", model) == recipe.model.config.stem.lower()
        assert recipe.model.path.name == recipe.model.config.stem


@pytest.mark.parametrize("path", [p for p in RECIPES if "xa800" in p.stem], ids=lambda path: path.stem)
def test_recipe_fills_the_devices_of_its_name(path: Path) -> None:
    recipe = load(path)
    match = re.search(r"-(?:(\d+)x)?8xa800(-40gb)?$", path.stem)
    assert match
    assert preflight.devices(recipe) == int(match[1] or 1) * 8
    assert recipe.parallel.device_memory_gb == (40 if match[2] else 80)
    assert memory.trainer_memory(sizes(recipe), recipe).total < recipe.parallel.device_memory_gb * memory.GIB


def test_the_papers_methods_have_files() -> None:
    for method in ("dcpo", "grpo", "entropy_reg", "entropy_adv", "aepo"):
        recipe = load(MAIN.with_name(f"{method}-qwen2.5-math-7b-8xa800.yaml"))
        assert recipe.method.name == method
        same = {"run", "method"}
        assert recipe.model_dump(exclude=same) == load(MAIN).model_dump(exclude=same), "they differ in the method alone"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_planned_by_an_override(method: str) -> None:
    preflight.check(load(MAIN, f"method.name={method}"), dry_run=True)


@pytest.mark.parametrize(
    "overrides", re.findall(r"`((?:method|train)\.[^`]*=[^`]*)`", (ROOT / "recipes/README.md").read_text())
)
def test_overrides_of_the_page(overrides: str) -> None:
    assert load(MAIN, *overrides.split()) != load(MAIN)


def test_what_does_not_fit_is_refused_with_all_of_it_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        preflight.check(
            load(
                MAIN,
                "parallel.device_memory_gb=16",
                "method.name=dpco",
                "rollout.max_new_tokens=8192",
                "train.micro_batch_tokens=9216",
            ),
            dry_run=True,
        )
    message = str(caught.value)
    assert "did you mean 'dcpo'?" in message
    assert "1024 + 8192 = 9216 exceeds the model's max_position_embeddings = 4096" in message
    assert re.search(
        r"a training device needs about \d+\.\d GiB \(weights 7\.1, gradients 14\.2, optimizer 21\.3", message
    )
    assert "an engine device holds 14.2 GiB of weights" in message


def test_a_run_wants_what_a_dry_run_forgives() -> None:
    with pytest.raises(
        RecipeError, match=r"(?s)is not a Hugging Face model folder.*task\.train = .*no such readable file"
    ):
        preflight.check(load(MAIN))


def test_a_folder_with_config_json_alone_can_be_planned_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "Qwen3-4B.json").read_text())
    recipe = load(ROOT / "recipes" / "dcpo-qwen3-4b-8xa800.yaml", f"model.path={tmp_path}", "model.config=null")
    assert any("has no weights" in line for line in preflight.check(recipe, dry_run=True))
    with pytest.raises(RecipeError, match="has no weights"):
        preflight.check(recipe)
