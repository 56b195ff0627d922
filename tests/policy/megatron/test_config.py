"""megatron-core's configuration of what the CPU's tests do not run."""

from pathlib import Path
from typing import Any

import pytest
from megatron.core.models.common.embeddings import rope_utils
from transformers import AutoConfig

from dcpo_openrlhf.policy.megatron.config import transformer_config
from dcpo_openrlhf.recipe.schema import Model, Parallel, Train

CONFIGS = Path(__file__).parents[2] / "model_configs"


def config(name: str, *, rope: dict[str, Any] | None = None, layers: Any = "auto") -> Any:
    hf = AutoConfig.from_pretrained(CONFIGS / name)
    hf.rope_parameters = hf.rope_parameters | (rope or {})
    model = Model(path=CONFIGS, dtype="bf16", layers=layers)
    return transformer_config(hf, model=model, parallel=Parallel(), train=Train(), device="cuda")


@pytest.mark.parametrize(
    ("kernel", "rope", "fused"),
    [
        (True, None, True),
        (False, None, False),
        (True, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, False),
    ],
    ids=["with Transformer Engine", "without", "yarn"],
)
def test_rotary_embedding_on_a_gpu_is_fused_where_it_can(
    kernel: bool, rope: dict[str, Any] | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", (lambda: None) if kernel else None)
    assert config("Qwen2.5-7B.json", rope=rope).apply_rope_fusion is fused


@pytest.mark.parametrize(
    ("name", "layers", "grouped"),
    [
        ("Qwen3-30B-A3B.json", "auto", True),
        ("Qwen3-235B-A22B.json", "auto", True),
        ("Qwen3-30B-A3B.json", "local", False),
        ("Qwen2.5-7B.json", "auto", False),
    ],
)
def test_experts_are_multiplied_together_by_transformer_engine(name: str, layers: str, grouped: bool) -> None:
    assert config(name, layers=layers).moe_grouped_gemm is grouped
