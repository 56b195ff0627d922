"""Prompts: arithmetic splits, JSONL errors with line numbers, templates, the stream and its resume, length check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcpo_openrlhf.rollout.chat import render
from dcpo_openrlhf.rollout.tasks import (
    Problem,
    Prompt,
    PromptStream,
    PromptTemplate,
    TaskError,
    arithmetic,
    check_prompt_lengths,
    load_jsonl,
    prompt_template,
)
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
GOOD = {"id": "a", "problem": "1+1?", "answer": "2", "source": "test"}
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


# --- JSONL -----------------------------------------------------------------------------------------------------------


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_load_jsonl_reads_problems(tmp_path):
    rows = [GOOD, {**GOOD, "id": "b", "problem": "line\u2028separator \\boxed{}", "source": "", "extra": 1}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")  # no newline at the end
    assert load_jsonl(path) == [
        PROBLEM,
        Problem("b", "line\u2028separator \\boxed{}", "2", "", metadata={"extra": 1}),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"id": "b", ', "not JSON"),
        ("", "not JSON"),
        ("[1]", "list instead of an object"),
        ({"id": "b", "problem": "1+1?", "source": "test"}, "missing answer"),
        (
            {"id": "b", "prompt": [{"role": "user", "content": "1+1?"}], "answer": "2", "source": "test"},
            r"missing problem; the keys are id, .* \(prompt may be it: python -m tools.prepare_data writes",
        ),
        ({**GOOD, "id": "b", "answer": 2}, r"answer is 2 \(int\); write it as a string"),
        ({**GOOD, "id": "b", "problem": " "}, "problem is empty"),
        (GOOD, "id 'a' is already on line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = write(tmp_path / "data.jsonl", GOOD, bad, {**GOOD, "id": "c"})
    with pytest.raises(TaskError, match=f"data.jsonl:2: .*{message}"):
        load_jsonl(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(TaskError, match=r"data\.jsonl:2: not JSON in UTF-8"):
        load_jsonl(path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(TaskError, match=r"none\.jsonl: cannot be read: No such file"):
        load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="cannot be read"):
        load_jsonl(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(TaskError, match=r"empty\.jsonl: is empty"):
        load_jsonl(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("name", "rows"), [("gsm8k", 1319), ("math500", 500), ("minerva_math", 272), ("train_dapo17k", 17398)]
)
def test_real_files_load(name, rows):
    if not DATA.exists():
        pytest.skip("shared/data is not beside the repository")
    assert len(load_jsonl(DATA / f"{name}.jsonl")) == rows


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


# --- length check ----------------------------------------------------------------------------------------------------


def test_prompt_lengths_count_the_response():
    tokenizer = make_tokenizer()
    texts = ["1234", "123456789", "12345678"]
    prompts = [Prompt(Problem(f"p{i}", text, "0", ""), text) for i, text in enumerate(texts)]
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == [4, 9, 8]
    assert check_prompt_lengths(prompts, tokenizer=tokenizer, context=20, max_new_tokens=11) == 9
    with pytest.raises(TaskError, match=r"'p1' has 9 tokens, above the limit of 8 = context 20 .* 12; 1 of 3 prompts"):
        check_prompt_lengths(prompts, tokenizer=tokenizer, context=20, max_new_tokens=12)
    with pytest.raises(TaskError, match=r"'p1' has 9 tokens, .* 2 of 3 prompts are too long, the longest has 9"):
        check_prompt_lengths(prompts, tokenizer=tokenizer, context=20, max_new_tokens=13)


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


def test_order_depends_on_the_seed_and_the_ids_alone():
    assert ids(stream().take(20)) == ids(stream(reverse=True).take(20)) == ids(stream(suffix="!").take(20))
    assert ids(stream().take(20)) != ids(stream(seed=1).take(20))


def test_batch_size_does_not_change_the_order():
    source = stream()
    in_batches = [name for n in (3, 5, 1, 11) for name in ids(source.take(n))]
    assert in_batches == ids(stream().take(20))


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
