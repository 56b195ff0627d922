"""Weights of tokens against weights of sequences: sums against loops over a tree, responses against the model."""

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpo_openrlhf import objectives
from tools.reproduce import again, gradients, runner, small_model, tables, tasks, theorem
from tools.reproduce.archive import RESULTS

TINY_TASK = tasks.Signs(largest=8, size=4, target=20, count=450)

# --- a tree made by hand ---------------------------------------------------------------------------------------------

WORDS, DEPTH, WIDTH = 4, 3, 5
ROUNDING = {"rel": 1e-9, "abs": 1e-9}


class Tree:
    """Three tokens of four words, none twice in succession; what the output layer sees is drawn for each context."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.layer = torch.randn(WORDS, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
        self.contexts = {
            c: torch.randn(WIDTH, generator=draw, dtype=torch.float64)
            for depth in range(DEPTH)
            for c in itertools.product(range(WORDS), repeat=depth)
        }
        self.right = {r: bool(torch.rand((), generator=draw) < 0.4) for r in self.responses()}

    def responses(self) -> list[tuple[int, ...]]:
        every = itertools.product(range(WORDS), repeat=DEPTH)
        return [r for r in every if all(a != b for a, b in itertools.pairwise(r))]

    def log_pi(self, response: tuple[int, ...], temperature: float) -> list[Tensor]:
        """Of each token, by a loop over the words."""
        found = []
        for i, word in enumerate(response):
            logits = self.layer @ self.contexts[response[:i]] / temperature
            legal = [w for w in range(WORDS) if not i or w != response[i - 1]]
            found.append(logits[word] - torch.log(sum((torch.exp(logits[w]) for w in legal), torch.zeros(()))))
        return found

    def scores(self, response: tuple[int, ...]) -> list[Tensor]:
        """grad log pi of each token, by autograd."""
        return [torch.autograd.grad(log_pi, self.layer)[0] for log_pi in self.log_pi(response, 1.0)]

    def enumerated(self) -> gradients.Responses:
        rows = self.responses()
        hidden = torch.stack([torch.stack([self.contexts[r[:i]] for i in range(DEPTH)]) for r in rows])
        logits = (hidden @ self.layer.T).detach()
        for i, r in enumerate(rows):
            for t in range(1, DEPTH):
                logits[i, t, r[t - 1]] = -math.inf
        right = torch.tensor([self.right[r] for r in rows])
        return gradients.Responses(logits=logits, chosen=torch.tensor(rows), hidden=hidden, right=right)


def looped(tree: Tree, temperature: float, weight: str) -> dict[str, float]:
    """The numbers of gradients.compare, response by response."""
    g, mean, square = torch.zeros(WORDS, WIDTH), torch.zeros(WORDS, WIDTH), 0.0
    sums = {False: [0.0, 0.0, 0.0], True: [0.0, 0.0, 0.0]}  # by R: 1, w and w^2 over responses and tokens
    for response in tree.responses():
        pi = [math.exp(x.item()) for x in tree.log_pi(response, 1.0)]
        tempered = [math.exp(x.item()) for x in tree.log_pi(response, temperature)]
        rho = [b / a for a, b in zip(pi, tempered, strict=True)]
        weights = {"sequence": [math.prod(rho)] * DEPTH, "token": rho, "none": [1.0] * DEPTH}[weight]
        each = tree.scores(response)
        plain = sum(each, torch.zeros(())) / DEPTH * tree.right[response]
        own = sum((w * e for w, e in zip(weights, each, strict=True)), torch.zeros(())) / DEPTH * tree.right[response]
        g = g + math.prod(tempered) * plain
        mean = mean + math.prod(pi) * own
        square += math.prod(pi) * float(own.square().sum())
        for i in range(3):
            sums[tree.right[response]][i] += math.prod(pi) * sum(w**i for w in weights) / DEPTH
    size = float(g.norm())
    one, first, second = (sum(pair) for pair in zip(*sums.values(), strict=True))
    return {
        "bias": float((mean - g).norm()) / size,
        "size": float(mean.norm()) / size,
        "cosine": float(torch.nn.functional.cosine_similarity(mean.flatten(), g.flatten(), dim=0)),
        "deviation": math.sqrt(square - float(mean.square().sum())) / size,
        "effective": first**2 / (one * second),
        "effective_right": sums[True][1] ** 2 / (sums[True][0] * sums[True][2]),
    }


@pytest.mark.parametrize("temperature", [0.5, 1.2, 3.0])
def test_sums_are_those_of_loops_over_a_tree(temperature: float) -> None:
    tree = Tree(seed=3)
    found = gradients.compare(tree.enumerated(), temperature)
    for weight in gradients.WEIGHTS:
        assert found[weight] == pytest.approx(looped(tree, temperature, weight), **ROUNDING), weight
    assert found["sequence"]["bias"] < 1e-9 and found["sequence"]["cosine"] == pytest.approx(1.0)
    assert found["token"]["bias"] > 0.01 and found["none"]["bias"] > 0.01
    assert found["none"]["effective"] == pytest.approx(1.0)


def test_a_tree_is_whole() -> None:
    responses = Tree(seed=4).enumerated()
    for temperature in (0.5, 1.0, 3.0):
        assert float(responses.log_pi(temperature).sum(1).exp().sum()) == pytest.approx(1.0)


def test_without_temperature_all_weights_are_one() -> None:
    for numbers in gradients.compare(Tree(seed=5).enumerated(), 1.0).values():
        assert numbers["bias"] < 1e-9 and numbers["effective"] == pytest.approx(1.0)


def test_weights_of_tokens_are_those_of_the_loss() -> None:
    """The product's advantage and surrogate: no group advantage, alpha = 1, every response with its probability."""
    tree, temperature = Tree(seed=6), 2.0
    rows = tree.responses()
    logp = torch.stack([torch.stack(tree.log_pi(r, 1.0)) for r in rows])
    tempered = torch.stack([torch.stack(tree.log_pi(r, temperature)) for r in rows]).detach()
    mask = torch.ones_like(logp, dtype=torch.bool)
    advantage = objectives.mixed_advantage(
        group_advantage=torch.zeros(len(rows), dtype=torch.float64),
        success=torch.tensor([float(tree.right[r]) for r in rows], dtype=torch.float64),
        target_ratio=objectives.target_ratio(tempered_logp=tempered, old_logp=logp.detach(), mask=mask),
        alpha=1.0,
        mixing="additive",
    )
    drawn_from: dict[str, Any] = {"weight": logp.detach().sum(1).exp()[:, None] / DEPTH * mask}
    sums = objectives.surrogate_terms(
        logp=logp, old_logp=logp.detach(), advantage=advantage, mask=mask, clip_low=0.2, clip_high=0.2, **drawn_from
    )
    (gradient,) = torch.autograd.grad(-sums.loss_sum, tree.layer)
    g = sum(
        (
            torch.exp(sum(tree.log_pi(r, temperature), torch.zeros(()))).detach() * e / DEPTH
            for r in rows
            if tree.right[r]
            for e in tree.scores(r)
        ),
        torch.zeros(()),
    )
    found = gradients.compare(tree.enumerated(), temperature)["token"]
    assert found["bias"] == pytest.approx(float((gradient - g).norm() / g.norm()), rel=1e-6)
    assert found["cosine"] == pytest.approx(float((gradient * g).sum() / (gradient.norm() * g.norm())), rel=1e-6)


# --- the responses of a model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[Any, Any, str, list[str]]]:
    """A model that has learned nothing, with wide logits; a problem and an exact answer."""
    tokenizer = small_model.make_tokenizer(TINY_TASK)
    setting = small_model.Setting(hidden=64, heads=2, kv_heads=1, layers=2, ffn=64)
    model = small_model.as_llama(small_model.make_model(setting, tokenizer)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    problem = TINY_TASK.problems()[0]
    yield model, tokenizer, problem, TINY_TASK.trace(problem, random.Random(1)).split()


def test_endings_of_an_answer() -> None:
    trace = ["+5", "+4", "=-4", "+2", "-6", "=0"]  # reach 5 with 2 4 5 6
    found = list(gradients.endings(trace, 2))
    assert len(found) == 8 and len(set(map(tuple, found))) == 8
    assert ["+2", "-6", "=0"] in found and ["-6", "+2", "=0"] in found and ["-2", "-6", "=4"] in found
    longer = list(gradients.endings(trace, 3))
    assert len(longer) == 48 and ["-6", "=6", "-4", "-2", "=12"] in longer


@pytest.mark.parametrize("left", [2, 3, 4])
def test_every_response_of_the_model_held_to_legal_words(asked: tuple[Any, Any, str, list[str]], left: int) -> None:
    model, tokenizer, problem, trace = asked
    responses, share = gradients.respond(model, tokenizer, problem, trace, left=left)
    assert len(responses.chosen) == math.factorial(left) * 2**left
    for temperature in (0.8, 1.0, 2.0):  # 1 where no response is missing or there twice
        assert float(responses.log_pi(temperature).sum(1).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    texts = list(gradients.endings(trace, left))
    start = len(trace) - len(texts[0])
    numbers = [word[1:] for word in trace[start:] if gradients.is_number(word)]
    log_pi, free = responses.log_pi(), 0.0
    for row, text in enumerate(texts):
        whole = [*problem.split(), *trace[:start], *text]
        assert bool(responses.right[row]) == TINY_TASK.right(problem, " ".join(whole[len(problem.split()) :]))
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(" ".join(whole))])).logits[0].double()
        places = [i for i, word in enumerate(text) if gradients.is_number(word)]
        still, log_free = list(numbers), 0.0
        for t, place in enumerate(places):
            at = logits[len(whole) - len(text) + place - 1]
            ids = [tokenizer.encode(sign + n)[0] for n in still for sign in "+-"]
            chosen = at[tokenizer.encode(text[place])[0]]
            assert float(log_pi[row, t]) == pytest.approx(float(chosen - at[ids].logsumexp(0)), abs=1e-4)
            log_free += float(chosen - at.logsumexp(0))
            still.remove(text[place][1:])
        free += math.exp(log_free)
    assert share[1.0] == pytest.approx(free, rel=1e-3)
    assert set(share) == {1.0, *gradients.TEMPERATURES}


def test_the_gradient_is_that_of_the_output_layer(asked: tuple[Any, Any, str, list[str]]) -> None:
    """Of log pi of a response, by autograd; what the layer sees is held."""
    model, tokenizer, problem, trace = asked
    responses, _ = gradients.respond(model, tokenizer, problem, trace, left=2)
    layer = model.lm_head.weight.detach().double().requires_grad_()
    numbers = [f"{sign}{word[1:]}" for word in trace if gradients.is_number(word) for sign in "+-"][-4:]
    ids = tokenizer.encode(" ".join(numbers))
    logits = (responses.hidden[5] @ layer.T)[:, ids]
    torch.testing.assert_close(logits[0], responses.logits[5, 0], rtol=1e-4, atol=1e-4)
    masked = logits.masked_fill(responses.logits[5].isinf(), -torch.inf)
    log_pi = masked.log_softmax(-1).gather(-1, responses.chosen[5][:, None]).sum()
    (gradient,) = torch.autograd.grad(log_pi, layer)
    score = torch.nn.functional.one_hot(responses.chosen[5], 4) - responses.logits[5].softmax(-1)
    torch.testing.assert_close(gradient[ids], score.T @ responses.hidden[5], rtol=1e-4, atol=1e-4)
    assert int((gradient.abs().sum(1) > 0).sum()) == len(ids), "the other words have none"


# --- the table -------------------------------------------------------------------------------------------------------


def lines(**of: float) -> list[dict[str, Any]]:
    """Three problems; sequences deviate n times as far as tokens; `of` replaces numbers of tokens."""
    found = []
    for n, t, weight in itertools.product((2, 3), (0.8, 2.0), gradients.WEIGHTS):
        token = {"bias": 0.1, "cosine": 0.95, "size": 1.25, "deviation": 2.0, "effective": 0.8} | of
        others = {"bias": 1e-8 if weight == "sequence" else 0.4, "cosine": 0.9, "size": 1.0, "deviation": 2.0 * n}
        numbers = token if weight == "token" else others | {"effective": 0.1}
        numbers |= {"effective_right": 0.5, "share": 0.5, "share_at_1": 0.9}
        spread = {key: [value, value * 1.001, value * 0.999] for key, value in numbers.items()}
        found.append({"left": n, "temperature": t, "weight": weight, **spread})
    return found


def test_the_table_tells_what_the_numbers_say() -> None:
    report = theorem.report("theorem_3_1", lines())
    assert [claim.verdict for claim in report.claims] == ["reproduced"] * 6
    assert "from n = 2 to 3: 2.00 to 3.00 at T = 0.8" in report.claims[0].because
    text = report.markdown()
    assert "from n = 2 to 3: 2.50 to 3.75 at T = 0.8" in report.claims[4].because
    assert "| 2 | token | 3 | 0.100 [0.100, 0.100] | 0.950 [" in text
    assert "up to N = 3200 at T = 0.8" in text, "(6^2 - 2^2) / 0.1^2"
    assert "| n |" in text and len(report.rows) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("of", "verdicts"),
    [
        ({"deviation": 4.5}, {theorem.LESS: "not reproduced"}),
        ({"deviation": 6.0}, {theorem.LESS: "not reproduced", theorem.STEADY: "not reproduced"}),
        ({"cosine": 0.85}, {theorem.ALIKE: "not reproduced"}),
        ({"cosine": 0.9}, {theorem.ALIKE: "undecided"}),
        ({"bias": 0.5}, {theorem.NEARER: "not reproduced"}),
        ({"size": 0.25}, {theorem.STEADY: "not reproduced"}),
        ({"effective": 0.05}, {theorem.EVEN: "not reproduced"}),
    ],
)
def test_the_table_tells_what_they_do_not_say(of: dict[str, float], verdicts: dict[str, str]) -> None:
    for claim in theorem.report("theorem_3_1", lines(**of)).claims:
        assert claim.verdict == verdicts.get(claim.text, "reproduced"), claim
        assert (claim.verdict == "reproduced") == (f"{claim.verdict} at T = 2, n = 2" not in claim.because)


def test_the_gap_has_to_grow() -> None:
    numbers = lines()
    for line in numbers:
        if line["weight"] == "sequence":
            line["deviation"] = [value / line["left"] for value in line["deviation"]]
    (claim,) = (c for c in theorem.report("theorem_3_1", numbers).claims if c.text == theorem.GROWS)
    assert claim.verdict == "undecided", "the same at every n"


def test_numbers_of_another_task_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tables.TABLES["theorem_3_1"]
    assert {claim.verdict for claim in table.report(tmp_path).claims} == {"not run yet"}
    gradients.write(tmp_path, {"machine": "-"}, lines())
    assert gradients.load(tmp_path) == lines()
    assert {claim.verdict for claim in table.report(tmp_path).claims} == {"reproduced"}
    monkeypatch.setattr(gradients, "HOW", gradients.HOW | {"task": "another"})
    assert gradients.load(tmp_path) is None
    assert {claim.verdict for claim in table.report(tmp_path).claims} == {"not run yet"}


def test_run_makes_the_numbers_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that has learned nothing, and fewer problems."""
    setting = small_model.Setting(hidden=64, heads=2, kv_heads=1, layers=1, ffn=64, batch=8, updates=1, look_every=1)
    small_model.make(tmp_path / "model", setting, tasks.SIGNS)
    monkeypatch.setattr(runner.archive, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "make_small_model", lambda name: tmp_path / "model")
    for name, value in (("LEFT", (2, 3)), ("PROBLEMS", 2)):
        monkeypatch.setattr(gradients, name, value)
    runner.make_gradients()
    found = gradients.load(tmp_path)
    assert found is not None and len(found) == 2 * len(gradients.TEMPERATURES) * len(gradients.WEIGHTS)
    for line in found:
        assert all(len(line[key]) == 2 for key in (*theorem.COLUMNS, "share", "share_at_1"))
        if line["weight"] == "sequence":
            assert max(line["bias"]) < 1e-5, "single precision of the model's forward"
    assert theorem.report("theorem_3_1", found).rows
    monkeypatch.setattr(gradients, "measure", lambda folder: pytest.fail("made again"))
    runner.make_gradients()


def test_what_was_made_again_lies_inside_or_not(tmp_path: Path) -> None:
    assert "**not run yet**" in again.theorem_table(tmp_path)
    gradients.write(tmp_path, {"machine": "one", "minutes": 4.6}, lines())
    assert "**not run yet**" in again.theorem_table(tmp_path)
    moved = lines()
    for line in moved:
        if line["weight"] == "token":
            line["bias"] = [10 * value for value in line["bias"]]
    gradients.write(again.folder("other", tmp_path), {"machine": "other", "minutes": 1.0}, moved)
    text = again.theorem_table(tmp_path)
    assert "| one, 5 minutes: intervals over problems that hold the mean of | other, 1 minutes |" in text
    for told in ("bias | 4 of 8", "cosine with g | 12 of 12", "claims that are told alike | 5 of 6"):
        assert f"| {told} |" in text, "what sequences have of bias is rounding; tokens are now no less biased than none"


def test_a_second_machines_sums_have_a_folder_of_their_own(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    made: list[Path] = []
    monkeypatch.setattr(runner.archive, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "machine", lambda model: "one core")
    monkeypatch.setattr(runner, "make_gradients", made.append)
    assert again.main([again.THEOREM, "--run"]) == 0
    assert made == [tmp_path / "again/one-core"]
    (tmp_path / "config.json").write_text("{}")
    for cell in (again.THEOREM, "dcpo-demo"):
        with pytest.raises(SystemExit):
            again.main([cell, "--run", "--model", str(tmp_path)])
        assert f"{cell} has another one" in capsys.readouterr().err


def test_committed_numbers_are_of_this_task() -> None:
    about = json.loads((RESULTS / gradients.FILE).read_text())["about"]
    assert about["how"] == gradients.HOW, "make them again: python -m tools.reproduce theorem_3_1 --run"
