"""Every shipped recipe loads, fits its model's published config.json and its devices, and can be planned anywhere."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from dcpo_openrlhf.methods import METHODS
from dcpo_openrlhf.recipe import memory, preflight
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError
from tools.smollm2 import ensure_smollm2

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "model_configs"
FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
ON_GPUS = [path for path in RECIPES if "xa800" in path.stem]
MAIN = FOLDER / "dcpo-qwen2.5-math-7b-8xa800.yaml"
METHODS_OF_THE_PAPER = ("dcpo", "grpo", "entropy_reg", "entropy_adv", "aepo")
METHODS_SINCE: dict[str, dict[str, object]] = {
    "scope_rl": {},
    "clip_cov": {"loss.clip_low": 1.0, "loss.clip_high": 1.0},
    "kl_cov": {"loss.clip_low": 1.0, "loss.clip_high": 1e6},
    "adaptive_entropy": {},
    "entropic": {},
}
"""Rows from other papers, and what their recipes set beside the method: docs/methods.md says why."""
MODELS_OF_THE_PAPER = ("qwen2.5-7b", "qwen2.5-math-7b", "qwen3-4b")
HERE = ("model.path = ", "task.", "the run needs ", "run.dir = ", "not installed: ", "model.layers = auto takes ")
"""How a line begins that says what this machine lacks."""
PAPER = {
    # the paper, else its authors' code
    "method.mixing": "convex",
    "method.temperature_low": 0.8,
    "method.temperature_high": 1.2,
    "method.temperature_rule": "switch",
    "method.alpha_schedule": "reference",
    "method.alpha_max": 0.1,
    "method.entropy_coefficient": 0.015,
    "method.entropy_adv_beta": 0.4,
    "method.entropy_adv_kappa": 2.0,
    "method.aepo_max_rows": 60,
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.2,
    "loss.dual_clip": None,
    "loss.aggregation": "sequence_mean",
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_updates": 0,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.grad_clip": 1.0,
    "train.prompts_per_step": 512,
    "train.prompts_per_update": 128,
    "train.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "evaluation.temperature": 0.1,
    "evaluation.top_p": 0.95,
    "task.template": "boxed_think",
    "task.chat": True,
    "reward.extractor": "boxed",
}


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


def flat(recipe: Recipe) -> dict[str, object]:
    return {f"{s}.{key}": value for s, keys in recipe.model_dump(mode="json").items() for key, value in keys.items()}


def differences(path: Path, other: Path) -> dict[str, object]:
    """section.key -> value in `path`, where the other recipe has another one; run.dir must differ and is left out."""
    theirs = flat(load(other))
    found = {key: value for key, value in flat(load(path)).items() if value != theirs[key]}
    assert found.pop("run.dir")
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_can_be_planned(path: Path) -> None:
    recipe = load(path)
    if "smollm2" in path.stem:
        ensure_smollm2()
    lacking = preflight.check(recipe, dry_run=True)
    assert all(line.startswith(HERE) for line in lacking), lacking
    plan = preflight.plan(recipe, lacking)
    assert all(line.startswith("# ") for line in plan.splitlines())
    lines = path.read_text().splitlines()
    assert len(lines) <= (6 if "base" in yaml.safe_load(path.read_text()) else 20), "only what differs"


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_recipe_is_what_its_name_says(path: Path) -> None:
    recipe = load(path)
    match = re.fullmatch(r"(\w+)-(?:target_entropy_([\d.]+)-)?(qwen.*?)-(?:(\d+)x)?8xa800(-40gb)?", path.stem)
    assert match, "METHOD-MODEL-DEVICES.yaml"
    method, target, model, nodes, small = match.groups()
    assert recipe.method.name == method
    assert recipe.method.target_entropy == float(target or 0.25)
    assert recipe.model.config and recipe.model.config.stem.lower() == model
    assert recipe.model.path.name == recipe.model.config.stem
    assert recipe.run.dir == Path("runs") / path.stem
    assert preflight.devices(recipe) == int(nodes or 1) * 8
    assert recipe.parallel.device_memory_gb == (40 if small else 80)
    assert memory.trainer_memory(sizes(recipe), recipe).total < recipe.parallel.device_memory_gb * memory.GIB


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_recipe_runs_the_papers_settings(path: Path) -> None:
    values = flat(load(path))
    own = METHODS_SINCE[values["method.name"]] if path.parent.name == "methods" else {}  # type: ignore[index]
    assert {key: values[key] for key in PAPER} == PAPER | own
    # Qwen2.5-Math-7B has 4096 positions, every other model room for the paper's 8192 new tokens
    assert values["rollout.max_new_tokens"] == (3072 if "math" in path.stem else 8192)


def test_no_two_recipes_write_to_one_folder() -> None:
    folders = [load(path).run.dir for path in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("model", MODELS_OF_THE_PAPER)
@pytest.mark.parametrize("devices", ["8xa800", "8xa800-40gb"])
def test_methods_differ_in_the_method_alone(model: str, devices: str) -> None:
    for method in METHODS_OF_THE_PAPER[1:]:
        path, dcpo = (FOLDER / f"{name}-{model}-{devices}.yaml" for name in (method, "dcpo"))
        assert differences(path, dcpo) == {"method.name": method}


def test_folders_hold_what_the_page_says() -> None:
    grid = itertools.product(METHODS_OF_THE_PAPER, MODELS_OF_THE_PAPER, ("8xa800", "8xa800-40gb"))
    cpu = {"dcpo-smollm2-135m-cpu", "dcpo-smollm2-135m-cpu-ahead", "grpo-smollm2-135m-cpu"}
    demo = {*cpu, "dcpo-smollm2-135m-1gpu"}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"-".join(parts) for parts in grid} | demo
    sweep = [differences(path, MAIN) for path in sorted((FOLDER / "sweep").glob("*.yaml"))]
    assert sweep == [{"method.target_entropy": target} for target in (0.5, 0.75, 1.0)]
    ablations = [differences(path, MAIN) for path in sorted((FOLDER / "ablations").glob("*.yaml"))]
    names = ["dcpo_wo_double_is", "dcpo_wo_reinforce", "j1", "j2", "j3", "j4"]
    assert ablations == [{"method.name": name} for name in names]
    since = {flat(load(path))["method.name"]: differences(path, MAIN) for path in (FOLDER / "methods").glob("*.yaml")}
    assert since == {name: {"method.name": name} | own for name, own in METHODS_SINCE.items()}
    assert set(names) | set(METHODS_OF_THE_PAPER) | set(since) | {"dcpo_expected"} == set(METHODS)
    assert {path.parent.name for path in RECIPES} == {"recipes", "sweep", "ablations", "methods", "cluster"}


def test_demo_recipes_differ_in_the_method_alone() -> None:
    demo = FOLDER / "dcpo-smollm2-135m-cpu.yaml"
    found = differences(FOLDER / "grpo-smollm2-135m-cpu.yaml", demo)
    assert found.pop("method.name") == "grpo"
    assert all(key.startswith("method.") and value == flat(load(MAIN))[key] for key, value in found.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_planned_by_an_override(method: str) -> None:
    preflight.check(load(MAIN, f"method.name={method}"), dry_run=True)


@pytest.mark.parametrize(
    "overrides", re.findall(r"`((?:method|train)\.[^`]*=[^`]*)`", (ROOT / "recipes/README.md").read_text())
)
def test_overrides_of_the_page(overrides: str) -> None:
    assert load(MAIN, *overrides.split()) != load(MAIN)


def test_memory_of_the_page_is_what_a_dry_run_prints() -> None:
    page = (ROOT / "docs" / "run_on_8xa800.md").read_text()
    rows = re.findall(r"^\| (dcpo-\S+) \| ([\d.]+) \((.*?)\) \| ([\d.]+) \((.*?)\) \|$", page, flags=re.M)
    assert [row[0] for row in rows] == [f"dcpo-{m}-8xa800" for m in ("qwen2.5-math-7b", "qwen2.5-7b", "qwen3-4b")]
    for name, large, large_how, small, small_how in rows:
        for file, number, how in ((name, large, large_how), (f"{name}-40gb", small, small_how)):
            recipe = load(FOLDER / f"{file}.yaml")
            assert how == f"tensor {recipe.parallel.tensor}, recompute {recipe.train.recompute}"
            assert f"{memory.trainer_memory(sizes(recipe), recipe).total / memory.GIB:.1f}" == number


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
