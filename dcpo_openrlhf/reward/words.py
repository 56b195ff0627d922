r"""Answers that are no numbers: words, choices, times of day, dates, numerals in a base, names such as H_2O.

Each rule takes both answers as `spoken` gives them, and returns a verdict, or None where the gold is not of its kind.
"""

import re
from collections.abc import Callable

from dcpo_openrlhf.reward.vocabulary import FUNCTIONS, GREEK, names

Rule = Callable[[str, str], bool | None]
_CHOICE = re.compile(r"[(\[]?\s*([A-J])\s*[)\].:]?")
_DRESSED = re.compile(
    r"(?:(?:the |correct |final )*(?:option|choice|answer)(?: is)?:? *)?"
    r"(?:[(\[{] ?([A-J]) ?[)\]}][.:]?(?: +|(?=[A-Za-z0-9\\-]))|([A-J])(?:[).:] ?|\] ?))(.*)",
    re.IGNORECASE,
)
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) |has )?no (?:real |integer |such )?(?:solutions?|roots?|answers?)(?: exists?)?"
    r"|(?:the )?empty(?: set)?|\\emptyset|\\\{ ?\\\}",
    re.IGNORECASE,
)
_REALS = re.compile(r"(?:all )?(?:the )?reals?(?: numbers?)?|\\mathbb ?\{ ?R ?\}", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2})(?: ?: ?(\d{2}))? ?(?:([ap]) ?\.? ?m\.?)?", re.IGNORECASE)
_IN_DATES = names(
    """
    january february march april may june july august september october november december sept of the on
    jan feb mar apr jun jul aug sep oct nov dec
    """
)
_MONTHS = names("jan feb mar apr may jun jul aug sep oct nov dec")
_BASED = re.compile(r"\(?([0-9A-Z]+)\)?(?: ?_ ?\{? ?\(? ?([a-z]+|[0-9]+) ?\)? ?\}?)?")
_NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASES = {word: i for i, word in enumerate(_NUMBER_WORDS, start=2)} | {"sixteen": 16}
_ATOM = r"[A-Za-z](?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?'*"
_MULTIPLIES = re.compile(r"\\(?:cdot|times|frac)|[*/^0-9(]")
_NAME = re.compile(rf"{_ATOM}(?:{_ATOM})+")


def _choices(text: str) -> tuple[list[str], bool]:
    """The letters of a list of choices, and whether something stands between them; no letters where it is none."""
    plain = re.sub(r"\b(?:and|or|options?|choices?)\b|[(){}\[\]\\&]", " ", text)
    if re.fullmatch(r"[A-J](?:[\s,;]+[A-J])*[\s.]*", plain.strip()):
        return re.findall(r"[A-J]", plain), True
    run = re.fullmatch(r"[A-J]{2,}", text)
    return (list(text), False) if run else ([], False)


def choice(gold: str, found: str) -> bool | None:
    """One letter: (B), B), [B], B: 12, Option B; but no other letter beside it and no hedge."""
    match = _CHOICE.fullmatch(gold)
    if match is None:
        return None
    if _CHOICE.fullmatch(found):
        return _CHOICE.fullmatch(found)[1] == match[1]  # type: ignore
    plain = re.fullmatch(
        r"(?:the |correct |final )*(?:option|choice|answer)(?: is)?:? *[(\[{]? ?([A-J]) ?[)\]}]?", found, re.I
    )
    if plain:
        return plain[1] == match[1]
    dressed = _DRESSED.fullmatch(found)
    if dressed is None or (dressed[1] or dressed[2]) != match[1]:
        return False
    rest = dressed[3].strip()
    doubts = {
        "or",
        "not",
        "and",
        "but",
        "no",
        "isn't",
        "wrong",
        "incorrect",
        "if",
        "maybe",
        "either",
        "neither",
        "nor",
        "false",
    }
    others = re.search(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])", rest)
    return (
        others is None and rest[:1] not in "=+_^',;/*&|<>!?)" and not doubts & set(re.findall(r"[a-z']+", rest.lower()))
    )


def several_choices(gold: str, found: str) -> bool | None:
    """A, C in any order; AC also as A, C; but a run of letters only in its own order: BADC is not ABCD."""
    letters, separated = _choices(gold)
    if len(letters) < 2 or (not separated and letters != sorted(set(letters))):
        return None
    others, apart = _choices(found)
    if not apart and not separated:
        return others == letters
    return sorted(others) == sorted(letters) and (apart or others == sorted(set(others)))


def no_solution(gold: str, found: str) -> bool | None:
    """No solution and the empty set."""
    if _NO_SOLUTION.fullmatch(gold) is None:
        return None
    return _NO_SOLUTION.fullmatch(found) is not None


def time_of_day(gold: str, found: str) -> bool | None:
    """3:30 p.m. A gold without a.m. and p.m. takes either."""
    mine, other = _TIME.fullmatch(gold), _TIME.fullmatch(found)
    if mine is None or not (mine[2] or mine[3]) or not (_is_time(mine)):
        return (other is not None and other[3] is not None and other[2] is None and other[1] == gold) or None
    if other is None or not _is_time(other):
        return False if mine[3] else None
    if mine[3] and not other[3]:
        return int(other[1]) > 12 and _minutes(mine) == _minutes(other)
    if not mine[3] and other[3]:
        return _minutes(mine) == _minutes(other) or (mine[1].lstrip("0"), mine[2]) == (other[1].lstrip("0"), other[2])
    return _minutes(mine) == _minutes(other)


def _is_time(match: re.Match[str]) -> bool:
    return int(match[1]) <= (12 if match[3] else 24) and int(match[2] or 0) < 60


def _minutes(match: re.Match[str]) -> int:
    hour = int(match[1])
    if match[3]:
        hour = hour % 12 + (12 if match[3].lower() == "p" else 0)
    return 60 * hour + int(match[2] or 0)


def date(gold: str, found: str) -> bool | None:
    """March 5, 5 March, Mar. 5th: the same month and the same numbers."""
    mine = _date(gold)
    return None if mine is None else _date(found) == mine


def _date(text: str) -> tuple[str, list[int]] | None:
    words = re.findall(r"[A-Za-z]+", re.sub(r"(?<=\d) ?(?:st|nd|rd|th)\b", "", text))
    numbers = re.findall(r"\d+", text)
    months = [w.lower()[:3] for w in words if w.lower()[:3] in _MONTHS]
    if (
        len(months) != 1
        or not numbers
        or len(numbers) > 2
        or any(len(n) > 4 for n in numbers)
        or set(map(str.lower, words)) - _IN_DATES
    ):
        return None
    return months[0], sorted(int(n) for n in numbers)


def numeral(gold: str, found: str) -> bool | None:
    """1011_2: the same digits, in the same base or in none."""
    mine = _BASED.fullmatch(gold)
    if mine is None or mine[2] is None or _base(mine[2]) is None:
        return None
    other = _BASED.fullmatch(found)
    if other is None or mine[1].lstrip("0") != other[1].lstrip("0"):
        return False
    return other[2] is None or _base(other[2]) == _base(mine[2])


def _base(text: str) -> int | None:
    value = int(text) if text.isdigit() and len(text) < 3 else _BASES.get(text)
    return value if value is not None and 2 <= value <= 36 else None


def words(gold: str, found: str) -> bool | None:
    """Words in their order. Case, articles and a final period do not matter; letters do not multiply."""
    mine = _words(gold)
    if mine is None or (re.fullmatch(r"[a-z]{2,3}", gold) and _MULTIPLIES.search(found)):
        return None
    other = _words(found)
    return other is not None and len(mine) == len(other) and all(map(_same_word, mine, other))


def _words(text: str) -> list[str] | None:
    if (
        not re.fullmatch(r"[A-Za-z\"'][A-Za-z\s.,'!?;:\"-]*", text)
        or re.search(r"(?<![A-Za-z])[A-Za-z]{2,}", text) is None
    ):
        return None
    parts = re.findall(r"[A-Za-z']+", text)
    if any(p in FUNCTIONS or p in GREEK for p in parts) or (len(parts) == 1 and parts[0] in ("oo", "infinity")):
        return None
    return parts[1:] if len(parts) > 1 and parts[0].lower() in ("a", "an", "the") else parts


def _same_word(gold: str, found: str) -> bool:
    if gold == found:
        return True
    if gold.lower() != found.lower() or len(gold) == 1:
        return False
    if gold.isupper() and gold not in ("YES", "NO", "TRUE", "FALSE", "NONE"):
        return False  # names of points and abbreviations: ABC is not abc
    return found in (gold.lower(), gold.upper(), gold.capitalize())


def name(gold: str, found: str) -> bool | None:
    """AB', H_2O, xy: letters in their order, unless the found answer says that it multiplies."""
    if _NAME.fullmatch(gold) is None or gold in FUNCTIONS or gold in GREEK or gold in ("oo",):
        return None
    if _MULTIPLIES.search(re.sub(r"_(?:[A-Za-z0-9]|\{[^}]*\})", "", found)):
        return None
    return _braceless(found) == _braceless(gold)


def _braceless(text: str) -> str:
    return re.sub(r"[{}\s]", "", text)


def real_numbers(gold: str, found: str) -> bool | None:
    """All real numbers, in words and as a symbol."""
    if not _REALS.fullmatch(gold) or not _REALS.fullmatch(found):
        return None
    return True


RULES: tuple[Rule, ...] = (choice, several_choices, no_solution, real_numbers, time_of_day, date, numeral, words, name)


def verdict(gold: str, found: str) -> bool | None:
    """What the first rule for the gold's kind says; None where it is a matter for algebra."""
    for rule in RULES:
        result = rule(gold, found)
        if result is not None:
            return result
    return None
