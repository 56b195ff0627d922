"""The final answer of a response, as text: the last box or the last integer. Linear in the length of the response."""

import re
from collections import deque
from typing import Literal

Extractor = Literal["boxed", "last_integer", "choice"]
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
_NUMBER = re.compile(rf"(?P<digits>{_DIGITS})(?P<fraction>\.[0-9]+)?|(?<![\w.])\.[0-9]+")
# A sign counts only where it cannot be a subtraction or a range: 5-3 ends in 3.
_SIGN = re.compile(rf"(?:^|[^\w)\]}}\s])\s*(?P<sign>[+{MINUS}])\s*$|\s(?P<glued>[+{MINUS}])$")
# What makes it the end of something larger: 7/2, \frac{7}{2}, 3^2, x_2, 1e3, 12:30.
_PART = re.compile(r"[0-9)\]}]\s*/\s*$|[\^_]\s*\{?\s*[+-]?\s*$|\}\s*\{\s*$|[0-9][eE][+-]?$|[0-9]:$|\\frac\s*[0-9]?\s*$")
_CONTINUED = re.compile(
    r"[\u00b2\u00b3\u00b9\u2070-\u2079\u00bc-\u00be\u2150-\u215e]|\s*\^(?!\s*\{?\s*\\circ)"
)  # 5\u00bd, 3^n
_LOOK_BACK = 40  # characters: enough for a sign, a bar, an exponent
_INTEGER = re.compile(rf"(?P<sign>[+{MINUS}])?\s*(?P<digits>{_DIGITS})(?P<fraction>\.0*)?")
_LATEX_THOUSANDS = re.compile(r",\\!\s*|\{,\}|(?<=[0-9])\\[,;]\s*(?=[0-9]{3}(?![0-9]))")
_DOLLARS = re.compile(r"^\s*\\?\$\s*|\s*\\?\$\s*$")


def _canonical_integer(digits: str, sign: str | None) -> str:
    """Sign and digits without separators and leading zeros. Text, since int() refuses more than 4300 digits."""
    digits = digits.replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if sign and sign in MINUS and digits != "0" else digits


def last_integer(text: str) -> str | None:
    """The last number in the text, if it is an integer, without thousands separators: "-1,234." gives "-1234".

    None where there is no number or the last one is not whole: 12.5 is not the integer 5 (nor 12), 7/2 and 3^2 are not
    2, 1e3 is not 3; but 7.0 is 7.
    """
    last = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    if last is None or last["digits"] is None or (last["fraction"] or "").strip(".0"):
        return None
    before = text[max(0, last.start() - _LOOK_BACK) : last.start()]
    if _PART.search(before) or _CONTINUED.match(text, last.end()):
        return None
    sign = _SIGN.search(before)
    return _canonical_integer(last["digits"], sign and (sign["sign"] or sign["glued"]))


def as_integer(text: str) -> str | None:
    r"""The integer that the whole text is, in canonical digits; None where it is anything else. `1{,}234` is 1234."""
    match = _INTEGER.fullmatch(_DOLLARS.sub("", _LATEX_THOUSANDS.sub(",", text)).strip())
    return None if match is None else _canonical_integer(match["digits"], match["sign"])


_SAYS = re.compile(r"\banswers?(?:\s+(?:choice|option|letter))?[\s*_]*(?:\bis\b|:|=)[\s:*_]*", re.IGNORECASE)
_DRESS = r"[\s*_$`\"']*"
_LETTER = re.compile(
    rf"(?i:{_DRESS}(?:the\s+|correct\s+|option\s+|choice\s+)*){_DRESS}(?:\\(?:text|mathrm|mathbf|textbf|boxed)\s*\{{)*"
    rf"{_DRESS}(?P<open>[(\[]\s*)?(?P<letter>[A-J])(?![\w'\u2019])(?P<rest>.*)",
    re.DOTALL,
)
_ANOTHER = re.compile(r"[\s)\]}*_$.]*(?:,|/|&|\+|\bor\b|\band\b)[\s(\[*_$]*[A-J]\b(?!\w)")
_IS_A_WORD = re.compile(r"[ \t]+(?!(?:because|since|as|for|or|and|but|is|with)\b)[a-z]")  # A dog, I think


def extract_choice(text: str) -> str | None:
    """The letter A to J that a response chooses; None where it names none, or two.

    What counts is the last of: a box, "answer is (B)", "Answer: B"; without any of them, a last line that is a letter.
    """
    said = next(iter(deque(_SAYS.finditer(text), maxlen=1)), None)
    boxed, box = extract_boxed(text), text.rfind("\\boxed")
    if boxed is not None and (said is None or box > said.start()):
        return _letter(boxed)
    if said is not None:
        return _letter(text[said.end() : said.end() + _LONGEST_CHOICE].partition("\n\n")[0])
    last = text.rstrip().rpartition("\n")[2]
    return _letter(last) if re.fullmatch(r"[\s*_$(\[]*[A-J][\s*_$)\].:]*", last) else None


_LONGEST_CHOICE = 200


def _letter(text: str) -> str | None:
    match = _LETTER.match(text)
    if match is None or _ANOTHER.match(match["rest"]):
        return None
    if match["letter"] in "AI" and not match["open"] and _IS_A_WORD.match(match["rest"]):
        return None
    return match["letter"]


EXTRACTORS = {"boxed": extract_boxed, "last_integer": last_integer, "choice": extract_choice}
