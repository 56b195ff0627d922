"""Rows of the known sets as problems: by their columns, multiple choice rendered, the final answer alone."""

import hashlib
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from dcpo_openrlhf.reward.extract import extract_boxed
from dcpo_openrlhf.rollout.tasks import JSONL_KEYS, Problem
from tools.data_rows import PrepareError, Row

PROBLEM_COLUMNS = ("problem", "question", "prompt", "Question")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "Correct Answer")  # DAPO's `solution` is the answer alone
ID_COLUMNS = ("id", "unique_id", "problem_idx", "question_id", "Record ID")
DISTRACTORS = tuple(f"Incorrect Answer {n}" for n in (1, 2, 3))


def normalise(name: str, rows: Sequence[tuple[str, Row]], *, origin: str) -> list[Problem]:
    """The rows as problems, by the column names that the known sets use; rows already in the form stay as they are.

    Multiple choice is rendered as "question, Options:, A. ...", its answer is the letter. Raises PrepareError that
    names the row whose problem or answer is missing or whose id was seen before.
    """
    problems, place_of = [], {}
    for index, (place, row) in enumerate(rows):
        problem = _as_problem(name, row, index=index, place=place, origin=origin)
        if problem.id in place_of:
            raise PrepareError(f"{place}: id {problem.id!r} was seen before ({place_of[problem.id]}); ids are unique")
        place_of[problem.id] = place
        problems.append(problem)
    return problems


def _as_problem(name: str, row: Row, *, index: int, place: str, origin: str) -> Problem:
    text = _first(row, PROBLEM_COLUMNS, place).strip()
    if options := row.get("options"):
        text, answer = _with_options(text, options), str(row["answer"])
    elif all(row.get(column) for column in DISTRACTORS):
        text, answer = _shuffled_options(text, [row["Correct Answer"], *(row[column] for column in DISTRACTORS)])
    else:
        answer = _final_answer(_first(row, ANSWER_COLUMNS, place, allow_any=True))
    if not text or not answer:
        raise PrepareError(f"{place}: the {'answer' if text else 'problem'} is empty; remove the row or fill it in")
    id_value = next((row[column] for column in ID_COLUMNS if row.get(column) not in (None, "")), index)
    known = isinstance(id_value, str) and not id_value.isdecimal()
    return Problem(
        id=str(id_value) if known else f"{name}-{id_value}",
        problem=text,
        answer=answer,
        source=row["source"] if set(JSONL_KEYS) <= row.keys() and isinstance(row["source"], str) else origin,
    )


def _first(row: Row, columns: Sequence[str], place: str, *, allow_any: bool = False) -> Any:
    for column in columns:
        if column in row and (allow_any or isinstance(row[column], str)):
            return row[column]
    raise PrepareError(f"{place}: none of the columns {', '.join(columns)} holds it; the columns are {', '.join(row)}")


def _final_answer(value: Any) -> str:
    """The final answer alone: the entries of a list, an integral float as integer, what follows ####, the last box."""
    if isinstance(value, list | tuple):
        return ", ".join(_final_answer(entry) for entry in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if "####" in text:  # GSM8K: the solution, then "#### 1,234"
        text = text.rpartition("####")[2].strip().replace(",", "")
    return extract_boxed(text) or text


def _with_options(question: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, "Options:", *lines])


def _shuffled_options(question: str, options: Sequence[str]) -> tuple[str, str]:
    """The question with its options in an order that only their text decides, and the letter of the first of them."""
    correct = options[0]
    order = sorted(options, key=lambda option: hashlib.sha256(f"{question}\0{option}".encode()).digest())
    return _with_options(question, order), ascii_uppercase[order.index(correct)]
