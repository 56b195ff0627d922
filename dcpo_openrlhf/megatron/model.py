"""The policy: megatron-core's GPTModel made from a Hugging Face folder, weights included."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from dcpo_openrlhf.config import Model, Parallel, Train
from dcpo_openrlhf.megatron import names
from dcpo_openrlhf.megatron.layers import PackedAttention, RMSNorm
from dcpo_openrlhf.megatron.mesh import Mesh, tensor_group

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Policy:
    """A bare GPTModel of this rank with what is needed to name and cut its weights."""

    model: GPTModel
    config: TransformerConfig
    shape: names.Shape
    tied: bool
    first_layer: int

    def entries(self) -> Iterator[tuple[names.Entry, torch.nn.Parameter]]:
        return names.entries(self.model, first_layer=self.first_layer)


def padded_vocab_size(vocab_size: int, *, multiple: int, tensor: int) -> int:
    """The smallest multiple of multiple * tensor that holds vocab_size rows."""
    unit = multiple * tensor
    return -(-vocab_size // unit) * unit


def transformer_config(hf: Any, *, model: Model, parallel: Parallel, train: Train, device: str) -> TransformerConfig:
    """Megatron's configuration of a Hugging Face one (llama, qwen2, qwen3, qwen3_moe).

    Raises ValueError for another architecture or a sliding window.
    """
    if hf.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type = {hf.model_type!r} is not one of {', '.join(ARCHITECTURES)}; "
            "add its names to megatron/names.py"
        )
    if getattr(hf, "use_sliding_window", False):
        raise ValueError(
            f"{hf.model_type} with use_sliding_window = true is not supported; set it to false in config.json"
        )
    dtype = DTYPES[model.dtype]
    moe = {}
    if hf.model_type == "qwen3_moe":
        moe = {
            "num_moe_experts": hf.num_experts,
            "moe_router_topk": hf.num_experts_per_tok,
            "moe_ffn_hidden_size": hf.moe_intermediate_size,
            "moe_router_pre_softmax": False,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    on_gpu = device == "cuda"
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=_head_dim(hf),
        ffn_hidden_size=hf.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.model_type == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        qk_layernorm=hf.model_type in ("qwen3", "qwen3_moe"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        autocast_dtype=dtype,
        variable_seq_lengths=True,
        # the only dispatcher that allows variable lengths; megatron-core checks it for dense models too
        moe_token_dispatcher_type="alltoall",
        # the loss function returns a sum and a count; finalize_model_grads divides once, by the global count
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        recompute_granularity=None if train.recompute == "none" else train.recompute,
        recompute_method="uniform" if train.recompute == "full" else None,
        recompute_num_layers=1 if train.recompute == "full" else None,
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **moe,
    )


def build_policy(*, model: Model, parallel: Parallel, train: Train, mesh: Mesh) -> Policy:
    """This rank's GPTModel with the weights of the Hugging Face folder `model.path`, on the mesh's device."""
    hf = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    config = transformer_config(hf, model=model, parallel=parallel, train=train, device=mesh.device.type)
    shape = names.Shape(
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=_head_dim(hf),
        vocab_size=hf.vocab_size,
        padded_vocab_size=padded_vocab_size(hf.vocab_size, multiple=model.vocab_multiple, tensor=parallel.tensor),
    )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, model.layers, mesh.device.type),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=_rope_theta(hf),  # type: ignore[arg-type]  # annotated int, used as float
    ).to(mesh.device)
    policy = Policy(gpt, config, shape, hf.tie_word_embeddings, get_transformer_layer_offset(config))
    load_weights(policy, HFWeights(model.path), mesh=mesh)
    return policy


@torch.no_grad()
def load_weights(policy: Policy, weights: "HFWeights", *, mesh: Mesh) -> None:
    """Copy each parameter's shard of the Hugging Face tensors in place."""
    for entry, parameter in policy.entries():
        tensors = [
            weights[name] for name in (_TIED_HEAD if policy.tied and entry.hf_names == _HEAD else entry.hf_names)
        ]
        shard = entry.cut.shard(tensors, mesh.tensor_rank, mesh.tensor_size, policy.shape)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{', '.join(entry.hf_names)}: this rank's shard has shape {tuple(shard.shape)}, "
                f"the model wants {tuple(parameter.shape)}; config.json and the weights do not belong together"
            )
        parameter.copy_(shard)
        if entry.cut.dim is not None:
            # megatron-core marks what it initialises; unmarked, the gradient norm counts this shard on rank 0 alone
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim, parameter.partition_stride = entry.cut.dim, 1  # type: ignore[attr-defined]


class HFWeights:
    """The tensors of a Hugging Face folder by name, read one at a time from safetensors."""

    def __init__(self, path: Path) -> None:
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if index.is_file():
            self._file_of = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise FileNotFoundError(
                f"{path} holds neither model.safetensors nor model.safetensors.index.json; "
                "model.path must be a Hugging Face folder"
            )
        self._path = path
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise KeyError(f"{self._path}: no tensor {name!r}; the folder is incomplete or of another architecture")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self._path / file, framework="pt")
        return self._open[file].get_tensor(name)


@torch.no_grad()
def hf_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors of the live model, one at a time; every tensor-parallel rank iterates in step."""
    group: Any = tensor_group()
    size = dist.get_world_size(group)
    for entry, parameter in policy.entries():
        local = parameter.detach().contiguous()
        shards = [local]
        if size > 1 and entry.cut is not names.REPLICATED:
            shards = [torch.empty_like(local) for _ in range(size)]
            dist.all_gather(shards, local, group=group)
        yield from zip(entry.hf_names, entry.cut.merge(shards, policy.shape), strict=True)


_HEAD = ("lm_head.weight",)
_TIED_HEAD = ("model.embed_tokens.weight",)


def _head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def _rope_theta(hf: Any) -> float:
    rope = hf.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type = {rope['rope_type']!r} is not supported yet, only 'default'")
    return rope["rope_theta"]


def _layer_spec(config: TransformerConfig, layers: str, device: str) -> Any:
    """Layers for GPTModel: Transformer Engine's, or megatron-core's local ones with our attention and norm."""
    if layers == "auto":
        layers = "transformer_engine" if device == "cuda" and _has_transformer_engine() else "local"
    moe = config.num_moe_experts
    if layers == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=moe, moe_grouped_gemm=False, qk_layernorm=bool(config.qk_layernorm)
        )
    spec = get_gpt_layer_local_spec(num_experts=moe, qk_layernorm=bool(config.qk_layernorm), normalization="RMSNorm")
    parts: Any = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    norm: Any = RMSNorm  # a class, where megatron-core's annotation says module or spec
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)


def _has_transformer_engine() -> bool:
    from megatron.core.extensions import transformer_engine

    return bool(transformer_engine.HAVE_TE)
