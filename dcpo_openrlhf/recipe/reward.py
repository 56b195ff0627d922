"""The recipe's section about rewards: who grades, with what bounds, and what is taken off."""

from typing import Annotated, Literal

from pydantic import Field

from dcpo_openrlhf.recipe.fields import Positive, Section

BuiltIn = Literal["boxed", "last_integer", "choice", "python_tests"]


class Reward(Section):
    extractor: BuiltIn = "boxed"
    """What is graded of a response: the last \\boxed{}, the last integer, the letter that it chooses, or the program in
    its last fenced block, by the problem's tests."""
    function: str | None = None
    """In place of extractor, a function of yours: FILE.py:NAME or import.path:NAME (docs/bring_your_own.md)."""
    by_source: dict[str, str] = {}  # noqa: RUF012  (pydantic copies it)
    """Graders by a problem's source: {gsm8k: last_integer, "*": FILE.py:NAME}. A name, or a pattern as in file names,
    of which the first that fits counts. Sources that none fits have function or extractor."""
    function_batch: Positive | None = None
    """Responses of one call of a function, whole groups together; None: all that it grades in a step, at once."""
    success_threshold: float = 0.5
    """Where a function names no success of a response: it is 1 from this reward (OpenRLHF's score) on, else 0."""
    require_end: bool = False
    """A response cut off at max_new_tokens earns 0, whatever it says."""
    overlong_buffer_len: Positive | None = None
    """DAPO's overlong penalty: tokens up to rollout.max_new_tokens over which it grows to the factor; None: off."""
    overlong_penalty_factor: Annotated[float, Field(ge=0)] = 1.0
    """Most that is taken off the reward of a long response; its success stays."""
    workers: Positive = 4
    """Grader processes."""
    deadline: Annotated[float, Field(gt=0)] = 10.0
    """Seconds for one comparison or one call of a function; then 0, a counted event and a fresh worker."""
    batch_deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for all grading of a step; what is left then earns 0 and is counted."""

    @property
    def default(self) -> str:
        """Grader of the sources that by_source leaves."""
        return self.function or self.extractor

    @property
    def functions(self) -> list[str]:
        """Every function that grades, once."""
        named = [name for name in (self.default, *self.by_source.values()) if ":" in name]
        return list(dict.fromkeys(named))
