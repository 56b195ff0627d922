"""Problems of data files: rows by the columns of problem, answer, id and source, read when they are asked for."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, overload

from dcpo_openrlhf.rollout.files import Columns, Lines, Row, files_of, names_of, rows_of
from dcpo_openrlhf.rollout.problems import Messages, Problem, TaskError, require_text

KEYS = ("id", "problem", "answer", "source")
Names = dict[str, str | None]
"""Key of KEYS -> column, with dots where it lies within another one; None: the data have none (answer alone)."""
OWN_NAMES: Names = {key: key for key in KEYS}
_OTHER_NAMES = {
    "problem": ("prompt", "question", "input", "messages"),
    "answer": ("reward_model.ground_truth", "ground_truth", "label", "solution", "final_answer"),
    "source": ("data_source", "datasource"),
}
"""What published sets call them."""


class Problems(Sequence[Problem]):
    """Problems of files; only their ids are in memory."""

    def __init__(self, parts: "Sequence[_Part]", ids: list[str], counts: list[int]) -> None:
        self.ids = ids
        self.counts = counts
        """Problems of each entry that was read, a folder's together."""
        self._parts = parts
        self._ends = list(accumulate(len(part.rows) for part in parts))

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, i: int) -> Problem: ...
    @overload
    def __getitem__(self, i: slice) -> list[Problem]: ...
    def __getitem__(self, i: int | slice) -> Problem | list[Problem]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        part, row = self._home(i)
        return part.problem(row, part.rows[row])

    def place(self, i: int) -> str:
        """File and line of a problem."""
        part, row = self._home(i)
        return part.rows.place(row)

    def _home(self, i: int) -> "tuple[_Part, int]":
        if not 0 <= i < len(self):
            raise IndexError(f"problem {i} of {len(self)}")
        k = bisect_right(self._ends, i)
        return self._parts[k], i - (self._ends[k - 1] if k else 0)


def read(
    entries: Sequence[tuple[Path, Names]],
    *,
    look: Callable[[Problem, str], None] | None = None,
    metadata: bool = True,
) -> Problems:
    """The problems of files and folders, each row read once; `look` is called with each and its file and line.

    metadata: `look` sees it of every row; without it, a table's other columns are not read. An id names a problem
    within its file: where several are read, the file's name goes before it. Raises TaskError with file and line for a
    row whose problem or answer is missing, empty, or has no one reading as text, or whose id the file has before.
    """
    found = [(files_of(path), names) for path, names in entries]
    homes = [(file, names) for files, names in found for file in files]
    labels = names_of([file for file, _ in homes])
    parts = [
        _Part(rows_of(file), label, names, f"{label}:" if len(homes) > 1 else "")
        for (file, names), label in zip(homes, labels, strict=True)
    ]
    ids = list[str]()
    for part in parts:
        wanted = None if metadata else [name for name in part.names.values() if name is not None]
        for i, row in enumerate(part.rows.scan(wanted)):
            try:
                problem = part.problem(i, row)
            except TaskError:
                part.problem(i, part.rows[i])  # the same error, told with all of the row's keys
                raise
            ids.append(problem.id)
            if look is not None:
                look(problem, part.rows.place(i))
    lengths = iter(len(part.rows) for part in parts)
    problems = Problems(parts, ids, [sum(next(lengths) for _ in files) for files, _ in found])
    if len(set(ids)) < len(ids):
        raise TaskError(_twice(problems))
    return problems


def load_jsonl(path: str | Path) -> list[Problem]:
    """The problems of a file or folder whose columns are called as KEYS, in memory. Raises TaskError as `read`."""
    return load(Path(path), OWN_NAMES)


def load(path: Path, names: Names) -> list[Problem]:
    """The problems of a file or folder, in memory. Raises TaskError as `read`."""
    found = list[Problem]()
    read([(path, names)], look=lambda problem, _: found.append(problem))
    return found


class _Part(NamedTuple):
    """The rows of one file, what tells it from the others, the columns in it, and what goes before its ids."""

    rows: Lines | Columns
    label: str
    names: Names
    prefix: str

    def problem(self, i: int, row: Row) -> Problem:
        """Row i as a problem. Raises TaskError with file and line."""
        try:
            return self._read(i, row)
        except TaskError as error:
            raise TaskError(f"{self.rows.place(i)}: {error}") from None

    def _read(self, i: int, row: Row) -> Problem:
        names, rest = self.names, dict(row)
        found = {key: _taken(rest, row, name) for key, name in names.items()}
        asked, answer, id, source = found["problem"], found["answer"], found["id"], found["source"]
        if asked is None or answer is None:
            raise TaskError(_lacking(row, names, [key for key in ("problem", "answer") if found[key] is None]))
        if isinstance(self.rows, Columns):  # a column's null is a key that this row does not have
            rest = {name: _plain(value) for name, value in rest.items() if value is not None}
        messages = () if isinstance(asked, str) else _messages(asked, names["problem"])
        return Problem(
            id=self.prefix + (str(self.rows.number(i)) if id is None else _id(id, names["id"])),
            problem=_full(messages[-1]["content"] if messages else asked, names["problem"]),
            answer=answer if names["answer"] is None else _answer(answer, names["answer"]),
            source=self.label if source is None else _source(source, names["source"]),
            metadata=rest,
            messages=messages,
        )


def _taken(rest: dict[str, Any], row: Row, name: str | None) -> Any:
    """The value of the column, which is no metadata then; of one within another, which stays there; None: no value."""
    if name is None:
        return ""
    return rest.pop(name) if name in row else _within(row, name)


def _plain(value: Any) -> Any:
    """The value with texts for what JSON has no form of, dates for example: graders are sent JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _within(row: Any, name: str) -> Any:
    for key in name.split("."):
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def _lacking(row: Row, names: Names, missing: Sequence[str]) -> str:
    """What is not there, and what may be it."""
    meant = {}
    for key, others in _OTHER_NAMES.items():
        if key in missing or key == "source":
            found = [other for other in others if _within(row, other) is not None]
            meant |= {key: found[0]} if found else {}
    said = ", ".join(f"{key}: {other}" for key, other in meant.items())
    hint = f" (task.fields={{{said}}} may be meant)" if meant.keys() & set(missing) else ""
    columns = ", ".join(str(names[key]) for key in missing)
    return f"missing {columns}; the keys are {', '.join(map(str, row))}{hint}; name the columns as task.fields"


def _full(text: str, what: str | None) -> str:
    """The text, if it says something."""
    if not text or text.isspace():
        raise TaskError(f"{what} is empty; give it a value or remove the line")
    require_text(text, what=str(what))
    return text


def _id(value: Any, what: str | None) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TaskError(f"{what} is {_shown(value)}; write it as a string or an integer")
    return _full(str(value), what)


def _source(value: Any, what: str | None) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{what} is {_shown(value)}; write it as a string")
    require_text(value, what=str(what))
    return value


def _answer(value: Any, what: str | None) -> str:
    """A text, or an integer as one; of a list of one, its entry."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TaskError(f"{what} is {_shown(value)}; write it as a string")
    return _full(str(value), what)


def _messages(value: Any, what: str | None) -> Messages:
    """Chat messages up to the one that is to be answered."""
    if not isinstance(value, list) or not value:
        raise TaskError(
            f"{what} is {_shown(value)}; write it as a string, or as chat messages, a list of role, content"
        )
    turns = []
    for number, turn in enumerate(value, start=1):
        for key in ("role", "content"):
            if not isinstance(turn, Mapping) or not isinstance(turn.get(key), str):
                raise TaskError(
                    f"{what}: message {number} is {_shown(turn)}; give each a role and a content, as strings"
                )
            require_text(turn[key], what=f"{what}: message {number}")
        turns.append({key: part for key, part in turn.items() if part is not None})
    if turns[-1]["role"] not in ("user", "tool"):
        raise TaskError(
            f"{what} ends with a message of {turns[-1]['role']!r}, and the policy is to answer the last one; drop it"
        )
    return turns


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _twice(problems: Problems) -> str:
    seen: dict[str, int] = {}
    for i, id in enumerate(problems.ids):
        if (first := seen.setdefault(id, i)) != i:
            part, row = problems._home(first)
            return (
                f"{problems.place(i)}: id {id!r} is already on line {part.rows.number(row)} of {part.rows.path}; ids "
                "must be unique within a file"
            )
    raise AssertionError("no id is there twice")
