"""The final answer of a response, as text: the last box or the last integer. Linear in the length of the response."""

import re
from collections import deque
from typing import Literal

Extractor = Literal["boxed", "last_integer"]
_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)

_SECOND_GROUP = re.compile(r"\s*\{[^{}]*")


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance; None where there is none.

    `\{` and `\}` are letters, not braces. `\boxed 5`, without braces, is not accepted: prompts ask for `\boxed{}`.
    Nor is `\boxed{5}{6}`, which answers twice: it gives the text with both.
    """
    opened: list[int | None] = []  # one for each open brace: where the content starts if it is a box
    last: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    if last is None:
        return None
    second = _SECOND_GROUP.match(text, last[1] + 1)
    return text[last[0] : second.end() if second else last[1]].strip()


MINUS = "\u2212-"  # typographic and ASCII; the latter last, so that a character class does not read it as a range
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
# A sign counts only where it cannot be a subtraction or a range: 5-3 ends in 3.
_SIGN = rf"(?:(?<![\w)\]}}])(?P<sign>[+{MINUS}]))?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?P<digits>{_DIGITS})(?P<fraction>\.[0-9]+)?|(?<![\w.])\.[0-9]+)")
_INTEGER = re.compile(rf"(?P<sign>[+{MINUS}])?\s*(?P<digits>{_DIGITS})(?P<fraction>\.0*)?")
LATEX_SPACE = re.compile(r"\\[,!]\s*|\\?\$")  # 32,\! 348 and \$5


def _canonical_integer(match: re.Match[str]) -> str:
    """Sign and digits without separators and leading zeros. Text, since int() refuses more than 4300 digits."""
    digits = match["digits"].replace(",", "").lstrip("0") or "0"
    negative = match["sign"] is not None and match["sign"] in MINUS
    return f"-{digits}" if negative and digits != "0" else digits


def last_integer(text: str) -> str | None:
    """The last number in the text, if it is an integer, without thousands separators: "-1,234." gives "-1234".

    None where there is no number or the last one has a fraction: 12.5 is not the integer 5 (nor 12), but 7.0 is 7.
    """
    last = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    if last is None or last["digits"] is None or (last["fraction"] or "").strip(".0"):
        return None
    return _canonical_integer(last)


def as_integer(text: str) -> str | None:
    r"""The integer that the whole text is, in canonical digits; None where it is anything else. `1{,}234` is 1234."""
    match = _INTEGER.fullmatch(LATEX_SPACE.sub("", text.replace("{,}", ",")).strip())
    return None if match is None else _canonical_integer(match)


EXTRACTORS = {"boxed": extract_boxed, "last_integer": last_integer}
