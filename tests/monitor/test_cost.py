"""What a step costs, by hand: tokens per second, FLOPs of the model, idle shares."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcpo_openrlhf.monitor.cost import Cost
from dcpo_openrlhf.policy import peaks
from dcpo_openrlhf.recipe.families import Sizes

CONFIG = Path(__file__).parents[1] / "model_configs" / "Qwen2.5-7B.json"
SECONDS = {"time/rollout": 2.0, "time/token_stats": 1.0, "time/train": 4.0, "time/step": 10.0}


def step(prompts: list[int], responses: list[int]) -> list[Any]:
    """One update of rows of these lengths, padded on the left."""
    total = max(p + r for p, r in zip(prompts, responses, strict=True))
    mask = torch.stack([torch.arange(total) >= total - p - r for p, r in zip(prompts, responses, strict=True)])
    return [SimpleNamespace(attention_mask=mask, response_length=torch.tensor(responses), aside=False)]


def cost(**changes: Any) -> Cost:
    made = Cost(
        sizes=Sizes.of(json.loads(CONFIG.read_text())),
        peak_flops=1e12,
        training_devices=4,
        engine_devices=2,
        group_size=2,
        share_prompts=True,
    )
    return replace(made, **changes)


def test_metrics_by_hand() -> None:
    found = cost().metrics(step([3, 3, 5, 5], [2, 4, 1, 6]), SECONDS)
    assert found["cost/generation_tokens_per_second"] == 13 / 2 / 2
    assert found["cost/training_tokens_per_second"] == 29 / 5 / 4
    assert found["cost/engine_idle"] == pytest.approx(0.8) and found["cost/trainer_idle"] == pytest.approx(0.5)
    active = 7.0706e9  # parameters that a token meets; 28 layers, queries of 3584
    tokens, pairs = 3 + 5 + 13, (25 + 49 - 9) + (36 + 121 - 25)
    assert found["cost/mfu"] == pytest.approx(4 * (2 * active * tokens + 2 * 28 * 3584 * pairs) / 5 / 4e12, rel=1e-4)
    unshared = cost(share_prompts=False).metrics(step([3, 3, 5, 5], [2, 4, 1, 6]), SECONDS)
    assert unshared["cost/mfu"] == pytest.approx(found["cost/mfu"] * 29 / 21, rel=1e-3)


def test_groups_that_are_left_are_generated_and_seen_and_not_trained_on() -> None:
    trained, left = step([3, 3, 5, 5], [2, 4, 1, 6]), step([4, 4], [3, 2])
    alone, as_if_trained = (cost().metrics(e, SECONDS) for e in (trained, left))
    left[0].aside = True
    both = cost().metrics([*trained, *left], SECONDS)
    assert both["cost/generation_tokens_per_second"] == (13 + 5) / 2 / 2
    assert both["cost/training_tokens_per_second"] == alone["cost/training_tokens_per_second"]
    assert both["cost/mfu"] == pytest.approx(
        alone["cost/mfu"] + as_if_trained["cost/mfu"] / 4
    )  # a forward, of 4 passes


def test_what_engines_did_while_the_step_before_trained_is_their_time_too() -> None:
    found = cost().metrics(step([3, 3], [2, 4]), SECONDS | {"time/generation": 6.0})
    assert found["cost/generation_tokens_per_second"] == 6 / (2 + 6) / 2
    assert found["cost/engine_idle"] == pytest.approx(0.2) and found["cost/trainer_idle"] == pytest.approx(0.5)
    longer = cost().metrics(step([3, 3], [2, 4]), SECONDS | {"time/generation": 12.0})  # than this step, which waited
    assert longer["cost/engine_idle"] == 0.0


@pytest.mark.parametrize("unknown", ["sizes", "peak_flops"])
def test_no_utilisation_without_a_known_peak_or_model(unknown: str) -> None:
    assert "cost/mfu" not in cost(**{unknown: None}).metrics(step([1, 1], [1, 1]), SECONDS)


def test_peaks_are_those_of_the_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA A800-SXM4-80GB": 312e12, "NVIDIA H200": 989e12, "NVIDIA H20": 148e12, "NVIDIA H100 PCIe": 756e12}
    for name, peak in {**names, "Another": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peaks.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
        assert peaks.peak_flops(torch.device("cuda"), torch.float32) is None
    measured = peaks.peak_flops(torch.device("cpu"), torch.float32)
    assert measured is not None and measured > 1e8
