"""The Megatron policy gives the numbers of the Hugging Face model it came from; its weights come back to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dcpo_openrlhf.policy.megatron.model import hf_shapes, hf_tensors
from tests.distributed import run_distributed
from tests.policy.megatron.common import make_models, make_policy, make_step, random_rows
from tests.tiny import ARCHITECTURE_FIELDS, MIXTURES, make_tiny_model

MODELS = [(architecture, tie) for architecture in ARCHITECTURE_FIELDS for tie in (True, False)]
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, SEQUENCE),
    "pp2": (2, {"pipeline": 2}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "ep2": (2, {"expert": 2}),
    "tp4": (4, {"tensor": 4, "sequence_parallel": True}),
    "tp2pp2": (4, SEQUENCE | {"pipeline": 2}),
    "pp2ep2": (4, {"pipeline": 2, "expert": 2}),
    "tp2pp2ep2-interleaved": (4, SEQUENCE | {"pipeline": 2, "expert": 2, "virtual_pipeline": 2}),
}

# each differs from the default within the few tokens of a test
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 2.0, "mscale_all_dim": 0.5},
}


def fits(architecture: str, mesh: str) -> bool:
    return architecture in MIXTURES or "expert" not in MESHES[mesh][1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    return make_models(tmp_path_factory.mktemp("models"), MODELS)


def _come_back(
    rank: int, world_size: int, models: dict[tuple[str, bool], Path], meshes: list[str]
) -> dict[Any, list[str]]:
    """For every model and mesh what differs between the folder and the tensors that this rank gets."""
    wrong = {}
    for mesh in meshes:
        for (architecture, tie), path in models.items():
            if not fits(architecture, mesh):
                continue
            policy = make_policy(path, rank=rank, world_size=world_size, **MESHES[mesh][1])
            tensors = list(hf_tensors(policy))
            declared = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
            differences = [] if list(hf_shapes(policy)) == declared else ["hf_shapes declares others"]
            expected = load_file(path / "model.safetensors")
            if len(tensors) != len(expected) or {name for name, _ in tensors} != set(expected):
                differences.append(f"names: {sorted(set(expected) ^ {name for name, _ in tensors})}")
            differences += [name for name, tensor in tensors if not torch.equal(tensor, expected[name])]
            wrong[architecture, tie, mesh] = differences
    return wrong


@pytest.fixture(scope="module")
def come_back(models: dict[tuple[str, bool], Path]) -> dict[Any, list[list[str]]]:
    found: dict[Any, list[list[str]]] = {}
    for size in (1, 2, 4):
        meshes = [mesh for mesh, (world, _) in MESHES.items() if world == size]
        for rank in run_distributed(_come_back, size, models, meshes):
            for key, differences in rank.items():
                found.setdefault(key, []).append(differences)
    return found


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("architecture", "tie"), MODELS)
def test_weights_come_back_to_the_bit(
    come_back: dict[Any, list[list[str]]], architecture: str, tie: bool, mesh: str
) -> None:
    if not fits(architecture, mesh):
        pytest.skip("no experts to share")
    assert come_back[architecture, tie, mesh] == [[]] * MESHES[mesh][0], "on any rank"


def _statistics(rank: int, world_size: int, models: dict[Any, Path], tensor: int) -> dict[Any, Any]:
    found = {}
    for key, path in models.items():
        policy = make_policy(path, rank=rank, world_size=world_size, tensor=tensor, sequence_parallel=tensor > 1)
        found[key] = make_step(policy).token_statistics(random_rows(), temperatures=[0.8, 1.2])
    return found


@pytest.fixture(scope="module")
def statistics(models: dict[tuple[str, bool], Path]) -> dict[int, list[dict[Any, Any]]]:
    return {tensor: run_distributed(_statistics, tensor, models, tensor) for tensor in (1, 2)}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("architecture", "tie"), MODELS)
def test_statistics_are_those_of_transformers(
    statistics: dict[int, list[dict[Any, Any]]],
    models: dict[tuple[str, bool], Path],
    architecture: str,
    tie: bool,
    tensor: int,
) -> None:
    for name, value in _hf_statistics(models[architecture, tie]).items():
        for rank in statistics[tensor]:
            torch.testing.assert_close(rank[architecture, tie][name].double(), value, atol=1e-4, rtol=0)


def _hf_statistics(path: Path) -> dict[str, torch.Tensor]:
    rows = random_rows()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(rows.sequences, attention_mask=rows.attention_mask.long()).logits[:, :-1].double()
    logp = logits.log_softmax(-1)
    pick = rows.sequences[:, 1:, None]
    tempered = [(logits / t).log_softmax(-1).gather(-1, pick)[..., 0] for t in (0.8, 1.2)]
    mask = rows.action_mask
    return {
        "logp": logp.gather(-1, pick)[..., 0] * mask,
        "entropy": -(logp.exp() * logp).sum(-1) * mask,
        "tempered_logp": torch.stack(tempered, -1) * mask[..., None],
    }


def test_rope_variants_are_those_of_transformers(tmp_path: Path) -> None:
    folders = {"default": make_tiny_model(tmp_path / "default", architecture="qwen2")}
    for name, parameters in ROPES.items():
        rope = {"rope_type": name.split("-")[0], "rope_theta": 10000.0} | parameters
        folders[name] = make_tiny_model(tmp_path / name, architecture="qwen2", rope_parameters=rope)
    (ours,) = run_distributed(_statistics, 1, folders, 1)
    plain = _hf_statistics(folders["default"])["logp"]
    for name, path in folders.items():
        expected = _hf_statistics(path)["logp"]
        assert name == "default" or float((expected - plain).abs().max()) > 0.01, "the variant changes something"
        torch.testing.assert_close(ours[name]["logp"].double(), expected, atol=1e-4, rtol=0)


def test_rope_that_engines_compute_otherwise_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    path = make_tiny_model(tmp_path, rope_parameters=rope)
    with pytest.raises(RuntimeError, match="rope_type = 'dynamic' is not one of default, linear, llama3, yarn; change"):
        run_distributed(_statistics, 1, {"dynamic": path}, 1)
