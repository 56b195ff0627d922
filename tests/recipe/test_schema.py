"""Recipes load, overrides take the schema's types, and a recipe that cannot run says rule, values and remedy."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dcpo_openrlhf.recipe.load import load_recipe, resolved_yaml
from dcpo_openrlhf.recipe.rules import rules
from dcpo_openrlhf.recipe.schema import DataFile, Fields, Recipe, RecipeError
from dcpo_openrlhf.weight_sync import TRANSPORTS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
MINIMAL = {"model": {"path": "models/tiny"}, "task": {"kind": "arithmetic"}}
FILES = [DataFile(path=Path("a.jsonl"), weight=1), DataFile(path=Path("~/b").expanduser(), weight=2)]


def write(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def load(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(write(tmp_path, MINIMAL), list(overrides))


def refused(tmp_path: Path, content: object = MINIMAL, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, content), list(overrides))
    return str(caught.value)


def test_recipes_ship() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, resolved_yaml(recipe))) == recipe
    device = "cpu" if path.stem.endswith(("-cpu", "-cpu-ahead")) else "cuda"
    assert (recipe.method.name, recipe.run.device) == (path.stem.split("-")[0], device), "METHOD-MODEL-DEVICES.yaml"


def layers(tmp_path: Path, **files: object) -> Path:
    """The first of these recipe files, whose names end in .yaml on disk; a name with __ in it lies in a folder."""
    for name, content in files.items():
        file = tmp_path / (name.replace("__", "/") + ".yaml")
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(content))
    return tmp_path / (next(iter(files)).replace("__", "/") + ".yaml")


BASE = MINIMAL | {"train": {"steps": 5, "group_size": 4}, "run": {"seed": 7}}


def test_recipe_is_laid_over_its_base_section_by_section(tmp_path: Path) -> None:
    file = layers(
        tmp_path,
        sweep__top={"base": "../middle.yaml", "train": {"steps": 9}},
        middle={"base": "sweep/bottom.yaml", "train": {"steps": 8, "micro_batch_size": 2}, "method": {"name": "grpo"}},
        sweep__bottom=BASE,
    )
    recipe = load_recipe(file, ["run.seed=3"])
    assert (recipe.train.steps, recipe.train.micro_batch_size, recipe.train.group_size) == (9, 2, 4)
    assert (recipe.method.name, recipe.run.seed, recipe.model.path) == ("grpo", 3, Path("models/tiny"))
    assert "base" not in yaml.safe_load(resolved_yaml(recipe))
    moved = tmp_path / "elsewhere.yaml"
    moved.write_text(resolved_yaml(recipe))
    assert load_recipe(moved) == recipe


def test_base_that_is_not_there_names_both_files_and_what_to_do(tmp_path: Path) -> None:
    file = layers(tmp_path, runs__copied={"base": "dcpo.yaml"})
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: base = {tmp_path}/runs/dcpo.yaml: no such file; a base is looked for from")
    assert "copy what --dry-run prints" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("base", [3, "", None, ["a.yaml"], {"a": 1}])
def test_base_must_be_a_path(base: object, tmp_path: Path) -> None:
    assert f"base = {base!r} must be the path of a recipe" in refused(tmp_path, MINIMAL | {"base": base})


def test_bases_in_a_circle_are_told_whole(tmp_path: Path) -> None:
    file = layers(tmp_path, a={"base": "b.yaml"}, b={"base": "../" + tmp_path.name + "/a.yaml"})
    with pytest.raises(RecipeError, match=r"b\.yaml: base = .*a\.yaml leads in a circle: .*a.yaml -> .*b.yaml -> .*a"):
        load_recipe(file)
    assert "leads in a circle" in refused(tmp_path, MINIMAL | {"base": "recipe.yaml"})


def test_bad_key_of_a_base_names_the_file_it_stands_in(tmp_path: Path) -> None:
    file = layers(
        tmp_path,
        top={"base": "bottom.yaml", "train": {"stepz": 1}, "reward": {"workers": 0}, "rollout": {"engines": 2}},
        bottom=BASE | {"trian": {}, "loss": {"clip": 1}, "rollout": 3, "method": {"alpha_max": -1, "mixing": "x"}},
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["method.mixing=y"])
    title, *lines = str(caught.value).splitlines()
    assert title == f"{file}:"
    in_base = f" (in {tmp_path}/bottom.yaml)"
    for text, told in [
        ("unknown key trian;", in_base),
        ("unknown key loss.clip;", in_base),
        ("method.alpha_max = -1 must be", in_base),
        ("rollout = 3 must be a mapping", in_base),
        ("unknown key train.stepz;", ""),
        ("reward.workers = 0 must be", ""),
        ("method.mixing = 'y' must be", ""),
    ]:
        (line,) = [line for line in lines if line.startswith(f"  {text}")]
        assert line.endswith(in_base) == bool(told), line
    assert len(lines) == 7


def test_broken_base_names_itself(tmp_path: Path) -> None:
    file = layers(tmp_path, top={"base": "bottom.yaml"}, bottom=["a"])
    with pytest.raises(RecipeError, match=r"^\S+bottom\.yaml: a recipe is a mapping of sections, got list"):
        load_recipe(file)
    (tmp_path / "bottom.yaml").write_text("train: {steps: 1, steps: 2}")
    with pytest.raises(RecipeError, match=r"^\S+bottom\.yaml: cannot be read as YAML: key 'steps' stands twice"):
        load_recipe(file)


def test_resolved_yaml_lists_every_setting_and_reads_back_equal(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, "optimizer.learning_rate=1e-6", "run.dir=~/runs/a b", "rollout.max_sequences=7", "loss.dual_clip=3"
    )
    text = resolved_yaml(recipe)
    assert load_recipe(write(tmp_path, text)) == recipe
    listed = {(section, key) for section, keys in yaml.safe_load(text).items() for key in keys}
    known = {(s, k) for s, f in Recipe.model_fields.items() for k in f.annotation.model_fields}  # type: ignore[union-attr]
    assert listed == known


def test_every_override_of_a_resolved_recipe_is_read_back_with_its_type(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    for section, keys in recipe.model_dump(mode="json").items():
        overrides = [f"{section}.{key}={'null' if value is None else value}" for key, value in keys.items()]
        assert load(tmp_path, *overrides) == recipe, section


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=12", 12),
        ("optimizer.learning_rate=1e-6", 1e-6),  # text in YAML 1.1, which wants 1.0e-6
        ("optimizer.learning_rate=4.0e-5", 4e-5),
        ("method.target_entropy=1", 1.0),
        ("task.chat=false", False),
        ("monitor.tensorboard=no", False),
        ("model.path=007", Path("007")),
        ("model.path=$RECIPE_TEST_MODELS/a=b", Path("/models/a=b")),
        ("task.heldout=null", None),
        ("task.heldout=data/x.jsonl", Path("data/x.jsonl")),
        ("task.train=007", Path("007")),
        ("task.train=[a.jsonl]", [DataFile(path=Path("a.jsonl"))]),
        ("task.train=[{path: a.jsonl, weight: 1}, {path: ~/b, weight: 2}]", FILES),
        ("task.fields={problem: prompt, answer: null}", Fields(problem="prompt", answer=None)),
        ("task.system=null", None),
        ("task.system=Answer: 42", "Answer: 42"),
        ("task.system=1e3", "1e3"),
        ("task.template={problem}", "{problem}"),
        ("rollout.max_sequences=null", None),
        ("rollout.max_sequences=4", 4),
        ("loss.dual_clip=3", 3.0),
        ("model.dtype=fp32", "fp32"),
        ("train.recompute=none", "none"),
        ("run.ray_address=auto", "auto"),
    ],
)
def test_override_takes_the_type_of_the_schema(
    override: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPE_TEST_MODELS", "/models")
    section, key = override.partition("=")[0].split(".")
    seen = getattr(getattr(load(tmp_path, override), section), key)
    assert (type(seen), seen) == (type(value), value)


def test_a_list_of_files_is_read_back_and_each_has_its_fields(tmp_path: Path) -> None:
    given = "task.train=[{path: a, weight: 0.7}, {path: b, weight: 0.3, fields: {problem: input}}]"
    recipe = load(tmp_path, given, "task.heldout=c", "task.fields={problem: prompt}")
    assert load_recipe(write(tmp_path, resolved_yaml(recipe))) == recipe
    files = [*recipe.task.files("train"), *recipe.task.files("heldout")]
    assert [(str(f.path), f.weight, f.fields.problem, f.fields.answer) for f in files if f.fields] == [
        ("a", 0.7, "prompt", "answer"),
        ("b", 0.3, "input", "answer"),
        ("c", None, "prompt", "answer"),
    ]
    assert load(tmp_path).task.files("train") == []
    assert {k: str(v) for k, v in recipe.paths.items() if k.startswith("task.")} == {
        "task.train.0": "a",
        "task.train.1": "b",
        "task.heldout": "c",
    }


def test_override_wins_over_the_file_and_the_last_one_over_the_first(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL | {"train": {"steps": 5, "group_size": 4}})
    recipe = load_recipe(file, ["train.steps=6", "train.steps=7"])
    assert (recipe.train.steps, recipe.train.group_size) == (7, 4)


def test_home_and_variables_in_paths_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(tmp_path, "run.dir=~/runs/x").run.dir == Path("/home/someone/runs/x")


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        (MINIMAL | {"trian": {"steps": 1}}, [], ["unknown key trian;", "did you mean 'train'?"]),
        (MINIMAL | {"Base": "x.yaml"}, [], ["unknown key Base;", "did you mean 'base'?"]),
        (MINIMAL | {"train": {"group_sise": 4}}, [], ["unknown key train.group_sise;", "did you mean 'group_size'?"]),
        (MINIMAL | {"method": {"zzz": 1}}, [], ["unknown key method.zzz; known: name, mixing"]),
        (MINIMAL, ["train.group_sise=4"], ["override 'train.group_sise=4'", "did you mean 'group_size'?"]),
        (MINIMAL, ["trian.steps=4"], ["override 'trian.steps=4'", "did you mean 'train'?"]),
        (MINIMAL, ["train.steps"], ["override 'train.steps'", "section.key=value"]),
        (MINIMAL, ["steps=4"], ["override 'steps=4'", "section.key=value"]),
        (MINIMAL, ["train.steps=[4"], ["override 'train.steps=[4'", "not valid YAML"]),
        (MINIMAL, ["train.steps=many"], ["train.steps = 'many' must be a valid integer"]),
        (MINIMAL, ["run.profile=3"], ["run.profile = 3 must be a list, for example run.profile=[3]"]),
        (MINIMAL, ["run.profile=[0]"], ["run.profile.0 = 0 must be greater than 0"]),
        (MINIMAL, ["train.steps=1.5"], ["train.steps = 1.5 must be a valid integer"]),
        (MINIMAL, ["train.steps="], ["train.steps = None must be a valid integer"]),
        (MINIMAL, ["method.mixing=cnvex"], ["method.mixing = 'cnvex' must be 'convex' or 'additive'"]),
        (MINIMAL, ["rollout.top_p=2"], ["rollout.top_p = 2 must be less than or equal to 1"]),
        (MINIMAL, ["task.chat=maybe"], ["task.chat = 'maybe' must be a valid boolean"]),
        (MINIMAL, ["optimizer.learning_rate=.inf"], ["optimizer.learning_rate = inf must be a finite number"]),
        (MINIMAL, ["task.train=[]"], ["task.train = [] List should have at least 1 item"]),
        (MINIMAL, ["task.train=[{weight: 2}]"], ["task.train.0.path is required"]),
        (MINIMAL, ["task.train=[a, {path: b, weight: 0}]"], ["task.train.1.weight = 0 must be greater than 0"]),
        (MINIMAL, ["task.train=[{path: b, wieght: 1}]"], ["unknown key task.train.0.wieght; did you mean 'weight'?"]),
        (MINIMAL | {"task": {"train": 5}}, [], ["task.train = 5 is not a valid path"]),
        (MINIMAL, ["task.fields={promblem: x}"], ["unknown key task.fields.promblem; did you mean 'problem'?"]),
        (MINIMAL, ["task.fields={problem: ''}"], ["task.fields.problem = '' String should have at least 1 character"]),
        (MINIMAL, ["task.fields={id: null}"], ["task.fields.id = None must be a valid string"]),
        (MINIMAL | {"train": 3}, [], ["train = 3 must be a mapping of keys"]),
        (MINIMAL | {"train": None}, ["train.steps=3"], ["section 'train' must be a mapping, got None"]),
        ({"task": {"kind": "arithmetic"}}, [], ["model.path is required", "model.path=VALUE"]),
        ({"model": {}}, [], ["model.path is required"]),
        ("", [], ["model.path is required"]),
        ("- 1\n- 2\n", [], ["a recipe is a mapping of sections, got list [1, 2]"]),
        ("train: {steps: 1", [], ["cannot be read as YAML", "line 1"]),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", [], ["key 'train' stands twice", "line 2"]),
        ("train: {steps: 1, steps: 2}\n", [], ["key 'steps' stands twice", "line 1"]),
    ],
)
def test_bad_recipe_says_where_what_and_what_else(
    content: object, overrides: list[str], said: list[str], tmp_path: Path
) -> None:
    message = refused(tmp_path, content, *overrides)
    assert all(text in message for text in said), message


def test_several_violations_are_reported_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL | {"trian": {}, "train": {"steps": 0}, "run": {"device": "tpu"}})
    assert len(message.splitlines()) == 4, message
    for text in ("recipe.yaml:", "trian", "train.steps = 0 must be greater than 0", "run.device = 'tpu' must be"):
        assert text in message


def test_unreadable_recipe_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--recipe .*none\.yaml: no such file; recipes/ holds"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory\); name a readable file"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"task: {system: \xe9}")
    with pytest.raises(RecipeError, match="cannot be read as YAML"):
        load_recipe(tmp_path / "latin.yaml")


# each breaks one rule between fields and lists what its message says: rule, values seen, remedy
DEEPSPEED = ["parallel.backend=deepspeed"]
RULES = [
    (["train.group_size=1"], ["train.group_size = 1 must be at least 2", "raise it"]),
    (
        ["train.prompts_per_step=10", "train.prompts_per_update=4"],
        ["train.prompts_per_step = 10 must be a multiple of train.prompts_per_update = 4", "change one of them"],
    ),
    (
        ["parallel.tensor=3"],
        [
            "parallel.tensor * pipeline * context = 3 * 1 * 1 = 3 must divide nodes * devices_per_node = 1 * 8 = 8",
            "lower",
        ],
    ),
    (
        ["train.prompts_per_step=3", "train.prompts_per_update=3", "train.group_size=2"],
        [
            "prompts_per_update * group_size = 3 * 2 = 6 rows must divide evenly over 8 data-parallel",
            "change prompts_per",
        ],
    ),
    (
        ["evaluation.temperature=0", "evaluation.samples=4"],
        ["evaluation.samples = 4 at evaluation.temperature = 0", "use samples = 1"],
    ),
    (
        ["rollout.temperature=0.6"],
        [
            "rollout.temperature = 0.6 must be 1 to train",
            "are those of the policy at T = 1",
            "set 1, correction.level=token, which weighs them, or train.rollout_o",
        ],
    ),
    (
        ["correction.level=token", "correction.low=3", "correction.high=2"],
        ["correction.low = 3 must be below correction.high = 2", "change one of them"],
    ),
    (
        ["correction.level=token", "correction.low=2"],
        ["correction.low = 2 and correction.high = 5 must hold 1 between them", "change one of them"],
    ),
    (
        ["correction.level=sequence", "correction.gating=tv", "correction.low=0"],
        ["correction.high = 5 must be below 1 with correction.gating = tv", "lower it"],
    ),
    (
        ["correction.level=sequence", "correction.mode=clip"],
        ["correction.mode = clip clamps the ratio of a token, not correction.level = sequence", "use mode=mask"],
    ),
    (
        ["correction.level=token", "correction.gating=tv"],
        ["correction.gating = tv is bounded above alone, got correction.low = 0.5", "set low=0"],
    ),
    (
        ["reward.function=boxed"],
        ["reward.function = 'boxed' must be FILE.py:NAME or import.path:NAME", "set reward.extractor"],
    ),
    (
        ["reward.by_source={gsm8k: last_intger, mbpp: 'a.py:f', math: boxed, x: 'a.py:'}"],
        [
            "reward.by_source = {'gsm8k': 'last_intger', 'x': 'a.py:'} must give each source FILE.py:NAME",
            "last_integer",
        ],
    ),
    (
        ["reward.overlong_buffer_len=9000"],
        ["reward.overlong_buffer_len = 9000 must be at most rollout.max_new_tokens = 8192", "lower it"],
    ),
    (
        ["rollout.replay=runs/a", "rollout.record=true"],
        ["rollout.replay reads recorded responses", "unset them"],
    ),
    (
        ["train.rollout_only=true", "checkpoint.resume=auto"],
        ["train.rollout_only has nothing to resume", "set checkpoint.resume=never"],
    ),
    (
        ["run.profile=[3, 8]", "train.steps=7"],
        ["run.profile = [3, 8] must name steps up to train.steps = 7; correct it, or raise that"],
    ),
    (
        ["run.profile=[1]", "train.rollout_only=true", "checkpoint.resume=never"],
        ["run.profile = [1] traces training steps, of which train.rollout_only has none; unset one"],
    ),
    (
        ["parallel.expert=3", "parallel.pipeline=2"],
        ["parallel.expert * pipeline = 3 * 2 must divide nodes * devices_per_node = 1 * 8 = 8"],
    ),
    (["optimizer.cpu_offload=0.5", "run.device=cpu"], ["optimizer.cpu_offload = 0.5 needs run.device = cuda", "set 0"]),
    (
        ["parallel.colocate=true", "rollout.tensor_parallel=2"],
        ["parallel.colocate puts rollout.engines * tensor_parallel = 8 * 2 on 8 training devices; lower one of them"],
    ),
    (
        ["parallel.colocate=true", "train.rollout_only=true", "checkpoint.resume=never"],
        ["parallel.colocate needs both training and engines; unset it"],
    ),
    (
        ["parallel.colocate=true", "rollout.ahead=1"],
        ["rollout.ahead = 1 draws responses while the policy trains", "engines are asleep then", "set ahead=0, or"],
    ),
    (
        ["train.rollout_only=true", "rollout.ahead=1"],
        [
            "rollout.ahead = 1 draws responses while the policy trains",
            "with train.rollout_only none does",
            "set ahead=0",
        ],
    ),
    (["parallel.virtual_pipeline=2"], ["virtual_pipeline = 2 needs parallel.pipeline > 1, got 1", "leave it at 1"]),
    (
        ["train.micro_batch_tokens=10242", "rollout.max_new_tokens=8193", "parallel.context=2"],
        ["micro_batch_tokens = 10242 must hold the longest", "max_new_tokens = 10241, filled up to 10244 for", "raise"],
    ),
    (["parallel.sequence_parallel=true"], ["sequence_parallel needs parallel.tensor > 1, got 1", "turn it off"]),
    (["task.kind=jsonl"], ["task.kind = jsonl needs task.train", "set task.kind=arithmetic"]),
    (["task.train=[a, {path: b, weight: 2}]"], ["task.train has weights for 1 of its 2 files", "or none (every"]),
    (["task.heldout=[{path: b, weight: 2}]"], ["task.heldout takes no weights", "drop them"]),
    (["weight_sync.transport=gloo"], ["weight_sync.transport = gloo is for run.device = cpu", "use nccl or ipc"]),
    (
        ["run.device=cpu", "weight_sync.transport=nccl"],
        ["weight_sync.transport = nccl needs run.device = cuda", "use gloo or shared_memory"],
    ),
    (
        ["weight_sync.transport=ipc"],
        ["transport = ipc hands tensors over within a device", "use nccl, or set colocate"],
    ),
    (
        ["weight_sync.transport=nccl", "parallel.colocate=true"],
        ["transport = nccl joins processes on devices of their own", "use ipc, or unset colocate"],
    ),
    (
        ["run.device=cpu", "weight_sync.transport=shared_memory", "parallel.nodes=2"],
        ["shared_memory needs one node, got parallel.nodes = 2", "use gloo"],
    ),
    (
        ["optimizer.min_learning_rate=1e-7"],
        ["optimizer.min_learning_rate = 1e-07 has no effect with schedule = constant", "use linear or cosine"],
    ),
    (["parallel.zero_stage=3"], ["zero_stage = 3 needs parallel.backend = deepspeed, got megatron", "leave it at 2"]),
    (
        [*DEEPSPEED, "parallel.tensor=2", "parallel.sequence_parallel=true"],
        [
            "shards over the data ranks alone, got parallel.tensor = 2, parallel.sequence_parallel = True",
            "backend = meg",
        ],
    ),
    (
        [*DEEPSPEED, "model.layers=local"],
        ["model.layers = local is for parallel.backend = megatron", "leave it at auto"],
    ),
    ([*DEEPSPEED, "train.recompute=selective"], ["train.recompute = selective is for", "use none or full"]),
    ([*DEEPSPEED, "optimizer.cpu_offload=0.5"], ["optimizer.cpu_offload = 0.5 is for parallel.backend", "set 0"]),
    (
        [*DEEPSPEED, "parallel.zero_stage=3", "parallel.colocate=true"],
        ["parallel.colocate with parallel.zero_stage = 3", "use zero_stage = 2"],
    ),
    (
        ["method.target_schedule=linear"],
        ["method.target_schedule = linear with method.target_entropy_end = None", "set both or neither"],
    ),
    (
        ["method.clip_cov_low=7"],
        ["method.clip_cov_low = 7.0 must be below method.clip_cov_high = 5.0", "change one of them"],
    ),
]


def test_any_temperature_where_nothing_is_trained(tmp_path: Path) -> None:
    recipe = load(tmp_path, "rollout.temperature=0.6", "train.rollout_only=true", "checkpoint.resume=never")
    assert recipe.rollout.temperature == 0.6


@pytest.mark.parametrize(("overrides", "said"), RULES, ids=lambda case: case[-1].split(" ")[0])
def test_rule_between_fields(overrides: list[str], said: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL, *overrides)
    assert all(text in message for text in said), message
    assert len(message.splitlines()) == 2, message


def test_every_rule_between_fields_has_a_case_above(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert all(holds for holds, _ in rules(recipe))
    messages = [refused(tmp_path, MINIMAL, *overrides) for overrides, _ in RULES]
    # a rule is known by its words up to the first value
    first_words = [" ".join(text.split(" ")[:2]) for _, text in rules(recipe)]
    assert len(RULES) == len(first_words)
    assert all(any(words in message for message in messages) for words in first_words)


def test_two_broken_rules_are_both_named(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL, "train.group_size=1", "parallel.sequence_parallel=true")
    assert "train.group_size = 1" in message and "parallel.sequence_parallel" in message


def test_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train = recipe.train  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "transport", "dtype"),
    [
        ([], "nccl", "bfloat16"),
        (["parallel.colocate=true", "rollout.dtype=float32"], "ipc", "float32"),
        (["run.device=cpu", "model.dtype=fp32"], "shared_memory", "float32"),
        (["run.device=cpu", "parallel.nodes=2", "model.dtype=bf16"], "gloo", "bfloat16"),
    ],
)
def test_auto_follows_device_nodes_and_model(overrides: list[str], transport: str, dtype: str, tmp_path: Path) -> None:
    recipe = load(tmp_path, *overrides)
    assert (recipe.transport, recipe.engine_dtype) == (transport, dtype)


@pytest.mark.parametrize(
    ("overrides", "senders", "backend"),
    [
        ([], 1, "nccl"),
        (["parallel.pipeline=2"], 2, "nccl_senders"),
        (["parallel.pipeline=2", "weight_sync.senders=1"], 1, "nccl"),
        (["parallel.pipeline=2", "parallel.colocate=true"], 1, "ipc"),
        (["parallel.pipeline=2", "run.device=cpu"], 1, "shared_memory"),
        (["parallel.pipeline=2", "run.device=cpu", "weight_sync.transport=gloo"], 2, "gloo_senders"),
        (["parallel.expert=4"], 4, "nccl_senders"),
        (["parallel.nodes=2", "parallel.expert=16"], 8, "nccl_senders"),
        (
            [
                "parallel.expert=12",
                "parallel.devices_per_node=12",
                "train.prompts_per_update=126",
                "train.prompts_per_step=126",
            ],
            6,
            "nccl_senders",
        ),
        (["parallel.nodes=16", "parallel.pipeline=2", "parallel.expert=64"], 8, "nccl_senders"),
        (["parallel.nodes=2", "parallel.pipeline=16", "parallel.expert=1"], 16, "nccl_senders"),
    ],
)
def test_auto_has_a_sender_for_each_stage_and_share_of_experts(
    overrides: list[str], senders: int, backend: str, tmp_path: Path
) -> None:
    recipe = load(tmp_path, *overrides)
    assert (recipe.senders, recipe.sync_backend) == (senders, backend)
    assert backend in TRANSPORTS


def test_sizes_that_follow_from_others(tmp_path: Path) -> None:
    recipe = load(tmp_path, "parallel.nodes=2", "parallel.tensor=4", "train.prompts_per_update=256")
    assert (recipe.parallel.world_size, recipe.parallel.data, recipe.updates_per_step) == (16, 4, 2)
    assert recipe.rollout.context == recipe.rollout.max_prompt_tokens + recipe.rollout.max_new_tokens


@pytest.mark.parametrize(("asked", "threads"), [([], 2), (["parallel.cpu_threads=3"], 3), (["parallel.nodes=2"], 2)])
def test_policy_ranks_of_a_node_share_its_cores(tmp_path: Path, asked: list[str], threads: int) -> None:
    recipe = load(tmp_path, *asked)
    assert recipe.parallel.threads(2 * 8 + 1) == threads
    assert recipe.parallel.threads(4) == (3 if "parallel.cpu_threads=3" in asked else 1)
