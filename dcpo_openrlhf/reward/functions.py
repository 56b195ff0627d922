"""Reward functions of the user's: found by name, called on a batch, their answers as numbers. Runs in workers alone.

python -m dcpo_openrlhf.reward.functions NAME ...     ends with 0 where each can be imported and called
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SEEN = frozenset(
    {"PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV", "CONDA_PREFIX"}
    | {"PYTHONPATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"}
    | {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM"}
    | {"HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NLTK_DATA", "SSL_CERT_FILE"}
)
"""Variables that a grader's process is given. None is a secret: keys and tokens stay with the driver."""
RESERVED = ("timeouts", "crashes", "failures", "overlong_penalty")
"""Names of reward/* metrics that are not a function's."""
_LOG_NAME = re.compile(r"[A-Za-z0-9_.@-]+(?:/[A-Za-z0-9_.@-]+)*")


class FunctionError(Exception):
    """A reward function that is not there, or an answer of it that is none."""


class Row(NamedTuple):
    """What a plain function gets of each response."""

    prompt: str
    response: str
    answer: str
    source: str
    metadata: Mapping[str, Any]


def environment() -> dict[str, str]:
    """What a grader's process may see of this one's environment."""
    return {name: value for name, value in os.environ.items() if name in SEEN}


def load(name: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME or import.path:NAME means. Raises FunctionError with the reason and the remedy."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            file = Path(os.path.expandvars(place)).expanduser().resolve()
            sys.path.insert(0, str(file.parent))  # what stands beside it can be imported, as for a script
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[file.stem] = module  # where pickle and dataclasses look for it
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(place)
        found = getattr(module, attribute)
    except (Exception, SystemExit) as error:
        raise FunctionError(
            f"{name} cannot be imported ({said(error)}); the form is FILE.py:NAME or a.b:NAME"
        ) from error
    if not callable(found):
        raise FunctionError(f"{name} is a {type(found).__name__}, no function; name one")
    _form(found, name)
    return found


def _form(function: Callable[..., Any], name: str) -> str:
    """Whose form the function has: "plain", "OpenRLHF" or "verl". Raises FunctionError for any other."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    names = [p.name for p in positional]
    if names[:3] == ["data_source", "solution_str", "ground_truth"]:
        return "verl"
    if names[:3] == ["queries", "prompts", "labels"] or len(needed) == 3:
        return "OpenRLHF"
    if len(needed) == 1 or (not needed and positional):
        return "plain"
    raise FunctionError(
        f"{name} takes ({', '.join(names)}); a reward function takes (batch), a list of (prompt, response, answer, "
        "source, metadata), or (queries, prompts, labels), as OpenRLHF's do, or (data_source, solution_str, "
        "ground_truth, extra_info), as verl's do"
    )


def call(
    function: Callable[..., Any], name: str, rows: Sequence[Row], queries: Sequence[str], *, threshold: float
) -> list[dict[str, Any]]:
    """{"reward", "success", "logs", "extracted"} of each row, or {"failure"} where the function gave no number for it.

    threshold: where no success is named, it is 1 from this reward (OpenRLHF's score) on. Raises FunctionError for an
    answer that is not one a row, and whatever the function raises.
    """
    form = _form(function, name)
    if form == "OpenRLHF":
        found = _finished(function(list(queries), [row.prompt for row in rows], [row.answer for row in rows]))
        answers = _by_row(found, len(rows))
    elif form == "verl":
        answers = [_of_verl(_finished(function(r.source, r.response, r.answer, _extra_info(r)))) for r in rows]
    else:
        answers = _listed(_finished(function(list(rows))))
    if len(answers) != len(rows):
        raise FunctionError(f"{len(answers)} rewards for {len(rows)} responses")
    return [_checked(answer, threshold) for answer in answers]


def _finished(answer: Any) -> Any:
    return asyncio.run(answer) if inspect.iscoroutine(answer) else answer


def _listed(values: Any) -> list[Any]:
    """Tensors, arrays and sequences as a list; a number by itself as a list of one."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | Mapping) or values is None:
        raise FunctionError(f"{type(values).__name__} instead of one reward a response")
    return list(values) if hasattr(values, "__iter__") else [values]


def _by_row(answer: Any, count: int) -> list[dict[str, Any]]:
    """OpenRLHF's {"rewards", "scores", "extra_logs"} as one answer a row."""
    if not isinstance(answer, Mapping) or "rewards" not in answer:
        raise FunctionError('an answer without "rewards"; OpenRLHF\'s form is {"rewards", "scores", "extra_logs"}')
    columns = {"reward": _listed(answer["rewards"])}
    scores = answer.get("scores")
    columns["score"] = columns["reward"] if scores is None else _listed(scores)
    logs = {name: _listed(values) for name, values in (answer.get("extra_logs") or {}).items()}
    logs = {name: values * count if len(values) == 1 else values for name, values in logs.items()}
    for name, values in (columns | logs).items():
        if len(values) != count:
            raise FunctionError(f"{len(values)} values of {name} for {count} responses")
    return [
        {"reward": columns["reward"][i], "score": columns["score"][i], "logs": {n: v[i] for n, v in logs.items()}}
        for i in range(count)
    ]


def _extra_info(row: Row) -> dict[str, Any]:
    """That column of verl's files; of other rows, all their further keys."""
    found = row.metadata.get("extra_info")
    return dict(found if isinstance(found, Mapping) else row.metadata)


def _of_verl(answer: Any) -> Any:
    """verl's {"score", "acc", ...}: acc is the success, further numbers are logs."""
    if not isinstance(answer, Mapping) or "score" not in answer:
        return answer
    logs = {name: value for name, value in answer.items() if name != "score" and isinstance(value, bool | int | float)}
    return {"reward": answer["score"], "success": answer.get("acc"), "logs": logs}


def _checked(answer: Any, threshold: float) -> dict[str, Any]:
    """One row's answer as finite numbers, or why it is none."""
    answer = answer if isinstance(answer, Mapping) else {"reward": answer}
    try:
        if unknown := set(answer) - {"reward", "success", "score", "logs", "extracted"}:
            raise FunctionError(
                f"unknown keys {sorted(map(str, unknown))}; the keys are reward, success, logs, extracted"
            )
        if "reward" not in answer:
            raise FunctionError('no "reward"')
        reward = _number(answer["reward"], "reward")
        success = answer.get("success")
        if success is None:
            success = float(_number(answer.get("score", reward), "score") >= threshold)
        if _number(success, "success") not in (0.0, 1.0):
            raise FunctionError(f"success = {success!r} must be 0 or 1")
        logs = {name: _number(value, name) for name, value in (answer.get("logs") or {}).items()}
        for name in logs:
            if name in RESERVED or not (isinstance(name, str) and _LOG_NAME.fullmatch(name)):
                raise FunctionError(f"{name!r} names no log; take letters, digits and _, and none of {RESERVED}")
    except FunctionError as error:
        return {"failure": str(error)}
    return {"reward": reward, "success": float(success), "logs": logs, "extracted": str(answer.get("extracted", ""))}


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise FunctionError(f"{what} = {value!r:.60} is no number") from None
    if not math.isfinite(number):
        raise FunctionError(f"{what} = {number} is not finite")
    return number


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:300]


def main(names: Sequence[str]) -> int:
    """Prints the reasons as a JSON list, as the last thing on stdout; 0 where there is none."""
    visible, out = environment(), os.dup(1)
    os.dup2(2, 1)  # what a module prints is no reason
    os.environ.clear()
    os.environ.update(visible)
    wrong = []
    for name in names:
        try:
            load(name)
        except FunctionError as error:
            wrong.append(str(error))
    os.write(out, json.dumps(wrong).encode())
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
