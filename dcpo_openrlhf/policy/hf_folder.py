"""The live policy written as a Hugging Face folder that transformers and vLLM load."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5 * 2**30
# everything of the source folder that describes the model or its tokenizer; weights are written anew
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_MARKER = ".dcpo_openrlhf_export"
"""Names every other file of an export, one a line."""


def strangers(folder: Path) -> list[str]:
    """Names in `folder` that no export wrote, and that replacing it would lose."""
    marker = folder / _MARKER
    written = {*marker.read_text().splitlines(), _MARKER} if marker.is_file() else set()
    files = sorted(folder.iterdir())
    return [f.name for f in files if f.name not in written or f.is_symlink() or not f.is_file()]


def write_hf_folder(
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: Path,
    output: Path,
    shard_bytes: int = SHARD_BYTES,
    stop_token_ids: Sequence[int] = (),
) -> Path:
    """`output`: tensors in safetensors files of at most `shard_bytes`; config, tokenizer and the like from `source`.

    stop_token_ids ended the responses of training: generation_config.json names them beside its own, for others too.
    Written aside and renamed when whole. Only then an earlier export under this name is replaced; anything else there,
    and a `source` that lies in it, is kept as NAME.old-N. One shard is in memory at a time.
    """
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):  # indexes name weight files that are not copied
                shutil.copy2(file, aside / file.name)
    _add_stops(aside / "generation_config.json", stop_token_ids)
    _tell_dtype(_write_weights(tensors, aside, shard_bytes), aside / _CONFIG)
    (aside / _MARKER).write_text("".join(f"{name}\n" for name in sorted(file.name for file in aside.iterdir())))
    replaced = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        ours = output.is_dir() and not strangers(output) and not source.resolve().is_relative_to(output.resolve())
        output.rename(replaced if ours else _unused(output))
    aside.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
    return output


def _add_stops(file: Path, stop_token_ids: Sequence[int]) -> None:
    config = json.loads(file.read_text()) if file.is_file() else {}
    own = config.get("eos_token_id")
    own = own if isinstance(own, list) else [own] if own is not None else []
    ends = list(dict.fromkeys([*own, *stop_token_ids]))
    if ends != own:
        file.write_text(json.dumps(config | {"eos_token_id": ends[0] if len(ends) == 1 else ends}, indent=2) + "\n")


def _unused(output: Path) -> Path:
    return next(p for n in count(1) if not (p := output.with_name(f"{output.name}.old-{n}")).exists())


def _tell_dtype(dtype: torch.dtype, config: Path) -> None:
    """config.json names the dtype of the weights beside it, which need not be that of the weights it came with."""
    name = str(dtype).removeprefix("torch.")
    values: dict[str, Any] = json.loads(config.read_text())
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    stated = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
    stated = stated or [(values, "torch_dtype")]  # the older name, which every transformers reads
    if any(section.get(key) != name for section, key in stated):
        for section, key in stated:
            section[key] = name
        config.write_text(json.dumps(values, indent=2) + "\n")


def _write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> torch.dtype:
    """The dtype of most of the weights."""
    elements: Counter[torch.dtype] = Counter()
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        file = folder / f"shard-{len(shards)}.safetensors"
        file.touch()
        mode = file.stat().st_mode  # as the umask says; safetensors lets no one but the owner read
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(mode)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous().clone()
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        elements[tensor.dtype] += tensor.numel()
    flush()
    ((dtype, _),) = elements.most_common(1)
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return dtype
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    return dtype
