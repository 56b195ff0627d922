"""What a problem is, what a prompt is, and the error of data that cannot be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Messages = Sequence[Mapping[str, Any]]
"""Turns of a chat, {role, content}."""


class TaskError(ValueError):
    """A task cannot be used as given; the message names the rule, the values seen and the remedy."""


@dataclass(frozen=True)
class Problem:
    """One question with its final answer."""

    id: str
    problem: str
    """What is asked; of chat messages, the last one."""
    answer: str
    source: str
    difficulty: int = 0
    """0 where the source names none; the level for built-in arithmetic."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further keys of the problem's row, for graders."""
    messages: Messages = field(default=(), hash=False)
    """The prompt as chat messages, where the data have it so."""


class Prompt(NamedTuple):
    """A problem with the text that the policy reads."""

    problem: Problem
    text: str


def require_text(text: str, *, what: str) -> None:
    """Raise TaskError for half of a surrogate pair: JSON can write one, no tokenizer or file takes it."""
    if text.isascii():  # known without a look at the text
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TaskError(
            f"{what} holds half of a surrogate pair, {half} at character {error.start + 1}, which is no text; "
            "write the whole pair or remove it"
        ) from None
