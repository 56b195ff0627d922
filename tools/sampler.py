"""The model that is evaluated: its folder, looked at without loading it, and vLLM's engine, which samples from it."""

import argparse
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from dcpo_openrlhf.rollout.chat import stop_tokens
from tools.sample_file import EvaluationError, Request, Sample

Generate = Callable[[Sequence[Request]], Iterator[Sample]]
"""Yields the samples of the requests, each as soon as it is finished."""
Generator = Callable[..., AbstractContextManager[Generate]]

CPU_BLOCK_SIZE = 32  # as in training: vLLM's 128 on CPU means that short prompts are never shared
IN_FLIGHT = 2048
"""Requests inside vLLM at a time; more than it runs at once, few enough to be queued quickly."""


class ModelFolder:
    """A Hugging Face model folder, looked at without loading the model. Raises EvaluationError if it is none."""

    def __init__(self, path: Path, *, trust_remote_code: bool) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.path = path
        weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
        if not (path / "config.json").is_file() or not weights:
            what = "no such folder" if not path.is_dir() else "lacks config.json or *.safetensors"
            raise EvaluationError(
                f"{path}: {what}; give a Hugging Face folder: a run's hf/, or `hf download NAME --local-dir {path}`"
            )
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path}: cannot be read as a Hugging Face folder: {error}") from error
        context = getattr(config, "max_position_embeddings", None)
        if not isinstance(context, int):
            raise EvaluationError(f"{path}: its config.json has no max_position_embeddings, the context; add it")
        self.context: int = context
        self._weights = weights

    @property
    def label(self) -> str:
        """The folder's name; the run's name for the hf/ that a run exports."""
        path = self.path.resolve()
        return path.parent.name if path.name == "hf" else path.name

    def sha256(self) -> str:
        """Of all that decides what the model answers: weights, config, tokenizer."""
        total = hashlib.sha256()
        for file in sorted([*self._weights, *self.path.glob("*.json"), *self.path.glob("*.jinja")]):
            with file.open("rb") as handle:
                total.update(f"{file.name} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


@contextmanager
def vllm_generator(model: Path, *, max_model_len: int, args: argparse.Namespace) -> Iterator[Generate]:
    """vLLM's offline engine; on a CPU machine inside this process, so that a kill leaves nothing behind."""
    import torch

    settings: dict[str, Any] = {"gpu_memory_utilization": args.gpu_memory_utilization}
    if not torch.cuda.is_available():
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": cores}
        settings = {"block_size": CPU_BLOCK_SIZE, "kv_cache_memory_bytes": int(args.cpu_kv_cache_gb * 2**30)}
        settings |= {
            "enforce_eager": True,
            "distributed_executor_backend": "uni" if args.tensor_parallel == 1 else "mp",
        }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # below the progress bar
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        model=str(model),
        dtype=args.dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=args.tensor_parallel,
        trust_remote_code=args.trust_remote_code,
        enable_prefix_caching=True,
        disable_log_stats=True,
        **settings,
    )
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    stops = stop_tokens(tokenizer, chat=not args.no_chat, stop=args.stop)  # as in training

    def add(number: int, request: Request) -> None:
        ids = tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
        params = SamplingParams(
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_tokens,
            seed=request.seed,
            stop_token_ids=stops,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(number), llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=ids)])[0], params)

    def generate(requests: Sequence[Request]) -> Iterator[Sample]:
        # LLM.generate returns when the last of its requests is finished; here each one is kept at its end.
        waiting = deque(enumerate(requests))
        while waiting or engine.has_unfinished_requests():
            while waiting and engine.get_num_unfinished_requests() < IN_FLIGHT:
                add(*waiting.popleft())
            for output in engine.step():
                (answer,) = output.outputs  # type: ignore[union-attr]
                cut = answer.finish_reason == "length"
                yield Sample(requests[int(output.request_id)].key, answer.text, len(answer.token_ids), cut)

    try:
        yield generate
    finally:
        engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
