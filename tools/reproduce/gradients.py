"""Theorem 3.1 on the small model: weights of tokens against weights of sequences, by sums over every response.

The regulariser's gradient is g = E[R mean_t grad log pi(o_t)] over responses of pi^T. From responses of pi it is
estimated with prod_t rho_t on the whole response (unbiased), with rho_t on each token (DCPO), or with none. The policy
is the model held to legal words: of an answer the first numbers are given, n are left to place in any order, each with
either sign, n! 2^n responses in all, so that means and variances are sums without noise. What is left to go and the
end are words without a choice, so without a gradient; they change |o| alone, which is one for all responses.
The gradient is that of the output layer: in it, as in training, all contexts move the same numbers (in a table of
logits each would have its own), and a response's is a sum of outer products, whose norms need no more than their dots.
"""

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tools.reproduce.tasks import SIGNS

TEMPERATURES = (0.8, 1.2, 2.0)
LEFT = (2, 3, 4, 5, 6)
"""n: numbers that are left to place, tokens with a choice."""
PROBLEMS, SEED, BATCH = 10, 1, 512
FILE, DIGITS = "gradients.json", 5
HOW: dict[str, Any] = {
    "task": asdict(SIGNS),
    "temperatures": list(TEMPERATURES),
    "left": list(LEFT),
    "problems": PROBLEMS,
    "seed": SEED,
}
"""Numbers of another task or other constants are not read."""

Tokens = Float[Tensor, "response token"]
Weight = Callable[[Tokens], Tokens]
"""log rho -> weight of each token."""
WEIGHTS: dict[str, Weight] = {
    "sequence": lambda log_rho: log_rho.sum(1, keepdim=True).exp().expand_as(log_rho),
    "token": lambda log_rho: log_rho.exp(),
    "none": torch.ones_like,
}


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Every response of a policy, once; float64."""

    logits: Float[Tensor, "response token word"]
    """Of the words that may follow, -inf elsewhere."""
    chosen: Int[Tensor, "response token"]
    hidden: Float[Tensor, "response token width"]
    """What the output layer sees."""
    right: Bool[Tensor, " response"]
    """R."""

    def log_pi(self, temperature: float = 1.0) -> Tokens:
        return _log_softmax_of(self.logits, self.chosen, temperature)


def _log_softmax_of(logits: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, chosen[..., None])[..., 0]


def compare(responses: Responses, temperature: float) -> dict[str, dict[str, float]]:
    """Of each weight, as shares of |g|: bias and length of the mean, standard deviation of one response; cosine with g.

    effective: (E w)^2 / E w^2 over responses and their tokens, 1 for equal weights; effective_right: over right ones.
    """
    log_pi = responses.log_pi()
    log_rho = responses.log_pi(temperature) - log_pi
    pi, drawn = log_pi.sum(1).exp(), (log_pi + log_rho).sum(1).exp()  # of whole responses, at T = 1 and at T
    kept, length = responses.right, log_pi.shape[1]
    hidden, logits = responses.hidden[kept], responses.logits[kept]
    score = torch.nn.functional.one_hot(responses.chosen[kept], logits.shape[-1]) - logits.softmax(-1)
    dots = (score @ score.mT) * (hidden @ hidden.mT)  # of the gradients of a response's tokens

    def mean(probability: Tensor, weight: Tensor) -> Tensor:
        """E[R mean_t w_t grad log pi(o_t)], [word, width]."""
        return torch.einsum("rt,rtv,rtd->vd", probability[kept, None] * weight[kept] / length, score, hidden)

    g = mean(drawn, torch.ones_like(log_rho))
    found = {}
    for name, weight_of in WEIGHTS.items():
        weight = weight_of(log_rho)
        estimate, own = mean(pi, weight), weight[kept] / length
        square = torch.einsum("r,rt,rtu,ru->", pi[kept], own, dots, own)
        variance = square - estimate.square().sum()  # trace of the covariance
        found[name] = {
            "bias": float((estimate - g).norm() / g.norm()),
            "cosine": float((estimate * g).sum() / (estimate.norm() * g.norm())),
            "size": float(estimate.norm() / g.norm()),
            "deviation": float(variance.clamp_min(0.0).sqrt() / g.norm()),
            "effective": _effective(pi, weight),
            "effective_right": _effective(pi[kept], weight[kept]),
        }
    return found


def _effective(probability: Tensor, weight: Tensor) -> float:
    return float((probability @ weight.mean(1)) ** 2 / (probability.sum() * (probability @ weight.square().mean(1))))


# --- every response ---------------------------------------------------------------------------------------------------


def is_number(word: str) -> bool:
    return word[0] in "+-"


def endings(trace: Sequence[str], left: int) -> Iterator[list[str]]:
    """Every way to end an exact answer anew from its last `left` numbers on; the last sign changes fastest."""
    places = [i for i, word in enumerate(trace) if is_number(word)]
    target, start = sum(int(trace[i]) for i in places), places[-left]
    for order in itertools.permutations(trace[i][1:] for i in places[-left:]):
        for signs in itertools.product("+-", repeat=left):
            signed = iter(zip(signs, order, strict=True))
            to_go, words = target - sum(int(trace[i]) for i in places[:-left]), []
            for word in trace[start:]:
                if is_number(word):
                    words.append("".join(next(signed)))
                    to_go -= int(words[-1])
                else:
                    words.append(f"={to_go}")
            yield words


@torch.no_grad()
def respond(
    model: Any, tokenizer: Any, problem: str, trace: Sequence[str], *, left: int
) -> tuple[Responses, dict[float, float]]:
    """The responses to a problem and the start of an exact answer, and T -> what the free model's pi^T gives to them.

    That share is of the numbers; the words between, which have no choice here, are given. One that the vocabulary
    lacks, a rest too large to be written, is its unknown word.
    """
    texts = list(endings(trace, left))
    start = len(trace) - len(texts[0])
    places = [i for i, word in enumerate(trace[start:]) if is_number(word)]
    words = [f"{sign}{word[1:]}" for word in trace[start:] if is_number(word) for sign in "+-"]
    given = [*problem.split(), *trace[:start]]
    contexts = [" ".join([given[-1], *text[: places[-1]]]) for text in texts[::2]]  # each of two last signs
    tokens = torch.tensor(tokenizer(contexts)["input_ids"])
    hidden = _hidden(model, tokenizer.encode(" ".join(given[:-1])), tokens)[:, places].repeat_interleave(2, 0)
    every = hidden @ model.lm_head.weight.T

    index = {word: i for i, word in enumerate(words)}
    chosen = torch.tensor([[index[text[i]] for i in places] for text in texts])
    number = torch.nn.functional.one_hot(chosen // 2, left)
    placed = (number.cumsum(1) - number).bool().repeat_interleave(2, -1)
    ids = torch.tensor(tokenizer.encode(" ".join(words)))
    share = {t: float(_log_softmax_of(every, ids[chosen], t).double().sum(1).exp().sum()) for t in (1.0, *TEMPERATURES)}
    responses = Responses(
        logits=every[..., ids].double().masked_fill(placed, -torch.inf),
        chosen=chosen,
        hidden=hidden.double(),
        right=torch.tensor([SIGNS.right(problem, " ".join([*trace[:start], *text])) for text in texts]),
    )
    return responses, share


def _hidden(model: Any, shared: Sequence[int], tokens: Int[Tensor, "row token"]) -> Float[Tensor, "row token width"]:
    """The last layer's output at `tokens`, each row of which follows `shared`, which is computed once."""
    before = model.model(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
    found = []
    for rows in tokens.split(BATCH):
        past = copy.deepcopy(before)
        past.batch_repeat_interleave(len(rows))
        found.append(model.model(input_ids=rows, past_key_values=past, use_cache=True).last_hidden_state)
    return torch.cat(found)


# --- the numbers of the table -----------------------------------------------------------------------------------------


def measure(folder: Path) -> list[dict[str, Any]]:
    """A line for each n, T and weight: the numbers of `compare` and the free model's share, each a list over problems.

    The problems are training problems; with each n the same ones and the same answers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(SEED)
    every = [json.loads(line)["problem"] for line in (folder / "train.jsonl").read_text().splitlines()]
    asked = [(problem, SIGNS.trace(problem, rng).split()) for problem in rng.sample(every, PROBLEMS)]
    lines: dict[tuple[int, float, str], dict[str, Any]] = {}
    for left in LEFT:
        for problem, trace in asked:
            responses, share = respond(model, tokenizer, problem, trace, left=left)
            for t in TEMPERATURES:
                for name, numbers in compare(responses, t).items():
                    line = lines.setdefault((left, t, name), {"left": left, "temperature": t, "weight": name})
                    for key, value in (numbers | {"share": share[t], "share_at_1": share[1.0]}).items():
                        line.setdefault(key, []).append(float(f"{value:.{DIGITS}g}"))
    return list(lines.values())


def write(folder: Path, about: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    """Into the folder's gradients.json, a line of text a line."""
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps(about | {"how": HOW})
    (folder / FILE).write_text(f'{{"about": {head},\n"lines": [\n{",\n".join(map(json.dumps, lines))}\n]}}\n')


def load(folder: Path) -> list[dict[str, Any]] | None:
    """The committed lines; None where there are none, or they are of another task or other constants."""
    file = folder / FILE
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    return found["lines"] if found["about"].get("how") == HOW else None


def machine(folder: Path) -> str:
    """Where the folder's numbers were made, and in how many minutes; "-" where there are none."""
    file = folder / FILE
    if not file.is_file():
        return "-"
    about = json.loads(file.read_text())["about"]
    return f"{about['machine']}, {about['minutes']:.0f} minutes"
