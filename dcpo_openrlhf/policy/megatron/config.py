"""megatron-core's configuration of a Hugging Face model on a mesh."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from dcpo_openrlhf.recipe.families import ROPE_TYPES, Sizes, not_implemented
from dcpo_openrlhf.recipe.schema import Model, Parallel, Train

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def padded_vocab_size(vocab_size: int, *, multiple: int, tensor: int) -> int:
    """The smallest multiple of multiple * tensor that holds vocab_size rows."""
    unit = multiple * tensor
    return -(-vocab_size // unit) * unit


def transformer_config(hf: Any, *, model: Model, parallel: Parallel, train: Train, device: str) -> TransformerConfig:
    """Megatron's configuration of a Hugging Face one of recipe/families.py.

    Raises ValueError for another one, or for what of its family is not implemented.
    """
    values = hf.to_dict()
    for wrong in not_implemented(values, "config.json"):
        raise ValueError(wrong)
    rope = hf.rope_parameters if rope_type(hf) == "yarn" else {}
    transformer_engine = device == "cuda" and model.layers != "local"
    dtype, on_gpu, interleaved = DTYPES[model.dtype], device == "cuda", parallel.virtual_pipeline > 1
    sizes = Sizes.of(values)
    config = TransformerConfig(
        **_sizes(hf, sizes),
        # one kernel for the experts of a layer, where the local layers loop over them
        moe_grouped_gemm=transformer_engine and sizes.experts > 0,
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
        # Transformer Engine's, on cpu fused.packed_rotary; yarn also scales, which neither does. Where it is not fused,
        # megatron-core asks the GPU for lengths, several times a layer
        apply_rope_fusion=rope_utils.fused_apply_rotary_pos_emb_thd is not None and not rope,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    if rope:  # megatron-core's attention reads these three; queries and keys are multiplied by what they give
        config.yarn_rotary_scaling_factor = rope["factor"]  # type: ignore[attr-defined]
        config.yarn_mscale = rope.get("mscale")  # type: ignore[attr-defined]
        config.yarn_mscale_all_dim = rope.get("mscale_all_dim")  # type: ignore[attr-defined]
    return config


def _sizes(hf: Any, sizes: Sizes) -> dict[str, Any]:
    """What the model is, whatever it runs on."""
    dense = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.kv_heads,
        "kv_channels": sizes.head_dim,
        "ffn_hidden_size": hf.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": "q" in sizes.bias,
        "qk_layernorm": sizes.qk_norm != "none",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if not sizes.experts:
        return dense
    return (
        dense
        | _router(hf, sizes)
        | {
            # a list says that layers differ, which are then saved one by one
            "moe_layer_freq": [int(layer >= sizes.dense_layers) for layer in range(sizes.layers)]
            if sizes.dense_layers
            else 1,
            "moe_shared_expert_intermediate_size": sizes.shared_ffn or None,
            "num_moe_experts": sizes.experts,
            "moe_router_topk": sizes.experts_per_token,
            "moe_ffn_hidden_size": sizes.ffn,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    )


def _router(hf: Any, sizes: Sizes) -> dict[str, Any]:
    if sizes.router != "sigmoid":
        return {"moe_router_pre_softmax": sizes.router == "softmax"}
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,  # the bias stays what pretraining made it
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        "moe_router_dtype": "fp32",
    }


def rope_type(hf: Any) -> str:
    """Raises ValueError for a kind that trainer and engine would not compute alike."""
    kind = hf.rope_parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type = {kind!r} is not one of {', '.join(ROPE_TYPES)}; change it in config.json")
    return kind
