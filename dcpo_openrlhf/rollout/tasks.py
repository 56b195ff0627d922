"""Prompts: built-in arithmetic, local JSONL, templates, a resumable stream, and a length check.

Nothing here imports torch or ray; a tokenizer is any object with Hugging Face's `apply_chat_template` and `__call__`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple


class TaskError(ValueError):
    """A task cannot be used as given; the message names the rule, the values seen and the remedy."""


@dataclass(frozen=True)
class Problem:
    """One question with its final answer."""

    id: str
    problem: str
    answer: str
    source: str
    difficulty: int = 0
    """0 where the source names none; the level for built-in arithmetic."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further keys of the problem's line, for graders."""


class Prompt(NamedTuple):
    """A problem with the text that the policy reads."""

    problem: Problem
    text: str


def _seeded_order(keys: Sequence[str], *, salt: str) -> list[int]:
    """Indices of `keys` in the order of sha256(salt, key): the same in every process, whatever the order of `keys`."""
    return sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{salt}\0{keys[i]}".encode()).digest())


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


# --- local files -----------------------------------------------------------------------------------------------------

JSONL_KEYS = ("id", "problem", "answer", "source")
OTHER_NAMES = ("prompt", "question", "messages")
"""What published sets call the problem."""


def load_jsonl(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file, one object a line with the string keys id, problem, answer and source.

    Other keys are its metadata. Raises TaskError with file and line number for anything else: an unreadable or empty
    file, a blank or malformed line, a missing, empty or non-string value, an id seen before.
    """
    path = Path(path)
    try:
        # Split on \n alone: str.splitlines would also split inside a string that holds U+2028.
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}; give the path of a readable JSONL file") from error
    if lines == [b""]:
        raise TaskError(f"{path}: is empty; give one JSON object a line with the keys {', '.join(JSONL_KEYS)}")
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        problem = _parse_line(line, where=f"{path}:{number}")
        if problem.id in line_of_id:
            first = line_of_id[problem.id]
            raise TaskError(f"{path}:{number}: id {problem.id!r} is already on line {first}; ids must be unique")
        line_of_id[problem.id] = number
        problems.append(problem)
    return problems


def _parse_line(line: bytes, *, where: str) -> Problem:
    expected = f"expected one JSON object with the string keys {', '.join(JSONL_KEYS)}"
    try:
        record = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        seen = line[:60].decode("utf-8", errors="replace")
        raise TaskError(f"{where}: not JSON in UTF-8 ({error}): {seen!r}; {expected}") from error
    if not isinstance(record, dict):
        raise TaskError(f"{where}: {type(record).__name__} instead of an object; {expected}")
    missing = [key for key in JSONL_KEYS if key not in record]
    if missing:
        other = [name for name in OTHER_NAMES if "problem" in missing and name in record]
        hint = f" ({other[0]} may be it: python -m tools.prepare_data writes such a file in this form)" if other else ""
        raise TaskError(f"{where}: missing {', '.join(missing)}; the keys are {', '.join(record)}{hint}; {expected}")
    for key in JSONL_KEYS:
        if not isinstance(record[key], str):
            raise TaskError(f"{where}: {key} is {record[key]!r} ({type(record[key]).__name__}); write it as a string")
        if key != "source" and not record[key].strip():
            raise TaskError(f"{where}: {key} is empty; give it a value or remove the line")
        require_text(record[key], what=f"{where}: {key}")
    return Problem(**{key: record.pop(key) for key in JSONL_KEYS}, metadata=record)


def require_text(text: str, *, what: str) -> None:
    """Raise TaskError for half of a surrogate pair: JSON can write one, no tokenizer or file takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TaskError(
            f"{what} holds half of a surrogate pair, {half} at character {error.start + 1}, which is no text; "
            "write the whole pair or remove it"
        ) from None


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


def check_prompt_lengths(prompts: Sequence[Prompt], *, tokenizer: Any, context: int, max_new_tokens: int) -> int:
    """The longest prompt [tokens], once length + max_new_tokens <= context holds for every prompt.

    Raises TaskError that names the first prompt for which it does not, its length, the limit and how many offend.
    """
    for prompt in prompts:  # what template, system message or their settings brought in
        require_text(prompt.text, what=f"prompt {prompt.problem.id!r}")
    # verbose: else the tokenizer warns of a long prompt in its own words, before the error that says what to do
    encoded = tokenizer([p.text for p in prompts], add_special_tokens=False, verbose=False)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    limit = context - max_new_tokens
    too_long = [i for i, length in enumerate(lengths) if length > limit]
    if too_long:
        first = too_long[0]
        raise TaskError(
            f"prompt {prompts[first].problem.id!r} has {lengths[first]} tokens, above the limit of {limit} = context "
            f"{context} - max_new_tokens {max_new_tokens}; {len(too_long)} of {len(prompts)} prompts are too long, the "
            f"longest has {max(lengths)}; raise the context, lower max_new_tokens or remove them"
        )
    return max(lengths, default=0)


# --- the stream ------------------------------------------------------------------------------------------------------


class PromptStream:
    """Prompts without end: epoch after epoch, each a fresh permutation by (seed, epoch, problem ids) alone."""

    def __init__(self, problems: Sequence[Problem], *, prompts: Sequence[str], seed: int):
        """`prompts[i]` is the text of `problems[i]`. Raises TaskError for no problems, unequal counts or equal ids."""
        if not problems:
            raise TaskError("a prompt stream needs at least one problem")
        if len(problems) != len(prompts):
            raise TaskError(f"one prompt a problem is needed, not {len(prompts)} for {len(problems)}")
        ids = {problem.id for problem in problems}
        if len(ids) != len(problems):
            raise TaskError(f"problem ids must be unique: {len(problems)} problems, {len(ids)} ids")
        self._prompts = [Prompt(problem, text) for problem, text in zip(problems, prompts, strict=True)]
        self._seed = seed
        self.fingerprint = fingerprint(self._prompts)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.position = 0  # prompts of this epoch already taken
        self._order = _seeded_order([p.problem.id for p in self._prompts], salt=f"stream/{self._seed}/{epoch}")

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        if self.position == len(self):
            self._start_epoch(self.epoch + 1)
        prompt = self._prompts[self._order[self.position]]
        self.position += 1
        return prompt

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; they may span epochs."""
        return [next(self) for _ in range(n)]

    def state_dict(self) -> dict[str, int | str]:
        """What `load_state_dict` needs to continue with the very next prompt."""
        return {"seed": self._seed, "epoch": self.epoch, "position": self.position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Raises TaskError where seed or prompts differ from those of `state`."""
        own = self.state_dict()
        for key, what in (("fingerprint", "the problems or their prompts"), ("seed", "the seed")):
            if state[key] != own[key]:
                raise TaskError(
                    f"cannot resume the prompt stream: {what} changed ({key} {state[key]!r} in the checkpoint, "
                    f"{own[key]!r} now); resume with the same data, template and seed, or start a new run"
                )
        self._start_epoch(state["epoch"])
        self.position = state["position"]


def require_same_heldout(prompts: Sequence[Prompt], saved: str | None) -> None:
    """Raise TaskError where the held-out prompts are not the checkpoint's; None: it is from before they were kept."""
    if saved is not None and saved != (now := fingerprint(prompts)):
        raise TaskError(
            f"cannot resume: the held-out problems or their prompts changed (fingerprint {saved} in the checkpoint, "
            f"{now} now), so that accuracies before and after are not of the same problems; give the run its own "
            "(task.heldout, evaluation.problems), or start a new run"
        )


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """sha256 of all problems and texts, in the order of their ids, as 16 hex digits."""
    rows = sorted([p.problem.id, p.problem.problem, p.problem.answer, p.text] for p in prompts)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
