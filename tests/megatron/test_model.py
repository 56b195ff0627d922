"""The Megatron policy gives the numbers of the Hugging Face model it came from; its weights come back to the bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from dcpo_openrlhf.megatron.model import HFWeights, hf_tensors
from tests.distributed import run_distributed
from tests.megatron.common import make_policy, make_step, random_rows
from tests.tiny import make_tiny_model


def _statistics(rank: int, world_size: int, path: Path, tensor: int):
    policy, mesh = make_policy(path, rank=rank, world_size=world_size, tensor=tensor)
    step = make_step(policy, mesh)
    stats = step.token_statistics(random_rows(), temperatures=[0.8, 1.2])
    weights = {name: value.clone() for name, value in hf_tensors(policy)}
    return stats, weights


def _hf_statistics(path: Path):
    rows = random_rows()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(rows.sequences, attention_mask=rows.attention_mask.long()).logits[:, :-1].double()
    logp = logits.log_softmax(-1)
    pick = rows.sequences[:, 1:, None]
    tempered = [(logits / t).log_softmax(-1).gather(-1, pick)[..., 0] for t in (0.8, 1.2)]
    mask = rows.action_mask
    return {
        "logp": logp.gather(-1, pick)[..., 0] * mask,
        "entropy": -(logp.exp() * logp).sum(-1) * mask,
        "tempered_logp": torch.stack(tempered, -1) * mask[..., None],
    }


CASES = [
    ("llama", 1, True),
    ("llama", 2, True),
    ("llama", 2, False),
    ("llama", 4, True),
    ("qwen2", 2, True),
    ("qwen3", 2, False),
]


@pytest.mark.parametrize(("architecture", "tensor", "tie"), CASES)
def test_statistics_and_weights_are_those_of_transformers(
    tmp_path: Path, architecture: str, tensor: int, tie: bool
) -> None:
    path = make_tiny_model(tmp_path, architecture=architecture, kv_heads=4, tie=tie)
    results = run_distributed(_statistics, tensor, path, tensor)
    expected = _hf_statistics(path)
    for stats, _ in results:
        for name, value in expected.items():
            torch.testing.assert_close(stats[name].double(), value, atol=1e-4, rtol=0)
    hf = HFWeights(path)
    weights = results[0][1]
    assert ("lm_head.weight" in weights) == (not tie)
    assert set(weights) == set(hf._file_of) - ({"lm_head.weight"} if tie else set())
    for name, value in weights.items():
        assert torch.equal(value, hf[name]), name
    assert not dist.is_initialized()
