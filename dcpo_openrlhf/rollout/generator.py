"""OpenRLHF's samples generator over our engines: results in prompt order, a seed for each prompt, a deadline."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm import SamplingParams

from dcpo_openrlhf.openrlhf_seam import make_importable
from dcpo_openrlhf.recipe.schema import Rollout
from dcpo_openrlhf.rollout.engine import Response, require_room
from dcpo_openrlhf.rollout.healing import Batch, EnginePool
from dcpo_openrlhf.rollout.tasks import Prompt

make_importable()

from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator, _collect_prompt_batch  # noqa: E402

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class Begun(NamedTuple):
    """Responses that engines were asked for."""

    pool: EnginePool
    batch: Batch
    prompts: list[str]
    labels: list[str]
    max_len: int


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
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        """OpenRLHF's arguments; stop_token_ids end a response, None: the tokenizer's EOS alone."""
        super().__init__(strategy, prompts_dataloader, eval_dataloader, tokenizer, vllm_engines)
        self.seed = seed
        self.timeout_s = timeout_s
        self.stop_token_ids = [tokenizer.eos_token_id] if stop_token_ids is None else list(stop_token_ids)

    def generate(self, prompts: Sequence[str], labels: Sequence[str], **how: Any) -> list[Experience]:
        """What `finish` gives of what `begin` asks for."""
        return self.finish(self.begin(prompts, labels, **how))

    def begin(
        self,
        prompts: Sequence[str],
        labels: Sequence[str],
        *,
        step: int,
        first: int = 0,
        n_samples: int,
        max_new_tokens: int,
        max_len: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
    ) -> "Begun":
        """Ask the engines for `n_samples` responses to each prompt; `finish` waits for them.

        max_len bounds prompt + response. The same (seed, step, prompt index) asks for the same samples; the prompts'
        indices count from `first`, how many the step has asked for before. Raises ValueError for a prompt without room.
        """
        if temperature == 0 and n_samples > 1:
            raise ValueError(f"temperature 0 gives {n_samples} equal samples; ask for 1 or raise the temperature")
        token_ids = self.tokenizer(text=list(prompts), add_special_tokens=False)["input_ids"]
        for prompt, ids in zip(prompts, token_ids, strict=True):
            require_room(ids, max_new_tokens, max_len, prompt)
        requests = []
        for index, (prompt, label, ids) in enumerate(zip(prompts, labels, token_ids, strict=True), start=first):
            params = self._sampling_params(
                seed=request_seed(self.seed, step, index),
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
            )
            requests.append(
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
        pool = EnginePool.of(self.vllm_engines)
        batch = pool.begin(requests, doing=f"generating for step {step}", timeout_s=self.timeout_s)
        return Begun(pool, batch, list(prompts), list(labels), max_len)

    def finish(self, begun: "Begun") -> list[Experience]:
        """One Experience [1, T] a response: prompts in the order given, the responses of a prompt consecutive.

        Raises RuntimeError naming the engine that failed or did not answer in time.
        """
        begun.pool.wait(begun.batch)
        return [
            experience(response, prompt, label, max_len=begun.max_len)
            for group, prompt, label in zip(begun.batch.answers(), begun.prompts, begun.labels, strict=True)
            for response in group
        ]

    def _sampling_params(
        self, *, seed: int, max_tokens: int, temperature: float, top_p: float, top_k: int
    ) -> SamplingParams:
        return SamplingParams(
            seed=seed,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_token_ids=self.stop_token_ids,
            detokenize=False,
        )

    def _generate_vllm(
        self, dataloader_iter: Any, num_prompts: int, dynamic_filtering: bool, **generate_kwargs: Any
    ) -> tuple[list[Experience], int, bool]:
        """OpenRLHF's loop over a dataloader, by `generate`; kept so that its generate_samples works."""
        if dynamic_filtering:
            raise ValueError("dynamic filtering needs rewards in the engine; here they come after it: use train.filter")
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


def experience(response: Response, prompt: str, label: str, *, max_len: int) -> Experience:
    """OpenRLHF's Experience [1, T] of a response; tokens are int32 and masks bool, of memory of their own."""
    first, total = response.prompt_tokens, len(response.tokens)
    action_mask, log_probs = np.zeros((1, total - 1), dtype=bool), np.zeros((1, total - 1), dtype=np.float32)
    action_mask[0, first - 1 :], log_probs[0, first - 1 :] = True, response.log_probs
    return Experience(
        sequences=torch.from_numpy(response.tokens[None].copy()),
        attention_mask=torch.ones(1, total, dtype=torch.bool),  # type: ignore[arg-type]
        action_mask=torch.from_numpy(action_mask),  # type: ignore[arg-type]
        rollout_log_probs=torch.from_numpy(log_probs),
        prompts=[prompt],
        labels=[label],
        images=[None],
        mm_train_inputs=[None],
        response_length=torch.tensor([total - first]),
        truncated=torch.tensor([response.truncated]),
        total_length=torch.tensor([float(total)]),
        info={
            "response_clip_ratio": torch.tensor([total >= max_len]),
            "weight_version": torch.tensor([response.weight_version]),
        },
    )


def arguments(prompts: Sequence[Prompt], rollout: Rollout, **sampling: Any) -> dict[str, Any]:
    """Those of a samples generator for these prompts; `sampling` has step, n_samples, temperature, top_p."""
    return {
        "prompts": [p.text for p in prompts],
        "labels": [p.problem.answer for p in prompts],
        "max_new_tokens": rollout.max_new_tokens,
        "max_len": rollout.context,
        **sampling,
    }


def request_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """48-bit seed of one request, from (run seed, step, prompt index); sample k of it uses seed + k."""
    digest = hashlib.blake2b(f"{run_seed}:{step}:{prompt_index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
