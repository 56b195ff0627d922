"""What the ZeRO tests share: a recipe, and the step of this rank."""

import os
from pathlib import Path
from typing import Any

from dcpo_openrlhf.recipe.schema import Recipe


def make_recipe(path: Path, *, world_size: int, stage: int = 2, dtype: str = "fp32", **sections: Any) -> Recipe:
    """A recipe for the deepspeed backend on cpu; further sections by keyword."""
    values: dict[str, Any] = {
        "run": {"device": "cpu"},
        "model": {"path": path, "dtype": dtype},
        "task": {"kind": "arithmetic"},
        "parallel": {"backend": "deepspeed", "zero_stage": stage, "devices_per_node": world_size},
        # Adam's first step is nearly the sign of the gradient: a larger eps keeps rounding of tiny gradients small
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-3},
        "train": {"micro_batch_size": 2},
        "kl": {"coefficient": 0.3},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 16},  # random_rows has 24 tokens at most
    }
    return Recipe.model_validate(values | {name: values.get(name, {}) | more for name, more in sections.items()})


def make_step(recipe: Recipe, *, total_updates: int = 10) -> Any:
    """This rank's ZeroStep; called in a rank of `run_distributed`, whose process group it joins."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used: the group is there
    from dcpo_openrlhf.policy.deepspeed.model import build_policy
    from dcpo_openrlhf.policy.deepspeed.step import ZeroStep

    return ZeroStep(
        build_policy(recipe),
        optimizer=recipe.optimizer,
        loss=recipe.loss,
        kl=recipe.kl,
        micro_batch_size=recipe.train.micro_batch_size,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        total_updates=total_updates,
    )
