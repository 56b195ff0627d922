"""The engines of a run: created side by side, waited for, asked, and ended."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dcpo_openrlhf.errors import RunError
from dcpo_openrlhf.local_ray import StartupError
from dcpo_openrlhf.rollout.devices import POLL_S, device_group, places
from dcpo_openrlhf.rollout.engine import RolloutEngine
from dcpo_openrlhf.rollout.healing import EngineError, EnginePool, what_it_did

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)
WORKER_EXTENSION = "dcpo_openrlhf.weight_sync.worker.WorkerExtension"
# Prompts shorter than a block are never shared; vLLM's default of 128 on CPU switches prefix caching off for them.
CPU_BLOCK_SIZE = 32
CPU_BATCHED_TOKENS = 4096
# Engines that share cores with training must sleep, not spin, while they wait. They run eagerly: what vLLM compiles
# even then, the rank of a sampled token, nothing here reads, and a host may lack the C++ compiler for it.
CPU_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TORCH_COMPILE_DISABLE": "1"}
# As OpenRLHF: the share of a device that lets engine and trainer actors sit on one.
COLOCATED_SHARE = 0.2
# An async actor runs this many calls at a time; more would leave control calls waiting behind prompts.
MAX_CONCURRENCY = 16384
ENGINE_KWARGS = {
    "skip_tokenizer_init": True,  # prompts come as tokens, responses leave as tokens
    "worker_extension_cls": WORKER_EXTENSION,
    # log-probs of the distribution that is sampled from; at temperature 1 and top_p 1 the model's own
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": 1,
    "disable_log_stats": True,
}
"""What vLLM is told whatever the recipe says."""


def create_rollout_engines(
    *,
    count: int,
    tensor_parallel: int,
    model: str,
    seed: int,
    max_model_len: int,
    dtype: str,
    device: str,
    transport: str,
    placement_group: "PlacementGroup | None" = None,
    bundle_indices: Sequence[Sequence[int]] | None = None,
    gpu_memory_utilization: float = 0.9,
    cpu_kv_cache_gb: float = 2.0,
    cpu_threads: int | None = None,
    block_size: int | None = None,
    enforce_eager: bool = True,
    enable_prefix_caching: bool = True,
    enable_sleep: bool = False,
    trust_remote_code: bool = False,
    max_num_seqs: int | None = None,
    env: dict[str, str] | None = None,
    timeout_s: float = 600.0,
) -> EnginePool:
    """`count` engines that start in the background; `wait_until_ready` tells when they serve.

    One Ray GPU (on CPU a logical one) for each of an engine's `tensor_parallel` workers, in a placement group of their
    own unless one is given; then `bundle_indices[i]` are engine i's bundles and the engine takes a share of a device,
    as OpenRLHF's colocated engines do. Raises StartupError when the cluster does not grant the group in `timeout_s`.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", not {device!r}')
    colocated = placement_group is not None
    if placement_group is None:
        placement_group = device_group(
            count * tensor_parallel, timeout_s, what=f"{count} rollout engines * tensor_parallel {tensor_parallel}"
        )
    if bundle_indices is None:
        found = places(placement_group, timeout_s, ask_devices=device == "cuda" and tensor_parallel > 1)
        bundles = [place.bundle for place in found]
        bundle_indices = [bundles[i * tensor_parallel : (i + 1) * tensor_parallel] for i in range(count)]
    settings = {
        "model": str(model),
        "tensor_parallel_size": tensor_parallel,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enforce_eager": enforce_eager,
        "enable_prefix_caching": enable_prefix_caching,
        "enable_sleep_mode": enable_sleep,
        "trust_remote_code": trust_remote_code,
        "max_num_seqs": max_num_seqs,
        "weight_transfer_config": {"backend": transport},
        # the handles of ipc are CUDA objects, which vLLM sends to its workers as pickles
        "env": (env or {}) | ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if transport == "ipc" else {}),
        **_device_kwargs(device, tensor_parallel, max_model_len, gpu_memory_utilization, cpu_kv_cache_gb, block_size),
    }

    def start(index: int) -> "ActorHandle":
        cpus = {"threads": cpu_threads, "workers": tensor_parallel, "engine": index, "engines": count}
        own = {"seed": seed + index} | ({"cpu_share": cpus} if device == "cpu" else {})
        return _start(settings | own, placement_group, bundle_indices[index], COLOCATED_SHARE if colocated else 1.0)

    own = None if colocated else placement_group
    return EnginePool([start(index) for index in range(count)], start=start, startup_s=timeout_s, own_group=own)


def _start(settings: dict[str, Any], group: "PlacementGroup", bundles: Sequence[int], share: float) -> "ActorHandle":
    """One engine on its bundles of the group, of whose devices it takes a share."""
    by_ray = settings["distributed_executor_backend"] == "ray"
    return RolloutEngine.options(  # type: ignore[attr-defined]
        num_cpus=0 if by_ray else share,
        num_gpus=0 if by_ray else share,
        max_concurrency=MAX_CONCURRENCY,
        runtime_env={"env_vars": CPU_ENV} if "cpu_share" in settings else None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_capture_child_tasks=True, placement_group_bundle_index=bundles[0]
        ),
    ).remote(**ENGINE_KWARGS, **settings, num_gpus=share, bundle_indices=list(bundles) if by_ray else None)


def _device_kwargs(
    device: str,
    tensor_parallel: int,
    max_model_len: int,
    gpu_memory_utilization: float,
    cpu_kv_cache_gb: float,
    block_size: int | None,
) -> dict[str, Any]:
    if device == "cpu":
        return {
            "distributed_executor_backend": "uni" if tensor_parallel == 1 else "mp",
            "block_size": block_size or CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": int(cpu_kv_cache_gb * 2**30),
            # After a part of a prompt vLLM rewinds the request's generator, which CPU generators cannot do.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_model_len, CPU_BATCHED_TOKENS),
        }
    return {
        "distributed_executor_backend": "uni" if tensor_parallel == 1 else "ray",
        "gpu_memory_utilization": gpu_memory_utilization,
        **({"block_size": block_size} if block_size else {}),
    }


def wait_until_ready(engines: Sequence["ActorHandle"], timeout_s: float) -> None:
    """Return when every engine answers. Raises StartupError that names the engine which failed or is late."""
    found = gather(
        [engine.health.remote() for engine in engines],
        list(range(len(engines))),
        timeout_s=timeout_s,
        doing="starting",
        remedy="see its log in Ray's session folder (logs/worker-*.err); the first start on a machine is the slowest, "
        "so raise run.startup_timeout if it was still loading",
        error=StartupError,
    )
    for slot, health in enumerate(found):
        EnginePool.of(engines).came_up(slot, health)


def sleep(engines: Sequence["ActorHandle"], timeout_s: float) -> None:
    """Return when every engine has left its device to the policy. Raises StartupError as `wait_until_ready`."""
    gather(
        [engine.sleep.remote() for engine in engines],
        list(range(len(engines))),
        timeout_s=timeout_s,
        doing="going to sleep",
        remedy="see its log in Ray's session folder (logs/worker-*.err)",
        error=StartupError,
    )


def shutdown_engines(engines: Sequence["ActorHandle"], timeout_s: float = 30.0) -> None:
    """Stop the engines' processes, then the actors; devices that were reserved for them alone are free again."""
    EnginePool.of(engines).shutdown(timeout_s)


def gather(
    calls: Sequence["ray.ObjectRef"],
    engine_of: Sequence[int],
    *,
    timeout_s: float,
    doing: str,
    remedy: str,
    who: str = "rollout engine",
    error: type[RunError] = EngineError,
) -> list[Any]:
    """Results in the order of `calls`; `error` naming the engine (`who` it is) when one dies or `timeout_s` is over."""
    position = {call: index for index, call in enumerate(calls)}
    results: list[Any] = [None] * len(calls)
    pending, ends = list(calls), time.monotonic() + timeout_s
    while pending:
        # Waiting in slices keeps the caller open to signals.
        slice_s = max(min(POLL_S, ends - time.monotonic()), 0.0)
        done, pending = ray.wait(pending, num_returns=min(len(pending), 64), timeout=slice_s)
        for call in done:
            try:
                results[position[call]] = ray.get(call)
            except RayError as failure:
                did = what_it_did(failure)
                more = f": {failure}" if did == "died" else ""
                raise error(f"{who} {engine_of[position[call]]} {did} while {doing}; {remedy}{more}") from failure
        if pending and time.monotonic() >= ends:
            late = Counter(engine_of[position[call]] for call in pending)
            kind = who.split()[-1]
            names = ", ".join(f"{kind} {engine} ({number} calls)" for engine, number in sorted(late.items()))
            raise error(f"{who}s took more than {timeout_s:g} s while {doing}: {names} did not answer; {remedy}")
    return results
