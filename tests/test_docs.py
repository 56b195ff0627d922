"""The pages' code runs."""

import re
from pathlib import Path

import pytest
import torch

from dcpo_openrlhf import methods, objectives, train_dcpo
from dcpo_openrlhf.grading import question
from dcpo_openrlhf.recipe import families, preflight
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import GraderPool
from dcpo_openrlhf.rollout.chat import render
from dcpo_openrlhf.rollout.data import load, load_jsonl
from dcpo_openrlhf.rollout.tasks import prompt_template
from tests.bounds import HANG_S
from tests.tiny import make_tiny_model, make_tokenizer

DOCS = Path(__file__).parent.parent / "docs"


def code_blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.S)


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


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of bring_your_own.md, each named by its first line, and train.jsonl."""
    (data,) = code_blocks("bring_your_own.md", "json")
    (tmp_path / "train.jsonl").write_text(data)
    for language in ("python", "yaml"):
        for block in code_blocks("bring_your_own.md", language):
            (tmp_path / block.split("\n")[0].removeprefix("# ")).write_text(block)
    monkeypatch.chdir(tmp_path)
    exec(compile((tmp_path / "make_parquet.py").read_text(), "make_parquet.py", "exec"), {})
    return tmp_path


RESPONSES = {
    "add-1": ("I add them: 7", "8"),
    "bio-1": ("A trout is a fish. The answer is (B).", "Answer: A"),
    "py-1": ("```python\ndef double(n):\n    return 2 * n\n```", "```python\ndef double(n):\n    return 6\n```"),
    "sum-1": ("```\nprint(sum(map(int, input().split())))\n```", "```\nimport os\nprint(3)\nos._exit(0)\n```"),
    "poem-1": ("Soft rain has come to stay the day", "Rain, rain, go away"),
}
"""A right and a wrong response to each problem of bring_your_own.md."""


@pytest.mark.parametrize(
    ("recipe", "rewards"),
    [
        ("openrlhf.yaml", None),
        ("mix.yaml", [(1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.5, 0.0)]),
    ],
)
def test_bring_your_own(recipe: str, rewards: list[tuple[float, float]] | None, own: Path) -> None:
    r = load_recipe(own / recipe).reward
    problems = load_jsonl(own / "train.jsonl")
    with GraderPool(
        workers=1, extractor=r.default, by_source=r.by_source, deadline_s=HANG_S, success_threshold=r.success_threshold
    ) as pool:
        grades = [pool.grade(RESPONSES[p.id], [question(p, "Hello. ")] * 2) for p in problems]
    assert [grade.failure for pair in grades for grade in pair] == [""] * 10
    if rewards is not None:
        assert [tuple(g.reward for g in pair) for pair in grades] == rewards
        assert [tuple(g.success for g in pair) for pair in grades] == [(1.0, 0.0)] * 5
        assert [g.logs for g in grades[-1]] == [{"short": 1.0}, {"short": 1.0}]
        return
    right, wrong = grades[0]
    assert (right.success, wrong.success) == (1.0, 0.0)
    assert (right.reward, wrong.reward) == (pytest.approx(1 + 0.1 / 5), pytest.approx(0.1 / 2))
    assert right.logs == {"brevity": pytest.approx(1 / 5)}


def test_verls_parquet_file(own: Path) -> None:
    recipe = load_recipe(own / "verl.yaml")
    (file,), r = recipe.task.files("train"), recipe.reward
    assert file.fields is not None
    problems = load(file.path, file.fields.model_dump())
    assert [(p.id, p.answer, p.source) for p in problems] == [
        (f"{i + 1}", a, "openai/gsm8k") for i, a in enumerate(("7", "15", "42"))
    ]
    chat_prompt = render(problems[0], tokenizer=make_tokenizer(), template=prompt_template(recipe.task.template))
    assert (
        chat_prompt.count("What is 3 + 4? Answer with only the number.<|im_end|>") == 1 and "FIRST" not in chat_prompt
    )
    with GraderPool(
        workers=1, extractor=r.default, by_source=r.by_source, deadline_s=HANG_S, success_threshold=r.success_threshold
    ) as pool:
        grades = pool.grade(["7", "8", "seven"], [question(problems[0])] * 3)
    assert [(g.reward, g.success, g.logs) for g in grades] == [
        (1.0, 1.0, {"acc": 1.0, "terms": 2.0}),
        (0.1, 0.0, {"acc": 0.0, "terms": 2.0}),
        (0.0, 0.0, {"acc": 0.0, "terms": 2.0}),
    ]


@pytest.mark.parametrize("recipe", ["openrlhf.yaml", "mix.yaml", "verl.yaml"])
def test_the_recipes_of_bring_your_own_pass_a_dry_run(
    recipe: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_dcpo, "log_to", lambda _: None)  # it would take pytest's log handlers away
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make_tiny_model(own / "models/mine", layers=1)
    small = ("run.device=cpu", "parallel.devices_per_node=1", "rollout.engines=1", "rollout.max_prompt_tokens=200")
    small += ("rollout.max_new_tokens=50", "reward.overlong_buffer_len=25")
    assert train_dcpo.main(["--recipe", str(own / recipe), *small, "--dry-run"]) == 0, capsys.readouterr().err
    assert "a run on this machine would be refused" not in capsys.readouterr().out
    (own / "reward_func.py").write_text("import nowhere\n")
    (own / "poems.py").unlink()
    (own / "compute_score.py").unlink()
    assert train_dcpo.main(["--recipe", str(own / recipe), *small, "--dry-run"]) == 2
    assert "cannot be imported" in capsys.readouterr().err


def test_add_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are the table's."""
    rows = {name: families.FAMILIES[name] for name in ("mistral", "olmoe")}
    table = {name: family for name, family in families.FAMILIES.items() if name not in rows}
    monkeypatch.setattr(families, "FAMILIES", table)  # a table of its own: put back, a row would stand at the end
    for block in code_blocks("add_a_model.md"):
        exec(compile(block, "add_a_model.md", "exec"), {"Family": families.Family, "FAMILIES": table})
    assert {name: table[name] for name in rows} == rows


def test_the_readmes_tree_names_what_is_there() -> None:
    """Every module beside the rooms, of the recipe room, and of tools/; every folder of recipes/."""
    root = DOCS.parent
    (tree,) = re.findall(r"```\n(dcpo_openrlhf/ .*?)```", (root / "README.md").read_text(), flags=re.S)
    (recipe,) = re.findall(r"^  recipe/ .*$", tree, flags=re.M)
    (recipes,) = re.findall(r"^recipes/ .*$", tree, flags=re.M)
    (tools,) = re.findall(r"^tools/ .*$", tree, flags=re.M)

    def modules(folder: str) -> set[str]:
        return {file.stem for file in (root / folder).glob("*.py")} - {"__init__"}

    def unnamed(words: set[str], line: str) -> set[str]:
        return {word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line)}

    assert unnamed({f"{name}.py" for name in modules("dcpo_openrlhf")}, tree) == set()
    assert unnamed(modules("dcpo_openrlhf/recipe") - {"fields"}, recipe) == set()
    assert (
        unnamed(modules("tools") | {f.parent.name + "/" for f in (root / "tools").glob("*/__init__.py")}, tools)
        == set()
    )
    assert unnamed({f.parent.name + "/" for f in (root / "recipes").glob("*/*.yaml")}, recipes) == set()


def test_the_loop_of_the_readme_is_the_trainers_without_its_clock() -> None:
    """Line by line, but for comments and what frees memory, evaluates or takes notes in between."""
    root = DOCS.parent
    (block,) = re.findall(r"```python\n(for step in .*?)```", (root / "README.md").read_text(), flags=re.S)
    source = (root / "dcpo_openrlhf/trainer.py").read_text()
    body = source[source.index("        for step in range(done + 1") : source.index("        self.end(int(")]

    def lines(text: str) -> list[str]:
        bare = [re.sub(r"\s+#.*", "", line).rstrip() for line in text.splitlines()]
        return [line for line in bare if line.strip()]

    own = [line.removeprefix("        ") for line in lines(body)]
    own = [re.sub(r"(experiences): list\[Any\]", r"\1", line).replace(" | clock.seconds()", "") for line in own]
    left_out = ("clock", "self.saving.in_hand", "del ", "self.evaluate_between")
    left_out += ("with phase", "self.profile", "self.timeline")
    own = [line.strip() for line in own if not line.strip().startswith(left_out)]
    assert [line.strip() for line in lines(block)] == own
