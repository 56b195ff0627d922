"""Which groups of a step are trained on, and which prompts are drawn in place of the others: `train.filter`.

Entropy, success rate and every metric of the rollout are taken over all groups that were drawn: the policy's own
distribution is what the controller steers, and what a filter leaves is no sample of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dcpo_openrlhf.recipe.schema import GroupFilter
from dcpo_openrlhf.reward.pool import Grade
from dcpo_openrlhf.rollout.tasks import Prompt

KEEPS: dict[GroupFilter, Callable[[int, int], bool]] = {
    "none": lambda right, size: True,
    "all_wrong": lambda right, size: right > 0,
    "uniform": lambda right, size: 0 < right < size,
}
"""Whether a group is trained on, by its responses of success 1 and its size. uniform: DAPO (arXiv 2503.14476), Eq. 11.

Success decides, not the reward: where length or a function's shaping is taken off the rewards of responses that are all
wrong, the group advantage makes those differences as large as right from wrong (NVIDIA-NeMo/RL#2431, verl-recipe#125).
"""


class Group(NamedTuple):
    """The responses to one prompt and what they earned."""

    prompt: Prompt
    samples: Sequence[Any]
    texts: Sequence[str]
    grades: Sequence[Grade]

    @staticmethod
    def split(
        prompts: Sequence[Prompt], samples: Sequence[Any], texts: Sequence[str], grades: Sequence[Grade]
    ) -> "list[Group]":
        """One for each prompt, of as many consecutive responses each."""
        n = len(samples) // len(prompts)
        some = [slice(i * n, (i + 1) * n) for i in range(len(prompts))]
        return [Group(p, samples[s], texts[s], grades[s]) for p, s in zip(prompts, some, strict=True)]


@dataclass(frozen=True)
class Draw:
    """What a step drew."""

    groups: list[Group]
    """Those that are trained on, in the order of the updates, then all others."""
    fillers: list[int] = field(default_factory=list)
    """Places among the former of groups that the filter dropped: their advantage is 0."""
    metrics: dict[str, float] = field(default_factory=dict)
    """filter/*; nothing without a filter."""
    shortage: str = ""
    """Why the step has fillers."""

    @property
    def prompts(self) -> list[Prompt]:
        return [g.prompt for g in self.groups]

    @property
    def samples(self) -> list[Any]:
        return [sample for g in self.groups for sample in g.samples]

    @property
    def texts(self) -> list[str]:
        return [text for g in self.groups for text in g.texts]

    @property
    def grades(self) -> list[Grade]:
        return [grade for g in self.groups for grade in g.grades]


def draw_step(draw: Callable[[int, int], list[Group]], *, prompts: int, group_filter: GroupFilter, rounds: int) -> Draw:
    """`prompts` groups to train on, of at most `rounds` rounds; `draw(count, drawn)` answers the next count prompts.

    A refill asks for what is missing / the share of groups kept so far, and for `prompts` at most. A step that stays
    short is filled up with dropped groups, at an advantage of 0: the run goes on, where verl, NeMo-RL and SkyRL end it;
    number and size of the updates stay, and with them the learning rate's course and the data ranks' shares; and a
    group weighs as much in its update as in a full step's, however few there are.
    """
    drawn: list[Group] = []
    kept: list[int] = []
    done = 0
    while len(kept) < prompts and done < rounds:
        missing = prompts - len(kept)
        count = min(prompts, -(-missing * len(drawn) // max(len(kept), 1))) if drawn else prompts
        new = draw(count, len(drawn))
        kept += [len(drawn) + i for i, group in enumerate(new) if _keeps(group_filter, group)]
        drawn += new
        done += 1
    if group_filter == "none":
        return Draw(drawn)
    dropped = sorted(set(range(len(drawn))) - set(kept))
    missing = max(prompts - len(kept), 0)
    fillers = [(2 * i + 1) * prompts // (2 * missing) for i in range(missing)]  # evenly, so that updates share them
    kept_first, dropped_first, filled = iter(kept), iter(dropped), set(fillers)
    order = [next(dropped_first if place in filled else kept_first) for place in range(prompts)]
    rest = [*kept_first, *dropped_first]
    metrics = {
        "filter/drawn": len(drawn),
        "filter/kept": prompts - missing,
        "filter/surplus": max(len(kept) - prompts, 0),
        "filter/rounds": done,
        "filter/short": missing,
    }
    return Draw(
        [drawn[i] for i in (*order, *rest)],
        fillers,
        {name: float(value) for name, value in metrics.items()},
        _shortage(drawn, missing, prompts, done) if missing else "",
    )


def _keeps(group_filter: GroupFilter, group: Group) -> bool:
    return KEEPS[group_filter](sum(grade.success > 0 for grade in group.grades), len(group.grades))


def _shortage(drawn: Sequence[Group], missing: int, prompts: int, rounds: int) -> str:
    right = [sum(grade.success > 0 for grade in group.grades) for group in drawn]
    solved = sum(count == len(group.grades) for count, group in zip(right, drawn, strict=True))
    return (
        f"train.filter kept {prompts - missing} of {prompts} groups in {rounds} rounds (train.filter_rounds): of "
        f"{len(drawn)} drawn, {right.count(0)} have no right response and {solved} right ones alone; {missing} of "
        "these fill the step, at an advantage of 0. Raise train.filter_rounds or train.group_size, or take problems "
        "that the model solves now and then"
    )
