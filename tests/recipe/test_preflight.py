"""Preflight names every violation of recipe, model folder and machine at once, with values and remedy."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dcpo_openrlhf.recipe import packages, preflight, weights
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.memory import Sizes
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError
from tests.tiny import MAX_POSITIONS, make_tiny_model

Check = Callable[..., list[str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("preflight") / "tiny", heads=4, kv_heads=2, ffn=128)


@pytest.fixture
def violations(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Lines of the error that a recipe for the tiny model gives once `changes` ({"section.key": value}) are made."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def check(changes: dict[str, Any] | None = None) -> list[str]:
        values: dict[str, dict[str, Any]] = {
            "run": {"dir": tmp_path / "run", "device": "cpu", "logical_devices": 2},
            "model": {"path": tiny},
            "task": {"kind": "arithmetic"},
            "train": {"prompts_per_step": 12, "prompts_per_update": 12, "group_size": 4},
            "parallel": {"devices_per_node": 1},
            "rollout": {"engines": 1, "max_prompt_tokens": MAX_POSITIONS - 16, "max_new_tokens": 16},
        }
        for key, value in (changes or {}).items():
            section, name = key.split(".")
            values.setdefault(section, {})[name] = value
        recipe = Recipe.model_validate(values)
        try:
            preflight.check(recipe)
        except RecipeError as error:
            title, *lines = str(error).splitlines()
            assert title == "the recipe cannot run:"
            return [line.removeprefix("  ") for line in lines]
        return []

    return check


@pytest.fixture
def model_with(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model's config.json with other values (None: without the key), and tensors of its names."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        config = json.loads((tiny / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        try:
            names = weights.names(Sizes.of(config | {"num_experts": config.get("num_experts")}))
            save_file({name: torch.ones(1) for name in names}, folder / "model.safetensors")
        except (KeyError, TypeError, ValueError):  # a config.json of no model
            (folder / "model.safetensors").symlink_to(tiny / "model.safetensors")
        return folder

    return make


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0]


def test_recipe_that_can_run_passes_and_writes_nothing(violations: Check, tmp_path: Path) -> None:
    assert violations() == []
    assert not (tmp_path / "run").exists()


def test_context_may_be_filled_to_the_last_position(violations: Check) -> None:
    line = only(violations({"rollout.max_prompt_tokens": MAX_POSITIONS - 15}))
    assert f"= {MAX_POSITIONS - 15} + 16 = {MAX_POSITIONS + 1} exceeds the model's" in line
    assert f"max_position_embeddings = {MAX_POSITIONS}; lower one of them" in line


@pytest.mark.parametrize("made", [False, True], ids=["no folder", "empty folder"])
def test_missing_model_folder(violations: Check, tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "nothing").mkdir()
    line = only(violations({"model.path": tmp_path / "nothing"}))
    assert line.startswith(f"model.path = {tmp_path / 'nothing'} is not a Hugging Face model folder")
    assert "python -m tools.smollm2" in line


def test_model_folder_without_weights(violations: Check, model_with: Callable[..., Path]) -> None:
    folder = model_with()
    (folder / "model.safetensors").unlink()
    assert "has no weights (model.safetensors or model.safetensors.index.json)" in only(
        violations({"model.path": folder})
    )


@pytest.mark.parametrize("text", ["{", "\xff", '"text"', "[]"])
def test_broken_model_config(violations: Check, model_with: Callable[..., Path], text: str) -> None:
    folder = model_with()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    line = only(violations({"model.path": folder}))
    assert "cannot be read as JSON" in line or "is not supported; use one of llama, mistral" in line


def test_model_config_without_sizes(violations: Check, model_with: Callable[..., Path]) -> None:
    line = only(violations({"model.path": model_with(max_position_embeddings=None, num_hidden_layers=None)}))
    assert "has no num_hidden_layers, max_position_embeddings; complete it" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "gemma2"},
            "model_type = 'gemma2' in .* is not supported; use one of llama, mistral, qwen2, qwen3",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' in .* is not implemented, only 'silu'; use another model"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True in .* is not implemented, only False"),
        ({"model_type": "gpt_oss"}, "model_type = 'gpt_oss' in .* is not supported: its experts .*; use one of llama"),
        ({"model_type": "mistral"}, "sliding_window = 4096 in .* is not implemented, only None"),
        ({"mlp_bias": True}, "mlp_bias = True in .* is not implemented, only False"),
        ({"use_sliding_window": True}, "use_sliding_window = True in .* is not implemented, only False"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_type = 'longrope' in .* is not implemented, only default,",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config \(quant_method = 'fp8'\) in .*: quantised weights are not trained.*in bf16 or fp32",
        ),
        ({"compression_config": {"format": "float"}}, "compression_config .* quantised weights are not trained"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters = .*'default'} and rope_scaling = .*2.0} in .* differ.*; remove one of them",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type = 'dynamic' in .* not implemented"),
        ({"rope_parameters": {"rope_type": "yarn", "attention_factor": 0.9}}, "attention_factor = 0.9 .* is derived"),
    ],
)
def test_model_that_is_not_implemented(
    violations: Check, model_with: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    assert re.match(said, only(violations({"model.path": model_with(**changes)})))


def test_both_rope_keys_may_say_the_same(violations: Check, model_with: Callable[..., Path]) -> None:
    old, new = {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert violations({"model.path": model_with(rope_scaling=old, rope_parameters=new)}) == []


def test_weights_are_looked_into(violations: Check, model_with: Callable[..., Path]) -> None:
    folder = model_with()
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer" in only(violations({"model.path": folder}))


SHIPPED = Path(__file__).parents[2] / "recipes"


def test_rollouts_that_may_outlast_their_timeout_are_a_hint() -> None:
    recipe = load_recipe(SHIPPED / "dcpo-qwen2.5-7b-8xa800.yaml", ["rollout.timeout=1800"])
    (hint,) = preflight.hints(recipe)
    # 512 prompts * 8 responses * 8192 (or 1500) tokens / (4 engines * 2000 tokens/s)
    assert (
        "rollout.timeout = 1800 s" in hint and "about 4194 s if all of them reach rollout.max_new_tokens = 8192" in hint
    )
    assert "768 s at estimate.response_tokens = 1500" in hint
    assert preflight.hints(load_recipe(SHIPPED / "dcpo-qwen2.5-7b-8xa800.yaml", ["rollout.timeout=4200"])) == []


@pytest.mark.parametrize("file", sorted(SHIPPED.rglob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_leave_their_rollouts_time(file: Path) -> None:
    assert [hint for hint in preflight.hints(load_recipe(file)) if "rollout.timeout" in hint] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], ["correction.level=token correction.mode=clip"]),
        (["correction.level=token", "correction.mode=clip"], []),
        (["run.device=cpu", "correction.level=token"], ["rollout.cpu_threads and parallel.cpu_threads"]),
        (["run.device=cpu", "correction.level=token", "rollout.cpu_threads=1", "parallel.cpu_threads=1"], []),
    ],
)
def test_responses_drawn_ahead_ask_for_a_correction_and_for_cores_of_their_own(
    changes: list[str], said: list[str]
) -> None:
    file = SHIPPED / "dcpo-qwen2.5-7b-8xa800.yaml"
    found = preflight.hints(load_recipe(file, ["rollout.ahead=1", "model.dtype=fp32", *changes]))
    assert len(found) == len(said) and all(text in hint for text, hint in zip(said, found, strict=True))
    assert all(hint.startswith("rollout.ahead = 1") for hint in found)
    assert not any("ahead" in hint for hint in preflight.hints(load_recipe(file, changes)))


def test_tensor_size_must_divide_heads_groups_and_width(violations: Check) -> None:
    lines = violations({"parallel.tensor": 3, "parallel.devices_per_node": 3, "run.logical_devices": 4})
    assert lines == [
        "parallel.tensor = 3 must divide num_attention_heads = 4; this model allows 1, 2",
        "parallel.tensor = 3 must divide num_key_value_heads = 2; this model allows 1, 2",
        "parallel.tensor = 3 must divide intermediate_size = 128; this model allows 1, 2",
    ]
    line = only(violations({"parallel.tensor": 4, "parallel.devices_per_node": 4, "run.logical_devices": 5}))
    assert line == "parallel.tensor = 4 must divide num_key_value_heads = 2; this model allows 1, 2"


def test_engine_tensor_size_must_divide_heads_but_may_copy_groups(violations: Check) -> None:
    assert violations({"rollout.tensor_parallel": 4, "run.logical_devices": 5}) == []
    lines = violations({"rollout.tensor_parallel": 3, "run.logical_devices": 4})
    assert lines[0] == "rollout.tensor_parallel = 3 must divide num_attention_heads = 4; this model allows 1, 2"
    assert len(lines) == 3


MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


def test_every_dimension_of_the_mesh_may_be_used(violations: Check, model_with: Callable[..., Path]) -> None:
    four = {"parallel.devices_per_node": 4, "run.logical_devices": 5}
    for sizes in ({"tensor": 2, "sequence_parallel": True, "pipeline": 2}, {"context": 2, "pipeline": 2}):
        assert violations(four | {f"parallel.{name}": value for name, value in sizes.items()}) == []
    experts = {"parallel.tensor": 2, "parallel.sequence_parallel": True, "parallel.expert": 4}
    assert violations(four | experts | {"model.path": model_with(**MOE)}) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor": 2}, "parallel.tensor = 2 of a model with experts needs parallel.sequence_parallel = true"),
        ({"expert": 6}, "parallel.expert = 6 must divide num_experts = 4; lower it"),
        ({"pipeline": 6}, "parallel.pipeline * virtual_pipeline = 6 * 1 must divide num_hidden_layers = 2; lower one"),
    ],
)
def test_mesh_that_does_not_fit_a_model_with_experts(
    violations: Check, model_with: Callable[..., Path], changes: dict[str, int], said: str
) -> None:
    mesh = {"parallel.devices_per_node": 6, "run.logical_devices": 7}
    mesh |= {f"parallel.{name}": value for name, value in changes.items()}
    assert only(violations(mesh | {"model.path": model_with(**MOE)})).startswith(said)


def test_dense_model_has_no_experts_to_share(violations: Check) -> None:
    line = only(violations({"parallel.expert": 2, "parallel.devices_per_node": 2, "run.logical_devices": 3}))
    assert line == "parallel.expert = 2 needs a model with experts, got model_type = 'llama'; set 1"


def test_experts_without_sizes(violations: Check, model_with: Callable[..., Path]) -> None:
    line = only(violations({"model.path": model_with(model_type="qwen3_moe")}))
    assert "has no num_experts, num_experts_per_tok, moe_intermediate_size; complete it" in line


def test_not_enough_logical_devices(violations: Check) -> None:
    changes = {"rollout.engines": 2, "rollout.tensor_parallel": 2, "parallel.devices_per_node": 3}
    assert only(violations(changes)) == (
        "the run needs 7 devices: 1 nodes * 3 for training + 2 engines * tensor_parallel 2, run.logical_devices = 2; "
        "raise it, or lower rollout.engines or the mesh"
    )
    assert violations(changes | {"run.logical_devices": 7}) == []


def test_colocated_engines_need_no_devices_of_their_own(violations: Check) -> None:
    changes = {"rollout.engines": 2, "parallel.devices_per_node": 2}
    assert only(violations(changes)).startswith("the run needs 4 devices")
    assert violations(changes | {"parallel.colocate": True}) == []


def test_not_enough_gpus_on_this_machine(violations: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(packages, "capability", lambda: (9, 0))
    line = only(violations({"run.device": "cuda", "model.layers": "local"}))
    assert "the run needs 2 devices" in line and "this machine has 1 GPUs" in line and "set run.device=cpu" in line


@pytest.mark.parametrize(("gpus", "cpus"), [(1, 8), (8, 1)])
def test_cluster_that_is_too_small(tiny: Path, gpus: float, cpus: float) -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"device": "cpu"},
            "model": {"path": tiny},
            "task": {"kind": "arithmetic"},
            "parallel": {"devices_per_node": 1},
            "rollout": {"engines": 1},
        }
    )
    said = rf"the run needs 2 devices.*the cluster has {gpus} logical devices and {cpus} CPUs; lower rollout\.engines"
    with pytest.raises(RecipeError, match=said):
        preflight.check_cluster(recipe, gpus=gpus, cpus=cpus)
    preflight.check_cluster(recipe, gpus=2, cpus=2)


def test_announced_cluster_must_answer(violations: Check, taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert violations({"run.ray_address": f"ray://127.0.0.1:{taken_port}", "run.logical_devices": 1}) == []
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else listens there
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        line = only(violations())
    assert line.startswith(f"no Ray cluster answers at {address}, which run.ray_address or RAY_ADDRESS names")
    assert "ray start --head" in line


def test_run_folder_under_a_file(violations: Check, tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o755)  # an executable one: not for its permissions is it refused
    line = only(violations({"run.dir": tmp_path / "file" / "run"}))
    assert line.startswith(
        f"run.dir = {tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is not a folder that this user can"
    )
    assert line.endswith("name another run.dir or change its permissions")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_run_folder_without_permission(violations: Check, tmp_path: Path, mode: int) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=mode)
    try:
        line = only(violations({"run.dir": locked / "run"}))
    finally:
        locked.chmod(0o700)
    assert f"{locked} is not a folder that this user can read and write" in line


def test_run_folder_that_holds_a_run_stays_as_it_is(violations: Check, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert violations() == [], "an empty folder may be used"
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    line = only(violations())
    assert line.startswith(f"run.dir = {tmp_path / 'run'} already holds a run") and "name another run.dir" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


def test_port_that_is_taken(violations: Check, taken_port: int) -> None:
    line = only(violations({"weight_sync.port": taken_port}))
    assert line.startswith(f"weight_sync.port = {taken_port} cannot be bound on this host (Address already in use)")
    assert line.endswith("name another port, or null for a free one")


def test_missing_data_files(violations: Check, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    changes = {"task.kind": "jsonl", "task.train": tmp_path / "train.jsonl", "task.heldout": tmp_path / "held"}
    line = only(violations(changes))
    assert line.startswith(f"task.heldout = {tmp_path}/held: no such readable file or folder; name one of problems")
    assert len(violations(changes | {"task.train": tmp_path / "none.jsonl"})) == 2
    (tmp_path / "held").mkdir()
    files = [{"path": tmp_path / "held"}, {"path": tmp_path / "gone"}]
    assert only(violations(changes | {"task.train": files})).startswith(f"task.train.1 = {tmp_path}/gone: no such")


def test_deepspeed_needs_no_megatron_and_trains_dense_models(
    violations: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = packages.version
    monkeypatch.setattr(packages, "version", lambda name: None if name == "megatron-core" else version(name))
    assert only(violations()) == "not installed: megatron-core; install a lock file of docker/"
    assert violations({"parallel.backend": "deepspeed"}) == []
    moe = make_tiny_model(tmp_path / "moe", architecture="qwen3_moe")
    line = only(violations({"parallel.backend": "deepspeed", "model.path": moe}))
    assert line.startswith("parallel.backend = deepspeed trains dense models only, got model_type = 'qwen3_moe'")
    assert line.endswith("set backend = megatron")


def test_transformer_engine_is_wanted_by_what_takes_it(violations: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(packages, "capability", lambda: (9, 0))
    version = packages.version
    monkeypatch.setattr(packages, "version", lambda name: None if name == packages.TE else version(name))
    cuda = {"run.device": "cuda", "parallel.devices_per_node": 4}
    line = only(violations(cuda))
    assert line.startswith("model.layers = auto takes Transformer Engine on cuda, which is not installed here")
    assert "make setup-gpu" in line and "model.layers=local" in line
    line = only(violations(cuda | {"model.layers": "local", "optimizer.cpu_offload": 0.5}))
    assert line.startswith("optimizer.cpu_offload = 0.5 takes Transformer Engine")
    for other in ({"model.layers": "local"}, {"parallel.backend": "deepspeed"}, {"train.rollout_only": True}):
        assert violations(cuda | other) == []
    assert violations() == []
    monkeypatch.setattr(packages, "version", lambda name: "2.20.2" if name == packages.TE else version(name))
    assert violations(cuda) == []
    for capability, needed in (((8, 0), True), ((9, 0), False)):
        monkeypatch.setattr(packages, "capability", lambda capability=capability: capability)
        lines = violations(cuda)
        assert len(lines) == needed and all("this GPU has 8.0: it takes flash-attn there" in line for line in lines)
        assert violations(cuda | {"model.layers": "local"}) == []


def test_unknown_method(violations: Check) -> None:
    line = only(violations({"method.name": "dpco"}))
    assert line.startswith("method.name = 'dpco' is not a row of methods.METHODS; did you mean 'dcpo'?")
    assert "grpo" in line


def test_methods_that_train_on_solved_groups_take_no_filter_that_drops_them(violations: Check) -> None:
    line = only(violations({"method.name": "dcpo", "train.filter": "uniform"}))
    assert line.startswith(
        "train.filter = uniform drops groups of right responses alone, and method.name = dcpo trains"
    )
    assert "avg S(A + α ρ R)" in line and "train.filter=all_wrong" in line
    for name, kind in (("dcpo", "all_wrong"), ("grpo", "uniform"), ("grpo", "all_wrong")):
        assert violations({"method.name": name, "train.filter": kind}) == []


def test_all_violations_are_reported_at_once(violations: Check, tmp_path: Path, taken_port: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    lines = violations(
        {
            "method.name": "dpco",
            "model.path": tmp_path / "nothing",
            "weight_sync.port": taken_port,
            "rollout.engines": 9,
        }
    )
    keys = ["method.name", "model.path", "run.dir", "weight_sync.port", "the run needs 10 devices"]
    assert len(lines) == len(keys), lines
    assert all(line.startswith(key) for line, key in zip(lines, keys, strict=True)), lines
    assert violations({"checkpoint.resume": "auto"}) == [], "which is continued where the recipe says so"


def test_replay_needs_the_responses_of_every_step(violations: Check, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded" / "samples"
    recorded.mkdir(parents=True)
    (recorded / "step_000001.pt").touch()
    line = only(violations({"rollout.replay": tmp_path / "recorded", "train.steps": 2, "evaluation.problems": 0}))
    assert "holds the responses of 1 of 2 steps" in line and "rollout.record=true" in line
    assert violations({"rollout.replay": recorded, "train.steps": 1, "evaluation.problems": 0}) == []
    own = {
        "run.dir": tmp_path / "recorded",
        "rollout.replay": tmp_path / "recorded",
        "train.steps": 1,
        "evaluation.problems": 0,
    }
    assert "is the run.dir itself" in only(violations(own))


def test_replay_needs_what_evaluation_and_tempered_rows_ask_for(violations: Check, tmp_path: Path) -> None:
    (samples := tmp_path / "recorded/samples").mkdir(parents=True)
    for step in (1, 2):
        (samples / f"step_{step:06d}.pt").touch()
    run = {"rollout.replay": tmp_path / "recorded", "train.steps": 2, "method.name": "j2", "evaluation.every": 1}
    assert "lacks tempered_000001.pt, tempered_000002.pt, evaluation_000000.pt, evaluation_000001.pt ..." in only(
        violations(run)
    )
    for name in ("tempered_000001", "tempered_000002", "evaluation_000000", "evaluation_000001", "evaluation_000002"):
        (samples / f"{name}.pt").touch()
    assert violations(run) == []


def test_resume_names_what_it_cannot_continue(violations: Check, tmp_path: Path) -> None:
    line = only(violations({"checkpoint.resume": tmp_path / "step_000004"}))
    assert "is not a checkpoint (a folder step_NNNNNN)" in line


def test_relative_paths_in_the_copy_that_a_ray_job_runs_in_are_refused(
    violations: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert violations() == []
    (line,) = violations({"run.dir": Path("runs/a"), "model.config": Path("config.json")})
    assert "run.dir = runs/a must be absolute" in line and "python -m tools.paths" in line
    monkeypatch.chdir(tmp_path)
    assert violations({"run.dir": Path("runs/a")}) == []
