"""Where the Recipe meets OpenRLHF: its Namespace of arguments and the strategy object that its classes ask for."""

import importlib
import importlib.machinery
import importlib.util
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any, cast

from dcpo_openrlhf.recipe.schema import Recipe


def make_importable() -> None:
    """Make `import openrlhf` work where flash-attn is not installed, and where no GPU is."""
    _stub_flash_attn()
    _import_peft()


def _import_peft() -> None:
    """Import peft, which openrlhf does, without Transformer Engine: that wants libcuda, and a Ray head may have none.

    peft asks for it to know its layers, of which no model here is made; who imports it later finds it.
    """
    name = "transformer_engine"
    if "peft" in sys.modules or name in sys.modules:
        return
    sys.modules[name] = cast(ModuleType, None)  # how Python says that there is no such module
    try:
        importlib.import_module("peft")
    finally:
        del sys.modules[name]


def _stub_flash_attn() -> None:
    """What openrlhf.models.ring_attn_utils imports of flash-attn at the top.

    It serves ring attention, which this recipe never calls (Megatron does context parallelism).
    """
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        return
    wanted = {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
    }

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("flash-attn is not installed and OpenRLHF's ring attention needs it")

    for name, attributes in wanted.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for attribute in attributes:
            setattr(module, attribute, missing)
        sys.modules[name] = module
    sys.modules["flash_attn"].__version__ = "0.0.0"  # type: ignore[attr-defined]


_CONSTANT: dict[str, dict[str, Any]] = {
    "critic": {"freezing_steps": -1, "model_name_or_path": None},
    "algo": {
        "dynamic_filtering_enable": False,
        "dynamic_filtering_range": (0.0, 1.0),
        "kl": {"init_coef": 0.0, "target": None, "horizon": 10000, "estimator": "k3", "use_loss": False},
        "advantage": {
            "estimator": "group_norm",
            "gamma": 1.0,
            "lambd": 1.0,
            "no_std_norm": False,
            "is_correction_level": "off",
        },
    },
    "reward": {
        "clip_range": (-10.0, 10.0),
        "overlong_buffer_len": None,
        "overlong_penalty_factor": None,
        "stop_properly_penalty_coef": None,
    },
    "logger": {"logging_steps": 1, "tensorboard_dir": None, "wandb": {"key": None}},
}
"""What no recipe changes: no critic, no KL penalty, no filtering, no reward shaping, no logging of OpenRLHF's own."""


def openrlhf_args(recipe: Recipe) -> Namespace:
    """The arguments that the reused OpenRLHF modules read, as its own parser would give them."""
    train, parallel, rollout = recipe.train, recipe.parallel, recipe.rollout
    tree: dict[str, dict[str, Any]] = {
        "actor": {
            "model_name_or_path": str(recipe.model.path),
            "num_nodes": parallel.nodes,
            "num_gpus_per_node": parallel.devices_per_node,
        },
        "rollout": {
            "batch_size": train.prompts_per_step,
            "n_samples_per_prompt": train.group_size,
            "micro_batch_size": train.micro_batch_size,
            "max_new_tokens": rollout.max_new_tokens,
            "max_tokens_per_gpu": None,
            "vllm_generate_batch_size": None,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
        },
        "train": {
            "batch_size": train.prompts_per_update * train.group_size,
            "micro_batch_size": train.micro_batch_size,
            "num_episodes": 1,
            "max_epochs": 1,
            "seed": recipe.run.seed,
            "full_determinism_enable": False,
            "dynamic_batch_enable": False,
            "max_tokens_per_gpu": None,
            "colocate_all": False,
            "colocate_actor_ref": False,
            "colocate_critic_reward": False,
            "async_enable": False,
        },
        "data": {"max_len": rollout.context, "disable_fast_tokenizer": False},
        "ds": {
            "ring_attn_size": parallel.context,
            "tensor_parallel_size": parallel.tensor * parallel.pipeline,
            "enable_sleep": False,
            "param_dtype": recipe.model.dtype,
        },
        "vllm": {
            "enable_sleep": False,
            "num_engines": rollout.engines,
            "tensor_parallel_size": rollout.tensor_parallel,
        },
        "eval": {
            "dataset": None,
            "steps": float("inf"),
            "temperature": recipe.evaluation.temperature,
            "n_samples_per_prompt": 1,
        },
        "ckpt": {
            "path": str(recipe.run.dir / "checkpoints"),
            "save_steps": float("inf"),
            "load_enable": False,
            "best_metric_key": "none",
        },
    }
    return _namespace(_CONSTANT | tree)


def _namespace(tree: dict[str, Any]) -> Namespace:
    return Namespace(**{key: _namespace(value) if isinstance(value, dict) else value for key, value in tree.items()})


class RecipeStrategy:
    """What OpenRLHF calls a strategy: the arguments, and who prints. The mesh does the rest of its work."""

    ring_attn_group = None

    def __init__(self, recipe: Recipe, *, rank: int = 0) -> None:
        self.recipe = recipe
        self.args = openrlhf_args(recipe)
        self.rank = rank

    def is_rank_0(self) -> bool:
        return self.rank == 0

    def print(self, *message: object) -> None:
        if self.is_rank_0():
            print(*message)
