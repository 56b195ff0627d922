"""A training step and a pass of token statistics beside transformers, on the same ragged rows, and beside the peak.

- ours: one process of the recipe (tp 1): rows packed to --tokens, one forward for all statistics, distributed optimizer
- transformers: its model, micro-batches of --rows-per-batch rows padded to the longest, as its users run it; AdamW
- multiplies: the matrix multiplies of our side and nothing else
- attainable: the same, and the passes over memory that no implementation is spared (see `multiplies_side`)

Each side lives in a process of its own, so that its peak memory is its own; they take turns, so that a busy machine
hits all alike. peak: the fastest square multiply.
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from dcpo_openrlhf.policy.packing import micro_batches
from dcpo_openrlhf.policy.rows import Rows
from tools.smollm2 import ensure_smollm2

SIDES = ("ours", "transformers", "multiplies", "attainable")
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


def multiplies_side(
    options: argparse.Namespace, rows: Rows, *, and_memory: bool = False
) -> dict[str, Callable[[], object]]:
    """The matrix multiplies of our side; each stage returns its FLOP.

    Every layer has its own weights and keeps its inputs for its backward pass, so that operands lie where a model's do.
    Attention multiplies row by row; the masked half of its scores counts.

    and_memory: what else no implementation is spared. What follows a multiply reads its product and writes one; where
    it meets the residual stream, sum and norm are two; each logit is exponentiated once for each distribution; weights'
    gradients are summed in fp32, their norm is taken, Adam updates. Nothing of attention's softmax or rotary embedding.
    """
    hf = AutoConfig.from_pretrained(options.model)
    heads, hidden, inner = hf.num_attention_heads, hf.hidden_size, hf.intermediate_size
    dim = getattr(hf, "head_dim", None) or hidden // heads
    queries, keys = heads * dim, hf.num_key_value_heads * dim
    layer = [(queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]
    weights = [_random(*shape) for shape in layer * hf.num_hidden_layers + [(hf.vocab_size, hidden)]]
    masters = [torch.nn.Parameter(weight.float()) for weight in weights] if and_memory else []
    for master in masters:
        master.grad = torch.zeros_like(master)
    adam = torch.optim.AdamW(masters, lr=1e-6, fused=True) if and_memory else None
    gradients = {n: _random(options.tokens, n) for n in {len(weight) for weight in weights}}
    head, scores = _random(heads, options.longest, dim), _random(heads, options.longest, options.longest)
    packs = micro_batches(rows, size=1, token_cap=options.tokens)
    flop = 0

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        nonlocal flop
        flop += 2 * a.numel() * b.shape[-1]
        return a @ b

    def move(product: Tensor, times: int = 1) -> Tensor:
        for _ in range(times * and_memory):
            product = product.clone()
        return product

    def exponentiate(logits: Tensor, times: int) -> None:
        for block in logits.split(8) if and_memory else ():
            values = block.float()
            for _ in range(times):
                values.exp()

    def backward(index: int, x: Tensor) -> None:
        gradient = gradients[len(weights[index])][: len(x)]
        if index == len(weights) - 1:
            exponentiate(move(gradient), 1)
        move(multiply(gradient, weights[index]), 2 if index % len(layer) in (0, 2) else 1)
        of_weight = multiply(gradient.T, x)
        if and_memory:
            masters[index].grad.add_(of_weight)  # type: ignore[union-attr]

    def attention(lengths: list[int], times: int) -> None:
        for length in lengths * times:
            one = head[:, :length]
            move(multiply(one, one.mT))
            move(multiply(scores[:, :length, :length], one))

    def run(training: bool) -> int:
        nonlocal flop
        flop = 0
        for pack in packs:
            lengths, kept = pack.bounds.diff().tolist(), []
            x = gradients[hidden][: pack.bounds[-1]]
            for index, weight in enumerate(weights):
                x = x[:, : weight.shape[1]]  # of queries, keys and values the queries; of up and gate one
                if index % len(layer) == 1:
                    attention(lengths, 1)
                if weight is weights[-1]:
                    x = x[: len(pack.actions)]
                if training:
                    kept.append((index, x))
                x = multiply(x, weight.T)
                if weight is not weights[-1]:
                    x = move(x, 2 if index % len(layer) in (1, 3) else 1)
            exponentiate(x, 1 if training else 1 + len(TEMPERATURES))
            while kept:
                backward(*kept.pop())
            if training:
                attention(lengths * hf.num_hidden_layers, 2)
        if adam and training:
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            adam.step()
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master.detach())
                master.grad.zero_()  # type: ignore[union-attr]
        return flop

    return {stage: partial(run, stage == STAGES[0]) for stage in STAGES}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape).div(shape[-1] ** 0.5).to(DTYPE)


def peak_rate() -> float:
    """FLOP/s of the fastest square multiply."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a = _random(n, n)
        for _ in range(4):
            begin = time.perf_counter()
            torch.mm(a, a)
            best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def serve(options: argparse.Namespace) -> None:
    """Do each stage named on standard input; answer with its seconds, FLOP if counted, peak memory [GiB] so far."""
    rows = ragged_rows(options, AutoConfig.from_pretrained(options.model).vocab_size)
    make = {
        "ours": our_side,
        "transformers": transformers_side,
        "multiplies": multiplies_side,
        "attainable": partial(multiplies_side, and_memory=True),
    }
    stages = make[options.side](options, rows)
    for line in sys.stdin:
        begin = time.perf_counter()
        done = stages[line.strip()]()
        answer = {
            "seconds": time.perf_counter() - begin,
            "flop": done if isinstance(done, int) else None,
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print("answer", json.dumps(answer), flush=True)


class Side:
    """A process that measures one side when asked."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "tools.bench.train_step", *sys.argv[1:], "--side", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, stage: str) -> dict[str, Any]:
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


def report(options: argparse.Namespace) -> None:
    rows = ragged_rows(options, AutoConfig.from_pretrained(options.model).vocab_size)
    tokens, actions = int(rows.attention_mask.sum()), int(rows.action_mask.sum())
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {(stage, name): [] for stage in STAGES for name in SIDES}
    peaks = []
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(contextlib.closing(Side(name))) for name in SIDES}
        for stage in STAGES:
            for turn in range(options.repeats + 1):
                peaks.append(peak_rate())
                for name, side in sides.items():
                    answer = side.measure(stage)
                    if turn:
                        answers[stage, name].append(answer)
    peak = max(peaks)
    print(f"{options.model.name}: {len(rows)} rows, {tokens} tokens of which {actions} are actions, ", end="")
    print(f"{torch.get_num_threads()} threads, peak {peak / 1e9:.0f} GFLOP/s (bf16)")
    titles = ["stage", "side", "seconds", "tokens/s", "x transformers", "of the peak", "of attainable", "GiB"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for stage in STAGES:
        seconds = {name: [a["seconds"] for a in answers[stage, name]] for name in SIDES}
        flop = answers[stage, "multiplies"][0]["flop"]
        for name in SIDES:
            s, memory = median(seconds[name]), max(a["gib"] for a in answers[stage, name])
            faster, share = (_median_ratio(seconds[other], seconds[name]) for other in ("transformers", "attainable"))
            cells = [stage, name, f"{s:.2f}", f"{tokens / s:.0f}", f"{faster:.2f}"]
            cells += [f"{flop / s / peak:.2f}", f"{share:.2f}", f"{memory:.2f}"]
            print(f"| {' | '.join(cells)} |")
    print(f"targets: {TARGET_RATIO} x transformers in a training step, {TARGET_SHARE} of what is attainable")


def _median_ratio(above: list[float], below: list[float]) -> float:
    """Of two sides' seconds in the same turn, so that a machine whose speed drifts hits both."""
    return median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--tokens", type=int, default=2048, help="our cap of a micro-batch")
    parser.add_argument("--rows-per-batch", type=int, default=8, help="rows of a micro-batch of transformers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or ensure_smollm2()
    if options.side:
        serve(options)
        return
    report(options)


if __name__ == "__main__":
    main()
