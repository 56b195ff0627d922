"""Rollouts: OpenRLHF's vLLM actor with native weight transfer, weight version and health; the generator that feeds it.

A group is one vLLM request with n samples, so its prompt is tokenised and prefilled once. Rewards come later.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from dcpo_openrlhf.openrlhf_seam import install_flash_attn_stub

install_flash_attn_stub()

from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator, _collect_prompt_batch  # noqa: E402
from openrlhf.trainer.ray.utils import get_bundle_indices  # noqa: E402
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor  # noqa: E402
from ray.util.placement_group import placement_group as make_placement_group  # noqa: E402
from ray.util.placement_group import remove_placement_group  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.inputs import TokensPrompt  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.utils import random_uuid  # noqa: E402

from dcpo_openrlhf.weight_sync import ACTOR_PID, register  # noqa: E402

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

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
POLL_S = 2.0
QUEUE_POLL_S = 0.001
CHILD_EXIT_S = 10.0


class RolloutEngineActor(RolloutRayActor.__ray_metadata__.modified_class):  # type: ignore[attr-defined]
    """OpenRLHF's vLLM actor plus weight transfer. `RolloutEngine` below is the Ray class of it."""

    async def __init__(
        self, *args: Any, env: dict[str, str] | None = None, cpu_share: dict[str, Any] | None = None, **kwargs: Any
    ):
        os.environ.update(env or {})
        if cpu_share is not None:
            os.environ |= omp_env(thread_binding(sorted(os.sched_getaffinity(0)), **cpu_share))
        os.environ[ACTOR_PID] = str(os.getpid())
        register()
        self._update_open = False
        self._version = 0
        await super().__init__(*args, **kwargs)

    def _configure_vllm_env(self, version: Any, vllm: Any, full_determinism: bool) -> None:
        """As OpenRLHF's, without VLLM_ALLOW_INSECURE_SERIALIZATION: native weight transfer sends plain values."""
        del version, vllm
        if full_determinism:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)

    # Weight transfer: vLLM's four calls, with generation paused from start to finish.

    async def init_weight_transfer_engine(self, request: "WeightTransferInitRequest") -> None:
        await self.llm.init_weight_transfer_engine(request)

    async def start_weight_update(self) -> None:
        # "wait": a response is never made of two weight versions.
        await self.llm.pause_generation(mode="wait", clear_cache=True)
        if self._update_open:
            await self.llm.collective_rpc("abort_weight_update")
        self._update_open = True
        await self.llm.start_weight_update()

    async def update_weights(self, request: "WeightTransferUpdateRequest") -> None:
        await self.llm.update_weights(request)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self.llm.finish_weight_update(weight_version=weight_version)
        self._version = await self.weight_version()
        await self.llm.reset_prefix_cache()
        self._update_open = False
        await self.llm.resume_generation()

    async def update_weight_version(self, weight_version: str) -> None:
        await self.llm.update_weight_version(weight_version)
        self._version = int(weight_version)

    async def weight_version(self) -> int:
        """Version of the weights served; 0 for those the engine was started with."""
        version = await self.llm.get_weight_version()
        return 0 if version == "default" else int(version)

    async def weight_checksums(self) -> list[dict[str, int]]:
        """For each worker, name -> checksum of what the last sync brought."""
        return await self.llm.collective_rpc("weight_checksums")

    # Generation.

    async def generate_responses(
        self,
        prompt: str,
        label: str,
        sampling_params: SamplingParams,
        max_length: int,
        hf_tokenizer: Any,
        num_samples: int = 1,
        images: Any = None,
        prompt_token_ids: list[int] | None = None,
    ) -> list[dict[str, Any]]:
        """`num_samples` responses to one prompt, from one request; each is what OpenRLHF turns into an Experience.

        rollout_log_probs are log-probs of the distribution that was sampled from, 0 over the prompt. Raises ValueError
        for a prompt that leaves no room for the response, RuntimeError while the weights are incomplete.
        """
        if images:
            raise ValueError("images were given; rollouts here are text alone")
        if self._update_open:
            raise RuntimeError("the engine holds an unfinished weight update and must not generate; sync weights first")
        ids = prompt_token_ids or list(hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"])
        require_room(ids, sampling_params.max_tokens, max_length, prompt)
        params = sampling_params.clone()
        params.n = num_samples
        params.output_kind = RequestOutputKind.FINAL_ONLY
        version = self._version
        final = None
        async for output in self.llm.generate(TokensPrompt(prompt_token_ids=ids), params, request_id=random_uuid()):
            final = output
        if final is None or len(final.outputs) != num_samples:
            got = 0 if final is None else len(final.outputs)
            raise RuntimeError(f"the engine returned {got} of {num_samples} samples for a prompt; see its log")
        return [
            _response(prompt, label, ids, sample, version)
            for sample in sorted(final.outputs, key=lambda output: output.index)
        ]

    async def generate_groups(self, requests: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """`generate_responses` of several requests, in their order.

        The scheduler starts when all of them are queued, so equal requests meet in equal batches: in bf16 the logits
        of a token depend a little on its batch.
        """
        waiting = self.get_num_unfinished_requests()
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        try:
            groups = [asyncio.ensure_future(self.generate_responses(**request)) for request in requests]
            expected = waiting + sum(request["num_samples"] for request in requests)
            while self.get_num_unfinished_requests() < expected and not any(group.done() for group in groups):
                await asyncio.sleep(QUEUE_POLL_S)
        finally:
            await self.llm.resume_generation()
        return await asyncio.gather(*groups)

    # Health.

    async def health(self) -> dict[str, Any]:
        """Version, unfinished requests and process ids; raises when the engine behind the actor is dead."""
        await self.llm.check_health()
        return {
            "weight_version": await self.weight_version(),
            "weights_complete": not self._update_open,
            "unfinished_requests": self.get_num_unfinished_requests(),
            "pid": os.getpid(),
            "children": [child.pid for child in _children()],
        }

    async def shutdown(self) -> None:
        """Stop vLLM; when this returns none of its processes is left."""
        children = _children()
        await asyncio.to_thread(self.llm.shutdown)
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, CHILD_EXIT_S)
        for child in alive:
            child.kill()
        await asyncio.to_thread(psutil.wait_procs, alive, CHILD_EXIT_S)


RolloutEngine = ray.remote(RolloutEngineActor)


def require_room(token_ids: Sequence[int], max_tokens: int | None, max_length: int, prompt: str) -> None:
    """Raise ValueError where prompt and response do not fit: a shortened prompt would be another question."""
    new_tokens = 1 if max_tokens is None else max_tokens
    if len(token_ids) + new_tokens > max_length:
        raise ValueError(
            f"prompt tokens + new tokens = {len(token_ids)} + {new_tokens} must not exceed the context, {max_length}; "
            f"drop the prompt, allow fewer new tokens or raise the context. It begins: {prompt[:80]!r}"
        )


def _response(prompt: str, label: str, prompt_ids: list[int], sample: Any, version: int) -> dict[str, Any]:
    tokens = list(sample.token_ids)
    logprobs = None
    if sample.logprobs is not None:
        logprobs = [0.0] * len(prompt_ids)
        logprobs += [entry[token].logprob for token, entry in zip(tokens, sample.logprobs, strict=True)]
    return {
        "prompt": prompt,
        "label": label,
        "images": None,
        "mm_train_inputs": None,
        "observation_tokens": prompt_ids + tokens,
        "action_ranges": [(len(prompt_ids), len(prompt_ids) + len(tokens))],
        "rollout_log_probs": logprobs,
        "truncated": sample.finish_reason == "length",
        "reward": None,
        "scores": None,
        "extra_logs": {"weight_version": version},
    }


def _children() -> list[psutil.Process]:
    """vLLM's processes. Not multiprocessing's resource tracker, which ends with the actor and not before."""
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(_cmdline(p))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def thread_binding(cores: Sequence[int], *, threads: int | None, workers: int, engine: int, engines: int) -> str:
    """VLLM_CPU_OMP_THREADS_BIND of one engine: its cores, dealt to its workers, as in "0,1|2,3".

    Engines take turns through `cores`, `threads` each (None: an equal share), so that two of them meet on a core only
    when there are too few.
    """
    threads = max(threads or len(cores) // engines, workers)
    mine = [cores[(engine * threads + i) % len(cores)] for i in range(threads)]
    share = threads // workers
    groups = [sorted(set(mine[i * share : (i + 1) * share])) for i in range(workers)]
    return "|".join(",".join(map(str, group)) for group in groups)


def omp_env(binding: str) -> dict[str, str]:
    """Environment that lets an engine's workers compute on the cores of `binding`, whatever Ray set before.

    Several workers are processes of their own, for which vLLM sets OpenMP up. A single one is vLLM's engine process
    itself, which saves the start of another: there vLLM leaves OpenMP to us.
    """
    if "|" in binding:
        return {"VLLM_CPU_OMP_THREADS_BIND": binding}
    cores = binding.split(",")
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # read for this alone: the engine process of an AsyncLLM stays
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": " ".join(cores),
    }


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
) -> list["ActorHandle"]:
    """`count` engines that start in the background; `wait_until_ready` tells when they serve.

    One Ray GPU (on CPU a logical one) for each of an engine's `tensor_parallel` workers, in a placement group of their
    own unless one is given; then `bundle_indices[i]` are engine i's bundles and the engine takes a share of a device,
    as OpenRLHF's colocated engines do. Raises RuntimeError when the cluster does not grant the group in `timeout_s`.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", not {device!r}')
    colocated = placement_group is not None
    if placement_group is None:
        placement_group = device_group(count * tensor_parallel, timeout_s)
    if bundle_indices is None:
        bundle_indices = [get_bundle_indices(placement_group, i, tensor_parallel) for i in range(count)]
    kwargs: dict[str, Any] = {
        "model": str(model),
        "tensor_parallel_size": tensor_parallel,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enforce_eager": enforce_eager,
        "enable_prefix_caching": enable_prefix_caching,
        "enable_sleep_mode": enable_sleep,
        "trust_remote_code": trust_remote_code,
        "skip_tokenizer_init": True,  # prompts come as tokens, responses leave as tokens
        "worker_extension_cls": WORKER_EXTENSION,
        "weight_transfer_config": {"backend": transport},
        # Log-probs of the distribution that is sampled from; at temperature 1 and top_p 1 the model's own.
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 1,
        "disable_log_stats": True,
        "max_num_seqs": max_num_seqs,
        "env": dict(env or {}),
        **_device_kwargs(device, tensor_parallel, max_model_len, gpu_memory_utilization, cpu_kv_cache_gb, block_size),
    }
    if transport == "ipc":
        # The handles are CUDA objects, which vLLM sends to its workers as pickles.
        kwargs["env"]["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    engines = []
    for index in range(count):
        bundles = list(bundle_indices[index])
        share = COLOCATED_SHARE if colocated else 1.0
        if device == "cpu":
            kwargs["cpu_share"] = {
                "threads": cpu_threads,
                "workers": tensor_parallel,
                "engine": index,
                "engines": count,
            }
        by_ray = kwargs["distributed_executor_backend"] == "ray"
        engines.append(
            RolloutEngine.options(  # type: ignore[attr-defined]
                num_cpus=0 if by_ray else share,
                num_gpus=0 if by_ray else share,
                max_concurrency=MAX_CONCURRENCY,
                runtime_env={"env_vars": CPU_ENV} if device == "cpu" else None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=placement_group,
                    placement_group_capture_child_tasks=True,
                    placement_group_bundle_index=bundles[0],
                ),
            ).remote(**kwargs, seed=seed + index, num_gpus=share, bundle_indices=bundles if by_ray else None)
        )
    return engines


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


def device_group(count: int, timeout_s: float) -> "PlacementGroup":
    """A placement group of `count` devices, each a Ray GPU and a CPU. Raises RuntimeError where they are not free."""
    bundles = [{"GPU": 1.0, "CPU": 1.0} for _ in range(count)]
    group = make_placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError as error:
        remove_placement_group(group)
        total = ray.cluster_resources()
        raise RuntimeError(
            f"{count} devices (rollout engines * tensor_parallel, or those shared with training) must fit Ray's free "
            "GPUs and CPUs; "
            f"the cluster has {total.get('GPU', 0):g} GPUs and {total.get('CPU', 0):g} CPUs, some of them in use; "
            "lower rollout.engines or add nodes"
        ) from error
    return group


def wait_until_ready(engines: Sequence["ActorHandle"], timeout_s: float) -> None:
    """Return when every engine answers. Raises RuntimeError that names the engine which failed or is late."""
    _gather(
        [engine.health.remote() for engine in engines],
        list(range(len(engines))),
        timeout_s=timeout_s,
        doing="starting",
        remedy="see its log in Ray's session folder (logs/worker-*.err); the first start on a machine is the slowest, "
        "so raise run.startup_timeout if it was still loading",
    )


def shutdown_engines(engines: Sequence["ActorHandle"], timeout_s: float = 30.0) -> None:
    """Stop the engines' processes, then the actors."""
    ray.wait([engine.shutdown.remote() for engine in engines], num_returns=len(engines), timeout=timeout_s)
    for engine in engines:
        ray.kill(engine)


def _gather(
    calls: Sequence["ray.ObjectRef"], engine_of: Sequence[int], *, timeout_s: float, doing: str, remedy: str
) -> list[Any]:
    """Results in the order of `calls`; RuntimeError naming the engine when one dies or `timeout_s` is over."""
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
            except RayActorError as error:
                raise RuntimeError(
                    f"rollout engine {engine_of[position[call]]} died while {doing}; {remedy}: {error}"
                ) from error
        if pending and time.monotonic() >= ends:
            late = Counter(engine_of[position[call]] for call in pending)
            who = ", ".join(f"engine {engine} ({number} calls)" for engine, number in sorted(late.items()))
            raise RuntimeError(
                f"rollout engines took more than {timeout_s:g} s while {doing}: {who} did not answer; {remedy}"
            )
    return results


class DCPOSamplesGenerator(SamplesGenerator):
    """OpenRLHF's generator with results in prompt order, a seed for each prompt, and a deadline."""

    def __init__(
        self,
        strategy: Any,
        prompts_dataloader: Any,
        eval_dataloader: Any,
        tokenizer: Any,
        vllm_engines: list["ActorHandle"],
        *,
        seed: int = 0,
        timeout_s: float = 1800.0,
    ) -> None:
        super().__init__(strategy, prompts_dataloader, eval_dataloader, tokenizer, vllm_engines)
        self.seed = seed
        self.timeout_s = timeout_s

    def generate(
        self,
        prompts: Sequence[str],
        labels: Sequence[str],
        *,
        step: int,
        n_samples: int,
        max_new_tokens: int,
        max_len: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
    ) -> list[Experience]:
        """One Experience [1, T] a response: prompts in the order given, the `n_samples` of a prompt consecutive.

        max_len bounds prompt + response. The same (seed, step, prompt index) asks for the same samples. Raises
        ValueError for a prompt without room, RuntimeError naming the engine that died or did not answer in time.
        """
        if temperature == 0 and n_samples > 1:
            raise ValueError(f"temperature 0 gives {n_samples} equal samples; ask for 1 or raise the temperature")
        token_ids = self.tokenizer(text=list(prompts), add_special_tokens=False)["input_ids"]
        for prompt, ids in zip(prompts, token_ids, strict=True):
            require_room(ids, max_new_tokens, max_len, prompt)
        engine_of = self._assign(len(token_ids), n_samples)
        requests: dict[int, list[dict[str, Any]]] = {}
        for index, (prompt, label, ids) in enumerate(zip(prompts, labels, token_ids, strict=True)):
            params = self._sampling_params(
                seed=request_seed(self.seed, step, index),
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
            )
            requests.setdefault(engine_of[index], []).append(
                {
                    "prompt": prompt,
                    "label": label,
                    "sampling_params": params,
                    "max_length": max_len,
                    "hf_tokenizer": None,
                    "num_samples": n_samples,
                    "prompt_token_ids": ids,
                }
            )
        answers = _gather(
            [self.vllm_engines[engine].generate_groups.remote(batch) for engine, batch in requests.items()],
            list(requests),
            timeout_s=self.timeout_s,
            doing=f"generating for step {step}",
            remedy="see its log; resume from the last checkpoint, and raise rollout.timeout if it was only slow",
        )
        of_engine = {engine: iter(groups) for engine, groups in zip(requests, answers, strict=True)}
        groups = [next(of_engine[engine]) for engine in engine_of]
        return [
            self._process_response_into_experience(response, max_len=max_len) for group in groups for response in group
        ]

    def _assign(self, num_prompts: int, n_samples: int) -> list[int]:
        """Engine of each prompt: always the one with the fewest samples in hand."""
        load = _gather(
            [engine.get_num_unfinished_requests.remote() for engine in self.vllm_engines],
            list(range(len(self.vllm_engines))),
            timeout_s=self.timeout_s,
            doing="being asked for their load",
            remedy="see its log; resume from the last checkpoint",
        )
        chosen = []
        for _ in range(num_prompts):
            engine = load.index(min(load))
            load[engine] += n_samples
            chosen.append(engine)
        return chosen

    def _sampling_params(
        self, *, seed: int, max_tokens: int, temperature: float, top_p: float, top_k: int
    ) -> SamplingParams:
        return SamplingParams(
            seed=seed,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=[self.tokenizer.eos_token_id],
            detokenize=False,
        )

    def _generate_vllm(
        self, dataloader_iter: Any, num_prompts: int, dynamic_filtering: bool, **generate_kwargs: Any
    ) -> tuple[list[Experience], int, bool]:
        """OpenRLHF's loop over a dataloader, by `generate`; kept so that its generate_samples works."""
        if dynamic_filtering:
            raise ValueError("dynamic filtering needs rewards in the engine; here they are computed after generation")
        prompts, labels, _, exhausted = _collect_prompt_batch(dataloader_iter, num_prompts)
        if not prompts:
            return [], 0, True
        experiences = self.generate(
            prompts,
            labels,
            step=generate_kwargs.get("step", 0),
            n_samples=generate_kwargs.get("n_samples_per_prompt", self.args.rollout.n_samples_per_prompt),
            max_new_tokens=generate_kwargs["max_new_tokens"],
            max_len=generate_kwargs["max_len"],
            temperature=generate_kwargs.get("temperature", 1.0),
            top_p=generate_kwargs.get("top_p", 1.0),
        )
        return experiences, len(prompts), exhausted


def request_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """48-bit seed of one request, from (run seed, step, prompt index); sample k of it uses seed + k."""
    digest = hashlib.blake2b(f"{run_seed}:{step}:{prompt_index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
