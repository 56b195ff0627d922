"""The tests of a problem, and the program of a response: read from what data sets publish, without running either."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcpo_openrlhf.reward.grades import Question

_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})\s*([\w+.-]*)[^`]*")
PYTHON = ("", "python", "python3", "py")
FORMS = (
    "`tests` (a list of asserts, code, a list of {input, output}, or {inputs, outputs}), `test_list` as in MBPP, "
    "`test` and `entry_point` as in HumanEval, `input_output` as in APPS, or an `answer` that is one of these"
)


@dataclass(frozen=True)
class Checks:
    """What a program must pass: code that calls it, or what it prints for what it reads."""

    code: tuple[str, ...] = ()
    """Statements, run one after the other in one namespace; the first ones may only prepare."""
    cases: tuple[tuple[str, str], ...] = ()
    """(standard input, standard output)."""


def program_of(response: str) -> str | None:
    """The last fenced block of the response, where it is closed and names Python or nothing; else None."""
    found, fence, lines = None, None, list[str]()
    for line in response.splitlines():
        match = _FENCE.fullmatch(line)
        if fence is None:
            if match is not None:
                fence, lines = (match[1], match[2].lower()), []
        elif match is not None and not match[2] and match[1].startswith(fence[0]):
            found = ("\n".join(lines) + "\n") if fence[1] in PYTHON else None
            fence = None
        else:
            lines.append(line)
    return found if fence is None else None


def checks_of(question: Question) -> Checks:
    """The problem's tests. Raises ValueError where it has none that can be read."""
    data = question.metadata
    setup = [data["test_setup_code"]] if data.get("test_setup_code") else []
    setup += data.get("test_imports") or []
    try:
        if "tests" in data:
            return _read(data["tests"], setup, data)
        if "test_list" in data:
            return _read(list(data["test_list"]), setup, data)
        if "test" in data and "entry_point" in data:
            return _code([*setup, data["test"], f"check({data['entry_point']})"])
        return _read(data.get("input_output", question.answer), setup, data)
    except (TypeError, KeyError, ValueError, SyntaxError, AttributeError) as error:
        raise ValueError(
            f'grader "python_tests" cannot read the tests ({type(error).__name__}: {error}); give {FORMS}'
        ) from None


def _read(tests: Any, setup: list[str], data: Mapping[str, Any]) -> Checks:
    if isinstance(tests, str):
        try:
            return _read(json.loads(tests), setup, data)
        except json.JSONDecodeError:
            return _code([*setup, tests])
    if isinstance(tests, Mapping):
        inputs, outputs = tests["inputs"], tests["outputs"]
        if len(inputs) != len(outputs) or not inputs:
            raise ValueError(f"{len(inputs)} inputs for {len(outputs)} outputs")
        name = tests.get("fn_name")
        if name is None:
            return Checks(cases=tuple((_text(i), _text(o)) for i, o in zip(inputs, outputs, strict=True)))
        pairs = zip(map(_value, inputs), map(_value, outputs), strict=True)
        return _code([*setup, *(f"assert {name}(*{list(i)!r}) == {o!r}" for i, o in pairs)])
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return _code([*setup, *tests])
    if isinstance(tests, list) and tests:
        return Checks(cases=tuple((_text(test["input"]), _text(test["output"])) for test in tests))
    raise ValueError(f"tests = {tests!r:.60}")


def _code(parts: list[str]) -> Checks:
    """Raises SyntaxError for what is no Python, ValueError where nothing is asserted."""
    trees = [ast.parse(part) for part in parts]
    if not any(isinstance(node, ast.Assert | ast.Raise) for tree in trees for node in ast.walk(tree)):
        raise ValueError("no assert in the tests")
    return Checks(code=tuple(parts))


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):  # some of APPS
        return "\n".join(value)
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} instead of text")
    return value


def _value(value: Any) -> Any:
    """verl's and PRIME's inputs are JSON as text."""
    return [json.loads(line) for line in value.splitlines()] if isinstance(value, str) else value
