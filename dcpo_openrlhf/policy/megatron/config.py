"""megatron-core's configuration of a Hugging Face model on a mesh."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from dcpo_openrlhf.recipe.model_config import ARCHITECTURES, ROPE_TYPES
from dcpo_openrlhf.recipe.schema import Model, Parallel, Train

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    rope = hf.rope_parameters if rope_type(hf) == "yarn" else {}
    dtype, on_gpu, interleaved = DTYPES[model.dtype], device == "cuda", parallel.virtual_pipeline > 1
    config = TransformerConfig(
        **_sizes(hf),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        autocast_dtype=dtype,
        variable_seq_lengths=not interleaved,
        # two stages send each other both activations and gradients: megatron-core keeps them apart only so
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=not interleaved,  # gloo may still be sending them
        # the only dispatcher that allows variable lengths; megatron-core checks it for dense models too
        moe_token_dispatcher_type="alltoall",
        # the loss function returns a sum and a count; finalize_model_grads divides once, by the global count
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        recompute_granularity=None if train.recompute == "none" else train.recompute,
        recompute_method="uniform" if train.recompute == "full" else None,
        recompute_num_layers=1 if train.recompute == "full" else None,
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
        bias_dropout_fusion=on_gpu,
        use_te_activation_func=not on_gpu,  # fused.SwiGLU
        apply_rope_fusion=not on_gpu and not rope,  # fused.packed_rotary; yarn also scales, which it does not
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    if rope:  # megatron-core's attention reads these three; queries and keys are multiplied by what they give
        config.yarn_rotary_scaling_factor = rope["factor"]  # type: ignore[attr-defined]
        config.yarn_mscale = rope.get("mscale")  # type: ignore[attr-defined]
        config.yarn_mscale_all_dim = rope.get("mscale_all_dim")  # type: ignore[attr-defined]
    return config


def _sizes(hf: Any) -> dict[str, Any]:
    """What the model is, whatever it runs on."""
    dense = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": head_dim(hf),
        "ffn_hidden_size": hf.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": hf.model_type == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        "qk_layernorm": hf.model_type in ("qwen3", "qwen3_moe"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if hf.model_type != "qwen3_moe":
        return dense
    return dense | {
        "num_moe_experts": hf.num_experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rope_type(hf: Any) -> str:
    """Raises ValueError for a kind that trainer and engine would not compute alike."""
    kind = hf.rope_parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type = {kind!r} is not one of {', '.join(ROPE_TYPES)}; change it in config.json")
    return kind
