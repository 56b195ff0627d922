"""An exported folder loads with transformers and gives the same tensors; a write that fails changes nothing."""

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcpo_openrlhf.policy.hf_folder import strangers, write_hf_folder
from tests.tiny import make_tiny_model

SMALL = 100_000
"""Bytes of a file: the tiny model takes several, and its embedding is larger than one."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("export") / "source")


@pytest.fixture
def tensors(source: Path) -> dict[str, Tensor]:
    """Weights that differ from those of the source folder."""
    return {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("shard_bytes", [SMALL, 10**9], ids=["sharded", "single"])
def test_export_loads_with_transformers_and_gives_the_same_tensors(
    source: Path, tensors: dict[str, Tensor], tmp_path: Path, shard_bytes: int
) -> None:
    output = write_hf_folder(tensors.items(), source=source, output=tmp_path / "hf", shard_bytes=shard_bytes)
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert AutoTokenizer.from_pretrained(output)("what is 1+1").input_ids
    assert model.generation_config.eos_token_id is not None
    files = sorted(file.name for file in output.glob("*.safetensors"))
    if shard_bytes == SMALL:
        index = json.loads((output / "model.safetensors.index.json").read_text())
        count = len(files)
        assert count > 1 and files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    else:
        assert files == ["model.safetensors"] and not list(output.glob("*.index.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("shard_bytes", [SMALL, 10**9], ids=["sharded", "single"])
def test_who_may_read_files_may_read_the_weights(
    source: Path, tensors: dict[str, Tensor], tmp_path: Path, shard_bytes: int
) -> None:
    """safetensors writes for the owner alone, and models are served by others."""
    before = os.umask(0o027)
    try:
        output = write_hf_folder(tensors.items(), source=source, output=tmp_path / "hf", shard_bytes=shard_bytes)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in output.glob("*.safetensors")} == {"0o640"}


def test_files_stay_below_the_bound_unless_one_tensor_exceeds_it(
    source: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    output = write_hf_folder(tensors.items(), source=source, output=tmp_path / "hf", shard_bytes=SMALL)
    file_of = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    sizes = [[tensors[n].nbytes for n in tensors if file_of[n] == file] for file in sorted(set(file_of.values()))]
    assert all(sum(held) <= SMALL or len(held) == 1 for held in sizes)
    assert all(sum(held) + following[0] > SMALL for held, following in pairwise(sizes)), "a file is filled first"


def test_views_of_one_tensor_are_written_apart(source: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    pieces = [("a", whole[:2].T), ("b", whole[1:])]
    output = write_hf_folder(pieces, source=source, output=tmp_path / "hf")
    loaded = load_file(output / "model.safetensors")
    assert torch.equal(loaded["a"], whole[:2].T) and torch.equal(loaded["b"], whole[1:])


def test_index_of_a_sharded_source_is_not_copied(source: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    sharded = write_hf_folder(tensors.items(), source=source, output=tmp_path / "sharded", shard_bytes=SMALL)
    (sharded / "pytorch_model.bin.index.json").write_text("{}")
    output = write_hf_folder(tensors.items(), source=sharded, output=tmp_path / "hf")
    assert not list(output.glob("*.index.json"))
    assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_second_export_replaces_the_first(source: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    output = tmp_path / "hf"
    write_hf_folder(tensors.items(), source=source, output=output, shard_bytes=SMALL)
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    write_hf_folder(newer.items(), source=source, output=output)
    assert [file.name for file in output.glob("model*")] == ["model.safetensors"]
    written = load_file(output / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in newer.items())


@pytest.mark.parametrize("added", ["README.md", "notes.txt", "other.safetensors", "folder"])
def test_what_is_no_export_is_kept_under_another_name(
    source: Path, tensors: dict[str, Tensor], tmp_path: Path, added: str
) -> None:
    output = write_hf_folder(tensors.items(), source=source, output=tmp_path / "hf")
    assert strangers(output) == [] and "config.json" in strangers(source)
    (output / added).mkdir() if added == "folder" else (output / added).write_text("mine")
    assert strangers(output) == [added]
    before = contents(output)
    for _ in range(2):
        write_hf_folder(tensors.items(), source=source, output=output)
    assert contents(tmp_path / "hf.old-1") == before and (tmp_path / "hf.old-1" / added).exists()
    assert strangers(output) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf.old-1"]


def test_an_export_that_the_policy_started_from_is_kept(
    source: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    first = write_hf_folder(tensors.items(), source=source, output=tmp_path / "hf")
    before = contents(first)
    write_hf_folder([(name, tensor + 1) for name, tensor in tensors.items()], source=first, output=first)
    assert contents(tmp_path / "hf.old-1") == before != contents(first)


def test_interrupted_write_leaves_the_old_folder_untouched(
    source: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    output = write_hf_folder(tensors.items(), source=source, output=tmp_path / "hf")
    before = contents(output)

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors.items())[:-1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(interrupted(), source=source, output=output, shard_bytes=SMALL)
    assert contents(output) == before
    write_hf_folder(tensors.items(), source=source, output=output)
    assert contents(output) == before, "what the interrupted write left behind is gone"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("own", "stops", "written"),
    [(2, [2, 0], [2, 0]), ([2, 1], [2], [2, 1]), (None, [2], 2), (2, [], 2), ([5, 2], [0, 2], [5, 2, 0])],
)
def test_generation_ends_where_training_ended_it(
    own: object, stops: list[int], written: object, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    config = {"do_sample": False} | ({"eos_token_id": own} if own is not None else {})
    (source / "generation_config.json").write_text(json.dumps(config))
    tensors = [("a", torch.ones(2))]
    output = write_hf_folder(tensors, source=source, output=tmp_path / "out", stop_token_ids=stops)
    assert json.loads((output / "generation_config.json").read_text()) == config | {"eos_token_id": written}
