"""Duplicates within a set, and problems that a training set shares with test sets."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcpo_openrlhf.rollout.tasks import Problem

NGRAM = 8
SHARE = 0.5
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    """Words in lower case without punctuation and LaTeX marks; each Chinese or Japanese character is a word."""
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", unicodedata.normalize("NFKC", text).lower())
    return tuple(_WORD.findall(spaced))


def _identity(text: str) -> str:
    """The text up to case, spaces and dollar signs. Operators and digits stay: 2+3 and 2-3 are two problems."""
    return re.sub(r"[\s$]+", "", unicodedata.normalize("NFKC", text).lower())


class Deduplicated(NamedTuple):
    kept: list[Problem]
    duplicates: list[str]
    """Ids whose problem and answer an earlier row has."""
    conflicting: list[str]
    """Ids of equal problems with different answers; none of them is kept."""


def deduplicate(problems: Sequence[Problem]) -> Deduplicated:
    """The first of each group of equal problems (see _identity); none of a group that disagrees about the answer."""
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[_identity(problem.problem)].append(problem)
    result = Deduplicated([], [], [])
    for group in groups.values():
        if len({_identity(p.answer) for p in group}) > 1:
            result.conflicting.extend(p.id for p in group)
        else:
            result.kept.append(group[0])
            result.duplicates.extend(p.id for p in group[1:])
    return result


class Overlap(NamedTuple):
    """A training problem that holds much of a test problem."""

    train: str
    set: str
    test: str
    share: float
    """Of the test problem's n-grams; 1.0 where the whole text is in the training problem."""


def find_overlap(train: Sequence[Problem], tests: Mapping[str, Sequence[Problem]]) -> list[Overlap]:
    """Pairs where the training problem holds at least SHARE of the test problem's runs of NGRAM words.

    After Chowdhery et al. 2022 (PaLM, 8-grams, 70%). Half, since DAPO rewrites how a problem ends so that its answer is
    an integer. Any one 13-gram, as for GPT-3, would flag "m/n where m and n are relatively prime positive integers".
    """
    holders: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    size: dict[tuple[str, str], int] = {}
    for name, problems in tests.items():
        for problem in problems:
            grams = _grams(words(problem.problem))
            size[name, problem.id] = len(grams)
            for gram in grams:
                holders[gram].append((name, problem.id))
    found = []
    for problem in train:
        shared = Counter(test for gram in _grams(words(problem.problem)) for test in holders.get(gram, ()))
        shares = ((*test, count / size[test]) for test, count in sorted(shared.items()))
        found.extend(Overlap(problem.id, *pair) for pair in shares if pair[-1] >= SHARE)
    return found


def _grams(text: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + NGRAM]) for i in range(max(1, len(text) - NGRAM + 1))}
