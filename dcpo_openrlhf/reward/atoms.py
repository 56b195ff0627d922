"""The small parts of a formula: symbols with their scripts, commands, functions, brackets, matrices."""

import re
from fractions import Fraction

from dcpo_openrlhf.reward.numerals import number
from dcpo_openrlhf.reward.tokens import Cursor, Node, Token, Unreadable
from dcpo_openrlhf.reward.vocabulary import FUNCTIONS, names

_CLOSES = {"(": ")", "[": "]", "{": "}", "langle": "rangle"}
_MIXED_CLOSES = {"(": "]", "[": ")"}
MARKS = names(
    "overline overrightarrow overleftarrow hat widehat tilde widetilde dot ddot mathbb mathcal mathscr mathfrak"
)
_ROUNDING = {"lfloor": ("floor", "rfloor"), "lceil": ("ceil", "rceil")}


class Atoms(Cursor):
    """What stands between two operators. The levels above are in reader.py."""

    def answers(self) -> Node:
        raise NotImplementedError

    def sum(self) -> Node:
        raise NotImplementedError

    def factor(self) -> tuple[Node, str]:
        raise NotImplementedError

    def base(self) -> tuple[Node, str]:
        raise NotImplementedError

    def product_behind(self, node: Node, before: str, *, functions: bool) -> Node:
        raise NotImplementedError

    def scripts(self) -> str:
        """Subscript and primes, as a part of the name: v_{max}, y''."""
        name = ""
        while self.meets("_", "'"):
            if self.take().text == "'":
                name += "'"
                continue
            first = self.take()
            if first[:2] != ("op", "{"):
                name += "_" + first.text
                continue
            depth, inside = 1, []
            while depth:
                token = self.take()
                depth += (token.text == "{") - (token.text == "}")
                inside.append(token.text)
            name += "_" + "".join(inside[:-1])
        return name

    def symbol(self, token: Token) -> Node:
        name = token.text
        rate = self._rate(token)
        if rate:
            return rate
        scripts = self.scripts()
        if not scripts and name in ("e", "i", "pi", "infty"):
            return ("const", "inf" if name == "infty" else name)
        primes = "'" in scripts
        if self.meets("(") and not self.next.space and (primes or name in ("f", "g", "h") or self._lone_argument()):
            group = self.bracket(self.take().text, keep=True)
            return ("app", name + scripts, *group[3:])
        return ("sym", name + scripts)

    def _lone_argument(self) -> bool:
        return self.peek().kind in ("num", "let") and self.peek(2)[:2] == ("op", ")")

    def _rate(self, token: Token) -> Node | None:
        """dv/dt, one symbol: the d's do not cancel."""
        following = [self.peek(i) for i in range(4)]
        slash = token.text == "d" and [t.text for t in following[1:3]] == ["/", "d"]
        if not slash or following[0].kind != "let" or following[3].kind != "let" or following[3].text == "d":
            return None
        self.at += 4
        return ("sym", f"d {following[0].text}/{following[3].text}")

    def command(self, name: str) -> Node:
        if name == "frac":
            return self._derivative() or ("div", self._argument(), self._argument())
        if name == "binom":
            return ("binom", self._argument(), self._argument())
        if name in ("sqrt", "abs"):
            return self._root() if name == "sqrt" else ("abs", self._argument(multi=True))
        if name in FUNCTIONS:
            return self._function(name)
        if name in _ROUNDING:
            kind, closing = _ROUNDING[name]
            inside = self.sum()
            self.expect(closing)
            return ("fn", kind, inside)
        if name in MARKS:
            inside = self._raw()
            return ("sym", f"{name} {inside}{self.scripts()}")
        if name in ("{", "langle"):
            return self.bracket(name)
        if name == "emptyset":
            return ("group", "{", "}")
        if name.startswith("begin:"):
            return self._matrix(name.removeprefix("begin:"))
        raise Unreadable(f"\\{name}")

    def _raw(self) -> str:
        """The text of a braced argument, or of one token."""
        if not self.accept("{"):
            return self.take().text
        depth, inside = 1, []
        while depth:
            token = self.take()
            depth += (token.text == "{") - (token.text == "}")
            inside.append(token.text)
        return "".join(inside[:-1])

    def _derivative(self) -> Node | None:
        start = self.at
        if self.meets("{"):
            top, bottom = self._raw(), self._raw() if self.meets("{") else ""
            variable = r"(?:[A-Za-z]|[a-z]{2,})(?:_\{?\w+\}?)?(?:\([a-z]\))?"
            match = re.fullmatch(
                rf"(d|partial)(?:\^\{{?(\d)\}}?)?({variable})/\1({variable})(?:\^\{{?(\d)\}}?)?", f"{top}/{bottom}"
            )
            if match and match[2] == match[5] and match[4] not in ("d",):
                return ("sym", f"{match[1]}{match[2] or ''} {match[3]}/{match[4]}")
        self.at = start
        return None

    def _argument(self, multi: bool = False) -> Node:
        """A braced or bracketed argument, or one token: of a number one digit, as TeX has it."""
        if self.accept("{"):
            node = self.sum()
            self.expect("}")
            return node
        if self.accept("("):
            node = self.sum()
            self.expect(")")
            return node
        token = self.next
        if token.kind == "num" and not multi and len(token.text) > 1:
            if len(token.text) != 2 or "." in token.text:
                raise Unreadable("a command before several digits")
            self.tokens[self.at] = Token("num", token.text[1])
            return number(token.text[0])
        return self.base()[0]

    def _root(self) -> Node:
        index: Node = ("num", Fraction(2), None)
        if self.accept("["):
            index = self.sum()
            self.expect("]")
        return ("root", self._argument(), index)

    def _function(self, name: str) -> Node:
        base, exponent = None, None
        while self.meets("_", "^"):
            which = self.take().text
            if self.accept("{"):
                value = self.sum()
                self.expect("}")
            else:
                negative = self.accept("-")
                value = ("neg", self.base()[0]) if negative else self.base()[0]
            base, exponent = (value, exponent) if which == "_" else (base, value)
        argument = self._function_argument()
        node: Node = ("fn", name, argument) if base is None else ("div", ("fn", "ln", argument), ("fn", "ln", base))
        if base == ("num", Fraction(10), None):
            node = ("fn", "lg", argument)
        if name == "log" and base == ("const", "e"):
            node = ("fn", "ln", argument)
        if exponent == ("neg", ("num", Fraction(1), None)):
            return ("fn", "arc" + name, argument)
        return node if exponent is None else ("pow", node, exponent)

    def _function_argument(self) -> Node:
        if self.meets("(", "{", "["):
            return self.bracket(self.take().text)
        node = self.product_behind(*self.factor(), functions=False)
        if self.accept("deg"):
            node = ("mul", node, ("div", ("const", "pi"), ("num", Fraction(180), None)))
        return node

    def bracket(self, opening: str, keep: bool = False) -> Node:
        """(..), [..], {..}, \\{..\\}, |..|; a single member in plain brackets is only grouped."""
        if opening == "|":
            self.bars += 1
            inside = self.sum()
            self.bars -= 1
            self.expect("|")
            return ("abs", inside)
        is_set = opening == "{" and self.tokens[self.at - 1].kind == "cmd"
        closing = _CLOSES.get(opening)
        if closing is None:
            raise Unreadable(opening)
        bars, self.bars = self.bars, 0
        if is_set and self.accept("}"):
            return ("group", "{", "}")
        cycle = opening == "(" and self._cycle()
        if cycle:
            return cycle
        inside = self.answers()
        members = list(inside[1:]) if inside[0] == "list" else [inside]
        self.bars = bars
        token = self.take()
        if token.text not in (closing, _MIXED_CLOSES.get(opening)) or (is_set and token.kind != "cmd"):
            raise Unreadable(f"{opening} ends with {token.text}")
        if len(members) == 1 and not is_set and opening + token.text in ("()", "[]", "{}") and not keep:
            return members[0]
        if opening == "{":
            return ("group", "{", "}", *members)
        return ("group", opening, token.text, *members)

    def _cycle(self) -> Node | None:
        """(1 2 3): a permutation's cycle, written from its smallest number."""
        end = self.at
        while self.tokens[end].kind == "num":
            end += 1
        numbers = [t.text for t in self.tokens[self.at : end]]
        if len(numbers) < 2 or self.tokens[end].text != ")":
            return None
        self.at = end + 1
        first = numbers.index(min(numbers))
        return ("cycle", " ".join(numbers[first:] + numbers[:first]))

    def _matrix(self, environment: str) -> Node:
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            if self.accept(f"end:{environment}"):
                break
            while self.next.kind == "word" and self.next.text.lower() in ("if", "for", "when"):
                self.at += 1
            row.append(self.answers())
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self.accept("newrow") and not self.meets(f"end:{environment}"):
                raise Unreadable("a matrix row")
        if row or len({len(r) for r in rows}) != 1:
            raise Unreadable("rows of different lengths")
        return ("matrix", environment, *rows)
