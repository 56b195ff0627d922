"""The one list of model families: what each computes beyond llama's block, and what of its config.json is implemented.

Preflight, plan, doctor, trainer and the table of docs/families.md read it. A family is here when it has passed every
proof that docs/add_a_model.md names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

QKNorm = Literal["none", "head"]


@dataclass(frozen=True)
class Family:
    """How a model_type differs from llama's block."""

    example: str
    """A model of it that people train."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json whose other values would train another model than the engine serves."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes where config.json leaves a key of `only` out, if that is another value."""
    bias: tuple[str, ...] = ()
    """Attention's projections with a bias, of q, k, v and o."""
    optional_bias: tuple[str, ...] = ()
    """The same where attention_bias is true."""
    qk_norm: QKNorm = "none"
    """RMSNorm of queries and keys: of each head."""
    experts: str = ""
    """Key of config.json that counts them; "": a dense model."""


_QKV = ("q", "k", "v")
_NO_BIAS = {"attention_bias": False}
EVERYWHERE = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
"""`only` of every family."""

FAMILIES: dict[str, Family] = {
    # model_type of config.json
    "llama": Family("Llama-3.1-8B, SmolLM2", optional_bias=(*_QKV, "o")),
    "mistral": Family("Mistral-7B-v0.3", only=_NO_BIAS | {"sliding_window": None}, absent={"sliding_window": 4096}),
    "qwen2": Family("Qwen2.5-7B", only=_NO_BIAS, bias=_QKV),
    "qwen3": Family("Qwen3-4B", only=_NO_BIAS, qk_norm="head"),
    "qwen3_moe": Family(
        "Qwen3-30B-A3B",
        only=_NO_BIAS | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        qk_norm="head",
        experts="num_experts",
    ),
}

LACKS: dict[str, str] = {}
"""Families that have been looked at and do not pass: model_type -> what is missing."""


def family_of(hf: Mapping[str, Any]) -> Family:
    """Raises ValueError for a model_type that is no family."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type = {kind!r} {why_not(kind)}")
    return FAMILIES[str(kind)]


def why_not(kind: Any) -> str:
    """Why a model_type is none of the families, and what to do."""
    lacking = f": {LACKS[kind]}" if isinstance(kind, str) and kind in LACKS else ""
    return f"is not supported{lacking}; use one of {', '.join(FAMILIES)}"


def not_implemented(hf: Mapping[str, Any], config: Path | str) -> Iterator[str]:
    """What this config.json of a family asks for beyond it."""
    family = family_of(hf)
    for name, value in (EVERYWHERE | dict(family.only)).items():
        found = hf.get(name, family.absent.get(name, value))
        if found != value:
            yield f"{name} = {found!r} in {config} is not implemented, only {value!r}; use another model"


@dataclass(frozen=True)
class Sizes:
    """What of a model's config.json decides about its layers, and so about memory and work."""

    layers: int
    hidden: int
    ffn: int
    """Width of the dense MLP, or of one expert."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    bias: tuple[str, ...]
    """Attention's projections that have one, of q, k, v and o."""
    qk_norm: QKNorm
    experts: int
    """0: a dense model."""
    experts_per_token: int

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> "Sizes":
        family = family_of(hf)
        heads = hf["num_attention_heads"]
        experts = expert_count(hf)
        return cls(
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            ffn=hf["moe_intermediate_size"] if experts else hf["intermediate_size"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            vocab=hf["vocab_size"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            bias=family.bias or (family.optional_bias if hf.get("attention_bias") else ()),
            qk_norm=family.qk_norm,
            experts=experts,
            experts_per_token=hf.get("num_experts_per_tok") or 0 if experts else 0,
        )

    @property
    def query(self) -> int:
        """Heads * head size."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Key/value heads * head size."""
        return self.kv_heads * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Of all experts of all layers."""
        return self.layers * self.experts * 3 * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        layer = dense_layer(self, 1)
        return self.layers * layer + self.expert_parameters + (2 - self.tied) * self.vocab * self.hidden + self.hidden

    @property
    def active_parameters(self) -> int:
        """That one token meets in a forward pass, the output layer included, the embedding not."""
        idle = self.expert_parameters * (self.experts - self.experts_per_token) // max(self.experts, 1)
        return self.parameters - idle - (0 if self.tied else self.vocab * self.hidden)


def expert_count(hf: Mapping[str, Any]) -> int:
    """0 for a dense model. transformers 5 writes every family's number as num_local_experts too."""
    key = family_of(hf).experts
    return (hf.get(key) or hf.get("num_local_experts") or 0) if key else 0


def dense_layer(s: Sizes, tensor: int) -> int:
    """Parameters of one layer on one of `tensor` ranks, experts not counted."""
    widths = {"q": s.query, "k": s.key, "v": s.key}
    cut = s.hidden * (2 * s.query + 2 * s.key) + sum(width for name, width in widths.items() if name in s.bias)
    whole = 2 * s.hidden + s.hidden * ("o" in s.bias) + 2 * s.head_dim * (s.qk_norm == "head")
    if s.experts:
        return cut // tensor + whole + s.hidden * s.experts
    return (cut + 3 * s.hidden * s.ffn) // tensor + whole
