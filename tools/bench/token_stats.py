"""Token statistics against the usual ways, on the same logits: time and peak extra memory as ratios.

- full copies: whole log-softmaxes, one for each temperature, as in the authors' code (which runs the model twice)
- OpenRLHF: its log_probs_from_logits for each temperature and its compute_entropy

statistics: log pi, log pi^T for two T, exact entropy; no gradient (the pass over the old policy).
training: log pi and its gradient. entropy training: log pi, entropy and their gradient.
Only the stage behind the logits is measured; their gradient, where it gets memory of its own, counts as extra memory.

On CPUs with other work to do set OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1: otherwise OpenMP's threads spin while
they wait for one another, at every block.
"""

import argparse
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dcpo_openrlhf.policy.token_stats import token_stats
from tools.bench import median_seconds, peak_extra_bytes

TEMPERATURES = (0.8, 1.2)
OURS = "token_stats"
Outputs = tuple[Tensor, ...]
Way = Callable[[Tensor, Tensor, str], Outputs]


def ours(*, overwrite_logits: bool) -> Way:
    def way(logits: Tensor, targets: Tensor, stage: str) -> Outputs:
        stats = token_stats(
            logits,
            targets,
            temperatures=TEMPERATURES if stage == "statistics" else (),
            entropy_grad=stage == "entropy training",
            overwrite_logits=overwrite_logits,
        )
        outputs = (stats.logp, *stats.tempered_logp.unbind(1))
        return outputs if stage == "training" else (*outputs, stats.entropy)

    return way


def full_copies(logits: Tensor, targets: Tensor, stage: str) -> Outputs:
    def gather(logp: Tensor) -> Tensor:
        return logp.gather(1, targets[:, None])[:, 0]

    logp = F.log_softmax(logits.float(), dim=-1)
    outputs = [gather(logp)]
    if stage == "statistics":
        outputs += [gather(F.log_softmax(logits.float() / temperature, dim=-1)) for temperature in TEMPERATURES]
    if stage != "training":
        outputs.append(-(logp.exp() * logp).sum(-1))
    return tuple(outputs)


def openrlhf() -> Way:
    from dcpo_openrlhf.openrlhf_seam import make_importable

    make_importable()
    from openrlhf.models.utils import compute_entropy, log_probs_from_logits

    def way(logits: Tensor, targets: Tensor, stage: str) -> Outputs:
        logits = logits.float()  # as its Actor.forward does
        outputs = [log_probs_from_logits(logits, targets)]
        if stage == "statistics":  # it divides in place, so each temperature takes a copy (or another forward)
            outputs += [log_probs_from_logits(logits.clone(), targets, temperature) for temperature in TEMPERATURES]
        if stage != "training":
            outputs.append(compute_entropy(logits))
        return tuple(outputs)

    return way


def run(way: Way, logits: Tensor, targets: Tensor, stage: str) -> tuple[Outputs, Tensor | None]:
    """What the way gives, and the gradient of the sum of it in the logits."""
    if stage == "statistics":
        with torch.no_grad():
            return way(logits, targets, stage), None
    outputs = way(logits, targets, stage)
    return outputs, torch.autograd.grad(torch.stack(outputs).sum(), logits)[0]


def check(ways: dict[str, Way], logits: Tensor, targets: Tensor, stage: str) -> None:
    """Raises where a way computes something else."""
    needs_gradient = logits.requires_grad
    results = [
        run(way, logits.detach().clone().requires_grad_(needs_gradient), targets, stage) for way in ways.values()
    ]
    for outputs, gradient in results[1:]:
        torch.testing.assert_close(outputs, results[0][0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-3, rtol=1e-2)


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row(ways: dict[str, Way], *, stage: str, vocab: int, tokens: int, options: argparse.Namespace) -> str:
    """One line of the table: our time and memory, then those of each other way as multiples of ours."""
    logits = torch.randn(tokens, vocab, device=options.device).to(getattr(torch, options.dtype)).mul_(3)
    logits.requires_grad_(stage != "statistics")
    targets = torch.randint(vocab, (tokens,), device=options.device)

    def extra(way: Way, some: slice) -> int:
        part = logits.detach()[some].requires_grad_(logits.requires_grad)
        return peak_extra_bytes(lambda: run(way, part, targets[some], stage), device=options.device)

    few = slice(0, min(64, tokens))
    check(ways, logits[few], targets[few], stage)
    room = 0.9 * free_bytes(options.device)
    fitting = {name: way for name, way in ways.items() if extra(way, few) * tokens / few.stop < room}
    # Overwritten logits are small numbers from then on: of no influence on the time.
    calls = {name: lambda way=way: run(way, logits, targets, stage) for name, way in fitting.items()}
    seconds = median_seconds(calls, repeats=options.repeats, device=options.device)
    memory = {name: extra(way, slice(None)) for name, way in fitting.items()}
    cells = [stage, str(vocab), str(tokens), f"{seconds[OURS]:.3f}", f"{memory[OURS] / 2**20:.0f}"]
    for values, digits in ((seconds, 2), (memory, 1)):
        for name in list(ways)[1:]:
            cells.append(f"{values[name] / values[OURS]:.{digits}f}" if name in values else "does not fit")
    return f"| {' | '.join(cells)} |"


def header(others: list[str]) -> str:
    names = ["stage", "vocabulary", "tokens", "time [s]", "extra memory [MiB]"]
    names += [f"{name}: time" for name in others] + [f"{name}: memory" for name in others]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 152064])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--stage", nargs="+", default=["statistics", "training", "entropy training"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the logits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep-logits", action="store_true", help="do not write the gradient over the logits")
    options = parser.parse_args()

    torch.manual_seed(0)
    ways: dict[str, Way] = {
        OURS: ours(overwrite_logits=not options.keep_logits),
        "full copies": full_copies,
        "OpenRLHF": openrlhf(),
    }
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.dtype} logits, {name}, torch {torch.__version__}; the other ways as multiples of {OURS}\n")
    print(header(list(ways)[1:]))
    for stage in options.stage:
        for vocab in options.vocab:
            for tokens in options.tokens:
                print(row(ways, stage=stage, vocab=vocab, tokens=tokens, options=options), flush=True)


if __name__ == "__main__":
    main()
