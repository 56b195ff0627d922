"""Samples of an evaluation and the file that keeps each of them as soon as it is finished."""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked; names the rule, the values seen and the remedy."""


Key = tuple[str, int]
"""(problem id, number of the sample)"""


@dataclass(frozen=True)
class Request:
    """One sample that is asked for."""

    key: Key
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sample:
    """One response."""

    key: Key
    response: str
    tokens: int
    truncated: bool


_KINDS = {"id": str, "sample": int, "response": str, "tokens": int, "truncated": bool}
"""A kept sample's keys."""


class SampleFile:
    """JSONL: a header with the settings, then one sample a line in the order of their ends.

    A torn last line, as a kill leaves it, is cut off. Raises EvaluationError for other settings, for any other line
    that is not a sample, and while another process writes the file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.samples = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load(settings)
        except BlockingIOError as error:
            self._file.close()
            raise EvaluationError(f"{path}: another evaluation writes it; wait, or take another --output") from error
        except BaseException:
            self._file.close()
            raise

    def _load(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write({"evaluation": settings})
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._check(row["evaluation"], settings)
                else:
                    for name, kind in _KINDS.items():
                        if type(row[name]) is not kind:  # True is no number of tokens, and neither is NaN
                            raise TypeError(f"{name} is {row[name]!r} instead of {kind.__name__}")
                    sample = Sample((row["id"], row["sample"]), row["response"], row["tokens"], row["truncated"])
                    self.samples[sample.key] = sample
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, EvaluationError):
                    raise
                what = "the header of an evaluation" if number == 1 else "a sample"
                raise EvaluationError(
                    f"{self.path}:{number}: not {what} ({error!r}); remove the line or the file, or change --output"
                ) from error

    def _check(self, kept: dict[str, Any], settings: dict[str, Any]) -> None:
        different = [key for key in kept.keys() | settings.keys() if kept.get(key) != settings.get(key)]
        if different:
            values = "; ".join(
                f"{key}: {kept.get(key)!r} there, {settings.get(key)!r} now" for key in sorted(different)
            )
            raise EvaluationError(
                f"{self.path} was made with other settings ({values}); use the same ones, take another --output, "
                "or remove the file"
            )

    def append(self, sample: Sample) -> None:
        id, number = sample.key
        rest = {"response": sample.response, "tokens": sample.tokens, "truncated": sample.truncated}
        self._write({"id": id, "sample": number, **rest})
        self.samples[sample.key] = sample

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
