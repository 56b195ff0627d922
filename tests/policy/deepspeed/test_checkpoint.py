"""A checkpoint of the engine: k updates + save + load + the rest equal all updates; its export holds the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dcpo_openrlhf import checkpoint
from tests.distributed import run_distributed
from tests.policy.deepspeed.common import make_recipe, make_step
from tests.tiny import make_tiny_model
from tools import export_hf

BEFORE, AFTER = (0, 1), (2, 3)
RUNS = {"one-2": (1, 2, "fp32"), "two-2-bf16": (2, 2, "bf16"), "two-3-bf16": (2, 3, "bf16")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), tie=True)


def _update(step: Any, seeds: tuple[int, ...]) -> list[dict[str, float]]:
    from tests.policy.megatron.common import random_rows

    mesh = step.mesh
    return [step.update(random_rows(seed=seed).part(mesh.data_rank, mesh.data_size)) for seed in seeds]


def _weights(step: Any) -> dict[str, torch.Tensor]:
    from dcpo_openrlhf.policy.deepspeed.model import hf_tensors

    return {name: value.clone() for name, value in hf_tensors(step.policy)}


def _save_and_load(rank: int, world_size: int, model: Path, folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    """Weights at the save, then (metrics, weights, a random number) of the run that went on and of the resumed one."""
    from dcpo_openrlhf.policy.deepspeed.checkpoint import ZeroCheckpoint

    recipe = make_recipe(model, world_size=world_size, stage=stage, dtype=dtype, optimizer={"schedule": "cosine"})
    step = make_step(recipe)
    _update(step, BEFORE)
    saving = ZeroCheckpoint(step)
    saving.save(folder)
    sums = saving.finish()
    saved, number = _weights(step), float(torch.rand(()))
    metrics = _update(step, AFTER)
    went_on = metrics, _weights(step), number
    resumed = make_step(recipe)
    torch.manual_seed(99)
    ZeroCheckpoint(resumed).load(folder)
    number = float(torch.rand(()))
    again = _update(resumed, AFTER), _weights(resumed), number
    return {"saved": saved, "sums": sums, "went on": went_on, "resumed": again}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_updates_are_those_of_the_run_bit_for_bit_and_the_export_loads(
    name: str, model: Path, tmp_path: Path
) -> None:
    world_size, stage, dtype = RUNS[name]
    folder = tmp_path / "step_000002"
    folder.mkdir()
    ranks = run_distributed(_save_and_load, world_size, model, folder, stage, dtype)
    for rank in ranks:
        (metrics, weights, number), (same, same_weights, same_number) = rank["went on"], rank["resumed"]
        assert same == metrics and metrics[0]["policy/learning_rate"] > metrics[1]["policy/learning_rate"]
        assert same_number == number
        assert same_weights.keys() == weights.keys()
        assert all(torch.equal(same_weights[key], value) for key, value in weights.items())
        assert not torch.equal(weights["model.norm.weight"], rank["saved"]["model.norm.weight"])

    on_disk = {f"deepspeed/{file.name}" for file in (folder / "deepspeed").iterdir()}
    told = [name for rank in ranks for name in rank["sums"]]
    assert sorted(told) == sorted(on_disk), "each file is told by the one rank that wrote it"
    recipe = {"model": {"path": str(model), "dtype": dtype}}
    (folder / checkpoint.STATE).write_text(json.dumps({"recipe": recipe}))
    checkpoint.write_manifest(folder, step=2, scores={})
    exported = export_hf.export(folder, tmp_path / "hf")
    tensors = load_file(exported / "model.safetensors")
    assert tensors.keys() == ranks[0]["saved"].keys()
    assert all(torch.equal(tensors[key], value) for key, value in ranks[0]["saved"].items())
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def _away_and_back(rank: int, world_size: int, model: Path) -> tuple[list[Any], list[Any]]:
    """Metrics of updates, without and with the engine in host memory between them."""
    from dcpo_openrlhf.policy.deepspeed.memory import ZeroOffload

    results = []
    for moves in (False, True):
        step = make_step(make_recipe(model, world_size=world_size, dtype="bf16"))
        metrics = _update(step, BEFORE)
        if moves:
            offload = ZeroOffload(step)
            offload.away()
            with pytest.raises(RuntimeError, match="in host memory already"):
                offload.away()
            offload.back()
        results.append(metrics + _update(step, AFTER))
    return results[0], results[1]


def test_offload_of_stage_2_changes_no_number(model: Path) -> None:
    for stayed, moved in run_distributed(_away_and_back, 2, model):
        assert moved == stayed
