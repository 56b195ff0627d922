"""The driver's work between engines and policy: from responses in the engines' memory to rows in the actors' hands.

Ray, the generator, the experience maker, the monitor and the dealing are real; engines and policy actors stand in,
whose answers are random numbers made before the clock starts. There is no model and no grading. All responses are as
long as they may be. seconds: the least of the repeats by the wall clock, each part by itself; CPU: this process's own,
all threads. Memory: the most that all processes hold at once, shared pages once, in a repeat of its own.

python -m tools.bench.driver --output docs/bench/driver.md
"""

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import ray
import torch
from torch import Tensor

from dcpo_openrlhf import experience_maker, local_ray
from dcpo_openrlhf.assemble import make_controller
from dcpo_openrlhf.experience import put
from dcpo_openrlhf.experience_maker import DCPOExperienceMaker
from dcpo_openrlhf.monitor.statistics import batch_metrics
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.policy.actor import PolicyActor
from dcpo_openrlhf.policy.group import PolicyActorGroup
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.reward.pool import Grade
from dcpo_openrlhf.rollout.checks import require_possible_samples
from dcpo_openrlhf.rollout.engine import Response, response
from dcpo_openrlhf.rollout.generator import DCPOSamplesGenerator
from dcpo_openrlhf.rollout.healing import EnginePool
from dcpo_openrlhf.rollout.tasks import Problem, Prompt
from tools.bench import publish
from tools.machine import processor_name

VOCABULARY, PROMPT_TOKENS, LOOK_S = 150_000, 128, 0.2


@ray.remote(num_cpus=0)
class StandInEngine:
    """A rollout engine that holds its answer already."""

    def make(self, groups: int, size: int, tokens: int, seed: int) -> None:
        random = np.random.default_rng(seed)

        def one(prompt: np.ndarray) -> Response:
            ids = np.concatenate([prompt, random.integers(0, VOCABULARY, tokens, dtype=np.int32)])
            return Response(ids, len(prompt), -random.random(tokens, dtype=np.float32), True, 0)

        prompts = random.integers(0, VOCABULARY, (groups, PROMPT_TOKENS), dtype=np.int32)
        self.groups = [[one(prompt) for _ in range(size)] for prompt in prompts]

    def health(self) -> dict[str, Any]:
        return {}

    def generate_groups(self, requests: list[dict[str, Any]]) -> list[list[Response]]:
        groups, self.groups = self.groups, []
        return groups

    def conversion_seconds(self, count: int, tokens: int) -> float:
        """CPU seconds that vLLM's lists of a response take to become arrays."""
        from vllm.logprobs import FlatLogprobs

        logprobs = FlatLogprobs(
            list(range(tokens)), list(range(1, tokens + 1)), logprobs=np.random.rand(tokens).tolist()
        )
        ids = np.random.randint(0, VOCABULARY, PROMPT_TOKENS + tokens).tolist()
        sample = SimpleNamespace(token_ids=ids[PROMPT_TOKENS:], logprobs=logprobs, finish_reason="length")
        begin = time.process_time()
        for _ in range(count):
            response(ids[:PROMPT_TOKENS], sample, 0)
        return (time.process_time() - begin) / count


class StandIn(PolicyActor):
    """A rank of the policy, every one a data rank of its own, that holds its token statistics already."""

    def init_model_from_pretrained(self, strategy: RecipeStrategy, pretrain: str, max_steps: int) -> int:
        self.strategy, self.step, self._updates = strategy, self, []
        strategy.rank = 1  # rank 0 shows a progress bar
        return self._rank

    def make(self, updates: int, rows: int, time: int, temperatures: int) -> None:
        logp = torch.rand(rows, time).clamp_(min=1e-6).log_().mul_(0.3)
        tempered = torch.stack([logp * (1 + 0.1 * i) for i in range(temperatures)], -1)
        self.made = [
            {"logp": logp.clone(), "entropy": -logp, "tempered_logp": tempered.clone()} for _ in range(updates)
        ]
        self._updates.clear()

    def token_statistics(self, rows: Rows, temperatures: list[float], reference: bool = False) -> dict[str, Tensor]:
        assert rows.index is not None
        return self.made.pop() | {"index": rows.index}

    def held(self) -> int:
        return sum(int(rows.action_mask.sum()) for rows in self._updates if rows.sequences.dtype == torch.long)


class Tokenizer:
    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2] * PROMPT_TOKENS for _ in text]}


class Parts:
    """Seconds and CPU seconds of each part; those of an inner part are not the outer one's."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self.open: list[str] = []
        self.last = (0.0, 0.0)

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self.open:
            spent = self.spent.setdefault(self.open[-1], [0.0, 0.0])
            spent[:] = [s + after - before for s, after, before in zip(spent, now, self.last, strict=True)]
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self.open.append(name)
        try:
            yield
        finally:
            self._charge()
            self.open.pop()

    def wrap(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """Let every call of owner.attribute count as the part `name`, or as name(its arguments)."""
        inner = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return inner(*args, **kwargs)

        setattr(owner, attribute, timed)


class Memory(threading.Thread):
    """Highest sum of proportional set sizes of this process and all that it has started [GiB], while in a block."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = held()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(LOOK_S):
            self.peak = max(self.peak, held())

    def __enter__(self) -> "Memory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def held() -> float:
    total, me = 0, psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**30


class Step:
    """One step of the driver with `responses` answers of `tokens` tokens each, in updates."""

    def __init__(self, o: argparse.Namespace, responses: int, engines: list[Any], group: PolicyActorGroup) -> None:
        self.o, self.responses, self.engines, self.group = o, responses, engines, group
        self.recipe = make_recipe(o, responses)
        strategy, tokenizer = RecipeStrategy(self.recipe), Tokenizer()
        self.generator = DCPOSamplesGenerator(strategy, None, None, tokenizer, engines)
        self.controller = make_controller(self.recipe)
        self.maker = DCPOExperienceMaker(
            group,  # type: ignore[arg-type]
            None,
            None,
            None,
            None,
            strategy,
            tokenizer,
            controller=self.controller,
        )
        self.maker.prompts = [
            Prompt(Problem(str(i), "", "", "", difficulty=i % 5), f"prompt {i}") for i in range(responses // o.group)
        ]

    def prepare(self) -> None:
        o, ranks = self.o, len(self.group.data_ranks)
        groups, rows = self.responses // o.group // o.engines, self.responses // o.updates // ranks
        ray.get([engine.make.remote(groups, o.group, o.tokens, i) for i, engine in enumerate(self.engines)])
        ray.get(self.group.async_run_method("make", o.updates, rows, PROMPT_TOKENS + o.tokens - 1, 2))

    def run(self) -> Parts:
        """The trainer's calls in their order."""
        parts, prompts, size = Parts(), self.maker.prompts, self.o.group
        with self.timed(parts):
            samples = self.generator.generate(
                [p.text for p in prompts],
                ["" for _ in prompts],
                step=1,
                n_samples=size,
                max_new_tokens=self.o.tokens,
                max_len=PROMPT_TOKENS + self.o.tokens,
            )
            grades = [Grade(float(i % 3 == 0), str(i % 7)) for i in range(len(samples))]
            with parts.part("samples checked"):
                for sample, grade in zip(samples, grades, strict=True):
                    sample.rewards = sample.info["reward"] = torch.tensor([grade.reward])
                require_possible_samples(samples, step=1, prompts=prompts, group_size=size, versions=range(1))
            updates: list[Any] = self.maker.make_experience_batch(samples)
            with parts.part("put: advantages to the actors"):
                put(updates, self.group)
            with parts.part("monitor"):
                batch_metrics(updates, grades=grades, prompts=prompts, alpha=0.3, mixing="convex")
        held = sum(ray.get(self.group.async_run_method("held")))
        assert held == self.responses * self.o.tokens, f"the actors hold {held} actions"
        return parts

    @contextmanager
    def timed(self, parts: Parts) -> Iterator[None]:
        """Inside, the calls between the trainer's own count as parts too."""
        group_names = {"append": "put: advantages to the actors"}
        places: list[tuple[Any, str, str | Callable[..., str]]] = [
            (self.generator, "generate", "experiences made"),
            (EnginePool, "wait", "responses through Ray"),
            (self.maker, "split_rollout_samples", "padded into updates"),
            (self.maker, "make_experience", "rows dealt"),
            (self.maker, "compute_advantages_and_returns", "advantages"),
            (experience_maker, "require_possible_statistics", "statistics checked"),
            (self.group, "async_run_method_batch", lambda method, **_: group_names.get(method, "rows dealt")),
            (self.group, "gather", "statistics in"),
        ]
        before = [getattr(owner, attribute) for owner, attribute, _ in places]
        for place in places:
            parts.wrap(*place)
        try:
            yield
        finally:
            for (owner, attribute, _), value in zip(places, before, strict=True):
                setattr(owner, attribute, value)


def make_recipe(o: argparse.Namespace, responses: int) -> Recipe:
    prompts = responses // o.group
    return Recipe.model_validate(
        {
            "model": {"path": "unused"},
            "task": {"kind": "arithmetic"},
            "method": {"target_entropy": 0.3},
            "train": {"prompts_per_step": prompts, "prompts_per_update": prompts // o.updates, "group_size": o.group},
            "parallel": {"devices_per_node": o.ranks},
            "rollout": {"engines": o.engines},
        }
    )


def start(o: argparse.Namespace) -> tuple[list[Any], PolicyActorGroup]:
    local_ray.start(num_cpus=o.ranks, num_gpus=o.ranks, include_dashboard=False, log_to_driver=False)
    engines = [StandInEngine.remote() for _ in range(o.engines)]
    group = PolicyActorGroup(1, o.ranks, ray.remote(num_gpus=1)(StandIn))
    group.begin_init(RecipeStrategy(make_recipe(o, o.responses[0])), 1)
    group.finish_init([], timeout=600.0)
    return engines, group


def table(o: argparse.Namespace, found: dict[int, tuple[dict[str, list[float]], float]]) -> Iterator[str]:
    sizes = list(found)
    yield "| | " + " | ".join(f"{n} responses: seconds | CPU" for n in sizes) + " |"
    yield "|---|" + "---|---|" * len(sizes)
    for name in found[sizes[0]][0]:
        cells = [f"{value:.2f}" for n in sizes for value in found[n][0][name]]
        yield f"| {name} | {' | '.join(cells)} |"
    totals = [[sum(spent[i] for spent in parts.values()) for i in (0, 1)] for parts, _ in found.values()]
    yield "| **in all** | " + " | ".join(f"**{wall:.2f}** | {cpu:.2f}" for wall, cpu in totals) + " |"
    yield "| peak memory of all processes [GiB] | " + " | ".join(f"{peak:.1f} |" for _, peak in found.values()) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=8192, help="of each response")
    parser.add_argument("--group", type=int, default=16, help="responses to a prompt")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks of the policy, one an actor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    o = parser.parse_args()

    engines, group = start(o)
    idle, found = held(), {}
    for responses in o.responses:
        step = Step(o, responses, engines, group)
        runs = []
        for _ in range(o.repeats):
            step.prepare()
            runs.append(step.run().spent)
        best = {name: min((run[name] for run in runs), key=lambda spent: spent[0]) for name in runs[0]}
        step.prepare()
        with Memory() as memory:
            step.run()
        found[responses] = (best, memory.peak)
    conversion: float = ray.get(engines[0].conversion_seconds.remote(32, o.tokens))  # type: ignore[assignment]
    ray.shutdown()
    defaults = vars(parser.parse_args([]))
    changed = [
        f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in vars(o).items()
        if v != defaults[k] and k != "output"
    ]
    command = " ".join(["python -m tools.bench.driver", *changed])
    lines = [
        f"# The driver: responses of {o.tokens} tokens, from the engines to the policy's actors",
        "",
        f"`{command}`, {os.cpu_count()} cores of {processor_name()}, torch {torch.__version__}, Ray {ray.__version__}: "
        f"{o.engines} engines, {o.ranks} policy ranks, groups of {o.group}, {o.updates} updates; least of {o.repeats}. "
        "CPU seconds are the driver's own, all threads.",
        "",
        *table(o, found),
        "",
        f"Of the memory {idle:.1f} GiB are there before the first step: interpreters and libraries. What comes before, "
        f"in the engine: {conversion * 1e3:.2f} ms of CPU to turn vLLM's lists of a response into arrays.",
    ]
    publish("\n".join(lines) + "\n", o.output)


if __name__ == "__main__":
    main()
