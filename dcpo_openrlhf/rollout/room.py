"""Do prompts fit beside their responses? And their texts, made when they are asked for."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

from dcpo_openrlhf.rollout.problems import Problem, Prompt, TaskError, require_text

BATCH = 1000
"""Prompts that the tokenizer gets at a time."""
NORMALISED = 3
"""Most bytes that a byte may become where a tokenizer normalises text to NFC (Unicode FAQ, Normalization); ASCII stays
as it is."""


class Room:
    """Prompts may have context - max_new_tokens tokens."""

    def __init__(self, *, tokenizer: Any, context: int, max_new_tokens: int) -> None:
        self._tokenizer, self._context, self._max_new_tokens = tokenizer, context, max_new_tokens
        self.limit = context - max_new_tokens
        self.longest = 0
        """Tokens of the longest prompt that was counted."""
        self._batch: list[Prompt] = []
        self._seen, self._over = 0, 0
        self._first = ("", 0)

    def holds(self, size: int) -> bool:
        """Whether a prompt of so many bytes at most is seen to fit, uncounted: a token has one byte or more."""
        self._seen += (fits := size <= self.limit)
        return fits

    def add(self, prompt: Prompt) -> None:
        """Raises TaskError for a text that is none."""
        require_text(prompt.text, what=f"prompt {prompt.problem.id!r}")  # template and system message come in here
        self._batch.append(prompt)
        if len(self._batch) == BATCH:
            self._count()

    def require(self) -> None:
        """Raise TaskError that names the first prompt that is too long, its length, the limit and how many are."""
        self._count()
        if self._over:
            id, length = self._first
            raise TaskError(
                f"prompt {id!r} has {length} tokens, above the limit of {self.limit} = context {self._context} - "
                f"max_new_tokens {self._max_new_tokens}; {self._over} of {self._seen} prompts are too long, the "
                f"longest has {self.longest}; raise the context, lower max_new_tokens or remove them"
            )

    def _count(self) -> None:
        if not self._batch:
            return
        texts = [prompt.text for prompt in self._batch]
        # verbose: else the tokenizer warns of a long prompt in its own words, before the error that says what to do
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        over = [(p.problem.id, len(i)) for p, i in zip(self._batch, ids, strict=True) if len(i) > self.limit]
        self._first = self._first if self._over or not over else over[0]
        self.longest = max(self.longest, *map(len, ids))
        self._seen, self._over, self._batch = self._seen + len(ids), self._over + len(over), []


def check_prompt_lengths(prompts: Sequence[Prompt], *, tokenizer: Any, context: int, max_new_tokens: int) -> int:
    """The longest prompt [tokens], once length + max_new_tokens <= context holds for every prompt.

    Raises TaskError that names the first prompt for which it does not, its length, the limit and how many offend.
    """
    room = Room(tokenizer=tokenizer, context=context, max_new_tokens=max_new_tokens)
    for prompt in prompts:
        room.add(prompt)
    room.require()
    return room.longest


def size(text: str) -> int:
    """Bytes of the text, at most, as a tokenizer may see it."""
    return len(text) if text.isascii() else NORMALISED * len(text.encode("utf-8"))


class Writer(NamedTuple):
    """How problems become prompts, and how much of them is not the problem's."""

    write: Callable[[Problem], str]
    around: int
    """Bytes, at most, that go around what is asked, or around each of its messages."""

    @classmethod
    def of(cls, write: Callable[[Problem], str]) -> "Writer":
        """Raises TaskError for what template or system message bring in that is no text."""
        text = write(PROBE)
        require_text(text, what="a prompt")
        return cls(write, size(text))

    def most(self, problem: Problem) -> int:
        """Bytes of the prompt, at most, where the chat template does no more than put messages together."""
        if problem.messages:
            return sum(size(turn["content"]) + self.around for turn in problem.messages)
        return size(problem.problem) + self.around


PROBE = Problem("", "1+1?", "2", "")


class Texts(Sequence[str]):
    """The prompt of each problem, written and counted when it is asked for."""

    def __init__(self, problems: Sequence[Problem], write: Callable[[Problem], str], **room: Any) -> None:
        """room: what `check_prompt_lengths` takes."""
        self._problems, self._write, self._room = problems, write, room

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        problem = self._problems[i]
        text = self._write(problem)
        check_prompt_lengths([Prompt(problem, text)], **self._room)
        return text
