"""Cost of the entropy monitor on a large batch, beside a step's other work on the same batch.

The batch is synthetic: responses of equal length in updates, as the trainer holds them. It is compared with
- the token statistics of the same tokens on this machine (logits -> log pi, two log pi^T, entropy; no model): a part of
  a step, measured on some tokens and scaled by their number;
- the least time that a step of a model can take on so many A800: 10 floating-point operations a parameter and token
  (2 of generation, 2 of the forward of pi_old, 6 of the update) at the full peak of 312 Tflop/s a device.
Real steps take longer than either. Times are CPU seconds: other work on the machine does not count.

python -m tools.bench.monitor --output docs/bench/monitor.md
"""

import argparse
import resource
import time
from pathlib import Path

import torch

from dcpo_openrlhf import methods, objectives
from dcpo_openrlhf.assemble import make_monitor
from dcpo_openrlhf.experience import DCPOExperience
from dcpo_openrlhf.monitor.statistics import batch_metrics
from dcpo_openrlhf.policy.token_stats import token_stats
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import Grade
from dcpo_openrlhf.rollout.tasks import Problem, Prompt
from tools.bench import publish

A800_PEAK = 312e12
"""bf16, dense [flop/s]; NVIDIA's data sheet (the A100's)."""
FLOPS_A_PARAMETER_AND_TOKEN = 10
PROMPT_TOKENS = 128
ALPHA, GROUP = 0.3, 8


def make_update(rows: int, time: int) -> DCPOExperience:
    """Statistics as they come of a policy of about 0.3 nats/token, all responses as long as they may be."""
    length = torch.full((rows,), time)
    place = torch.arange(PROMPT_TOKENS + time - 1)[None]
    mask = (place >= PROMPT_TOKENS - 1) & (place < PROMPT_TOKENS - 1 + length[:, None])
    logp = torch.rand(mask.shape).log_().mul_(0.3)
    reward = torch.randint(0, 2, (rows,)).float()
    ratio = torch.randn(mask.shape).mul_(0.3).exp_()
    return DCPOExperience(
        sequences=torch.randint(0, 150_000, (rows, PROMPT_TOKENS + time)),
        action_mask=mask,  # type: ignore[arg-type]
        action_log_probs=logp,
        rollout_log_probs=logp + torch.randn(mask.shape).mul_(0.01),
        entropy=-logp,
        target_ratio=ratio,
        rewards=reward,
        response_length=length,
        truncated=length == time,
        advantage_terms=methods.method_advantage(
            methods.METHODS["dcpo"],
            group_advantage=objectives.group_advantage(reward=reward, group_size=GROUP),
            success=reward,
            target_ratio=ratio,
            alpha=ALPHA,
            mixing="convex",
        ),
    )


def monitor_seconds(batch: list[DCPOExperience], repeats: int) -> float:
    """Least CPU seconds, all threads together, of statistics, trends and causes of one step."""
    responses = sum(len(e.rewards) for e in batch)
    grades = [Grade(1.0, str(i % 7)) for i in range(responses)]
    prompts = [Prompt(Problem(str(i), "", "", "", difficulty=i % 5), "") for i in range(responses // GROUP)]
    watch = make_monitor(Recipe.model_validate({"model": {"path": "unused"}, "task": {"kind": "arithmetic"}}))
    seconds = []
    for step in range(1, repeats + 1):
        begin = time.process_time()
        found = batch_metrics(batch, grades=grades, prompts=prompts, alpha=ALPHA, mixing="convex")
        watch.observe(step, found | {"entropy/target": 0.25, "dcpo/alpha": ALPHA})
        seconds.append(time.process_time() - begin)
    return min(seconds)


def token_statistics_seconds(vocab: int, tokens: int, repeats: int) -> float:
    """Least CPU seconds of the token statistics of `tokens` tokens, from logits that are there."""
    logits, targets = torch.randn(tokens, vocab), torch.randint(vocab, (tokens,))
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        with torch.no_grad():
            token_stats(logits, targets, temperatures=(0.8, 1.2))
        seconds.append(time.process_time() - begin)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192, help="of each response")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=152064, help="of the token statistics it is compared with")
    parser.add_argument("--part", type=int, default=2048, help="tokens that the token statistics are measured on")
    parser.add_argument("--parameters", type=float, default=7.6e9, help="of the model of the least step")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    o = parser.parse_args()

    torch.manual_seed(0)
    statistics = token_statistics_seconds(o.vocab, o.part, o.repeats) / o.part
    batch = [make_update(o.responses // o.updates, o.tokens) for _ in range(o.updates)]
    tokens = sum(int(e.mask.sum()) for e in batch)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = monitor_seconds(batch, o.repeats)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 2**10
    least = FLOPS_A_PARAMETER_AND_TOKEN * o.parameters * tokens / (o.devices * A800_PEAK)
    measured = statistics * tokens
    command = f"python -m tools.bench.monitor --responses {o.responses} --tokens {o.tokens} --updates {o.updates}"
    lines = [
        f"# Entropy monitor: {o.responses} responses of {o.tokens} tokens",
        "",
        f"`{command}`, OMP_NUM_THREADS={torch.get_num_threads()}, "
        f"torch {torch.__version__}, least of {o.repeats}; peak memory grew by {extra:.0f} MiB.",
        "",
        "| | CPU seconds | monitor / this |",
        "|---|---|---|",
        f"| monitor: every statistic, trends, causes | {ours:.2f} | |",
        f"| token statistics of these tokens here, V = {o.vocab}, no model (measured on {o.part} tokens, scaled) "
        f"| {measured:.0f} | {ours / measured:.4%} |",
        f"| least step, {o.parameters / 1e9:g}B parameters on {o.devices} A800 at peak "
        f"({FLOPS_A_PARAMETER_AND_TOKEN} flop a parameter and token; arithmetic, not measured) "
        f"| {least:.0f} | {ours / least:.2%} |",
    ]
    publish("\n".join(lines) + "\n", o.output)


if __name__ == "__main__":
    main()
