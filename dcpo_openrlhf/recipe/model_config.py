"""What a config.json must say to be trained, and what the recipe asks of it; families.py lists the families."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcpo_openrlhf.recipe import families
from dcpo_openrlhf.recipe.schema import Recipe

SIZES = (
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
)


def features(hf: dict[str, Any], config: Path) -> Iterator[str]:
    yield from families.not_implemented(hf, config)
    for name in ("quantization_config", "compression_config"):
        if quantised := hf.get(name):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            yield (
                f"{name} (quant_method = {method!r}) in {config}: quantised weights are not trained, their numbers "
                "mean nothing without their scales; use the model in bf16 or fp32"
            )
    both = [_rope(hf.get(name)) for name in ("rope_parameters", "rope_scaling")]
    if all(both) and both[0] != both[1]:
        yield (
            f"rope_parameters = {hf['rope_parameters']} and rope_scaling = {hf['rope_scaling']} in {config} differ, "
            "and trainer and engine may each take another one; remove one of them"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in families.ROPE_TYPES:
        known = ", ".join(families.ROPE_TYPES)
        yield f"rope_type = {kind!r} in {config} is not implemented, only {known}; use another model"
    if rope.get("attention_factor") is not None:
        yield (
            f"attention_factor = {rope['attention_factor']!r} in {config} is not implemented: it is derived from "
            "factor; remove it or use another model"
        )


def _rope(said: Any) -> dict[str, Any]:
    """A rope section's settings under their newer names; theta may stand beside it."""
    given = {k: v for k, v in said.items() if v is not None} if isinstance(said, dict) else {}
    kind = given.pop("type", "default")
    given.pop("rope_theta", None)
    return {"rope_type": kind} | given if said else {}


def divisibility(recipe: Recipe, hf: dict[str, Any]) -> Iterator[str]:
    p = recipe.parallel
    heads, experts, sizes = hf["num_attention_heads"], families.expert_count(hf), families.Sizes.of(hf)
    counts = {"num_attention_heads": heads, "num_key_value_heads": sizes.kv_heads}
    width = "moe_intermediate_size" if experts else "intermediate_size"
    cut = {width: hf[width]}  # experts that are shared out stay whole in the trainer, never in the engine
    counts |= {"intermediate_size": sizes.dense_ffn} if sizes.dense_layers and experts else {}
    counts |= {"n_shared_experts * moe_intermediate_size": sizes.shared_ffn} if sizes.shared_ffn else {}
    for key, tensor, divided in (
        ("parallel.tensor", p.tensor, counts | (cut if p.expert == 1 else {})),
        ("rollout.tensor_parallel", recipe.rollout.tensor_parallel, counts | cut),
    ):
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if all(count % n == 0 for count in divided.values()))
        for name, count in divided.items():
            # vLLM gives each rank a copy where there are more ranks than key/value heads
            copied = key.startswith("rollout") and name == "num_key_value_heads" and tensor % count == 0
            if count % tensor and not copied:
                yield f"{key} = {tensor} must divide {name} = {count}; this model allows {allowed}"
    layers, chunks = hf["num_hidden_layers"], p.pipeline * p.virtual_pipeline
    if layers % chunks:
        yield (
            f"parallel.pipeline * virtual_pipeline = {p.pipeline} * {p.virtual_pipeline} must divide "
            f"num_hidden_layers = {layers}; lower one of them"
        )
    if experts and p.backend == "deepspeed":
        yield (
            f"parallel.backend = deepspeed trains dense models only, got model_type = {hf['model_type']!r}: "
            "transformers keeps experts under other names than the engine loads; set backend = megatron"
        )
    if not experts and p.expert > 1:
        yield f"parallel.expert = {p.expert} needs a model with experts, got model_type = {hf['model_type']!r}; set 1"
    if experts and experts % p.expert:
        yield f"parallel.expert = {p.expert} must divide {families.family_of(hf).experts} = {experts}; lower it"
    if experts and p.tensor > 1 and not p.sequence_parallel:
        yield (
            f"parallel.tensor = {p.tensor} of a model with experts needs parallel.sequence_parallel = true: "
            "megatron-core trains them no other way; set it"
        )


def context(recipe: Recipe, hf: dict[str, Any]) -> Iterator[str]:
    r, longest = recipe.rollout, hf["max_position_embeddings"]
    if r.context > longest:
        yield (
            f"rollout.max_prompt_tokens + max_new_tokens = {r.max_prompt_tokens} + {r.max_new_tokens} = {r.context} "
            f"exceeds the model's max_position_embeddings = {longest}; lower one of them"
        )
