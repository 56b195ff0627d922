r"""A normalised answer as tokens: numbers, letters, words, commands and operators. Linear in its length."""

import re
from typing import Any, NamedTuple

from dcpo_openrlhf.reward.units import GLUED
from dcpo_openrlhf.reward.vocabulary import CONNECTIVES, FUNCTIONS, GREEK, STANDING

Node = tuple[Any, ...]
"""A tree of an answer, its kind first; reader.py lists the kinds."""

_NAMES = {
    "oo": "infty",
    "infinity": "infty",
    "Infinity": "infty",
    "inf": "infty",
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
}


class Unreadable(ValueError):
    """The text is no answer that the grammar knows."""


class Token(NamedTuple):
    kind: str
    """num, let, word, cmd or op; "end" after the last."""
    text: str
    space: bool = False
    """Whether a space stands before it."""


END = Token("end", "")
_SPLIT = re.compile(
    r"""(?P<space>\s+)
    |\\(?:begin|end)\s*<(?P<env>[a-z]+)>
    |\\w\s*<(?P<marked>[^>]*)>
    |\\(?P<cmd>[a-zA-Z]+|.)
    |(?P<rep>(?<![0-9.])[0-9]*\.[0-9]*(?:\\overline\s*\{\s*[0-9]+\s*\}|\\overline\s*[0-9]|\([0-9]+\)
        |\\dot\s*\{?[0-9]\}?(?:[0-9]*\\dot\s*\{?[0-9]\}?)?))
    |(?P<ell>(?<![0-9.])[0-9]+\.[0-9]{2,}\s?\\ldots)
    |(?P<num>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]-?[0-9]+(?![0-9.])|E\+[0-9]+|(?<=[.][0-9])e\+[0-9]+|e\+[0-9][0-9]+)?)
    |(?P<run>(?:np\.|math\.)?[A-Za-z]+)
    |(?P<op>.)""",
    re.VERBOSE | re.DOTALL,
)
_GROUPED = re.compile(
    r"(?<![0-9.,\\])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])"
    r"|(?<![0-9.,])(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})+(?![0-9]| [0-9])"
)


def _join_thousands(text: str, *, commas: bool) -> str:
    """12,345 and 12 345 as 12345, outside brackets: inside, a comma separates coordinates."""
    if _GROUPED.search(text) is None:
        return text
    depth = [0]
    for c in text:
        depth.append(depth[-1] + (c in "([") - (c in ")]"))
    in_set = "\\{" in text

    def join(match: re.Match[str]) -> str:
        keep = depth[match.start()] > 0 or (in_set and "," in match[0]) or ("," in match[0] and not commas)
        return match[0] if keep else match[0].replace(",", "").replace(" ", "")

    return _GROUPED.sub(join, text)


def _run(run: str, space: bool) -> list[Token]:
    """A bare run of letters: a function, a word, or a product of letters; three capitals and more are a name."""
    run = run.removeprefix("np.").removeprefix("math.")
    name = _NAMES.get(run, run)
    if name in FUNCTIONS or name in STANDING or name == "infty" or (name in GREEK and len(run) > 1):
        return [Token("cmd", name, space)]
    if len(set(run)) == 1:
        return [Token("let", c, space and i == 0) for i, c in enumerate(run)]
    for function in ("sin", "cos", "tan", "ln", "log"):
        if run.startswith(function) and len(run) == len(function) + 1:
            return [Token("cmd", function, space), Token("let", run[-1])]
    if run.lower() in CONNECTIVES or len(run) >= 4 or (len(run) == 3 and (run.isupper() or run.istitle())):
        return [Token("word", run, space)]
    return [Token("let", c, space and i == 0) for i, c in enumerate(run)]


def tokenise(text: str, *, commas: bool = True) -> list[Token]:
    """The tokens of a normalised text. `commas`: 12,345 is a number, not two."""
    tokens: list[Token] = []
    space = False
    for match in _SPLIT.finditer(_join_thousands(text, commas=commas)):
        kind, value = match.lastgroup or "op", match[match.lastgroup or 0]
        if kind == "space":
            space = True
            continue
        behind = tokens[-2 if tokens[-1].text == "(" else -1 :] if tokens else []
        measured = bool(behind) and (behind[0].kind == "num" or behind[0].text == "/") and value in GLUED
        if kind == "run":
            tokens += [Token("word", value, space)] if measured else _run(value, space)
        elif kind == "marked":
            name = _NAMES.get(value, _NAMES.get(value.lower(), value))
            is_command = not measured and (name in FUNCTIONS | STANDING | GREEK or name == "infty")
            tokens.append(Token("cmd", name, space) if is_command else Token("word", value, space))
        elif kind == "env":
            tokens.append(Token("cmd", ("begin:" if match[0].startswith("\\begin") else "end:") + value, space))
        elif kind == "cmd":
            tokens.append(Token("cmd", _NAMES.get(value, value), space))
        else:
            value = value.rstrip(".") if kind == "num" else value
            tokens.append(Token("num" if kind in ("num", "rep", "ell") else "op", value, space))
        space = False
    return tokens


def same(a: list[Token], b: list[Token]) -> bool:
    """Token by token the same, whatever the spaces, but for those between two numbers."""

    def key(tokens: list[Token]) -> list[tuple[str, str, bool]]:
        before = [END, *tokens][: len(tokens)]
        return [(t.kind, t.text, t.space and t.kind == p.kind == "num") for p, t in zip(before, tokens, strict=True)]

    return bool(a) and key(a) == key(b)


def drop_grouping(tokens: list[Token]) -> list[Token]:
    r"""Without the braces around a single token: x^{2} and x^2, a_{1} and a_1 are the same."""
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        if tokens[i][:2] == ("op", "{") and i + 2 < len(tokens) and tokens[i + 2][:2] == ("op", "}"):
            result.append(tokens[i + 1])
            i += 3
        else:
            result.append(tokens[i])
            i += 1
    return result


class Cursor:
    """Tokens and a place among them."""

    def __init__(self, tokens: list[Token], *, bare_units: bool = False):
        self.tokens, self.at, self.depth, self.bars = [*tokens, END], 0, 0, 0
        self.bare_units = bare_units
        """Whether a single letter behind a number may be a unit: 12 m."""

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def peek(self, offset: int = 1) -> Token:
        return self.tokens[min(self.at + offset, len(self.tokens) - 1)]

    def take(self) -> Token:
        token = self.tokens[self.at]
        if token is END:
            raise Unreadable("the answer ends too early")
        self.at += 1
        return token

    def meets(self, *texts: str) -> bool:
        return self.next.kind in ("op", "cmd") and self.next.text in texts

    def accept(self, *texts: str) -> bool:
        if self.meets(*texts):
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Unreadable(f"{text} expected, not {self.next.text!r}")
