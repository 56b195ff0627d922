"""Prompts computed once for all responses to them, beside rows that each carry theirs: time and memory in one run.

One process of the recipe (tp 1) computes token statistics and makes updates of the same responses both ways, in turns.
Lengths are those of every prompt and every response; memory is the most that tensors take beyond weights and optimizer.
Aims: 3 x at 64/12, 1.4 x at 256/256, never below 0.97 x.
"""

import argparse
import importlib.metadata
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.recipe.processor import native_dtype
from tools.bench import median_seconds, peak_extra_bytes
from tools.smollm2 import ensure_smollm2

SHAPES = ("64/12", "256/256", "256/2048")
TEMPERATURES = [0.8, 1.2]
STAGES = ("token statistics", "update")


def grouped_rows(*, prompts: int, group_size: int, prompt: int, response: int, vocab_size: int) -> Rows:
    """`group_size` random responses to each of the random prompts, all of full length."""
    g = torch.Generator().manual_seed(0)
    batch, time = prompts * group_size, prompt + response
    sequences = torch.randint(0, vocab_size, (batch, time), generator=g)
    sequences[:, :prompt] = sequences[::group_size, :prompt].repeat_interleave(group_size, 0)
    attention = torch.ones(batch, time, dtype=torch.bool)
    actions = torch.zeros(batch, time - 1, dtype=torch.bool)
    actions[:, prompt - 1 :] = True
    advantage = torch.randn(batch, 1, generator=g).expand(actions.shape) * actions
    return Rows(sequences, attention, actions, torch.full(actions.shape, -10.0), (advantage,))


def make_step(model: Path, dtype: str, tokens: int) -> Any:
    """The PolicyStep of one process."""
    from dcpo_openrlhf.policy.megatron import cpu
    from dcpo_openrlhf.recipe.schema import Loss, Model, Optimizer, Parallel, Train

    cpu.install()
    from dcpo_openrlhf.policy.megatron.mesh import init_mesh
    from dcpo_openrlhf.policy.megatron.model import build_policy
    from dcpo_openrlhf.policy.megatron.step import PolicyStep

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    parallel, train = Parallel(devices_per_node=1), Train()
    mesh = init_mesh(parallel, device="cpu", rank=0, world_size=1, seed=1)
    of = Model(path=model, dtype=dtype)  # type: ignore[arg-type]
    policy = build_policy(model=of, parallel=parallel, train=train, mesh=mesh)
    return PolicyStep(
        policy, optimizer=Optimizer(), loss=Loss(), micro_batch_size=1, micro_batch_tokens=tokens, total_updates=100
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens of prompt/response")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 2, 1], help="groups of each shape")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4608, help="cap of a micro-batch")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: what the processor multiplies natively")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    dtype = options.dtype or native_dtype("cpu")
    step = make_step(options.model or ensure_smollm2(), dtype, options.tokens)
    vocab_size = step.policy.shape.vocab_size
    print(
        f"SmolLM2-135M, G {options.group_size}, micro-batches of at most {options.tokens} tokens, {dtype}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, megatron-core {importlib.metadata.version('megatron-core')}\n"
    )
    titles = ["prompt/response", "prompts", "stage", "unshared [s]", "shared [s]", "faster", "unshared [MiB]"]
    titles += ["shared [MiB]"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for shape, prompts in zip(options.shapes, options.prompts, strict=True):
        prompt, response = map(int, shape.split("/"))
        rows = grouped_rows(
            prompts=prompts, group_size=options.group_size, prompt=prompt, response=response, vocab_size=vocab_size
        )

        def way(share: bool, stage: str, rows: Rows = rows) -> Callable[[], object]:
            def run() -> object:
                step.layout = replace(step.layout, share_prompts=share)
                if stage == "update":
                    return step.update(rows)
                return step.token_statistics(rows, temperatures=TEMPERATURES)

            return run

        for stage in STAGES:
            ways = {"unshared": way(False, stage), "shared": way(True, stage)}
            seconds = median_seconds(ways, repeats=options.repeats, device="cpu")
            mib = {name: peak_extra_bytes(path, device="cpu") / 2**20 for name, path in ways.items()}
            cells = [shape, str(prompts), stage, f"{seconds['unshared']:.2f}", f"{seconds['shared']:.2f}"]
            cells += [
                f"{seconds['unshared'] / seconds['shared']:.2f}",
                f"{mib['unshared']:.0f}",
                f"{mib['shared']:.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
