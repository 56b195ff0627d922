"""A training step and a pass of token statistics beside transformers, on the same ragged rows, and beside the peak.

- ours: one process of the recipe (tp 1): rows packed to --tokens, one forward for all statistics, distributed optimizer
- transformers: its model, micro-batches of --rows-per-batch rows padded to the longest, as its users run it; AdamW

Either side lives in a process of its own, so that its peak memory is its own; they take turns, so that a busy machine
hits both alike. peak: the fastest matrix multiply that was tried. attainable: all of the model's own multiplies, alone.
Targets: 1.3 x transformers in a training step; 0.6 of what is attainable.
"""

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from dcpo_openrlhf.megatron.batch import Rows
from tools.smollm2 import ensure_smollm2

SIDES = ("ours", "transformers")
STAGES = ("training step", "token statistics")
TEMPERATURES = [0.8, 1.2]
DTYPE = torch.bfloat16
TARGET_RATIO, TARGET_SHARE = 1.3, 0.6


def ragged_rows(options: argparse.Namespace, vocab_size: int) -> Rows:
    """Rows of uniformly distributed lengths up to --longest; the first quarter of each is its prompt."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(options.longest // 8, options.longest + 1, (options.rows,), generator=g)
    time_ = torch.arange(options.longest)
    attention = time_ < lengths[:, None]
    actions = attention[:, 1:] & (time_[1:] >= lengths[:, None] // 4)
    sequences = torch.randint(0, vocab_size, attention.shape, generator=g) * attention
    advantage = torch.randn(options.rows, 1, generator=g).expand(actions.shape) * actions
    return Rows(sequences, attention, actions, torch.full(actions.shape, -10.0), (advantage,))


def our_side(options: argparse.Namespace, rows: Rows) -> dict[str, Callable[[], object]]:
    from dcpo_openrlhf import cpu
    from dcpo_openrlhf.config import Loss, Model, Optimizer, Parallel, Train

    cpu.install()
    from dcpo_openrlhf.megatron.mesh import init_mesh
    from dcpo_openrlhf.megatron.model import build_policy
    from dcpo_openrlhf.megatron.step import PolicyStep

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    parallel, train = Parallel(devices_per_node=1), Train()
    mesh = init_mesh(parallel, device="cpu", rank=0, world_size=1, seed=1)
    policy = build_policy(model=Model(path=options.model), parallel=parallel, train=train, mesh=mesh)
    step = PolicyStep(
        policy,
        optimizer=Optimizer(),
        loss=Loss(),
        micro_batch_size=1,
        micro_batch_tokens=options.tokens,
        total_updates=100,
    )
    return {
        "training step": lambda: step.update(rows),
        "token statistics": lambda: step.token_statistics(rows, temperatures=TEMPERATURES),
    }


def transformers_side(options: argparse.Namespace, rows: Rows) -> dict[str, Callable[[], object]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    size = options.rows_per_batch
    parts = [slice(i, i + size) for i in range(0, len(rows), size)]

    def logits_and_targets(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        longest = int(rows.attention_mask[part].sum(1).max())
        tokens, attention = rows.sequences[part, :longest], rows.attention_mask[part, :longest]
        logits = model(tokens, attention_mask=attention.long()).logits[:, :-1].float()
        return logits, tokens[:, 1:, None], rows.action_mask[part, : longest - 1]

    def train() -> None:
        optimizer.zero_grad()
        for part in parts:
            logits, targets, mask = logits_and_targets(part)
            logp = logits.log_softmax(-1).gather(-1, targets)[..., 0]
            advantage = rows.advantages[0][part, : mask.shape[1]]
            (-(logp - logp.detach()).exp() * advantage * mask).sum().div(len(rows)).backward()
        optimizer.step()

    @torch.no_grad()
    def statistics() -> None:
        for part in parts:
            logits, targets, _ = logits_and_targets(part)
            logp = logits.log_softmax(-1)
            logp.gather(-1, targets)
            (logp.exp() * logp).sum(-1).neg()
            for temperature in TEMPERATURES:
                (logits / temperature).log_softmax(-1).gather(-1, targets)

    return dict(zip(STAGES, (train, statistics), strict=True))


def serve(options: argparse.Namespace) -> None:
    """Do each stage named on standard input and answer with its seconds and the peak memory [GiB] so far."""
    rows = ragged_rows(options, AutoConfig.from_pretrained(options.model).vocab_size)
    stages = (our_side if options.side == "ours" else transformers_side)(options, rows)
    for line in sys.stdin:
        begin = time.perf_counter()
        stages[line.strip()]()
        answer = {
            "seconds": time.perf_counter() - begin,
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print("answer", json.dumps(answer), flush=True)


class Side:
    """A process that measures one side when asked."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "tools.bench.train_step", *sys.argv[1:], "--side", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, stage: str) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(stage + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{' '.join(self.process.args)} ended with status {self.process.wait()}")  # type: ignore[arg-type]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Multiply(NamedTuple):
    """`batch` times [rows, inner] @ [inner, columns]"""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flop(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns

    def gradients(self) -> "list[Multiply]":
        """Those of its backward pass: of the left side, of the right side."""
        batch, rows, inner, columns = self
        return [Multiply(batch, rows, columns, inner), Multiply(batch, inner, rows, columns)]


def multiplies(hf: Any, *, tokens: int, actions: int, lengths: Tensor, training: bool) -> list[Multiply]:
    """A model's matrix multiplies in one forward pass, and backward where training, of rows of the given lengths.

    Only actions reach the output layer. Attention multiplies each row by itself: rows of the root mean square length
    stand for all, the masked half of the scores counts.
    """
    head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    queries, length = hf.num_attention_heads * head, int(lengths.double().square().mean().sqrt())
    scores = Multiply(hf.num_attention_heads, length, head, length)
    layer = [
        Multiply(1, tokens, hf.hidden_size, queries + 2 * hf.num_key_value_heads * head),
        *[scores, scores._replace(inner=length, columns=head)] * len(lengths),
        Multiply(1, tokens, queries, hf.hidden_size),
        Multiply(1, tokens, hf.hidden_size, 2 * hf.intermediate_size),
        Multiply(1, tokens, hf.intermediate_size, hf.hidden_size),
    ]
    forward = layer * hf.num_hidden_layers + [Multiply(1, actions, hf.hidden_size, hf.vocab_size)]
    return forward + [gradient for m in forward for gradient in m.gradients()] if training else forward


def rate(multiply: Multiply, repeats: int) -> float:
    """Median FLOP/s in bf16."""
    batch, rows, inner, columns = multiply
    a, b = torch.randn(batch, rows, inner).to(DTYPE), torch.randn(batch, inner, columns).to(DTYPE)
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.bmm(a, b) if batch > 1 else torch.mm(a[0], b[0])
        times.append(time.perf_counter() - begin)
    return multiply.flop / median(times[1:])


def report(options: argparse.Namespace) -> None:
    hf = AutoConfig.from_pretrained(options.model)
    rows = ragged_rows(options, hf.vocab_size)
    tokens, actions = int(rows.attention_mask.sum()), int(rows.action_mask.sum())
    batches = -(-tokens // options.tokens)
    mean = {"tokens": tokens // batches, "actions": actions // batches}
    lengths = rows.attention_mask.sum(1)[::batches]
    work = {s: multiplies(hf, **mean, lengths=lengths, training=s == STAGES[0]) for s in STAGES}
    tried = {m for parts in work.values() for m in parts} | {Multiply(1, n, n, n) for n in (1024, 2048, 4096)}
    rates = {m: rate(m, options.repeats) for m in sorted(tried)}  # before the sides start: the machine is free
    peak = max(rates.values())
    print(f"{options.model.name}: {len(rows)} rows, {tokens} tokens of which {actions} are actions, ", end="")
    print(f"{torch.get_num_threads()} threads, peak {peak / 1e9:.0f} GFLOP/s (bf16)")
    titles = ["stage", "side", "seconds", "tokens/s", "x transformers", "of the peak", "of what is attainable", "GiB"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(contextlib.closing(Side(name))) for name in SIDES}
        for stage in STAGES:
            measured = {name: [] for name in sides}
            for turn in range(options.repeats + 1):
                for name, side in sides.items():
                    answer = side.measure(stage)
                    if turn:
                        measured[name].append(answer)
            flop = batches * sum(m.flop for m in work[stage])
            alone = batches * sum(m.flop / rates[m] for m in work[stage])
            seconds = {name: median(a["seconds"] for a in answers) for name, answers in measured.items()}
            for name, answers in measured.items():
                s = seconds[name]
                cells = [stage, name, f"{s:.2f}", f"{tokens / s:.0f}", f"{seconds['transformers'] / s:.2f}"]
                cells += [f"{flop / s / peak:.2f}", f"{alone / s:.2f}", f"{max(a['gib'] for a in answers):.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"targets: {TARGET_RATIO} x transformers in a training step, {TARGET_SHARE} of what is attainable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--tokens", type=int, default=1024, help="our cap of a micro-batch")
    parser.add_argument("--rows-per-batch", type=int, default=8, help="rows of a micro-batch of transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or ensure_smollm2()
    if options.side:
        serve(options)
        return
    report(options)


if __name__ == "__main__":
    main()
