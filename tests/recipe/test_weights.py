"""A model folder's weights by their headers: half-copied, foreign and empty files, and tensors that nobody reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpo_openrlhf.policy.megatron import names as table
from dcpo_openrlhf.recipe import weights
from dcpo_openrlhf.recipe.memory import Sizes
from tests.tiny import ARCHITECTURE_FIELDS, make_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("weights") / "whole", hidden=64, heads=2, kv_heads=2, tie=False)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def said(folder: Path) -> str:
    """The one violation."""
    lines = list(weights.violations(folder, config(folder)))
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURE_FIELDS)
def test_what_transformers_writes_is_whole_and_read(architecture: str, tie: bool, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", architecture=architecture, hidden=64, heads=2, kv_heads=2, tie=tie)
    assert list(weights.violations(folder, config(folder))) == []
    # and the same names as the trainer's own table gives, numbers aside
    known = {hf for hf_names, _ in table.TABLE.values() for hf in hf_names}
    found = weights.names(Sizes.of(config(folder)))
    assert {
        name.replace(".0.", ".{layer}.", 1) for name in found if ".1." not in name and "experts" not in name
    } <= known


def test_half_copied_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for part in (data[:-1], data[: len(data) // 2]):
        file.write_bytes(part)
        assert said(folder) == (f"{file} has {len(part)} bytes, its header says {len(data)}; complete the download")
    for part in (data[:100], data[:5], b""):
        file.write_bytes(part)
        assert said(folder) == f"{file} of {len(part)} bytes is no whole safetensors file; download it again"
    file.write_bytes(data[:8] + b"x" + data[9:])
    assert said(folder).startswith(f"{file} has a header that cannot be read (JSONDecodeError")


def test_git_lfs_pointer(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")
    assert said(folder) == f"{file} is a Git LFS pointer of 74 bytes, not the weights; run git lfs pull there"


def test_file_without_tensors(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    assert "holds no tensors; download it again" in said(folder)


def test_index_and_files_that_are_not_of_one_download(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    save_file(tensors, folder / "a.safetensors")
    save_file(head, folder / "b.safetensors")
    index = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(head, "b.safetensors")
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": index}))
    assert list(weights.violations(folder, config(folder))) == []
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index, "a.safetensors")}))
    assert said(folder) == (
        f"{folder}/a.safetensors lacks 1 tensor (lm_head.weight), which {weights.INDEX} says are there; "
        "download both again"
    )
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    assert "cannot be read (AttributeError" in said(folder)
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": index | {"lm_head.weight": "c.safetensors"}}))
    assert "c.safetensors cannot be read; complete the download" in said(folder)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "1 tensor (model.layers.0.mlp.up_proj.weight_scale_inv)"),
        ("model.layers.2.mlp.up_proj.weight", "1 tensor (model.layers.2.mlp.up_proj.weight)"),
        ("model.layers.0.self_attn.q_proj.bias", "1 tensor (model.layers.0.self_attn.q_proj.bias)"),
    ],
)
def test_tensor_that_nothing_reads(folder: Path, extra: str, named: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {extra: torch.ones(2)}, folder / "model.safetensors")
    assert said(folder).startswith(f"{folder} holds {named}, which nothing would read for its config.json")


def test_tensors_that_follow_from_others_may_be_there(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, folder / "model.safetensors")
    assert list(weights.violations(folder, config(folder))) == []
    assert list(weights.violations(folder, config(folder) | {"tie_word_embeddings": True})) == []


def test_a_layer_that_drafts_tokens_may_be_there(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.ones(2)}, folder / "model.safetensors")
    assert "1 tensor (model.layers.2.eh_proj.weight)" in said(folder)
    assert list(weights.violations(folder, config(folder) | {"num_nextn_predict_layers": 1})) == []


def test_tensors_that_the_model_lacks(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1." not in k}, folder / "model.safetensors")
    assert "lacks 9 tensors (model.layers.1.input_layernorm.weight," in said(folder)
    assert "and 5 more), which a model of its config.json has" in said(folder)
