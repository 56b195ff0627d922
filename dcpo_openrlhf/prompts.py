"""From a recipe to prompts: problems read, checked against graders and the room for prompts, written when they are due.

Of a file's problems memory holds the ids alone: one pass at the start sees every row, a step reads its own again.
"""

import fnmatch
from collections.abc import Iterable
from functools import partial
from typing import Any

from dcpo_openrlhf.grading import question
from dcpo_openrlhf.recipe.schema import DataFile, Recipe, Task
from dcpo_openrlhf.reward.pool import PYTHON_TESTS, check_question, chosen_grader
from dcpo_openrlhf.rollout import chat, data, room, tasks
from dcpo_openrlhf.rollout.problems import Problem, Prompt, TaskError

Placed = tuple[Problem, str]
"""A problem, and where it stands."""


def read_prompts(recipe: Recipe, tokenizer: Any) -> tuple[tasks.PromptStream, list[Prompt]]:
    """The endless training prompts and the held-out ones; every problem is checked. Raises TaskError."""
    t, r, seed = recipe.task, recipe.rollout, recipe.run.seed
    template = tasks.prompt_template(t.template)
    chat.check_variables(tokenizer, t.chat_template_kwargs)
    chat.stop_tokens(tokenizer, chat=t.chat, stop=r.stop)  # for its errors
    how: Any = {"system": t.system, "chat": t.chat, "variables": t.chat_template_kwargs, "date": t.date}

    def write(problem: Problem) -> str:
        return chat.render(problem, tokenizer=tokenizer, template=template, **how)

    bounds: Any = {"tokenizer": tokenizer, "context": r.context, "max_new_tokens": r.max_new_tokens}
    checks = _Checks(recipe, room.Writer.of(write), room.Room(**bounds))
    if t.kind == "arithmetic":
        train, held = (tasks.arithmetic(level=t.level, split=s, seed=seed) for s in ("train", "heldout"))
        for problem in train:
            checks.see(problem, f"problem {problem.id!r}")
        heldout = [(problem, f"problem {problem.id!r}") for problem in held[: recipe.evaluation.problems]]
        stream = partial(tasks.PromptStream, train, prompts=[write(problem) for problem in train])
    else:
        found = data.read(_entries(t.files("train")), look=checks.see_training, metadata=checks.need_metadata)
        heldout = _heldout(t, recipe.evaluation.problems)
        mark = checks.fingerprint.value(write(room.PROBE))
        texts = room.Texts(found, write, **bounds)
        stream = partial(tasks.PromptStream, found, prompts=texts, shares=_shares(t, found), rows_fingerprint=mark)
    for problem, place in heldout:
        checks.see(problem, place)
    checks.require()
    return stream(seed=seed), [Prompt(problem, write(problem)) for problem, _ in heldout]


def _entries(files: Iterable[DataFile]) -> list[tuple[Any, data.Names]]:
    return [(file.path, file.fields.model_dump()) for file in files if file.fields is not None]


def _heldout(task: Task, most: int) -> list[Placed]:
    if not (files := task.files("heldout")):
        return []
    found = data.read(_entries(files), metadata=False)
    return [(found[i], found.place(i)) for i in range(min(most, len(found)))]


def _shares(task: Task, found: data.Problems) -> list[tuple[int, float]]:
    """(problems, weight) of each entry; none where none has a weight."""
    entries = zip(found.counts, task.files("train"), strict=True)
    return [(count, file.weight) for count, file in entries if file.weight is not None]


class _Checks:
    """What would end a run in its middle: an answer that its grader cannot take, a prompt that has no room."""

    def __init__(self, recipe: Recipe, writer: room.Writer, bounds: room.Room) -> None:
        self._reward, self._writer, self._room = recipe.reward, writer, bounds
        self._graders: dict[str, str] = {}  # of each source that was seen
        self._kinds = set[bool]()
        self.fingerprint = tasks.Fingerprint()
        self.need_metadata = PYTHON_TESTS in (recipe.reward.default, *recipe.reward.by_source.values())

    def see_training(self, problem: Problem, place: str) -> None:
        self.fingerprint.add(problem)
        self.see(problem, place)

    def see(self, problem: Problem, place: str) -> None:
        """Raises TaskError for an answer that the grader of its source could not take."""
        grader = self._graders.get(problem.source)
        if grader is None:
            grader = chosen_grader(problem.source, default=self._reward.default, by_source=self._reward.by_source)
            self._graders[problem.source] = grader
        try:
            check_question(grader, question(problem))
        except ValueError as error:
            raise TaskError(f"{place}: {error}") from None
        if not problem.answer and grader == "boxed":  # the other built-in ones have refused it
            raise TaskError(f"{place}: task.fields.answer = null, and reward.extractor = boxed compares with an answer")
        kind = bool(problem.messages)  # one prompt of each kind is written for what its writing may refuse
        if kind not in self._kinds or not self._room.holds(self._writer.most(problem)):
            self._kinds.add(kind)
            self._room.add(Prompt(problem, self._writer.write(problem)))

    def require(self) -> None:
        """Raise TaskError for prompts without room, or for a source in reward.by_source that no problem has."""
        self._require_sources()
        self._room.require()

    def _require_sources(self) -> None:
        """A slip in a source's name changes who grades."""
        sources, named = sorted(self._graders), self._reward.by_source
        if idle := [p for p in named if p != "*" and not fnmatch.filter(sources, p) and p not in sources]:
            raise TaskError(
                f"reward.by_source names {', '.join(idle)}, the source of no problem; the sources are "
                f"{', '.join(sources[:8])}{' ...' if len(sources) > 8 else ''}: correct the name or drop it"
            )
