"""Are two formulas equal? Exactly where both are rational, else numerically, at random points and several precisions.

Rational arithmetic is bounded and runs anywhere; the rest imports mpmath and belongs into a process that can be killed.
"""

import hashlib
import math
import random
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from dcpo_openrlhf.reward.tokens import Node

SMALL_BITS = 20_000
"""Size of the integers that the caller's process computes with: microseconds."""
LARGE_BITS = 8_000_000
"""The same in a worker: a second. 2^1000000 and 2^1000000 + 1 differ."""
CONSTANT_DIGITS = (30, 60, 200, 500)
VARIABLE_DIGITS = (30, 70)
POINTS = 6
LARGEST_EXPONENT = 10**12
DECIMAL_TOLERANCE = Fraction(1, 10**6)


class TooLarge(ArithmeticError):
    """A value beyond the size that can be compared."""


class Undefined(ArithmeticError):
    """No value here: a division by zero, infinity, an unknown function."""


# --- exact


def exact(node: Node, bits: int = SMALL_BITS) -> Fraction | None:
    """The rational number that the node is; None where it is none. Raises TooLarge above `bits`, Undefined for 1/0."""
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind not in ("add", "mul", "div", "pow", "neg", "fact", "binom", "abs"):
        return None
    values = [exact(child, bits) for child in node[1:]]
    if any(value is None for value in values):
        return None
    a, b = values[0], values[-1]
    assert a is not None and b is not None
    if kind == "neg":
        return -a
    if kind == "abs":
        return abs(a)
    if kind == "pow":
        return _power(a, b, bits)
    if kind == "fact":
        return Fraction(math.factorial(_count(a, bits // 8)))
    if kind == "binom":
        return Fraction(math.comb(_count(a, bits // 8), _count(b, bits // 8)))
    if kind == "div" and b == 0:
        raise Undefined("division by zero")
    value = a + b if kind == "add" else a * b if kind == "mul" else a / b
    if _bits(value) > bits:
        raise TooLarge(f"more than {bits} bits")
    return value


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _count(value: Fraction, limit: int) -> int:
    if value.denominator != 1 or value < 0:
        raise Undefined("no natural number")
    if value > limit or value * max(1, int(value).bit_length()) > 8 * limit:
        raise TooLarge("too large for a factorial")
    return int(value)


def _power(base: Fraction, exponent: Fraction, bits: int) -> Fraction | None:
    if exponent.denominator != 1:
        return _root(base, exponent, bits)
    if base == 0 and exponent < 0:
        raise Undefined("division by zero")
    if abs(base) != 1 and base != 0 and _bits(base) * abs(exponent) > bits:
        raise TooLarge(f"more than {bits} bits")
    return base ** int(exponent % 2 if abs(base) == 1 else exponent)


def _root(base: Fraction, exponent: Fraction, bits: int) -> Fraction | None:
    """4^(1/2), where the root of a small number is rational; None where it is not."""
    n = exponent.denominator
    if base <= 0 or n > 64 or _bits(base) > 400:
        return None
    root = Fraction(_integer_root(base.numerator, n), _integer_root(base.denominator, n))
    return _power(root, Fraction(exponent.numerator), bits) if root**n == base else None


def _integer_root(value: int, n: int) -> int:
    low, high = 0, 1 << (value.bit_length() // n + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**n <= value else (low, middle - 1)
    return low


# --- decimals


def decimal_of(node: Node) -> tuple[Fraction, Fraction] | None:
    """(value, half a unit of the last place) of a number with a decimal point, with or without a power of ten."""
    if node[0] == "neg":
        inner = decimal_of(node[1])
        return None if inner is None else (-inner[0], inner[1])
    if node[0] == "num" and node[2]:
        return node[1], Fraction(1, 2 * 10 ** node[2])
    if node[0] == "mul" and node[2][0] == "pow" and node[2][1][:2] == ("num", 10):
        inner, scale = decimal_of(node[1]), exact(node[2])
        if inner is not None and scale is not None:
            return inner[0] * scale, inner[1] * scale
    return None


def rounds_to(gold: tuple[Fraction, Fraction], found: Fraction, half_unit: Fraction | None) -> bool:
    """Whether the found number is the decimal gold to 1e-6 of its size and one is the other, rounded."""
    value, half = gold
    difference = abs(found - value)
    return difference <= DECIMAL_TOLERANCE * abs(value) and difference <= max(half, half_unit or Fraction(0))


# --- numbers at high precision


def symbols(node: Node) -> set[str]:
    """The names of all variables."""
    if node[0] == "sym":
        return {node[1]}
    return set[str]().union(*(symbols(child) for child in node[1:] if isinstance(child, tuple)))


def contains(node: Node, *kinds: str) -> bool:
    return node[0] in kinds or any(contains(child, *kinds) for child in node[1:] if isinstance(child, tuple))


class _Point:
    """Values for all variables; `real` says whether the evaluation stayed among real numbers."""

    def __init__(self, number: int, mp: Any, is_constant: bool):
        self.number, self.mp, self.real, self.is_constant = number, mp, True, is_constant

    def value(self, name: str) -> Any:
        """A rational between 0.2 and 3 for the first points, then of either sign, then up to 120."""
        source = random.Random(f"{self.number} {name}")
        value = self.mp.mpf(source.randint(2 * 10**8, 3 * 10**9)) / 10**9
        return value * (1 if self.number < 3 else source.choice((-4, -1, 1, 4)) if self.number < 6 else 40)

    def evaluate(self, node: Node) -> Any:
        mp, kind = self.mp, node[0]
        if kind == "num":
            return mp.mpf(node[1].numerator) / node[1].denominator
        if kind == "sym":
            return self.value(node[1])
        if kind == "const":
            if node[1] == "inf":
                raise Undefined("infinity in a formula")
            return {"pi": mp.pi, "e": mp.e, "i": mp.mpc(0, 1)}[node[1]] * 1
        if kind == "app":
            arguments = [self.evaluate(child) for child in node[2:] if child]
            return self._unknown(node[1], arguments)
        if kind == "fn":
            return self._function(node[1], self.evaluate(node[2]))
        if kind not in ("add", "mul", "div", "pow", "neg", "fact", "binom", "abs", "root"):
            raise Undefined(kind)
        return self._operation(kind, *(self.evaluate(child) for child in node[1:]))

    def _operation(self, kind: str, a: Any, b: Any = None) -> Any:
        mp = self.mp
        if kind == "add":
            total = a + b
            if self.is_constant and a and b and min(abs(a), abs(b)) < abs(total) * mp.mpf(10) ** (5 - mp.dps):
                raise TooLarge("an addend vanishes beside the other")
            return total
        if kind == "mul":
            return a * b
        if kind == "div":
            return a / b
        if kind == "neg":
            return -a
        if kind == "abs":
            return abs(a)
        if kind == "pow":
            return self._power(a, b)
        if kind == "root":
            if mp.im(a) == 0 and mp.re(a) < 0 and b == int(b) and int(b) % 2:
                return -mp.root(-mp.re(a), int(b))
            return self._power(a, 1 / b)
        if abs(a) > 10**9 or (b is not None and abs(b) > 10**9):
            raise TooLarge("a factorial")
        return mp.gamma(a + 1) if kind == "fact" else mp.binomial(a, b)

    def _power(self, a: Any, b: Any) -> Any:
        mp = self.mp
        if abs(b) > LARGEST_EXPONENT:
            raise TooLarge("an exponent")
        if a == 0:
            if mp.re(b) <= 0:
                raise Undefined("0^0")
            return a
        if mp.im(a) == 0 and mp.re(a) < 0 and b != mp.floor(mp.re(b)):
            self.real = False
        return mp.power(a, b)

    def _function(self, name: str, x: Any) -> Any:
        mp = self.mp
        if name in ("ln", "log", "lg"):
            if x == 0:
                raise Undefined("log 0")
            self.real &= not (mp.im(x) == 0 and mp.re(x) < 0)
            # log without a base is ln to some and log_10 to others: only what holds for every base is equal.
            return mp.log10(x) if name == "lg" else mp.log(x) * (1 if name == "ln" else self._unknown("log", []))
        if name in ("floor", "ceil"):
            return mp.floor(x) if name == "floor" else mp.ceil(x)
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot"}.get(
            name, name.replace("arc", "a")
        )
        function = getattr(mp, name, None)
        if function is None or abs(x) > 10**9:
            raise Undefined(name)
        value = function(x)
        self.real &= bool(mp.im(value) == 0 or mp.im(x) != 0)
        return value

    def _unknown(self, name: str, arguments: list[Any]) -> Any:
        """A function of which only the name is known: some number, the same for equal arguments."""
        mp = self.mp
        with mp.workdps(20):
            key = " ".join(f"{mp.nstr(mp.chop(+a, 1e-15), 12)}" for a in arguments)
        digest = hashlib.sha256(f"{self.number} {name} {key}".encode()).digest()
        return mp.mpf(int.from_bytes(digest[:8]) + 2**62) / 2**63


def _values(nodes: Iterable[Node], number: int, digits: int, is_constant: bool) -> tuple[list[Any], list[bool]]:
    import mpmath

    mp = mpmath.mp
    mp.dps = digits
    values, real = [], []
    for node in nodes:
        point = _Point(number, mp, is_constant)
        value = point.evaluate(node)
        if not mp.isfinite(value):
            raise Undefined("infinite")
        values.append(value)
        real.append(point.real)
    return values, real


def _vanishes(differences: list[Any], scales: list[Any], digits: tuple[int, ...]) -> bool:
    """Whether a difference is rounding noise: it shrinks with every step in precision, as far as the step goes."""
    import mpmath

    for i, (difference, scale) in enumerate(zip(differences, scales, strict=True)):
        bound = scale * mpmath.mpf(10) ** (8 - digits[i])
        shrunk = i > 0 and difference <= differences[i - 1] * mpmath.mpf(10) ** (digits[i - 1] - digits[i] + 6)
        if difference > bound and not shrunk and i > 0:
            return False
    return True


def _same_at(a: Node, b: Node, number: int, digits: tuple[int, ...], is_constant: bool) -> bool | None:
    """Whether a = b at one point; None where one of them has no value, or no real one."""
    differences, scales, tried, real = [], [], [], [True, True]
    for precision in digits:
        try:
            (x, y), real = _values((a, b), number, precision, is_constant)
        except TooLarge:
            continue
        except (ArithmeticError, ValueError, OverflowError):
            return None
        differences.append(abs(x - y))
        scales.append(max(abs(x), abs(y)))
        tried.append(precision)
        if len(tried) > 1 and not _vanishes(differences, scales, tuple(tried)):
            return False if all(real) or number < 3 or contains(a, "abs") or contains(b, "abs") else None
    return len(tried) > 1 or None


def equal(a: Node, b: Node) -> bool:
    """Whether a = b for all values of their variables. Unbounded in time: only for a process that can be killed.

    At points with negative variables, roots and logarithms may leave the real numbers: such a point decides nothing,
    unless absolute values stand there, which are about signs.
    """
    if _calls(a, "lg") != _calls(b, "lg"):
        a, b = _decimal_logarithm(a), _decimal_logarithm(b)
    names = symbols(a) | symbols(b)
    is_constant = not names and not contains(a, "app") and not contains(b, "app")
    if is_constant:
        return _same_at(a, b, 0, CONSTANT_DIGITS, True) is True and _not_unequal_exactly(a, b)
    verdicts = [_same_at(a, b, 0, VARIABLE_DIGITS, False)]
    for number in range(1, POINTS + 3 * (contains(a, "fn") or contains(b, "fn"))):
        if verdicts[-1] is False:
            return False
        verdicts.append(_same_at(a, b, number, VARIABLE_DIGITS, False))
    return False not in verdicts and verdicts.count(True) >= 3


def _calls(node: Node, name: str) -> bool:
    return node[:2] == ("fn", name) or any(_calls(child, name) for child in node[1:] if isinstance(child, tuple))


def _decimal_logarithm(node: Node) -> Node:
    """log without a base as log_10, where the other formula says log_10."""
    if node[:2] == ("fn", "log"):
        return ("fn", "lg", _decimal_logarithm(node[2]))
    return tuple(_decimal_logarithm(c) if isinstance(c, tuple) and c and isinstance(c[0], str) else c for c in node)


def _not_unequal_exactly(a: Node, b: Node) -> bool:
    """False where exact arithmetic tells two rational numbers apart that agree to the last digit computed."""
    try:
        x, y = exact(a, LARGE_BITS), exact(b, LARGE_BITS)
    except TooLarge:
        return True
    except Undefined:
        return False
    return x is None or y is None or x == y


def proportion(a: Node, b: Node) -> float:
    """The constant c with a = c b for all values of the variables, to a few digits; 0.0 where there is none."""
    if not symbols(a) or symbols(a) != symbols(b):
        return 0.0
    ratios = []
    for number in range(9):
        try:
            (x, y), _ = _values((a, b), number, 50, False)
            ratios.append(x / y)
        except (ArithmeticError, ValueError, OverflowError):
            continue
    if len(ratios) < 3 or any(abs(r - ratios[0]) > abs(ratios[0]) * 1e-35 for r in ratios):
        return 0.0
    return float(ratios[0].real)


def approximates(gold: tuple[Fraction, Fraction], found: Node) -> bool:
    """Whether a formula without variables is the decimal gold."""
    if symbols(found):
        return False
    try:
        (value,), _ = _values((found,), 0, 40, True)
    except (ArithmeticError, ValueError, OverflowError):
        return False
    if getattr(value, "imag", 0) != 0 or not abs(value) < 10**300:
        return False
    return rounds_to(gold, Fraction(str(value.real)), None)
