"""The recipe's section about problems: which files hold them, where a row has what, and how they become prompts."""

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from dcpo_openrlhf.recipe.fields import Expanded, Section

Column = Annotated[str, Field(min_length=1)]


class Fields(Section):
    """Where a row has what; dots lead into a column: reward_model.ground_truth."""

    problem: Column = "problem"
    """A text, which task.template takes in, or chat messages, which stay as they are."""
    answer: Column | None = "answer"
    """null: the data have no answers, and a function of yours grades without."""
    id: Column = "id"
    """Where a row has none, it is the number of its line."""
    source: Column = "source"
    """Where a row has none, it is the file's name."""


class DataFile(Section):
    path: Expanded
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the prompts that come from here, relative to the other weights."""
    fields: Fields | None = None
    """In place of task.fields."""


def _entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


def _form(value: Any) -> str:
    return "(files)" if isinstance(value, list | tuple) else "(file)"


Entry = Annotated[DataFile, BeforeValidator(_entry)]
Files = Annotated[
    Annotated[Expanded, Tag("(file)")] | Annotated[list[Entry], Field(min_length=1), Tag("(files)")],
    Discriminator(_form),  # so that an error is told of the form that was meant
]
"""A path, or a list of paths and of {path, weight, fields}."""


class Task(Section):
    kind: Literal["jsonl", "arithmetic"] = "jsonl"
    """jsonl: the files of task.train, whatever their form. arithmetic: built in."""
    train: Files | None = None
    """Training problems (kind jsonl): a JSONL, JSON or Parquet file, a gzip of the former two, a folder of such files,
    a folder that datasets' save_to_disk wrote, or a list of these. Entries {path, weight} have their share of the
    prompts of every step, whatever their size; a list without weights is read as one file."""
    heldout: Files | None = None
    """Held-out problems for evaluation, as task.train, without weights; None: no evaluation."""
    fields: Fields = Fields()
    """Columns of the files: {problem: prompt, answer: reward_model.ground_truth, source: data_source} reads verl's."""
    level: Annotated[int, Field(ge=1)] = 1
    """Difficulty of the built-in arithmetic."""
    template: str = "boxed_think"
    """Name of a prompt template in rollout/tasks.py, or a text with {problem} in it; chat messages take none."""
    system: str | None = None
    chat: bool = True
    """Wrap the prompt with the tokenizer's chat template as one user turn."""
    chat_template_kwargs: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies it)
    """Further variables of the chat template, for example {enable_thinking: false} (Qwen3)."""
    date: datetime.date | None = None
    """Today (YYYY-MM-DD), for chat templates that write it. None: the day of the first start, kept from then on."""

    def files(self, which: Literal["train", "heldout"]) -> list[DataFile]:
        """The files of that key, each with its fields; none where the key is null."""
        value: Path | list[DataFile] | None = getattr(self, which)
        entries = value if isinstance(value, list) else [DataFile(path=value)] if value is not None else []
        return [entry.model_copy(update={"fields": entry.fields or self.fields}) for entry in entries]
