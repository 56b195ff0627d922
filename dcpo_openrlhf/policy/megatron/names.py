"""The one table of weight names, Hugging Face <-> Megatron, and how a tensor is cut over tensor-parallel ranks.

Import, sync and export read it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The sizes that cutting needs."""

    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the Hugging Face vocabulary."""
    padded_vocab_size: int
    """Rows of Megatron's: a multiple of vocab_multiple * tensor."""


Shard = Callable[[list[Tensor], int, int, Shape], Tensor]
"""(Hugging Face tensors, rank, size, shape) -> this rank's Megatron tensor."""
Merge = Callable[[list[Tensor], Shape], list[Tensor]]
"""(Megatron tensors of all ranks, shape) -> Hugging Face tensors, which may be views of a single rank's."""


@dataclass(frozen=True)
class Cut:
    """How one Megatron tensor comes from Hugging Face tensors and goes back."""

    shard: Shard
    merge: Merge
    dim: int | None = 0
    """Dimension of the Megatron tensor that is cut; None: every tensor-parallel rank holds all of it."""


def _shard_qkv(hf: list[Tensor], rank: int, size: int, s: Shape) -> Tensor:
    q, k, v = (t.unflatten(0, (s.kv_heads, -1)) for t in hf)  # per key/value group: [its q heads, k, v]
    return torch.cat([q, k, v], dim=1).chunk(size)[rank].flatten(0, 1)


def _merge_qkv(shards: list[Tensor], s: Shape) -> list[Tensor]:
    group = _join(shards).unflatten(0, (s.kv_heads, -1))
    q_rows = s.heads // s.kv_heads * s.head_dim
    return [t.flatten(0, 1).contiguous() for t in group.split([q_rows, s.head_dim, s.head_dim], dim=1)]


def _join(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The whole; a single shard as it is, since every copy of a model's weights is seconds of a weight sync."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)


def _shard_vocabulary(hf: list[Tensor], rank: int, size: int, s: Shape) -> Tensor:
    (rows,) = hf
    padding = rows.new_zeros(s.padded_vocab_size - rows.shape[0], *rows.shape[1:])
    return torch.cat([rows, padding]).chunk(size)[rank]


REPLICATED = Cut(lambda hf, rank, size, s: hf[0], lambda shards, s: [shards[0]], dim=None)
COLUMNS = Cut(lambda hf, rank, size, s: hf[0].chunk(size, 1)[rank], lambda shards, s: [_join(shards, 1)], dim=1)
VOCABULARY = Cut(_shard_vocabulary, lambda shards, s: [_join(shards)[: s.vocab_size]])
QKV = Cut(_shard_qkv, _merge_qkv)
GATE_UP = Cut(  # each rank holds [its rows of gate; its rows of up]
    lambda hf, rank, size, s: torch.cat([t.chunk(size)[rank] for t in hf]),
    lambda shards, s: [_join(part) for part in zip(*(t.chunk(2) for t in shards), strict=True)],
)

_HF = "model.layers.{layer}."
_MG = "decoder.layers.{layer}."
_ATTENTION = ("q_proj", "k_proj", "v_proj")

TABLE: dict[str, tuple[tuple[str, ...], Cut]] = {
    # Megatron name: (Hugging Face names, cut)
    "embedding.word_embeddings.weight": (("model.embed_tokens.weight",), VOCABULARY),
    _MG + "input_layernorm.weight": ((_HF + "input_layernorm.weight",), REPLICATED),
    _MG + "self_attention.linear_qkv.weight": (tuple(f"{_HF}self_attn.{p}.weight" for p in _ATTENTION), QKV),
    _MG + "self_attention.linear_qkv.bias": (tuple(f"{_HF}self_attn.{p}.bias" for p in _ATTENTION), QKV),
    _MG + "self_attention.q_layernorm.weight": ((_HF + "self_attn.q_norm.weight",), REPLICATED),
    _MG + "self_attention.k_layernorm.weight": ((_HF + "self_attn.k_norm.weight",), REPLICATED),
    _MG + "self_attention.linear_proj.weight": ((_HF + "self_attn.o_proj.weight",), COLUMNS),
    _MG + "self_attention.linear_proj.bias": ((_HF + "self_attn.o_proj.bias",), REPLICATED),
    _MG + "pre_mlp_layernorm.weight": ((_HF + "post_attention_layernorm.weight",), REPLICATED),
    _MG + "mlp.linear_fc1.weight": ((_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), GATE_UP),
    _MG + "mlp.linear_fc2.weight": ((_HF + "mlp.down_proj.weight",), COLUMNS),
    _MG + "mlp.router.weight": ((_HF + "mlp.gate.weight",), REPLICATED),
    _MG + "mlp.router.expert_bias": ((_HF + "mlp.gate.e_score_correction_bias",), REPLICATED),
    _MG + "mlp.shared_experts.linear_fc1.weight": (
        (_HF + "mlp.shared_experts.gate_proj.weight", _HF + "mlp.shared_experts.up_proj.weight"),
        GATE_UP,
    ),
    _MG + "mlp.shared_experts.linear_fc2.weight": ((_HF + "mlp.shared_experts.down_proj.weight",), COLUMNS),
    _MG + "mlp.experts.local_experts.{expert}.linear_fc1.weight": (
        (_HF + "mlp.experts.{expert}.gate_proj.weight", _HF + "mlp.experts.{expert}.up_proj.weight"),
        GATE_UP,
    ),
    _MG + "mlp.experts.local_experts.{expert}.linear_fc2.weight": (
        (_HF + "mlp.experts.{expert}.down_proj.weight",),
        COLUMNS,
    ),
    "decoder.final_layernorm.weight": (("model.norm.weight",), REPLICATED),
    "output_layer.weight": (("lm_head.weight",), VOCABULARY),
}

BUFFERS = (".router.expert_bias",)
"""Ends of the names of what is in the Hugging Face folder and is not trained."""

_ALIASES = {
    # Transformer Engine fuses a norm into the linear layer behind it
    _MG + "self_attention.linear_qkv.layer_norm_weight": _MG + "input_layernorm.weight",
    _MG + "mlp.linear_fc1.layer_norm_weight": _MG + "pre_mlp_layernorm.weight",
    # and holds the experts of a layer in one module, each with a parameter of its own
    _MG + "mlp.experts.linear_fc1.weight{expert}": _MG + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
    _MG + "mlp.experts.linear_fc2.weight{expert}": _MG + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
}


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: its Hugging Face names (numbers filled in) and its cut."""

    hf_names: tuple[str, ...]
    cut: Cut
    expert: bool
    """One of a layer's experts: cut over expert-tensor ranks, and another one on every expert rank."""


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(
        re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    )


_PATTERNS = [(_pattern(name), name) for name in TABLE]
_PATTERNS += [(_pattern(alias), name) for alias, name in _ALIASES.items()]


def entry_of(name: str, *, first_layer: int = 0, first_expert: int = 0) -> Entry:
    """The table's entry of a local Megatron parameter; layers and experts are counted from this rank's first ones.

    Raises KeyError naming a parameter that the table does not know.
    """
    for pattern, key in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            hf_names, cut = TABLE[key]
            found = match.groupdict()
            numbers = {
                "layer": int(found.get("layer") or 0) + first_layer,
                "expert": int(found.get("expert") or 0) + first_expert,
            }
            return Entry(tuple(hf.format(**numbers) for hf in hf_names), cut, "{expert}" in key)
    raise KeyError(f"Megatron parameter {name!r} is not in names.TABLE; add its row there")
