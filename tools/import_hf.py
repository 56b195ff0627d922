"""A Hugging Face folder as a checkpoint of the policy, which ranks of any mesh load; the inverse of tools.export_hf.

python -m tools.import_hf --model DIR --output CHECKPOINTS

Writes CHECKPOINTS/step_000000 with the weights and an optimizer that has not stepped. A run needs none of it: it starts
from the Hugging Face folder itself (model.path). This is for tools that read megatron-core's checkpoints, and for
trying a mesh: what is saved here on one rank, dist_checkpointing loads on any other. No run resumes from it: it has
neither prompts nor a recipe. One process on the CPU holds
weights, gradients and optimizer: 18 bytes a parameter in bf16, 16 in fp32.
"""

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dcpo_openrlhf import checkpoint


def import_hf(model: Path, checkpoints: Path, *, dtype: Literal["bf16", "fp32"] = "bf16") -> Path:
    """The checkpoint's folder, step_000000 in `checkpoints`, written aside and renamed when whole."""
    from dcpo_openrlhf.policy.megatron import cpu

    cpu.install()
    from dcpo_openrlhf.policy.megatron.checkpoint import PolicyCheckpoint
    from dcpo_openrlhf.policy.megatron.mesh import close_mesh, init_mesh
    from dcpo_openrlhf.policy.megatron.model import build_policy
    from dcpo_openrlhf.policy.megatron.step import PolicyStep
    from dcpo_openrlhf.recipe.schema import Loss, Model, Optimizer, Parallel, Train

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    parallel, whole = Parallel(devices_per_node=1), checkpoints / "step_000000"
    aside = checkpoints / ".step_000000.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    mesh = init_mesh(parallel, device="cpu", rank=0, world_size=1, seed=1)
    try:
        policy = build_policy(model=Model(path=model, dtype=dtype), parallel=parallel, train=Train(), mesh=mesh)
        step = PolicyStep(policy, optimizer=Optimizer(), loss=Loss(), micro_batch_size=1, total_updates=1)
        _make_moments(step)
        saving = PolicyCheckpoint(step)
        saving.save(aside)
        known = saving.finish()
    finally:
        close_mesh()
    checkpoint.write_manifest(aside, step=0, scores={}, known=known)
    return aside.rename(whole)


def _make_moments(step: object) -> None:
    """Adam's moments, all zero, and no step counted: what an optimizer that has not stepped would hold."""
    optimizers = step.optimizer  # type: ignore[attr-defined]
    for optimizer in getattr(optimizers, "chained_optimizers", [optimizers]):
        kept = [(group["lr"], group["weight_decay"]) for group in optimizer.optimizer.param_groups]
        for group in optimizer.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0  # a step that moves nothing
        optimizer._init_optimizer_states_with_dummy_values()
        for group, (rate, decay) in zip(optimizer.optimizer.param_groups, kept, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for state in optimizer.optimizer.state.values():
            state["step"].zero_()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.import_hf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets a folder step_000000")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if not (arguments.model / "config.json").is_file():
        print(f"error: --model {arguments.model} is no Hugging Face folder (config.json); name one", file=sys.stderr)
        return 2
    if (arguments.output / "step_000000").exists():
        print(f"error: --output {arguments.output} already has step_000000; name another folder", file=sys.stderr)
        return 2
    print(import_hf(arguments.model, arguments.output, dtype=arguments.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
