"""The pure functions reproduce numbers that the authors' own functions computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dcpo_openrlhf import objectives
from dcpo_openrlhf.controller import EntropyController

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "dcpo_reference.json"
CASES = json.loads(GOLDEN.read_text())["cases"] if GOLDEN.is_file() else []
# The authors' success rate was divided in float32, relative error up to 6e-8, and their means add 1e-8 below.
TOLERANCE = {"rtol": 0.0, "atol": 1e-6}

pytestmark = pytest.mark.skipif(not CASES, reason=f"needs {GOLDEN.name} in shared/golden beside the repository")


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_golden_case(case):
    success, mask, old_logp = tensor(case["success"]), tensor(case["mask"]), tensor(case["old_logp"])
    success_rate = success.mean().item()
    controller = EntropyController(
        target_entropy=case["target_entropy"],
        temperature_low=0.8,
        temperature_high=1.2,
        alpha_schedule="reference",
        alpha_max=0.1,
        temperature_rule="switch",
        entropy_source="lagged_sampled",
    )
    controller.step(0.0, case["lagged_entropy"], success_rate)
    decision = controller.step(99.0, case["sampled_entropy_update"], success_rate)
    assert decision.entropy == case["lagged_entropy"]
    assert decision.temperature == case["temperature"]
    assert success_rate == pytest.approx(case["success_rate"], abs=1e-6)
    assert decision.alpha == pytest.approx(case["alpha"], abs=1e-6)
    assert objectives.mixing_weights(alpha=decision.alpha, mixing="convex")[1] == pytest.approx(
        case["convex_weight"], abs=1e-6
    )

    advantage = objectives.group_advantage(reward=success, group_size=case["group_size"])
    golden_advantage = tensor(case["group_advantage"])
    torch.testing.assert_close(advantage[:, None] * mask, golden_advantage * mask, **TOLERANCE)
    mixed = objectives.mixed_advantage(
        group_advantage=advantage,
        success=success,
        target_ratio=objectives.target_ratio(
            old_logp=old_logp, tempered_logp=tensor(case["tempered_old_logp"]), mask=mask
        ),
        alpha=decision.alpha,
        mixing="convex",
    )
    torch.testing.assert_close(mixed * mask, tensor(case["mixed_advantage"]) * mask, **TOLERANCE)

    result = objectives.clipped_surrogate(
        logp=tensor(case["logp"]),
        old_logp=old_logp,
        advantage=mixed,
        mask=mask,
        clip_low=case["clip"][0],
        clip_high=case["clip"][1],
        dual_clip=case["dual_clip"],
        aggregation="token_mean",
    )
    assert result.loss.item() == pytest.approx(case["token_mean_loss"], abs=1e-6)
    # Theirs counts both linear bounds as "high" and the dual clip as "low"; ours names all three.
    both = result.clip_fraction_high + result.clip_fraction_low
    assert both.item() == pytest.approx(case["clip_fraction_high"], abs=1e-6)
    assert result.dual_clip_fraction.item() == pytest.approx(case["clip_fraction_low"], abs=1e-6)
    assert result.approx_kl.item() == pytest.approx(case["approx_kl"], abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_golden_sampled_entropy_is_minus_the_mean_logp(case):
    mask = tensor(case["mask"])
    sampled = -(tensor(case["logp"]) * mask).sum() / mask.sum()
    assert sampled.item() == pytest.approx(case["sampled_entropy_update"], abs=1e-6)
