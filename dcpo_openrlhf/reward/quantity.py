"""Units read behind a number (or before it, as currencies stand), several of them as one: 2 h 30 min.

A quantity is the node ("qty", value, Unit, is_compound): value times the unit's factor, in the unit's dimensions.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from dcpo_openrlhf.reward.tokens import Node, Unreadable
from dcpo_openrlhf.reward.units import LETTERS, Unit, lookup, product, thing
from dcpo_openrlhf.reward.vocabulary import HEDGES, MULTIPLES

if TYPE_CHECKING:
    from dcpo_openrlhf.reward.reader import Reader

_SIGNS = {"%": "%", "deg": "degree", "usd": "dollar", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "¢": "¢", "Omega": "ohm"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_BEFORE = frozenset({"USD", "EUR", "GBP", "JPY", "CNY", "Rs"})
_TEMPERATURES = {
    "C": "celsius",
    "F": "fahrenheit",
    **dict.fromkeys(("Celsius", "celsius"), "celsius"),
    **dict.fromkeys(("Fahrenheit", "fahrenheit"), "fahrenheit"),
}


def starts_currency(reader: Reader) -> bool:
    """Whether a currency stands before a number."""
    token = reader.next
    sign = token.text in ("usd", "€", "£", "¥", "₹") and token.kind in ("cmd", "op")
    return (sign or (token.kind == "word" and token.text in _BEFORE)) and reader.peek().kind == "num"


def read_currency(reader: Reader) -> Node:
    name = reader.take().text
    unit = lookup(_SIGNS.get(name, name))
    assert unit is not None
    value, _ = reader.factor()
    return ("qty", *_multiplied(reader, value), unit, False)


def _multiplied(reader: Reader, value: Node) -> tuple[Node]:
    while reader.next.kind == "word" and reader.next.text.lower() in MULTIPLES:
        value = ("mul", value, ("num", Fraction(MULTIPLES[reader.take().text.lower()]), None))
    return (value,)


def read_quantity(reader: Reader, value: Node) -> Node | None:
    """The quantity that `value` begins, with the reader behind its unit; None where no unit follows."""
    (value,) = _multiplied(reader, value)
    unit = _unit(reader, after=None)
    if unit is None:
        return value if value[0] == "mul" and value[2][0] == "num" and value[2][1] in MULTIPLES.values() else None
    node: Node = ("qty", value, unit, False)
    while reader.next.kind == "num":
        at = reader.at
        more, _ = reader.factor()
        unit = _unit(reader, after=node[2])
        if unit is None:
            reader.at = at
            break
        joined = join(node, ("qty", more, unit, False))
        if joined is None:
            raise Unreadable("two quantities side by side")
        node = joined
    return node


def join(first: Node, second: Node) -> Node | None:
    """2 h and 30 min as one quantity; None where they are two: other dimensions, or the same unit twice."""
    a, b = first[2], second[2]
    if a.dims != b.dims or a.pi != b.pi or not b.factor < a.factor or any("thing" in base for base, _ in a.dims):
        return None
    return ("qty", ("add", first[1], ("mul", second[1], ("num", b.factor / a.factor, None))), a, True)


def base_value(node: Node) -> Node:
    """The value in the base of its dimensions."""
    _, value, unit, _ = node
    for _ in range(unit.pi):
        value = ("mul", value, ("const", "pi"))
    return ("mul", value, ("num", unit.factor, None))


def _starts_unit(reader: Reader, inside: bool) -> bool:
    token = reader.next
    if token.kind == "word":
        return token.text.lower() not in HEDGES
    if token.kind in ("cmd", "op") and token.text in _SIGNS:
        return token.text != "Omega" or reader.bare_units
    # Bare letters are units only where the caller says that nothing else can be meant.
    return token.kind == "let" and token.text in LETTERS and reader.bare_units and (inside or token.space)


def _unit(reader: Reader, after: Unit | None) -> Unit | None:
    if reader.meets("'") and reader.tokens[reader.at - 1].kind == "num":
        return _primes(reader, after)
    bracket = reader.meets("(") and reader.peek().kind == "word" and reader.peek().text.lower() not in HEDGES
    if bracket:
        reader.at += 1
    if not _starts_unit(reader, inside=bracket):
        return None
    parts: list[tuple[Unit, int]] = []
    sign = 1
    while True:
        parts.append(_part(reader, sign))
        if reader.meets("/") or (reader.next.kind == "word" and reader.next.text.lower() == "per"):
            reader.at += 1
            sign = -1
            if not _starts_unit(reader, inside=True):
                raise Unreadable("a unit per what?")
        elif reader.meets("cdot", "*", "times") and (reader.peek().kind == "word" or reader.peek().text in LETTERS):
            reader.at += 1
        elif not _starts_unit(reader, inside=True):
            break
    if bracket:
        reader.expect(")")
    if reader.next.kind == "word" and reader.next.text.lower() not in ("and", "or", "to"):
        raise Unreadable(f"{reader.next.text!r} behind a unit")
    return product(parts)


def _primes(reader: Reader, after: Unit | None) -> Unit | None:
    """5' 6'' in feet and inches, or in minutes and seconds of arc behind degrees."""
    count = 0
    while reader.accept("'"):
        count += 1
    of_arc = after is not None and after.pi == 1
    names = {1: "arcmin" if of_arc else "foot", 2: "arcsec" if of_arc else "inch"}
    if count not in names or (after is None and reader.next.kind != "num"):
        raise Unreadable("primes that are no feet and inches")
    return lookup(names[count])


def _part(reader: Reader, sign: int) -> tuple[Unit, int]:
    """One unit with its power: km^2, square feet, degrees Celsius, ordered pairs."""
    token = reader.take()
    power = 1
    if token.text.lower() in _POWERS and reader.next.kind == "word":
        power, token = _POWERS[token.text.lower()], reader.take()
    unit = lookup(_SIGNS.get(token.text, token.text))
    if unit is None:
        words = [token.text]
        while (
            reader.next.kind == "word" and reader.next.text.lower() != "per" and reader.next.text.lower() not in HEDGES
        ):
            words.append(reader.take().text)
        unit = thing(words)
    elif unit.pi and reader.next.kind in ("word", "let") and reader.next.text in _TEMPERATURES:
        unit = Unit(Fraction(1), 0, ((_TEMPERATURES[reader.take().text], Fraction(1)),))
    if reader.accept("^"):
        power *= _exponent(reader)
    if reader.next.kind == "word" and reader.next.text.lower() in ("squared", "cubed"):
        power *= 2 if reader.take().text.lower() == "squared" else 3
    return unit, sign * power


def _exponent(reader: Reader) -> int:
    braced = reader.accept("{")
    sign = -1 if reader.accept("-") else 1
    token = reader.take()
    if token.kind != "num" or not token.text.isdigit() or len(token.text) > 2:
        raise Unreadable("the power of a unit")
    if braced:
        reader.expect("}")
    return sign * int(token.text)
