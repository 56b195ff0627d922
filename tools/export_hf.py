"""A run's checkpoint as a Hugging Face folder that transformers and vLLM load; no cluster, no GPU, no process group.

python -m tools.export_hf --checkpoint RUN/checkpoints/step_000100 --output DIR

Weights are read from the checkpoint one Hugging Face tensor at a time, whatever mesh wrote it, and written in shards:
memory holds one shard (--shard-gb) and, of a tensor, twice its size. DeepSpeed's checkpoints are read whole: memory
holds the fp32 main weights too (stage 3: as they lie in the files). Configuration, tokenizer and generation settings
come from the folder that the run started from. To publish the result: hf upload USER/NAME DIR.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dcpo_openrlhf import checkpoint
from dcpo_openrlhf.policy.deepspeed import CHECKPOINT_FOLDER
from dcpo_openrlhf.policy.hf_folder import strangers, write_hf_folder
from dcpo_openrlhf.policy.megatron import names
from dcpo_openrlhf.rollout.chat import stop_tokens

_LAYERS, _EXPERTS = "decoder.layers.", "mlp.experts.experts."
_OWN_LAYER = re.compile(re.escape(_LAYERS) + r"(\d+)\.")


class ExportError(ValueError):
    """A checkpoint or model folder that cannot be converted; names what is wrong and the remedy."""


class CheckpointTensors:
    """The policy's tensors in a checkpoint of megatron-core, of which any slice can be read without the others."""

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.sizes = {
            key: value.size
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self._metadata = metadata.state_dict_metadata

    def read(self, key: str, *index: int) -> Tensor:
        """The tensor of `key` at `index` of its leading dimensions (layer, expert)."""
        stored = self._metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        rest = tuple(stored.size[len(index) :])
        offsets = torch.Size((*index, *(0,) * len(rest)))
        out = torch.empty((*(1,) * len(index), *rest), dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [ChunkStorageMetadata(offsets, out.shape)])
        self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        return out.view(rest)


def deepspeed_tensors(folder: Path, hf: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight in a checkpoint of parallel.backend = deepspeed.

    The fp32 main weights, rounded to `dtype`: the weights that the engine had.
    """
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed speaks there, and stdout is for the result
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        tensors: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=CHECKPOINT_FOLDER, lazy_mode=True)
    tied = bool(hf.get("tie_word_embeddings", False))
    for name, tensor in tensors.items():
        if not (tied and name == "lm_head.weight"):  # the embedding under another name
            yield name, tensor.contiguous().to(dtype)


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        out = self._out
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            out = out.narrow(dim, start, length)
        return out


def hf_tensors(folder: Path, hf: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight in the checkpoint `folder`, first layer first."""
    tensors = CheckpointTensors(folder)
    shape = _shape(tensors, hf)
    tied = bool(hf.get("tie_word_embeddings", False))
    for name, key, index in _parameters(tensors):
        if tied and name == "output_layer.weight":
            continue  # a last pipeline stage's copy of the embedding
        entry = names.entry_of(name)
        yield from zip(entry.hf_names, entry.cut.merge([tensors.read(key, *index)], shape), strict=True)


def _parameters(tensors: CheckpointTensors) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(Megatron name with layer and expert, key in the checkpoint, where in that key's tensor).

    Layers of one kind lie in one tensor; those of a model whose first ones have no experts have keys of their own.
    """
    outside = [key for key in tensors.sizes if not key.startswith(_LAYERS)]
    inside = [key for key in tensors.sizes if key.startswith(_LAYERS)]
    yield from ((key, key, ()) for key in outside)
    for layer in range(_layer_count(tensors)):
        for key in inside:
            own = _OWN_LAYER.match(key)
            if own and int(own[1]) != layer:
                continue
            rest, index = (key[own.end() :], ()) if own else (key.removeprefix(_LAYERS), (layer,))
            if not rest.startswith(_EXPERTS):
                yield f"{_LAYERS}{layer}.{rest}", key, index
                continue
            weight = rest.removeprefix(_EXPERTS)
            for expert in range(tensors.sizes[key][len(index)]):
                yield f"{_LAYERS}{layer}.mlp.experts.local_experts.{expert}.{weight}", key, (*index, expert)


def _layer_count(tensors: CheckpointTensors) -> int:
    inside = [key for key in tensors.sizes if key.startswith(_LAYERS)]
    own = {int(match[1]) for key in inside if (match := _OWN_LAYER.match(key))}
    return len(own) if own else tensors.sizes[inside[0]][0]


def _shape(tensors: CheckpointTensors, hf: dict[str, Any]) -> names.Shape:
    heads = hf["num_attention_heads"]
    shape = names.Shape(
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab_size=hf["vocab_size"],
        padded_vocab_size=tensors.sizes["embedding.word_embeddings.weight"][0],
    )
    key = next(key for key in tensors.sizes if key.endswith(".self_attention.linear_qkv.weight"))
    rows, layers = tensors.sizes[key][0 if _OWN_LAYER.match(key) else 1], _layer_count(tensors)
    if (layers, rows) != (hf["num_hidden_layers"], (shape.heads + 2 * shape.kv_heads) * shape.head_dim):
        raise ExportError(
            f"the checkpoint has {layers} layers with {rows} rows of queries, keys and values, the model's "
            f"config.json {hf['num_hidden_layers']} layers, {shape.heads} heads, {shape.kv_heads} key/value heads of "
            f"{shape.head_dim}; name the model that the run started from: --model DIR"
        )
    return shape


def _saved_recipe(folder: Path) -> dict[str, Any]:
    """The recipe that the checkpoint was saved with; an imported one has none, and so no key."""
    state = folder / checkpoint.STATE
    return json.loads(state.read_text())["recipe"] if state.is_file() else {}


def _model_of(folder: Path, recipe: dict[str, Any]) -> Path:
    if not recipe:
        raise ExportError(f"{folder} does not say which model it belongs to (no {checkpoint.STATE}); add --model DIR")
    return Path(recipe["model"]["path"])


def require_free(output: Path, *, kept: dict[str, Path]) -> None:
    """Raise ExportError unless `output` is new, empty or an earlier export, and has nothing in it of `kept`."""
    for what, path in kept.items():
        if path.resolve().is_relative_to(output):
            raise ExportError(f"--output {output} is or contains {what} {path}, and is replaced; name another folder")
    if output.exists() and not output.is_dir():
        raise ExportError(f"--output {output} is a file; name a folder")
    if output.is_dir() and (others := strangers(output)):
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ExportError(
            f"--output {output} is replaced, but holds other things than an export wrote ({listed}); "
            "name another folder, or move them away"
        )


def export(folder: Path, output: Path, *, model: Path | None = None, shard_gb: float = 5.0) -> Path:
    """`output`: the Hugging Face folder of the checkpoint `folder`. Raises ExportError, before anything is written."""
    output = output.resolve()
    if not shard_gb > 0:
        raise ExportError(f"--shard-gb is above 0, not {shard_gb}")
    if wrong := checkpoint.damage(folder):
        raise ExportError(f"--checkpoint {folder} is not a whole checkpoint (step_NNNNNN): {wrong}; name another one")
    recipe = _saved_recipe(folder)
    model = model or _model_of(folder, recipe)
    if not (model / "config.json").is_file():
        raise ExportError(f"the model that the run started from is not at {model}; say where it is: --model DIR")
    kept = {"the checkpoint": folder, "the model": model, "the folder you are in": Path.cwd()}
    if "run" in recipe:
        kept["the run"] = Path(recipe["run"]["dir"])
    require_free(output, kept=kept)
    if output.is_relative_to(folder.resolve()):
        raise ExportError(f"--output {output} lies in the checkpoint {folder}; name a folder outside it")
    hf = json.loads((model / "config.json").read_text())
    if (folder / CHECKPOINT_FOLDER).is_dir():
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe["model"]["dtype"]]
        tensors = deepspeed_tensors(folder, hf, dtype)
    else:
        tensors = hf_tensors(folder, hf)
    stops = _stop_tokens(folder, model)
    return write_hf_folder(
        tensors, source=model, output=output, shard_bytes=int(shard_gb * 2**30), stop_token_ids=stops
    )


def _stop_tokens(folder: Path, model: Path) -> list[int]:
    """Tokens that ended the responses of the run; none for a checkpoint that no run saved."""
    from transformers import AutoTokenizer

    state = folder / checkpoint.STATE
    recipe = json.loads(state.read_text()).get("recipe", {}) if state.is_file() else {}
    if "task" not in recipe:
        return []
    trusted = recipe["model"].get("trust_remote_code", False)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trusted)
    return stop_tokens(tokenizer, chat=recipe["task"]["chat"], stop=recipe["rollout"].get("stop", []))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.export_hf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN/checkpoints/step_NNNNNN")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new, or an earlier export")
    parser.add_argument("--model", type=Path, metavar="DIR", help="source of config and tokenizer; default: the run's")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GIB", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        export(arguments.checkpoint, arguments.output, model=arguments.model, shard_gb=arguments.shard_gb)
    except (ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
