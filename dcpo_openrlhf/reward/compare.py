"""Are two answers equal? Words and choices by rules, numbers exactly, formulas by algebra.

`settle` is for the caller's process: bounded, and without a library. What it leaves open is for `symbolic_equal`, in a
process that can be killed.
"""

import re
from collections.abc import Sequence

from dcpo_openrlhf.reward import algebra
from dcpo_openrlhf.reward.extract import EXTRACTORS, Extractor, as_integer
from dcpo_openrlhf.reward.matching import Oracle, match
from dcpo_openrlhf.reward.normalise import normalise, spoken
from dcpo_openrlhf.reward.reader import has_standing, read
from dcpo_openrlhf.reward.tokens import Node, Token, Unreadable, drop_grouping, same, tokenise
from dcpo_openrlhf.reward.words import verdict

# A final answer is short: anything longer is wrong, not worth a worker's time, and might not fit into a pipe at once.
MAX_ANSWER_CHARS = 2000


class Undecided(Exception):
    """Only algebra can tell."""


def _equal_exactly(gold: Node, found: Node) -> bool:
    """The caller's answer for two formulas; raises Undecided where they are not both rational and of moderate size."""
    if gold == found:
        return True
    try:
        a, b = algebra.exact(gold), algebra.exact(found)
    except algebra.TooLarge:
        raise Undecided from None
    except ArithmeticError:
        return False
    if a is None or b is None:
        raise Undecided
    return a == b or _rounded(gold, found, b)


def _rounded(gold: Node, found: Node, value: "algebra.Fraction") -> bool:
    decimal, other = algebra.decimal_of(gold), algebra.decimal_of(found)
    return decimal is not None and algebra.rounds_to(decimal, value, other[1] if other else None)


def _no_proportion(gold: Node, found: Node) -> float:
    raise Undecided


def _equal_by_algebra(gold: Node, found: Node) -> bool:
    try:
        return _equal_exactly(gold, found)
    except Undecided:
        decimal = algebra.decimal_of(gold)
        return algebra.equal(gold, found) or (decimal is not None and algebra.approximates(decimal, found))


EXACT = Oracle(_equal_exactly, _no_proportion)
ALGEBRA = Oracle(_equal_by_algebra, algebra.proportion)


def answers_equal(gold: str, found: str, ask: Oracle) -> bool:
    """Whether the found answer is the gold; raises Undecided where the oracle does."""
    gold, found = normalise(gold), normalise(found)
    mine, other = tokenise(gold), tokenise(found)
    if same(drop_grouping(_lower(mine)), drop_grouping(_lower(other))):
        return True
    result = verdict(spoken(gold), spoken(found))
    if result is not None:
        return result
    if has_standing(other) - has_standing(mine):
        return False
    return any(match(g, f, ask) for g, f in _readings(gold, found, mine, other))


def _lower(tokens: list[Token]) -> list[Token]:
    """Words of text in small letters, where they are written as words are."""
    return [
        t._replace(text=t.text.lower()) if t.kind == "word" and (t.text.istitle() or t.text.islower()) else t
        for t in tokens
    ]


def _readings(gold: str, found: str, mine: list[Token], other: list[Token]) -> list[tuple[Node, Node]]:
    """Pairs of trees that the two may mean: 100,200 is a list to a gold that is one, 12 m a length to a bare 12."""
    pairs = []
    trees = [_tree(mine), _tree(other)]
    if trees[0] is None:
        return []
    if trees[1] is not None:
        pairs.append((trees[0], trees[1]))
    if trees[0][0] == "list" and "," in found:
        apart = _tree(tokenise(found, commas=False))
        if apart is not None and apart != trees[1]:
            pairs.append((trees[0], apart))
    if not algebra.symbols(trees[0]) or trees[0][0] == "qty":
        measured = _tree(other, bare_units=True)
        if measured is not None and measured[0] == "qty" and measured != trees[1]:
            pairs.append((trees[0], measured))
    elif trees[1] is not None and trees[1][0] == "qty":
        measured = _tree(mine, bare_units=True)
        if measured is not None and measured[0] == "qty":
            pairs.append((measured, trees[1]))
    return pairs


def _tree(tokens: list[Token], *, bare_units: bool = False) -> Node | None:
    try:
        return read(tokens, bare_units=bare_units)
    except Unreadable:
        return None


def settle(extracted: str | None, answer: str) -> float | None:
    """The reward where it needs no algebra; None where only a symbolic comparison can tell."""
    if not extracted or len(extracted) > MAX_ANSWER_CHARS:
        return 0.0
    if extracted == answer.strip():
        return 1.0
    gold, found = as_integer(answer), as_integer(extracted)
    if gold is not None and found is not None:
        return float(gold == found)
    try:
        return float(answers_equal(answer, extracted, EXACT))
    except Undecided:
        return None
    except RecursionError:
        return 0.0


def symbolic_equal(gold: str, found: str) -> bool:
    """Whether the two are equal, with algebra. It has no time limit: only for a process that can be killed."""
    try:
        return answers_equal(gold, found, ALGEBRA)
    except RecursionError:
        return False


def check_answers(extractor: str, answers: Sequence[str]) -> None:
    """Raise ValueError for an unknown extractor, or an answer that it cannot meet. For the start of a run."""
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {sorted(EXTRACTORS)}, not {extractor!r}")
    for answer in answers:
        if extractor == "last_integer" and as_integer(answer) is None:
            raise ValueError(f'extractor "last_integer" needs integer answers, not {answer!r}; use "boxed"')
        if extractor == "choice" and re.fullmatch(r"\s*\(?[A-J]\)?\s*", answer) is None:
            raise ValueError(f'extractor "choice" needs a letter from A to J, not {answer!r}; use "boxed"')
        if len(answer) > MAX_ANSWER_CHARS:
            raise ValueError(f"an answer has at most {MAX_ANSWER_CHARS} characters, not {len(answer)}: {answer[:60]!r}")


def grade(response: str, answer: str, *, extractor: Extractor) -> float:
    """1.0 if the response's final answer equals `answer`, else 0.0, in this process and without a deadline.

    For tests and single items: a hostile response can hang it or take all memory. Use GraderPool for a policy's output.
    """
    check_answers(extractor, [answer])
    extracted = EXTRACTORS[extractor](response)
    reward = settle(extracted, answer)
    if reward is None and extracted is not None:
        reward = float(symbolic_equal(answer, extracted))
    return reward or 0.0
