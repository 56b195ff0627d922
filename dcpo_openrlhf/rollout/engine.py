"""The rollout engine: OpenRLHF's vLLM actor with native weight transfer, weight version and health.

A group is one vLLM request with n samples, so its prompt is tokenised and prefilled once. Rewards come later.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray
from jaxtyping import Float32, Int32

from dcpo_openrlhf import phases
from dcpo_openrlhf.openrlhf_seam import make_importable

make_importable()

from openrlhf.trainer.ray.vllm_engine import RolloutRayActor  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.inputs import TokensPrompt  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.utils import random_uuid  # noqa: E402

from dcpo_openrlhf.weight_sync import ACTOR_PID, register  # noqa: E402

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

QUEUE_POLL_S = 0.001
CHILD_EXIT_S = 10.0


@dataclass(frozen=True)
class Response:
    """One sample as it crosses Ray: arrays, which the driver reads where they lie in the object store."""

    tokens: Int32[np.ndarray, " time"]
    """Prompt and response."""
    prompt_tokens: int
    log_probs: Float32[np.ndarray, " response"]
    """log mu of each token of the response [nats], of the distribution that was sampled from."""
    truncated: bool
    """It ended for want of room, not with a stop token."""
    weight_version: int


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
        self._update_open, self._update_begun = False, 0.0
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
        self._update_begun = phases.now()
        await self.llm.start_weight_update()

    async def update_weights(self, request: "WeightTransferUpdateRequest") -> None:
        await self.llm.update_weights(request)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self.llm.finish_weight_update(weight_version=weight_version)
        self._version = await self.weight_version()
        await self.llm.reset_prefix_cache()
        self._update_open = False
        phases.add("load weights", self._update_begun)
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
    ) -> list[Response]:
        """`num_samples` responses to one prompt, from one request.

        Raises ValueError for a prompt that leaves no room for the response, RuntimeError while the weights are
        incomplete.
        """
        del label  # OpenRLHF's; it stays with the driver
        if images:
            raise ValueError("images were given; rollouts here are text alone")
        if self._update_open:
            raise RuntimeError("the engine holds an unfinished weight update and must not generate; sync weights first")
        ids = prompt_token_ids or list(hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"])
        require_room(ids, sampling_params.max_tokens, max_length, prompt)
        params = sampling_params.clone()
        params.n = num_samples
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.logprobs, params.flat_logprobs = 0, True  # of the sampled tokens alone; else a dict for each of them
        version = self._version
        final = None
        async for output in self.llm.generate(TokensPrompt(prompt_token_ids=ids), params, request_id=random_uuid()):
            final = output
        if final is None or len(final.outputs) != num_samples:
            got = 0 if final is None else len(final.outputs)
            raise RuntimeError(f"the engine returned {got} of {num_samples} samples for a prompt; see its log")
        return [response(ids, sample, version) for sample in sorted(final.outputs, key=lambda output: output.index)]

    async def generate_groups(self, requests: Sequence[dict[str, Any]]) -> list[list[Response]]:
        """`generate_responses` of several requests, in their order.

        The scheduler starts when all of them are queued, so equal requests meet in equal batches: in bf16 the logits
        of a token depend a little on its batch.
        """
        with phases.phase("generate"):
            return await self._generate_groups(requests)

    async def _generate_groups(self, requests: Sequence[dict[str, Any]]) -> list[list[Response]]:
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

    async def sleep(self, level: int = 1) -> None:
        with phases.phase("sleep"):
            await super().sleep(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        with phases.phase("wake"):
            await super().wake_up(tags)

    # Health, and what it did.

    def take_phases(self) -> list[phases.Phase]:
        return phases.take()

    async def health(self) -> dict[str, Any]:
        """Version, unfinished requests and processes, by vLLM's engine process, which must answer; raises where it is
        dead.
        """
        await self.llm.check_health()
        return {
            "weight_version": await self.weight_version(),
            "weights_complete": not self._update_open,
            "unfinished_requests": self.get_num_unfinished_requests(),
            "pid": os.getpid(),
            "children": [child.pid for child in _children()],
            "node": ray.get_runtime_context().get_node_id(),
            "processes": [(p.pid, p.create_time()) for p in (*_children(), psutil.Process())],
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


def response(prompt_ids: Sequence[int], sample: Any, version: int) -> Response:
    """Arrays of vLLM's CompletionOutput, whose log-probs are flat and of the sampled tokens alone."""
    return Response(
        tokens=np.array([*prompt_ids, *sample.token_ids], dtype=np.int32),
        prompt_tokens=len(prompt_ids),
        log_probs=np.array(sample.logprobs.logprobs, dtype=np.float32),
        truncated=sample.finish_reason == "length",
        weight_version=version,
    )


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
