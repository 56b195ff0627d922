"""Rows of the known sets as problems: by their columns, multiple choice rendered, the final answer alone."""

import hashlib
import math
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from dcpo_openrlhf.reward.extract import extract_boxed
from dcpo_openrlhf.rollout.data import KEYS
from dcpo_openrlhf.rollout.problems import Problem
from tools.data_rows import PrepareError, Row

PROBLEM_COLUMNS = ("problem", "question", "prompt", "Question")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "Correct Answer")  # DAPO's `solution` is the answer alone
ID_COLUMNS = ("id", "unique_id", "problem_idx", "question_id", "Record ID")
DISTRACTORS = tuple(f"Incorrect Answer {n}" for n in (1, 2, 3))
UNREAD_OPTIONS = ("choices", "Options", "endings", "A")
"""Columns that hold the options of sets which are not read here (MMLU, ARC); without them its questions ask nothing."""
MAX_WORDS = 2
"""Words of prose in a final answer: "June 20" and "5 square inches" are answers, "So it is 204" is not one."""
_LATEX = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{[^}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[^\W\d_]{2,}")


def normalise(name: str, rows: Sequence[tuple[str, Row]], *, origin: str) -> list[Problem]:
    """The rows as problems, by the column names that the known sets use; rows already in the form stay as they are.

    Multiple choice is rendered as "question, Options:, A. ...", its answer is the letter. Raises PrepareError that
    names the row whose problem, options or answer is missing or of another type, or whose id was seen before.
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
    for column in UNREAD_OPTIONS:
        if row.get(column) not in (None, ""):
            raise PrepareError(
                f"{place}: options are read from `options` with the answer as a letter, not from {column!r}; "
                "bring them into that form"
            )
    text = _problem_text(row, place)
    if row.get("options") not in (None, ""):
        options = _options(row["options"], place)
        text, answer = _with_options(text, options), _letter(row.get("answer"), len(options), place)
    elif any(column in row for column in DISTRACTORS):
        columns = ("Correct Answer", *DISTRACTORS)
        if missing := [column for column in columns if row.get(column) in (None, "")]:
            raise PrepareError(f"{place}: {', '.join(missing)} of {', '.join(columns)} is empty; fill it in")
        text, answer = _shuffled_options(text, _options([row[column] for column in columns], place))
    else:
        column = next((column for column in ANSWER_COLUMNS if column in row), "")
        answer = _final_answer(row[column] if column else _absent(row, ANSWER_COLUMNS, place), f"{place}: {column}")
        if column != "final_answer":  # OlympiadBench has "f(x)=ax+b, where a is ..." there
            _require_no_sentence(answer, f"{place}: {column}")
    if not text or not answer:
        raise PrepareError(f"{place}: the {'answer' if text else 'problem'} is empty; remove the row or fill it in")
    return Problem(
        id=_id(name, row, index, place),
        problem=text,
        answer=answer,
        source=row["source"] if set(KEYS) <= row.keys() and isinstance(row["source"], str) else origin,
    )


def _problem_text(row: Row, place: str) -> str:
    found = [column for column in PROBLEM_COLUMNS if column in row]
    column = next((column for column in found if isinstance(row[column], str)), None)
    if column is not None:
        return _present(row[column].strip(), f"{place}: {column}")
    if found:
        raise PrepareError(
            f"{place}: {found[0]} is {_shown(row[found[0]])} instead of text; "
            "write what is asked, without a template, as text into a column `problem`"
        )
    return _absent(row, PROBLEM_COLUMNS, place)


def _absent(row: Row, columns: Sequence[str], place: str) -> Any:
    """Raise PrepareError: no column of these; one that is spelt almost like one of them is pointed at."""
    wanted = {column.lower() for column in columns}
    near = [column for column in row if str(column).strip().lower() in wanted]
    raise PrepareError(
        f"{place}: none of the columns {', '.join(columns)} is there; the columns are {', '.join(row)}; "
        + (f"rename {near[0]!r}" if near else "rename the one that holds it")
    )


def _id(name: str, row: Row, index: int, place: str) -> str:
    """The row's own id if it is a text that says more than a number, else the set's name and the number."""
    column = next((column for column in ID_COLUMNS if row.get(column) not in (None, "")), None)
    value = index if column is None else row[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PrepareError(f"{place}: {column} is {_shown(value)} instead of a text or a whole number; write it as one")
    return value if isinstance(value, str) and not value.isdecimal() else f"{name}-{value}"


def _present(text: str, what: str) -> str:
    if text.lower() in ("nan", "null", "<na>") or text == "None":
        raise PrepareError(f"{what} is {text!r}, a missing value written as text; remove the row or fill it in")
    return text


def _final_answer(value: Any, what: str) -> str:
    """The final answer alone: the entries of a list, an integral float as integer, what follows ####, the last box."""
    if isinstance(value, list | tuple):
        return ", ".join(_final_answer(entry, what) for entry in value)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise PrepareError(f"{what} is {_shown(value)} instead of a text or a number; write the final answer alone")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = _present(str(value).strip(), what)
    if isinstance(value, float) and not math.isfinite(value):
        raise PrepareError(f"{what} is {value}, which no response equals; remove the row or fill it in")
    if "####" in text:  # GSM8K: the solution, then "#### 1,234"
        return text.rpartition("####")[2].strip().replace(",", "")
    if (boxed := extract_boxed(text)) is not None:
        return boxed
    return text


def _require_no_sentence(answer: str, what: str) -> None:
    if len(_PROSE.findall(_LATEX.sub(" ", answer))) > MAX_WORDS:
        raise PrepareError(
            f"{what} is a sentence ({_shown(answer)}), and no response equals it; write the final answer alone, "
            "or, if it is one, put it into \\boxed{\\text{}}"
        )


def _options(value: Any, place: str) -> list[str]:
    """At least two texts, at most as many as there are letters."""
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= len(ascii_uppercase):
        raise PrepareError(
            f"{place}: options is {_shown(value)} instead of a list of 2 to {len(ascii_uppercase)} texts; "
            "write it as one (JSONL and parquet have lists, CSV has none)"
        )
    for number, option in enumerate(value, 1):
        if not isinstance(option, str) or not option.strip():
            raise PrepareError(f"{place}: option {number} is {_shown(option)} instead of a text; write it as one")
    return [option.strip() for option in value]


def _letter(value: Any, count: int, place: str) -> str:
    letters = ascii_uppercase[:count]
    if not isinstance(value, str) or len(value) != 1 or value not in letters:
        raise PrepareError(
            f"{place}: answer is {_shown(value)}, and that of {count} options is a letter from {letters[0]} to "
            f"{letters[-1]}; write the letter of the right one"
        )
    return value


def _with_options(question: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, "Options:", *lines])


def _shuffled_options(question: str, options: Sequence[str]) -> tuple[str, str]:
    """The question with its options in an order that only their text decides, and the letter of the first of them."""
    correct = options[0]
    order = sorted(options, key=lambda option: hashlib.sha256(f"{question}\0{option}".encode()).digest())
    return _with_options(question, order), ascii_uppercase[order.index(correct)]


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"
