r"""An answer read as a tree: numbers exact, symbols by their whole name, lists, sets, points, relations, matrices.

A node is a tuple, its kind first: ("num", Fraction, places | None), ("sym", name), ("const", "pi" | "e" | "i" | "inf"),
("add" | "mul" | "div" | "pow" | "binom" | "root" | "pm", a, b), ("neg" | "fact" | "abs", a), ("fn", name, a),
("app", name, *arguments), ("qty", value, Unit, is_compound); above them ("list" | "union", *members),
("group", opening, closing, *members), ("rel", a, sign, b, ...), ("ratio", *parts), ("minus", set, set),
("cong", a, modulus), ("matrix", environment, *rows), ("cycle", numbers), ("approx", a),
("ellipsis",).
"""

from fractions import Fraction
from typing import Any

from dcpo_openrlhf.reward.atoms import MARKS, Atoms
from dcpo_openrlhf.reward.numerals import number
from dcpo_openrlhf.reward.quantity import read_currency, read_quantity, starts_currency
from dcpo_openrlhf.reward.tokens import END, Node, Token, Unreadable
from dcpo_openrlhf.reward.units import LETTERS
from dcpo_openrlhf.reward.vocabulary import FUNCTIONS, GREEK, STANDING

MAX_DEPTH = 60
RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "le": "<=",
    "ge": ">=",
    "ne": "!=",
    "approx": "~",
    "in": "in",
    "equiv": "==",
    "to": "to",
}


class Reader(Atoms):
    """Recursive descent over tokens; each method reads one level and leaves `at` behind it."""

    def whole(self) -> Node:
        node = self.answers()
        if self.next is not END:
            raise Unreadable(f"{self.next.text!r} is left over")
        return node

    # --- lists, relations, unions

    def answers(self) -> Node:
        """Members between commas, semicolons, "and"; "or" between relations makes a union."""
        members, joins = [self.relation()], set()
        while True:
            join = self._join()
            if not join:
                break
            joins |= join
            members.append(self.relation())
        if len(members) == 1:
            return members[0]
        sets = joins == {"or"} and all(m[0] == "rel" and set(m[2::2]) != {"="} for m in members)
        return ("union" if sets else "list", *members)

    def _join(self) -> set[str]:
        found = set()
        while True:
            if self.next.kind == "word" and self.next.text.lower() in ("and", "or"):
                found.add(self.take().text.lower())
            elif self.accept("lor"):
                found.add("or")
            elif self.meets(",", ";") and "," not in found:
                self.at += 1
                found.add(",")
            else:
                return found

    def relation(self) -> Node:
        if self.accept("ldots"):
            return ("ellipsis",)
        if self.accept("approx"):
            return ("approx", self.union())
        parts: list[Any] = [self.union()]
        while self.next.kind in ("op", "cmd") and self.next.text in RELATIONS:
            sign = RELATIONS[self.take().text]
            if sign in "<>" and self.accept("="):
                sign += "="
            parts += [sign, self.union()]
        node = parts[0] if len(parts) == 1 else ("rel", *parts)
        return self._congruence(node)

    def _congruence(self, node: Node) -> Node:
        opened = self.accept("(") if self.meets("(") and self.peek()[:2] == ("cmd", "mod") else False
        if self.accept("pmod", "mod") if not opened else self.accept("mod"):
            modulus = self.sum()
            if opened:
                self.expect(")")
            return ("cong", node, modulus)
        return node

    def union(self) -> Node:
        node = self.ratio()
        while self.meets("cup", "setminus"):
            kind = self.take().text
            right = self.ratio()
            node = ("union", node, right) if kind == "cup" else ("minus", node, right)
        return node

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.accept(":") or (self.next.kind == "word" and self.next.text == "to"):
            self.at += self.next.text == "to"
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", *parts)

    # --- arithmetic

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        node = self._signed()
        while self.meets("+", "-", "pm", "mp"):
            sign = self.take().text
            right = self.term()
            if sign in ("pm", "mp"):
                node = ("pm", node, right if sign == "pm" else ("neg", right))
            else:
                node = ("add", node, right if sign == "+" else ("neg", right))
        self.depth -= 1
        return node

    def _signed(self) -> Node:
        if self.accept("-"):
            return ("neg", self._signed())
        if self.accept("+"):
            return self._signed()
        if self.accept("pm", "mp"):
            return ("pm", ("num", Fraction(0), None), self.term())
        return self.term()

    def term(self) -> Node:
        """A product, or a quantity: 3 x, 5 km, $5."""
        if starts_currency(self):
            return read_currency(self)
        node = self.product_behind(*self.factor(), functions=True)
        return read_quantity(self, node) or node

    def product_behind(self, node: Node, before: str, *, functions: bool) -> Node:
        """The product that `node` begins. Without `functions` it is the argument of one: no operator, no function."""
        while True:
            if functions and self.meets("times", "cdot", "*"):
                self.at += 1
                right, before = self._signed_factor()
                node = ("mul", node, right)
            elif functions and self.accept("/"):
                right, before = self._signed_factor()
                node = _mixed(node, right) or ("div", node, right)
            elif self._starts_factor() and (functions or self.next.text not in FUNCTIONS):
                token = self.next
                if token.kind == "num" and node[0] == "qty":
                    return node
                right, last = self.factor()
                node, before = self._beside(node, right, before, last, token), last
            elif node[0] == "mixed":
                raise Unreadable("two numbers side by side")
            else:
                return node

    def _signed_factor(self) -> tuple[Node, str]:
        if self.accept("-"):
            node, last = self._signed_factor()
            return ("neg", node), last
        self.accept("+")
        return self.factor()

    def _beside(self, node: Node, right: Node, before: str, last: str, token: Token) -> Node:
        """The product of two neighbours, or the mixed number that they are. Two numbers have no product."""
        if _is_integer(node) and right[0] == "div" and all(map(_is_integer, right[1:])):
            if before == "num" and 0 < right[1][1] < right[2][1]:
                return ("add", node, right)
            raise Unreadable("neither a mixed number nor a product")
        if last == "num":
            if _is_integer(node) and _is_integer(right) and self.meets("/") and token.space:
                return ("mixed", node, right)
            if before not in ("let", "group") or (before == "group" and not token.space):
                raise Unreadable("two numbers side by side")
        return ("mul", node, right)

    def _starts_factor(self) -> bool:
        token = self.next
        if (
            token.kind == "let"
            and self.bare_units
            and token.space
            and self.at
            and self.tokens[self.at - 1].kind == "num"
        ):
            return token.text not in LETTERS
        if token.kind in ("num", "let"):
            return True
        if token.text == "(" and (
            self.peek(1)[:2] == ("cmd", "mod") or (self.peek().kind == "word" and self.peek(2).text == ")")
        ):
            return False  # (mod 7), (cm)
        if token.text == "Omega" and self.bare_units:
            return False
        if token.kind == "cmd":
            starts = token.text in GREEK or token.text in FUNCTIONS or token.text in MARKS
            return starts or token.text in ("frac", "sqrt", "binom", "infty", "lfloor", "lceil")
        return (
            token.kind == "op" and (token.text in "([{" or (token.text == "|" and self.bars == 0)) and bool(token.text)
        )

    def factor(self) -> tuple[Node, str]:
        """A base with its powers and factorials, and what it ends in: num, let, word, group."""
        node, kind = self.base()
        while True:
            if self.accept("^"):
                node, kind = self._power(node), "group"
            elif self.accept("!"):
                node, kind = ("fact", node), "group"
                if self.meets("!"):
                    raise Unreadable("double factorial")
            else:
                return node, kind

    def _power(self, node: Node) -> Node:
        if self.meets("*", "+", "-") and node[0] == "sym" and self.peek().kind == "end":
            return ("sym", node[1] + "^" + self.take().text)
        if (
            self.meets("{")
            and self.peek().text in ("*", "+", "-", "T", "circ")
            and self.peek(2).text == "}"
            and node[0] == "sym"
        ):
            self.at += 3
            return ("sym", f"{node[1]}^{self.tokens[self.at - 2].text}")
        if self.accept("{"):
            exponent = self.sum()
            self.expect("}")
        else:
            sign = self.accept("-")
            exponent, _ = self.factor() if self.meets("(") or self.peek()[:2] == ("op", "^") else self.base()
            exponent = ("neg", exponent) if sign else exponent
        return ("pow", node, exponent)

    def base(self) -> tuple[Node, str]:
        token = self.take()
        if token.kind == "num":
            if self.meets("_"):
                raise Unreadable("a number in a base")
            return number(token.text), "num"
        if token.kind == "let" or (token.kind == "cmd" and token.text in GREEK | {"infty"}):
            return self.symbol(token), "let"
        if token.kind == "word":
            return ("sym", "w:" + token.text.lower() + self.scripts()), "word"
        if token.kind == "cmd":
            return self.command(token.text), "group"
        return self.bracket(token.text), "group"


def _is_integer(node: Node) -> bool:
    return node[0] == "num" and node[2] is None and node[1].denominator == 1


def _mixed(node: Node, right: Node) -> Node | None:
    """2 1/3 as 2 + 1/3, once its denominator is known."""
    if node[0] != "mixed":
        return None
    if not _is_integer(right) or not 0 < node[2][1] < right[1]:
        raise Unreadable("neither a mixed number nor a product")
    return ("add", node[1], ("div", node[2], right))


def has_standing(tokens: list[Token]) -> set[str]:
    """What the tokens leave to be worked out; a subscript, as in m_{max}, is only a name."""
    found = set()
    for i, token in enumerate(tokens):
        before = "".join(t.text for t in tokens[max(0, i - 2) : i])
        if token.kind == "cmd" and token.text in STANDING and not before.endswith(("_", "_{")):
            found.add(token.text.removeprefix("p"))
    return found


def read(tokens: list[Token], *, bare_units: bool = False) -> Node:
    """The tree of the tokens; raises Unreadable."""
    try:
        return Reader(tokens, bare_units=bare_units).whole()
    except (RecursionError, ZeroDivisionError) as error:
        raise Unreadable(str(error)) from error
