"""Prompts: arithmetic splits, templates, the stream, the shares of its files, and its resume."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcpo_openrlhf.rollout.chat import render
from dcpo_openrlhf.rollout.tasks import (
    Fingerprint,
    Problem,
    Prompt,
    PromptStream,
    PromptTemplate,
    TaskError,
    arithmetic,
    fingerprint,
    prompt_template,
)
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem("a", "1+1?", "2", "test")


# --- arithmetic ------------------------------------------------------------------------------------------------------


def operands(problem: Problem) -> tuple[int, str, int]:
    a, op, b = problem.problem.removeprefix("What is ").removesuffix("? Answer with only the number.").split()
    return int(a), op, int(b)


@pytest.mark.parametrize(
    ("level", "total", "share"), [(1, 256, 0.41), (2, 2500, 0.22), (3, 10000, 0.22), (4, 30000, 0.22)]
)
def test_arithmetic_splits_cover_a_level_and_share_nothing(level, total, share):
    train = arithmetic(level=level, split="train", seed=3)
    heldout = arithmetic(level=level, split="heldout", seed=3)
    assert len({p.id for p in train + heldout}) == total
    assert share - 0.02 <= len(heldout) / total <= share + 0.03
    assert len(heldout) >= 100
    unordered = [{(op, frozenset((a, b))) for a, op, b in map(operands, split)} for split in (train, heldout)]
    assert not unordered[0] & unordered[1]
    assert all(p.difficulty == level for p in train)


@pytest.mark.parametrize("level", [1, 4])
def test_arithmetic_answers_are_right(level):
    for problem in arithmetic(level=level, split="heldout", seed=0):
        a, op, b = operands(problem)
        assert problem.answer == str(eval(f"{a}{op}{b}"))


def test_arithmetic_asks_in_the_words_of_the_demo():
    problems = {p.id: p.problem for p in arithmetic(level=1, split="train", seed=0)}
    problems |= {p.id: p.problem for p in arithmetic(level=1, split="heldout", seed=0)}
    assert problems["arithmetic-1-3+9"] == "What is 3 + 9? Answer with only the number."


def test_arithmetic_depends_on_the_seed_and_not_on_the_process():
    call = "[p.id for p in arithmetic(level=1, split='heldout', seed=5)]"
    code = f"from dcpo_openrlhf.rollout.tasks import arithmetic; print({call})"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    ]
    own = [p.id for p in arithmetic(level=1, split="heldout", seed=5)]
    assert runs[0] == runs[1] == f"{own}\n".encode()
    assert own != [p.id for p in arithmetic(level=1, split="heldout", seed=6)]


def test_a_prefix_of_the_heldout_split_is_a_fair_sample():
    first = [operands(p) for p in arithmetic(level=4, split="heldout", seed=0)[:300]]
    assert all(60 < sum(op == sign for _, op, _ in first) < 140 for sign in "+-*")
    assert 35 < sum(a for a, _, _ in first) / 300 < 64


@pytest.mark.parametrize("arguments", [{"level": 0}, {"level": 5}, {"split": "test"}])
def test_arithmetic_refuses_unknown_levels_and_splits(arguments):
    with pytest.raises(TaskError, match="must be"):
        arithmetic(**{"level": 1, "split": "train", "seed": 0, **arguments})


# --- templates -------------------------------------------------------------------------------------------------------


def test_templates_keep_literal_braces():
    assert prompt_template("plain").fill(r"\frac{1}{2} {problem}") == r"\frac{1}{2} {problem}"
    assert prompt_template(r"{problem} {x} \boxed{}").fill("Q") == r"Q {x} \boxed{}"
    paper = prompt_template("boxed_think").fill("Q")
    assert paper.startswith("Q You FIRST think about the reasoning process as an internal monologue and then provide")
    assert paper.endswith(r"within <think> </think> tags. The final answer MUST BE put in \boxed{}.")


@pytest.mark.parametrize("text", ["", "{Problem}", "{problem} {problem}"])
def test_a_template_holds_the_problem_once(text):
    with pytest.raises(TaskError, match="exactly once"):
        PromptTemplate(text)


def test_an_unknown_template_name_lists_the_known_ones():
    with pytest.raises(TaskError, match=r"'boxd'; take one of \['boxed_think', 'plain'\]"):
        prompt_template("boxd")


def test_render_wraps_the_filled_template_in_one_user_turn():
    arguments = {"tokenizer": make_tokenizer(), "template": PromptTemplate("Q: {problem}")}
    turn = "<|im_start|>user\nQ: 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert render(PROBLEM, **arguments) == turn
    assert render(PROBLEM, **arguments, system="S") == "<|im_start|>system\nS<|im_end|>\n" + turn
    assert render(PROBLEM, **arguments, chat=False) == "Q: 1+1?"


def test_render_refuses_what_it_cannot_place():
    tokenizer = make_tokenizer()
    with pytest.raises(TaskError, match="system message needs a chat template"):
        render(PROBLEM, tokenizer=tokenizer, template=PromptTemplate("{problem}"), system="S", chat=False)
    tokenizer.chat_template = None
    with pytest.raises(TaskError, match="no chat template; set chat to false"):
        render(PROBLEM, tokenizer=tokenizer, template=PromptTemplate("{problem}"))


# --- the stream ------------------------------------------------------------------------------------------------------


def stream(n: int = 7, *, seed: int = 0, reverse: bool = False, suffix: str = "") -> PromptStream:
    problems = [Problem(f"p{i}", f"{i}?", str(i), "") for i in range(n)][:: -1 if reverse else 1]
    return PromptStream(problems, prompts=[p.problem + suffix for p in problems], seed=seed)


def ids(prompts: list[Prompt]) -> list[str]:
    return [p.problem.id for p in prompts]


def test_each_epoch_is_a_fresh_permutation():
    source = stream()
    epochs = [ids(source.take(7)) for _ in range(4)]
    assert all(sorted(epoch) == [f"p{i}" for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (source.epoch, source.position) == (3, 7)


def test_texts_stay_with_their_problems():
    assert all(p.text == f"{p.problem.problem}!" for p in stream(suffix="!").take(20))


def test_the_order_is_that_of_sha256():
    def digest(salt: str, key: str) -> bytes:
        return hashlib.sha256(f"{salt}\0{key}".encode()).digest()

    expected = [
        key for e in (0, 1) for key in sorted((f"p{i}" for i in range(50)), key=lambda k: digest(f"stream/3/{e}", k))
    ]
    assert ids(stream(50, seed=3).take(100)) == expected


def test_order_depends_on_the_seed_and_the_ids_alone():
    assert ids(stream().take(20)) == ids(stream(reverse=True).take(20)) == ids(stream(suffix="!").take(20))
    assert ids(stream().take(20)) != ids(stream(seed=1).take(20))


def test_batch_size_does_not_change_the_order():
    source = stream()
    in_batches = [name for n in (3, 5, 1, 11) for name in ids(source.take(n))]
    assert in_batches == ids(stream().take(20))


@pytest.mark.parametrize("taken", [0, 3, 6, 7, 14])
def test_a_look_at_the_next_prompts_leaves_the_stream_where_it_is(taken):
    source = stream()
    source.take(taken)
    state = source.state_dict()
    seen = ids(source.peek(9))  # into the next epoch, and the one after
    assert source.state_dict() == state
    assert ids(source.take(9)) == seen == ids(stream().take(taken + 9))[taken:]


@pytest.mark.parametrize("taken", [0, 3, 7, 8, 14, 17])
def test_a_resumed_stream_continues_with_the_next_prompt(taken):
    whole = ids(stream().take(30))
    first = stream()
    first.take(taken)
    state = json.loads(json.dumps(first.state_dict()))
    second = stream(reverse=True)
    second.load_state_dict(state)
    assert ids(second.take(30 - taken)) == whole[taken:]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n": 8}, "the problems or their prompts changed"),
        ({"suffix": "!"}, "the problems or their prompts changed"),
        ({"seed": 1}, "the seed changed .seed 0 in the checkpoint, 1 now"),
    ],
)
def test_a_stream_of_other_prompts_is_not_resumed(other, message):
    with pytest.raises(TaskError, match=message):
        stream(**other).load_state_dict(stream().state_dict())


# --- shares of files -------------------------------------------------------------------------------------------------


def mixed(*shares: tuple[int, float], seed: int = 0) -> PromptStream:
    """Files of so many problems, a, b, ..., each with its weight."""
    problems = [
        Problem(f"{name}{i}", "?", "0", name) for name, (n, _) in zip("abcde", shares, strict=False) for i in range(n)
    ]
    return PromptStream(problems, prompts=["?"] * len(problems), seed=seed, shares=shares)


@pytest.mark.parametrize(
    "weights",
    [(1, 1), (3, 1), (0.7, 0.3), (0.1, 0.2, 0.7), (5, 3, 1, 1), (1, 1, 1, 1, 1), (1000, 1), (7, 5, 3, 2, 0.5)],
)
def test_every_file_has_its_share_of_any_number_of_prompts(weights):
    source = mixed(*((3, w) for w in weights))
    taken = dict.fromkeys("abcde"[: len(weights)], 0)
    bound = 1 - 1 / (2 * len(weights) - 2)
    for n in range(1, 1500):
        taken[next(source).problem.source] += 1
        for name, weight in zip(taken, weights, strict=True):
            assert abs(taken[name] - n * weight / sum(weights)) <= bound + 1e-9, (n, taken)


def test_each_file_is_permuted_anew_in_its_own_epochs():
    source = mixed((3, 3), (5, 1))
    taken = [next(source).problem for _ in range(40)]
    for name, n in (("a", 3), ("b", 5)):
        own = [p.id for p in taken if p.source == name]
        epochs = [own[i : i + n] for i in range(0, len(own) - n + 1, n)]
        assert all(len(set(epoch)) == n for epoch in epochs)
        assert name == "b" or len({tuple(epoch) for epoch in epochs}) > 1


def test_weights_are_shares_whatever_the_sizes():
    assert sum(p.problem.source == "a" for p in mixed((3, 1), (37, 1)).take(40)) == 20


@pytest.mark.parametrize("taken", [0, 1, 7, 33])
def test_a_resumed_mix_continues_with_the_next_prompt(taken):
    shares = ((3, 0.5), (5, 0.3), (2, 0.2))
    whole, first, second = ids(mixed(*shares).take(60)), mixed(*shares), mixed(*shares)
    first.take(taken)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert ids(second.take(60 - taken)) == whole[taken:]
    assert ids(mixed(*shares, seed=1).take(60)) != whole


@pytest.mark.parametrize("source", [stream(), mixed((3, 1), (5, 2))])
def test_a_copy_goes_on_by_itself(source):
    source.take(3)
    ahead = ids(copy.copy(source).take(30))
    assert ids(source.take(30)) == ahead


def test_a_mix_of_other_weights_is_not_resumed():
    state = mixed((3, 1), (5, 2)).state_dict()
    for other in (mixed((3, 1), (5, 3)), stream(8)):
        other.fingerprint = state["fingerprint"]
        with pytest.raises(TaskError, match=r"the weights of task\.train changed"):
            other.load_state_dict(state)


def test_a_checkpoint_from_before_files_stayed_on_the_disk_is_resumed():
    def now(suffix: str = "") -> PromptStream:
        problems = [Problem(f"p{i}", f"{i}?", str(i), "") for i in range(7)]
        return PromptStream(
            problems, prompts=[p.problem + suffix for p in problems], seed=0, rows_fingerprint="rows:0123456789abcdef"
        )

    earlier, later = stream(), now()
    earlier.take(3)
    later.load_state_dict(earlier.state_dict())
    assert ids(later.take(9)) == ids(earlier.take(9))
    with pytest.raises(TaskError, match="the problems or their prompts changed"):
        now("!").load_state_dict(earlier.state_dict())


def test_a_fingerprint_of_rows_tells_problems_and_prompts_apart():
    def mark(*problems: Problem, prompt: str = "1+1?") -> str:
        found = Fingerprint()
        for problem in problems:
            found.add(problem)
        return found.value(prompt)

    turns = ({"role": "user", "content": "1+1?"},)
    other = Problem("b", "2+2?", "4", "test")
    assert mark(PROBLEM, other) == mark(other, PROBLEM)
    marks = {
        mark(PROBLEM),
        mark(PROBLEM, prompt="Q: 1+1?"),
        mark(other),
        mark(Problem("a", "1+1?", "3", "test")),
        mark(Problem("b", "1+1?", "2", "test")),
        mark(Problem("a", "1+1?", "2", "test", messages=turns)),
        mark(Problem("a", "1+1?", "2", "test", messages=({"role": "system", "content": "S"}, *turns))),
    }
    assert len(marks) == 7 and all(":" in m for m in marks) and ":" not in fingerprint([Prompt(PROBLEM, "1+1?")])


def test_a_stream_refuses_bad_problems():
    problem = PROBLEM
    with pytest.raises(TaskError, match="at least one"):
        PromptStream([], prompts=[], seed=0)
    with pytest.raises(TaskError, match="not 2 for 1"):
        PromptStream([problem], prompts=["a", "b"], seed=0)
    with pytest.raises(TaskError, match="2 problems, 1 ids"):
        PromptStream([problem, problem], prompts=["a", "b"], seed=0)


def test_the_module_imports_neither_torch_nor_ray():
    code = "import sys, dcpo_openrlhf.rollout.tasks; print(*({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout == b"\n"
