"""Prompts: built-in arithmetic, templates, a length check, and a resumable stream; problems of files are read in data.

Nothing here imports torch or ray; a tokenizer is any object with Hugging Face's `apply_chat_template` and `__call__`.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np

from dcpo_openrlhf.rollout.data import Problems
from dcpo_openrlhf.rollout.data import load_jsonl as load_jsonl
from dcpo_openrlhf.rollout.problems import Problem, Prompt, TaskError
from dcpo_openrlhf.rollout.room import check_prompt_lengths as check_prompt_lengths


def _seeded_order(keys: Sequence[str], *, salt: str) -> np.ndarray:
    """Indices of `keys` in the order of sha256(salt, key): the same in every process, whatever the order of `keys`."""
    digests = bytearray(32 * len(keys))
    for i, key in enumerate(keys):
        digests[32 * i : 32 * i + 32] = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    words = np.frombuffer(digests, dtype=">u8").reshape(-1, 4).astype("u8")
    return np.lexsort(words.T[::-1])  # the last key is the first to decide


# --- built-in arithmetic ---------------------------------------------------------------------------------------------

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}

# level -> (operations, operands are below this bound, share of the unordered pairs that is held out)
# Level 1 has 256 problems: about 100 of them tell an accuracy of 0.9 from one of 0.8, the others are to learn from.
ARITHMETIC_LEVELS = {1: ("+", 16, 0.41), 2: ("+", 50, 0.22), 3: ("+", 100, 0.22), 4: ("+-*", 100, 0.22)}


def arithmetic(*, level: int, split: Literal["train", "heldout"], seed: int) -> list[Problem]:
    """Every problem of one split of a level, in a seeded order, so that a prefix is a fair sample.

    `a op b` and `b op a` fall into the same split; the two splits of one seed share no problem. Raises TaskError for an
    unknown level or split.
    """
    if level not in ARITHMETIC_LEVELS:
        raise TaskError(f"arithmetic level must be one of {sorted(ARITHMETIC_LEVELS)}, not {level!r}")
    if split not in ("train", "heldout"):
        raise TaskError(f'arithmetic split must be "train" or "heldout", not {split!r}')
    operations, bound, heldout_share = ARITHMETIC_LEVELS[level]
    pairs = [(a, op, b) for op in operations for a in range(bound) for b in range(a, bound)]
    order = _seeded_order([f"{a}{op}{b}" for a, op, b in pairs], salt=f"arithmetic/{level}/{seed}")
    cut = round(heldout_share * len(pairs))
    chosen = [pairs[i] for i in (order[:cut] if split == "heldout" else order[cut:])]
    ordered = [p for a, op, b in chosen for p in ([(a, op, b)] if a == b else [(a, op, b), (b, op, a)])]
    return [_arithmetic_problem(a, op, b, level=level) for a, op, b in ordered]


def _arithmetic_problem(a: int, op: str, b: int, *, level: int) -> Problem:
    return Problem(
        id=f"arithmetic-{level}-{a}{op}{b}",
        problem=f"What is {a} {op} {b}? Answer with only the number.",
        answer=str(OPERATIONS[op](a, b)),
        source=f"arithmetic level {level}",
        difficulty=level,
    )


# --- templates -------------------------------------------------------------------------------------------------------

SLOT = "{problem}"


@dataclass(frozen=True)
class PromptTemplate:
    r"""Text with exactly one `{problem}`; every other brace is literal, so `\boxed{}` needs no escape."""

    text: str

    def __post_init__(self):
        if self.text.count(SLOT) != 1:
            raise TaskError(f"a prompt template holds {SLOT} exactly once, not {self.text.count(SLOT)}x: {self.text!r}")

    def fill(self, problem: str) -> str:
        """The template with the problem in its place."""
        return self.text.replace(SLOT, problem)


TEMPLATES = {
    "plain": PromptTemplate("{problem}"),
    # The DCPO authors' training prompt (arXiv 2601.12730).
    "boxed_think": PromptTemplate(
        "{problem} You FIRST think about the reasoning process as an internal monologue and then provide the final "
        "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in "
        "\\boxed{}."
    ),
}


def prompt_template(name_or_text: str) -> PromptTemplate:
    """The template of that name, or one made of the text. Raises TaskError for a text without {problem}."""
    if name_or_text not in TEMPLATES and SLOT not in name_or_text:
        raise TaskError(f"no prompt template {name_or_text!r}; take one of {sorted(TEMPLATES)} or a text with {SLOT}")
    return TEMPLATES.get(name_or_text) or PromptTemplate(name_or_text)


# --- the stream ------------------------------------------------------------------------------------------------------


class _Pool:
    """Places of some problems without end: epoch after epoch, each a fresh permutation by (seed, epoch, ids) alone."""

    def __init__(self, places: range, ids: Sequence[str], seed: int) -> None:
        self._places, self._ids, self._seed = places, ids, seed
        self.start(0)

    def __len__(self) -> int:
        return len(self._places)

    def start(self, epoch: int) -> None:
        self.epoch = epoch
        self.position = 0  # problems of this epoch already taken
        ids = self._ids[self._places.start : self._places.stop]
        self._order = _seeded_order(ids, salt=f"stream/{self._seed}/{epoch}")

    @property
    def taken(self) -> int:
        return self.epoch * len(self) + self.position

    def next(self) -> int:
        if self.position == len(self):
            self.start(self.epoch + 1)
        place = self._places[int(self._order[self.position])]
        self.position += 1
        return place


class PromptStream:
    """Prompts without end, in an order by (seed, problem ids) alone: see _Pool, and `_turn` where files have shares."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        prompts: Sequence[str],
        seed: int,
        shares: Sequence[tuple[int, float]] = (),
        rows_fingerprint: str | None = None,
    ):
        """`prompts[i]` is the text of `problems[i]`. Raises TaskError for no problems, unequal counts or equal ids.

        shares: (number of problems, weight) of each file, in the order of `problems`, where each is to have its share
        of the prompts; none: every problem once an epoch. rows_fingerprint: a Fingerprint's, if not of all texts.
        """
        if not problems:
            raise TaskError("a prompt stream needs at least one problem")
        if len(problems) != len(prompts):
            raise TaskError(f"one prompt a problem is needed, not {len(prompts)} for {len(problems)}")
        ids = problems.ids if isinstance(problems, Problems) else [problem.id for problem in problems]
        if len(set(ids)) != len(ids):
            raise TaskError(f"problem ids must be unique: {len(ids)} problems, {len(set(ids))} ids")
        self._problems, self._prompts, self._seed = problems, prompts, seed
        ends = list(accumulate((count for count, _ in shares), initial=0)) if shares else [0, len(ids)]
        self._pools = [_Pool(range(begin, end), ids, seed) for begin, end in pairwise(ends)]
        self._weights = [Fraction(str(weight)) for _, weight in shares] or [Fraction(1)]
        self.fingerprint = rows_fingerprint or fingerprint(self._all())

    def _all(self) -> Iterator[Prompt]:
        return (Prompt(problem, text) for problem, text in zip(self._problems, self._prompts, strict=True))

    def __len__(self) -> int:
        """Problems."""
        return len(self._problems)

    def __copy__(self) -> "PromptStream":
        """A stream that goes on from here by itself."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _pools=[copy.copy(pool) for pool in self._pools])
        return other

    @property
    def epoch(self) -> int:
        """Of the first file, where files have shares."""
        return self._pools[0].epoch

    @property
    def position(self) -> int:
        """Prompts of this epoch already taken; of the first file, where files have shares."""
        return self._pools[0].position

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        place = self._pools[self._turn()].next()
        return Prompt(self._problems[place], self._prompts[place])

    def _turn(self) -> int:
        """The file whose turn it is: of n prompts, file i has n * w_i / sum(w) to within 1 - 1 / (2 files - 2).

        Of the files that may have one more, that whose bound comes first (Tijdeman, The chairman assignment problem,
        Discrete Mathematics 32, 1980).
        """
        if len(self._pools) == 1:
            return 0
        taken, total, parts = [pool.taken for pool in self._pools], sum(self._weights), 2 * len(self._pools) - 2
        n = sum(taken) + 1
        may = [i for i, w in enumerate(self._weights) if parts * (n * w - taken[i] * total) >= total]
        return min(may, key=lambda i: (parts * (taken[i] + 1) - 1) / self._weights[i])

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; they may span epochs."""
        return [next(self) for _ in range(n)]

    def peek(self, n: int) -> list[Prompt]:
        """What the next `take` of n will give; the stream stays where it is."""
        return copy.copy(self).take(n)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue with the very next prompt."""
        places = [{"epoch": pool.epoch, "position": pool.position} for pool in self._pools]
        where = places[0] if len(places) == 1 else {"files": places, "weights": [str(w) for w in self._weights]}
        return {"seed": self._seed, **where, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Raises TaskError where seed, prompts or weights differ from its own."""
        own = self.state_dict()
        if ":" not in state["fingerprint"] and ":" in self.fingerprint:  # from before files stayed on the disk
            own["fingerprint"] = fingerprint(self._all())
        for key, what in (
            ("fingerprint", "the problems or their prompts"),
            ("seed", "the seed"),
            ("weights", "the weights of task.train"),
        ):
            if (saved := state.get(key)) != (now := own.get(key)):
                raise TaskError(
                    f"cannot resume the prompt stream: {what} changed ({key} {saved!r} in the checkpoint, "
                    f"{now!r} now); resume with the same data, template and seed, or start a new run"
                )
        for pool, place in zip(self._pools, state.get("files", [state]), strict=True):
            pool.start(place["epoch"])
            pool.position = place["position"]


def require_same_heldout(prompts: Sequence[Prompt], saved: str | None) -> None:
    """Raise TaskError where the held-out prompts are not the checkpoint's; None: it is from before they were kept."""
    if saved is not None and saved != (now := fingerprint(prompts)):
        raise TaskError(
            f"cannot resume: the held-out problems or their prompts changed (fingerprint {saved} in the checkpoint, "
            f"{now} now), so that accuracies before and after are not of the same problems; give the run its own "
            "(task.heldout, evaluation.problems), or start a new run"
        )


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """sha256 of all problems and texts, in the order of their ids, as 16 hex digits."""
    rows = sorted([p.problem.id, p.problem.problem, p.problem.answer, p.text] for p in prompts)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class Fingerprint:
    """Of problems and of what makes prompts of them, in any order and one problem at a time."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, problem: Problem) -> None:
        parts = [problem.id, problem.problem, problem.answer]
        parts += [str(part) for turn in problem.messages for part in turn.values()]
        self._sum += int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest())

    def value(self, prompt: str) -> str:
        """prompt: the text of any one problem, which template, system message and date have gone into."""
        return "rows:" + hashlib.sha256(f"{self._sum}\0{prompt}".encode()).hexdigest()[:16]
