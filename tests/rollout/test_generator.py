"""From vLLM's output to an Experience: the arrays between hold what OpenRLHF's lists would."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.logprobs import FlatLogprobs, append_logprobs_for_next_position

from dcpo_openrlhf.rollout import generator
from dcpo_openrlhf.rollout.engine import response
from dcpo_openrlhf.rollout.generator import DCPOSamplesGenerator, experience, request_seed

PROMPT = [7, 150_001, 9]


def sample(tokens: list[int], log_probs: list[float], finish_reason: str = "stop") -> Any:
    """A CompletionOutput, its log-probs collected as vLLM does."""
    flat = FlatLogprobs()
    for token, log_prob in zip(tokens, log_probs, strict=True):
        append_logprobs_for_next_position(flat, [token], [log_prob], itertools.repeat(None), 1, 0)
    return SimpleNamespace(token_ids=tokens, logprobs=flat, finish_reason=finish_reason)


@pytest.mark.parametrize(
    ("tokens", "log_probs", "finish_reason"),
    [([11, 12, 0, 13], [-0.1, -2.5, 0.0, -1e-8], "stop"), ([5], [-0.7], "length"), ([], [], "length")],
)
def test_a_response_becomes_the_experience_that_openrlhf_makes_of_lists(
    tokens: list[int], log_probs: list[float], finish_reason: str
) -> None:
    lists = {
        "prompt": "what",
        "label": "7",
        "observation_tokens": PROMPT + tokens,
        "action_ranges": [(3, 3 + len(tokens))],
        "rollout_log_probs": [0.0] * 3 + log_probs,
        "truncated": finish_reason == "length",
        "extra_logs": {"weight_version": 4},
    }
    theirs = DCPOSamplesGenerator._process_response_into_experience(None, lists, max_len=7)  # type: ignore[arg-type]
    ours = experience(response(PROMPT, sample(tokens, log_probs, finish_reason), 4), "what", "7", max_len=7)
    assert_equal_values(vars(ours), vars(theirs))
    assert (ours.sequences.dtype, ours.attention_mask.dtype, ours.action_mask.dtype) == (torch.int32, *[torch.bool] * 2)


def assert_equal_values(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Of tokens and masks the values alone: ours are smaller."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert_equal_values(ours[name], value)
        elif isinstance(value, torch.Tensor):
            assert ours[name].shape == value.shape and torch.equal(ours[name].to(value.dtype), value), name
            assert ours[name].is_floating_point() == value.is_floating_point(), name
        else:
            assert ours[name] == value, name


def test_an_experience_has_memory_of_its_own() -> None:
    """Ray's arrays are read-only pages of its store."""
    arrays = response(PROMPT, sample([11], [-0.5]), 0)
    for array in (arrays.tokens, arrays.log_probs):
        array.flags.writeable = False
    made = experience(arrays, "", "", max_len=9)
    made.sequences[0, 0], made.rollout_log_probs[0, 0] = 1, -1.0
    assert arrays.tokens.tolist() == [*PROMPT, 11] and arrays.log_probs.tolist() == [np.float32(-0.5)]


def test_a_steps_further_prompts_have_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def begin(requests: list[dict[str, Any]], **_: Any) -> Any:
        asked.extend(request["sampling_params"].seed for request in requests)
        groups = [[response(PROMPT, sample([11], [-0.5]), 0)] for _ in requests]
        return SimpleNamespace(answers=lambda: groups)

    pool = SimpleNamespace(begin=begin, wait=lambda _: None)
    monkeypatch.setattr(generator.EnginePool, "of", lambda _: pool)
    fake: Any = SimpleNamespace(
        tokenizer=lambda text, **_: {"input_ids": [PROMPT] * len(text)},
        seed=1,
        vllm_engines=[],
        timeout_s=1.0,
        stop_token_ids=[0],
    )
    fake._sampling_params = lambda **kwargs: DCPOSamplesGenerator._sampling_params(fake, **kwargs)
    for first, count in ((0, 3), (3, 2)):
        said = {"step": 7, "n_samples": 1, "max_new_tokens": 4, "max_len": 9}
        begun = DCPOSamplesGenerator.begin(fake, ["a"] * count, ["7"] * count, **said, first=first)
        made = DCPOSamplesGenerator.finish(fake, begun)
        assert len(made) == count
    assert asked == [request_seed(1, 7, index) for index in range(5)]
