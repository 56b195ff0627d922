"""A real model: SmolLM2-135M's logits are those of transformers, in fp32, at tp 1 and 3 (it has 9 heads)."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcpo_openrlhf.policy.megatron.mesh import tensor_group
from dcpo_openrlhf.policy.packing import Packed
from dcpo_openrlhf.policy.rows import Rows
from tests.distributed import run_distributed
from tests.policy.megatron.common import make_policy, make_step
from tools.smollm2 import ensure_smollm2

TEXTS = ["What is 3 + 4? Answer with only the number.", "The capital of France is Paris. The capital of Italy is"]


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_smollm2()


def _rows(path: Path) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    mask = encoded["attention_mask"].bool()
    return Rows(encoded["input_ids"], mask, mask[:, 1:])


def _logits(rank: int, world_size: int, path: Path) -> Tensor:
    """[actions, vocabulary], every position but the last of each row, gathered over the shards."""
    policy = make_policy(path, rank=rank, world_size=world_size, tensor=world_size)
    found: list[Tensor] = []

    def collect(_: Packed, logits: Tensor) -> tuple[Tensor, Tensor, dict]:
        shards = [torch.empty_like(logits) for _ in range(world_size)]
        dist.all_gather(shards, logits.contiguous(), group=tensor_group())
        found.append(torch.cat(shards, -1)[:, : policy.shape.vocab_size])
        return logits.new_zeros(()), torch.zeros((), dtype=torch.int), {}

    step = make_step(policy, micro_batch_size=1)
    with torch.no_grad():
        step._run(step._packs(_rows(path)), collect, forward_only=True)
    return torch.cat(found) if rank == 0 else torch.zeros(())


@pytest.mark.parametrize("tensor", [1, 3])
def test_logits_are_those_of_transformers(model: Path, tensor: int) -> None:
    rows = _rows(model)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = hf(rows.sequences, attention_mask=rows.attention_mask.long()).logits[:, :-1][rows.action_mask]
    ours = run_distributed(_logits, tensor, model)[0]
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) < 1e-3
