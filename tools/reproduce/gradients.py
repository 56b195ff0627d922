"""Theorem 3.1 on the small model: weights of tokens against weights of sequences, as bias and variance of a gradient.

The regulariser's gradient is g = E[R mean_t grad log pi(o_t)] over responses of pi^T. From responses of pi it is
estimated with prod_t rho_t on the whole response (unbiased), with rho_t on each token (DCPO), or with none. The
gradient is that of the output layer; numbers come from independent halves of many samples: noise adds no bias.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.reproduce.small_model import sample
from tools.reproduce.tasks import TASK, right

TEMPERATURES = (0.8, 1.2, 2.0)
SAMPLES, BATCH = 8192, 512
"""Responses of pi, and of each pi^T."""

Weight = Callable[[Tensor, Tensor], Tensor]
"""(log rho, mask) [rows, time] -> weight of each token."""
WEIGHTS: dict[str, Weight] = {
    "sequence": lambda log_rho, mask: (log_rho * mask).sum(1, keepdim=True).exp().expand_as(log_rho),
    "token": lambda log_rho, mask: log_rho.exp(),
    "none": lambda log_rho, mask: torch.ones_like(log_rho),
}


@dataclass
class Mean:
    """Mean of vectors in two halves, their mean square, and that of the weights that they carry."""

    halves: Tensor
    count: int = 0
    square: float = 0.0
    weight: float = 0.0
    weight_square: float = 0.0

    def add(self, gradients: Callable[[Tensor], Tensor], squares: Tensor, weights: Tensor) -> None:
        """A batch, of which even rows go to one half. gradients: sum over the rows that a mask of them keeps."""
        even = torch.arange(len(squares)) % 2 == 0
        self.halves[0] += gradients(even)
        self.halves[1] += gradients(~even)
        self.count += len(squares)
        self.square += float(squares.sum())
        self.weight += float(weights.sum())
        self.weight_square += float(weights.square().sum())

    @property
    def means(self) -> Tensor:
        return self.halves / (self.count / 2)

    @property
    def effective(self) -> float:
        """(sum w)^2 / (n sum w^2) of the weights of right responses."""
        return self.weight**2 / (self.count * self.weight_square)

    @property
    def variance(self) -> float:
        """Trace of the covariance of one sample."""
        return self.square / self.count - dot(self.means[0], self.means[1])


def dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


@torch.no_grad()
def accumulate(
    model: Any, tokenizer: Any, prompts: Sequence[str], into: dict[tuple[str, float], Mean], drawn_at: float
) -> None:
    """One response to each prompt at T = `drawn_at`, added to every mean of `into`, (weight, T of rho) -> mean."""
    tokens, mask, _ = sample(model, tokenizer, prompts, new_tokens=TASK.new_tokens, temperature=drawn_at)
    texts = [tokenizer.decode(row[m], skip_special_tokens=True) for row, m in zip(tokens, mask, strict=True)]
    ended = ((tokens == tokenizer.eos_token_id) & mask).any(1)
    success = torch.tensor([right(p, t) for p, t in zip(prompts, texts, strict=True)]) & ended
    encoded = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    whole = torch.cat([encoded["input_ids"], tokens], 1)
    attention = torch.cat([encoded["attention_mask"], mask.long()], 1)
    positions = (attention.cumsum(1) - 1).clamp_min(0)
    out = model.model(input_ids=whole, attention_mask=attention, position_ids=positions)
    hidden = out.last_hidden_state[:, encoded["input_ids"].shape[1] - 1 : -1]
    logits = model.lm_head(hidden)
    score = torch.nn.functional.one_hot(tokens, logits.shape[-1]) - logits.softmax(-1)  # d log pi / d logits
    chosen = tokens[..., None]
    log_pi = logits.log_softmax(-1).gather(-1, chosen)[..., 0]
    share = (success[:, None] * mask / mask.sum(1, keepdim=True)).float()  # R / |o|
    inner = (score @ score.transpose(1, 2)) * (hidden @ hidden.transpose(1, 2))
    for (name, temperature), mean in into.items():
        log_rho = (logits / temperature).log_softmax(-1).gather(-1, chosen)[..., 0] - log_pi
        weight = WEIGHTS[name](log_rho, mask.float()) * share
        squares = torch.einsum("bt,btu,bu->b", weight, inner, weight)

        def gradients(kept: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.einsum("bt,btv,btd->vd", weight[kept], score[kept], hidden[kept])

        mean.add(gradients, squares, weight.sum(1))


def measure(folder: Path, *, seed: int = 1, samples: int = SAMPLES) -> list[dict[str, float | str]]:
    """For each T and weight: bias and standard deviation of a sample, relative to |g|; the effective sample share."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = [json.loads(line)["problem"] for line in (folder / "train.jsonl").read_text().splitlines()]
    shape = (2, *model.lm_head.weight.shape)
    estimates = {(name, t): Mean(torch.zeros(shape)) for t in TEMPERATURES for name in WEIGHTS}
    truth = {t: {("none", t): Mean(torch.zeros(shape))} for t in TEMPERATURES}
    for start in range(0, samples, BATCH):
        prompts = [problems[i % len(problems)] for i in range(start, start + BATCH)]
        accumulate(model, tokenizer, prompts, estimates, 1.0)
        for temperature, means in truth.items():
            accumulate(model, tokenizer, prompts, means, temperature)
    return [_line(name, t, estimates[name, t], truth[t]["none", t]) for t in TEMPERATURES for name in WEIGHTS]


def _line(name: str, temperature: float, estimate: Mean, truth: Mean) -> dict[str, float | str]:
    target, found = truth.means, estimate.means
    scale = max(dot(target[0], target[1]), 1e-30) ** 0.5
    off = dot(found[0] - target[0], found[1] - target[1])
    size = max(dot(found[0], found[1]), 1e-30) ** 0.5
    cross = (dot(found[0], target[1]) + dot(found[1], target[0])) / 2
    return {
        "weight": name,
        "temperature": temperature,
        "bias": max(off, 0.0) ** 0.5 / scale,
        "cosine": cross / (scale * size),
        "deviation": max(estimate.variance, 0.0) ** 0.5 / scale,
        "effective": estimate.effective,
        "samples": estimate.count,
    }
