"""A recipe's prompts: as many as its files hold, each file's share of every step, the same after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from dcpo_openrlhf import prompts
from dcpo_openrlhf.prompts import read_prompts
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.rollout.problems import TaskError
from tests.tiny import make_tokenizer


def write(file: Path, count: int, *, problem: str = "{}+1?") -> Path:
    rows = [{"id": f"r{i}", "problem": problem.format(i), "answer": i + 1, "source": file.stem} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(task: dict[str, Any], **more: Any) -> Recipe:
    rollout = {"max_prompt_tokens": 60, "max_new_tokens": 8}
    values = {"model": {"path": "unused"}, "task": {"template": "plain"} | task, "rollout": rollout}
    return Recipe.model_validate(values | more)


def test_a_step_has_the_shares_of_its_files(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 4), write(tmp_path / "b.jsonl", 40)
    weighted = recipe({"train": [{"path": a, "weight": 3}, {"path": b, "weight": 1}]})
    stream, _ = read_prompts(weighted, make_tokenizer())
    steps = [stream.take(8) for _ in range(5)]
    assert [sum(p.problem.source == "a" for p in step) for step in steps] == [6] * 5
    assert all(p.text.endswith(f"user\n{p.problem.problem}<|im_end|>\n<|im_start|>assistant\n") for p in steps[0])
    plain, _ = read_prompts(recipe({"train": [a, b]}), make_tokenizer())
    assert len({p.problem.id for p in plain.take(44)}) == 44

    state = json.loads(json.dumps(stream.state_dict()))
    again, _ = read_prompts(weighted, make_tokenizer())
    again.load_state_dict(state)
    assert again.take(50) == stream.take(50)
    for other in (
        recipe({"train": [{"path": a, "weight": 3}, {"path": b, "weight": 2}]}),
        recipe({"train": [{"path": a, "weight": 3}, {"path": b, "weight": 1}], "template": "Q: {problem}"}),
        recipe({"train": [{"path": a, "weight": 3}, {"path": b, "weight": 1}], "system": "S"}),
    ):
        with pytest.raises(TaskError, match="cannot resume the prompt stream"):
            read_prompts(other, make_tokenizer())[0].load_state_dict(state)
    write(b, 40, problem="{}+2?")
    with pytest.raises(TaskError, match="the problems or their prompts changed"):
        read_prompts(weighted, make_tokenizer())[0].load_state_dict(state)


def test_the_same_rows_in_another_form_resume_the_run(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 9)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (tmp_path / "a.json").write_text(json.dumps([{"q": row.pop("problem"), **row} for row in rows]))
    stream, _ = read_prompts(recipe({"train": file}), make_tokenizer())
    stream.take(4)
    other, _ = read_prompts(recipe({"train": tmp_path / "a.json", "fields": {"problem": "q"}}), make_tokenizer())
    other.load_state_dict(stream.state_dict())
    assert [p.text for p in other.take(9)] == [p.text for p in stream.take(9)]


def test_prompts_that_fit_by_their_bytes_are_not_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    add = prompts.room.Room.add
    monkeypatch.setattr(prompts.room.Room, "add", lambda self, prompt: counted.append(prompt.text) or add(self, prompt))
    file = write(tmp_path / "a.jsonl", 20)
    with file.open("a") as lines:
        lines.write(json.dumps({"problem": "what is the number " * 4, "answer": "1"}) + "\n")
    read_prompts(recipe({"train": file}), make_tokenizer())
    assert len(counted) == 2 and "user\n0+1?<" in counted[0] and "what is the number" in counted[1]


def test_heldout_problems_are_the_first_of_their_files(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", 5)
    _, heldout = read_prompts(recipe({"train": a, "heldout": [a, b]}, evaluation={"problems": 5}), make_tokenizer())
    assert [p.problem.id for p in heldout] == ["a.jsonl:r0", "a.jsonl:r1", "a.jsonl:r2", "b.jsonl:r0", "b.jsonl:r1"]
    assert read_prompts(recipe({"train": a, "heldout": b}, evaluation={"problems": 0}), make_tokenizer())[1] == []
    with b.open("a") as lines:
        lines.write('{"problem": ""}\n')
    with pytest.raises(TaskError, match=r"b\.jsonl:6: missing answer"):
        read_prompts(recipe({"train": a, "heldout": b}, evaluation={"problems": 1}), make_tokenizer())
