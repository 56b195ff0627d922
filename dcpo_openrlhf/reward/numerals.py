r"""Exact numbers from their digits: 1.20, .5, 3e8, 0.1(6), 0.1\overline{6}, 0.333\ldots"""

import re
from fractions import Fraction

from dcpo_openrlhf.reward.tokens import Node, Unreadable


def number(text: str) -> Node:
    """The exact number of a token: 1.20, .5, 3e8, 0.1(6), 0.1\\overline{6}, 0.333\\ldots"""
    plain = re.fullmatch(r"([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?", text)
    if plain:
        whole, digits, exponent = plain.groups()
        places = None if digits is None else len(digits)
        node = ("num", Fraction(_int(whole + (digits or ""))) / 10 ** (places or 0), places)
        return (
            node
            if exponent is None
            else ("mul", node, ("pow", ("num", Fraction(10), None), ("num", Fraction(_int(exponent)), None)))
        )
    dots = re.fullmatch(r"([0-9]*)\.([0-9]*)\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?", text)
    bar = re.fullmatch(r"([0-9]*)\.([0-9]*)(?:\\overline\s*|\()\{?\s*([0-9]+)\s*[})]?", text)
    if dots:
        whole, fixed, period = dots[1], dots[2], dots[3] + (dots[4] or "") + (dots[5] or "")
    elif bar:
        whole, fixed, period = bar.groups()
    else:
        whole, _, digits = text.partition("\\")[0].strip().partition(".")
        period = _period(digits)
        fixed = digits[: len(digits) - len(digits) % len(period)] if len(period) > 1 else digits
        if len(period) > 1:
            fixed, rest = "", digits
            while (rest[: len(period)] * len(rest))[: len(rest)] != rest:
                fixed, rest = fixed + rest[0], rest[1:]
            period = rest[: len(period)]
    value = Fraction(_int(whole + fixed), 10 ** len(fixed)) + Fraction(
        _int(period), 10 ** len(fixed) * (10 ** len(period) - 1)
    )
    return ("num", value, None)


def _int(digits: str) -> int:
    if len(digits) > 4000:
        raise Unreadable("too many digits")
    return int(digits or "0")


def _period(digits: str) -> str:
    """The shortest block that ends the digits: three times for one digit, twice for more. 0.1212... and 0.333..."""
    for length in range(1, len(digits) // 2 + 1):
        times = 3 if length == 1 and len(digits) > 2 else 2
        if digits.endswith(digits[-length:] * times):
            return digits[-length:]
    raise Unreadable(f"no period in {digits[:60]}")
