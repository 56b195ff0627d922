"""A model folder's safetensors, read by their headers alone: whole, of this model, and nothing that no one reads."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcpo_openrlhf.recipe.families import Sizes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADER_BYTES = 10**8
"""A longer header is none; safetensors' own bound."""
SAMPLE = 2**22
"""Bytes of a file that its fingerprint reads at a time; the header is within the first."""
LFS = b"version https://git-lfs"
NEEDLESS = re.compile(r".*\.rotary_emb\.inv_freq")
"""Old folders hold these numbers, which follow from config.json."""
SHOWN = 4
"""Names that an error lists."""


class _Broken(ValueError):
    """A file that is not a whole safetensors file; says why, and what to do."""


def violations(folder: Path, hf: Any) -> Iterator[str]:
    """What is wrong with the weights in the folder of a model with that config.json."""
    try:
        file_of = _index(folder)
    except _Broken as error:
        yield str(error)
        return
    files = sorted(set(file_of.values())) if file_of is not None else [SINGLE] * os.path.isfile(folder / SINGLE)
    if not files:
        yield f"model.path = {folder} has no weights ({SINGLE} or {INDEX}); save the model as safetensors there"
        return
    missing = [name for name in files if not os.access(folder / name, os.R_OK)]
    if missing:
        yield f"model.path = {folder}: {', '.join(missing)} cannot be read; complete the download"
        return
    held: set[str] = set()
    for name in files:
        try:
            inside = _tensors(folder / name)
        except _Broken as error:
            yield str(error)
            return
        lacking = [tensor for tensor, file in (file_of or {}).items() if file == name and tensor not in inside]
        if lacking:
            yield f"{folder / name} lacks {_list(lacking)}, which {INDEX} says are there; download both again"
            return
        held |= inside
    yield from _names(folder, held, hf)


def fingerprint(folder: Path) -> str:
    """Tells folders of other weights apart: of each file its name, size, header and three samples; not every byte."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, max(size - SAMPLE, 0)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor -> its file; None without an index."""
    index = folder / INDEX
    if not os.path.isfile(index):
        return None
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _Broken(f"{index} cannot be read ({error!r}); download the model again") from None


def _tensors(file: Path) -> set[str]:
    """Names of the tensors in a safetensors file: 8 bytes with its length, a JSON header, then the tensors."""
    size = os.path.getsize(file)
    with file.open("rb") as handle:
        start = handle.read(len(LFS))
        if start == LFS:
            raise _Broken(f"{file} is a Git LFS pointer of {size} bytes, not the weights; run git lfs pull there")
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size - 8, HEADER_BYTES):
            raise _Broken(f"{file} of {size} bytes is no whole safetensors file; download it again")
        handle.seek(8)
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _Broken(f"{file} has a header that cannot be read ({error!r}); download it again") from None
    if not ends:
        raise _Broken(f"{file} holds no tensors; download it again, or save the model as safetensors there")
    if size != 8 + length + max(ends):
        whole = 8 + length + max(ends)
        raise _Broken(f"{file} has {size} bytes, its header says {whole}; complete the download")
    return set(header)


def _names(folder: Path, held: set[str], hf: Any) -> Iterator[str]:
    """Tensors that the model needs and the folder lacks, and those that nothing would read."""
    try:
        sizes = Sizes.of(hf)
    except (KeyError, TypeError, AttributeError, ValueError):
        return  # said of config.json
    needed = set(names(sizes))
    needless = {"lm_head.weight"} if sizes.tied else set()
    drafting = range(sizes.layers, sizes.layers + (hf.get("num_nextn_predict_layers") or 0))
    needless |= {name for name in held if _layer(name) in drafting}  # they guess tokens ahead, here for nobody
    if lacking := sorted(needed - held):
        yield f"{folder} lacks {_list(lacking)}, which a model of its config.json has; download both again"
    if unread := sorted(name for name in held - needed - needless if not NEEDLESS.fullmatch(name)):
        yield (
            f"{folder} holds {_list(unread)}, which nothing would read for its config.json: the policy would be "
            "another model than its weights; use the model's own config.json, or an unquantised model of a known family"
        )


def _layer(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def names(s: Sizes) -> Iterator[str]:
    """Hugging Face names of a model's tensors: what policy/megatron/names.py reads for it."""
    yield from ("model.embed_tokens.weight", "model.norm.weight")
    if not s.tied:
        yield "lm_head.weight"
    attention = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    attention += [f"{name}_proj.bias" for name in s.bias]
    attention += ["q_norm.weight", "k_norm.weight"] * (s.qk_norm != "none")
    mlp = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    mixture = ["gate.weight"] + ["gate.e_score_correction_bias"] * (s.router == "sigmoid")
    mixture += [f"shared_experts.{name}" for name in mlp] * bool(s.shared_ffn)
    mixture += [f"experts.{e}.{name}" for e in range(s.experts) for name in mlp]
    for layer in range(s.layers):
        yield from (f"model.layers.{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention"))
        yield from (f"model.layers.{layer}.self_attn.{name}" for name in attention)
        yield from (f"model.layers.{layer}.mlp.{name}" for name in (mlp if layer < s.dense_layers else mixture))


def _list(found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{len(found)} tensor{'s' * (len(found) > 1)} ({', '.join(found[:SHOWN])}{more})"
