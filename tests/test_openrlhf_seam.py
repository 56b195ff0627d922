"""Every argument that the reused OpenRLHF code reads is in the namespace that the recipe gives it."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcpo_openrlhf.openrlhf_seam import RecipeStrategy, make_importable, openrlhf_args
from dcpo_openrlhf.recipe.schema import Recipe
from tests.bounds import HANG_S

# file under openrlhf/trainer: class: methods on our path (None: all of them)
REUSED: dict[str, dict[str, tuple[str, ...] | None]] = {
    "ppo_trainer.py": {"BasePPOTrainer": ("__init__", "ppo_train", "broadcast_to_vllm")},
    "ppo_utils/experience_maker.py": {"RemoteExperienceMaker": ("__init__", "make_experience_batch")},
    "ppo_utils/samples_generator.py": {
        "SamplesGenerator": ("__init__", "generate_samples", "_process_response_into_experience")
    },
    "ray/launcher.py": {"BaseDistributedActor": None, "BaseModelActor": None, "RayActorGroup": None},
}
Chain = tuple[str, ...]


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "models/tiny"},
            "task": {"kind": "arithmetic"},
            "train": {"prompts_per_step": 64, "prompts_per_update": 16, "group_size": 4},
        }
    )


def has_flash_attn() -> bool:
    try:
        return bool(importlib.metadata.version("flash-attn"))
    except importlib.metadata.PackageNotFoundError:
        return False


def reused_functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    spec = importlib.util.find_spec("openrlhf")  # does not import it: seconds, and flash-attn
    assert spec is not None and spec.submodule_search_locations
    trainer = Path(spec.submodule_search_locations[0]) / "trainer"
    for file, classes in REUSED.items():
        found = {n.name: n for n in ast.parse((trainer / file).read_text()).body if isinstance(n, ast.ClassDef)}
        for name, methods in classes.items():
            functions = {n.name: n for n in found[name].body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
            for method in functions if methods is None else methods:
                yield f"{file}: {name}.{method}", functions[method]


def dotted(node: ast.expr) -> Chain | None:
    """("self", "args", "train") of self.args.train, also for getattr(self.args, "train", ...); None for others."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and (*base, node.attr)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        base, name = dotted(node.args[0]), node.args[1]
        return base and (*base, name.value) if isinstance(name, ast.Constant) else None  # type: ignore[return-value]
    return None


def arguments_read(tree: ast.AST) -> set[Chain]:
    """What follows args in every args.x.y, self.args.x.y, strategy.args.x.y and self.strategy.args.x.y."""
    chains = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Call)}
    roots = [("args",), ("self", "args"), ("strategy", "args"), ("self", "strategy", "args")]
    return {c[len(root) :] for c in chains if c for root in roots if c[: len(root)] == root and len(c) > len(root)}


def unreadable(args: Namespace, chains: set[Chain]) -> list[str]:
    """Chains that raise AttributeError on `args`; what comes after a plain value (a method of it) is not looked at."""
    missing = []
    for chain in sorted(chains):
        value: object = args
        for name in chain:
            if not isinstance(value, Namespace):
                break
            if not hasattr(value, name):
                missing.append(".".join(chain))
                break
            value = getattr(value, name)
    return missing


def test_every_argument_that_reused_code_reads_exists(recipe: Recipe) -> None:
    args = openrlhf_args(recipe)
    read = {where: arguments_read(function) for where, function in reused_functions()}
    assert {where: names for where, chains in read.items() if (names := unreadable(args, chains))} == {}
    assert {("algo", "kl", "init_coef"), ("ckpt", "best_metric_key"), ("ds", "enable_sleep")} <= set.union(
        *read.values()
    )


def test_every_argument_that_this_package_reads_exists(recipe: Recipe) -> None:
    package = Path(__file__).parents[1] / "dcpo_openrlhf"
    read = {file.name: arguments_read(ast.parse(file.read_text())) for file in package.rglob("*.py")}
    assert {name: n for name, chains in read.items() if (n := unreadable(openrlhf_args(recipe), chains))} == {}


def test_a_missing_argument_is_found(recipe: Recipe) -> None:
    args = openrlhf_args(recipe)
    del args.algo.kl.init_coef
    code = (
        'self.args.algo.kl.init_coef; getattr(strategy.args.eval, "split", None); args.rollout.batch_size.bit_length()'
    )
    assert unreadable(args, arguments_read(ast.parse(code))) == ["algo.kl.init_coef", "eval.split"]


def test_arguments_carry_the_recipes_values(recipe: Recipe) -> None:
    args = openrlhf_args(recipe)
    assert args.actor.model_name_or_path == "models/tiny"
    assert (args.actor.num_nodes, args.actor.num_gpus_per_node) == (1, 8)
    assert (args.rollout.batch_size, args.rollout.n_samples_per_prompt, args.train.batch_size) == (64, 4, 16 * 4)
    assert args.data.max_len == recipe.rollout.context
    assert args.algo.kl.init_coef == 0.0, "no KL penalty: the regulariser is DCPO's"


def test_strategy_prints_on_rank_0(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        strategy = RecipeStrategy(recipe, rank=rank)
        assert strategy.is_rank_0() == (rank == 0)
        strategy.print("said by rank", rank)
    assert capsys.readouterr().out == "said by rank 0\n"


@pytest.mark.skipif(has_flash_attn(), reason="flash-attn itself is installed")
def test_flash_attn_stub_imports_and_refuses_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
        monkeypatch.setitem(sys.modules, name, None)  # restored afterwards
        del sys.modules[name]
    make_importable()
    from flash_attn.bert_padding import pad_input  # type: ignore[import-not-found]
    from flash_attn.utils.distributed import all_gather  # type: ignore[import-not-found]

    for function in (pad_input, all_gather):
        with pytest.raises(ImportError, match="flash-attn is not installed"):
            function()


def test_driver_starts_where_transformer_engine_finds_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(
        "raise OSError('libcuda.so.1: cannot open shared object file')"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import dcpo_openrlhf.trainer, dcpo_openrlhf.policy.actor\n"
        "assert 'openrlhf' in sys.modules\n"
        "try:\n    import transformer_engine\nexcept OSError:\n    print('found by who wants it')"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert "found by who wants it" in done.stdout
