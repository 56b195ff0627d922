"""From responses to grades: their texts, what each earns, what a grader failed on, and what the run folder keeps."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcpo_openrlhf.recipe.schema import Reward
from dcpo_openrlhf.reward.pool import Grade, GraderPool, Question
from dcpo_openrlhf.rollout.tasks import Problem, Prompt

NAMED = 8
"""Problems that an event names; it counts them all."""


def question(problem: Problem, prompt: str = "") -> Question:
    """The problem as graders see it."""
    return Question(problem.answer, prompt, problem.source, problem.metadata, problem.id)


def grade_samples(
    samples: Sequence[Any],
    prompts: Sequence[Prompt],
    *,
    tokenizer: Any,
    grader: GraderPool,
    reward: Reward,
    max_new_tokens: int,
) -> tuple[list[str], list[Grade]]:
    """The text of each response and what it earns; as many consecutive samples for each prompt."""
    tokens = (s.sequences[0, 1:][s.action_mask[0].bool()] for s in samples)  # one response at a time as a list
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    size = len(samples) // len(prompts)
    questions = [question(p.problem, p.text) for p in prompts for _ in range(size)]
    queries = None
    if reward.functions:  # with their special tokens, as OpenRLHF gives them
        queries = [tokenizer.decode(s.sequences[0], skip_special_tokens=False) for s in samples]
    grades = grader.grade(texts, questions, queries=queries)
    if reward.require_end:
        cut_off = [bool(s.truncated[0]) for s in samples]
        grades = [replace(g, reward=0.0, success=0.0) if cut else g for g, cut in zip(grades, cut_off, strict=True)]
    if reward.overlong_buffer_len is not None:
        taken = [
            overlong_penalty(
                int(s.response_length[0]),
                max_new_tokens=max_new_tokens,
                buffer_len=reward.overlong_buffer_len,
                factor=reward.overlong_penalty_factor,
            )
            for s in samples
        ]
        grades = [
            g if g.failure else replace(g, reward=g.reward - penalty, logs={**g.logs, "overlong_penalty": penalty})
            for g, penalty in zip(grades, taken, strict=True)
        ]
    return texts, grades


def overlong_penalty(length: int, *, max_new_tokens: int, buffer_len: int, factor: float) -> float:
    """factor * min(length - (max_new_tokens - buffer_len), buffer_len) / buffer_len above that length, else 0.

    Source: DAPO (arXiv 2503.14476), Eq. 13, and OpenRLHF's keys.
    """
    exceeding = min(length - (max_new_tokens - buffer_len), buffer_len)
    return factor * max(exceeding, 0) / buffer_len


def failures(grades: Sequence[Grade], prompts: Sequence[Prompt], *, step: int) -> Iterator[dict[str, Any]]:
    """One event for each way in which a reward function failed: the function, how often, on which problems."""
    size = len(grades) // len(prompts)
    found: dict[str, list[str]] = {}
    for i, grade in enumerate(grades):
        if grade.failure:
            found.setdefault(grade.failure, []).append(prompts[i // size].problem.id)
    for failure, ids in found.items():
        unique = list(dict.fromkeys(ids))
        names = ", ".join(map(repr, unique[:NAMED])) + (" ..." if len(unique) > NAMED else "")
        text = f"reward function {failure}; {len(ids)} responses earn 0, to the problems {names}"
        yield {
            "step": step,
            "cause": "reward_function",
            "text": text,
            "responses": len(ids),
            "problems": unique[:NAMED],
        }


def mean_logs(grades: Sequence[Grade]) -> dict[str, float]:
    """reward/NAME: the mean of each log over the grades that have it."""
    values: dict[str, list[float]] = {}
    for grade in grades:
        for name, value in grade.logs.items():
            values.setdefault(f"reward/{name}", []).append(value)
    return {name: sum(some) / len(some) for name, some in values.items()}


def keep_samples(
    file: Path, prompts: Sequence[Prompt], texts: Sequence[str], grades: Sequence[Grade], *, group_size: int
) -> None:
    """Write the responses to `file`, one JSON object a line; fewer texts than grades are the first of them."""
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as lines:
        for i, (text, grade) in enumerate(zip(texts, grades, strict=False)):
            problem = prompts[i // group_size].problem
            row = {
                "id": problem.id,
                "answer": problem.answer,
                "response": text,
                "reward": grade.reward,
                "success": grade.success,
                "extracted": grade.extracted,
            }
            row |= {"logs": grade.logs} if grade.logs else {}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
