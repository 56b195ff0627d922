"""Are two trees the same answer? Lists in any order, points in theirs, intervals, equations up to a factor.

What formulas and numbers need is left to an `Oracle`: a caller's exact one, or a worker's with algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from dcpo_openrlhf.reward.algebra import decimal_of, exact, symbols
from dcpo_openrlhf.reward.quantity import base_value
from dcpo_openrlhf.reward.realsets import FLIPPED, Interval, is_infinite, real_set, reversed_relation
from dcpo_openrlhf.reward.shapes import (
    assigned,
    common_label,
    family,
    is_label,
    is_labelled,
    one_label,
    simple,
    vector_of,
)
from dcpo_openrlhf.reward.tokens import Node
from dcpo_openrlhf.reward.units import has_direction, is_measured


class Oracle(NamedTuple):
    """Questions about formulas."""

    equal: Callable[[Node, Node], bool]
    """(gold, found): the same value for all variables, or found is the decimal gold, rounded."""
    proportion: Callable[[Node, Node], float]
    """The constant between two formulas; 0.0 where there is none."""


def match(gold: Node, found: Node, ask: Oracle) -> bool:
    """Whether the found tree is the gold's answer."""
    labels = (common_label(gold), common_label(found))
    if None not in labels and labels[0] != labels[1]:
        return False
    gold, found = simple(gold), simple(found)
    if gold == found:
        return True
    gold, found = family(gold, found)
    as_sets = _match_sets(gold, found, ask)
    if as_sets is not None:
        return as_sets
    rule = {
        "list": _match_list,
        "group": _match_group,
        "rel": _match_relation,
        "matrix": _match_matrix,
        "ratio": _match_ratio,
        "qty": _match_quantity,
    }.get(gold[0])
    if rule is not None:
        return rule(gold, found, ask)
    if gold[0] == found[0] == "cong":
        return _match_congruence(gold, found, ask)
    if gold[0] in ("cong", "minus", "union", "cycle"):
        return gold[0] == found[0] != "cycle" and _in_order(gold[1:], found[1:], ask)
    return _match_value(gold, found, ask)


def _match_congruence(gold: Node, found: Node, ask: Oracle) -> bool:
    """x = 3 and x = 10 (mod 7) are the same class; 5 (mod 7) is no answer to 5."""
    (_, mine, modulus), (_, other, its) = gold, found
    if (
        mine[0] == other[0] == "rel"
        and len(mine) == len(other) == 4
        and mine[2] == other[2]
        and match(mine[1], other[1], ask)
    ):
        mine, other = mine[3], other[3]
    residues = [exact(n) if n[0] in ("num", "neg") else None for n in (mine, other, modulus)]
    same_class = None not in residues and residues[2] and (residues[0] - residues[1]) % residues[2] == 0  # type: ignore
    return match(modulus, its, ask) and (bool(same_class) or match(mine, other, ask))


# --- lists, sets, points, matrices


def _pairs[T](gold: Sequence[T], found: Sequence[T], same: Callable[[T, T, Oracle], bool], ask: Oracle) -> bool:
    """Whether each has its own partner, in any order."""
    left = list(found)
    for member in gold:
        partner = next((i for i, other in enumerate(left) if same(member, other, ask)), None)
        if partner is None:
            return False
        del left[partner]
    return not left


def _in_order(gold: Sequence[Node], found: Sequence[Node], ask: Oracle) -> bool:
    return len(gold) == len(found) and all(match(g, f, ask) for g, f in zip(gold, found, strict=True))


def _match_list(gold: Node, found: Node, ask: Oracle) -> bool:
    members = list(gold[1:])
    if any(m[0] == "ellipsis" for m in members):
        return found[0] == "list" and _in_order(members, found[1:], ask)
    if found[0] == "group" and found[1] == "{":
        return _same_set(members, found[3:], ask)
    point = assigned(members)
    if found[0] == "group" and point is not None and found[1:3] == ("(", ")"):
        return _in_order(point, found[3:], ask)
    if found[0] != "list" or len(found) != len(gold):
        return False
    others = list(found[1:])
    if one_label(others) and not any(is_labelled(m) for m in members):
        others = [m[3] for m in others]
    elif one_label(members) and not any(is_labelled(m) for m in others):
        members = [m[3] for m in members]
    return _pairs(members, others, match, ask)


def _same_set(gold: Sequence[Node], found: Sequence[Node], ask: Oracle) -> bool:
    """Each member of one is in the other, however often."""
    return all(any(match(g, f, ask) for f in found) for g in gold) and all(
        any(match(g, f, ask) for g in gold) for f in found
    )


def _match_group(gold: Node, found: Node, ask: Oracle) -> bool:
    members = gold[3:]
    if gold[1] == "{":
        if found[0] == "list":
            others = list(found[1:])
            return _same_set(members, [m[3] for m in others] if one_label(others) else others, ask)
        others = (
            found[3:]
            if found[0] == "group" and found[1] == "{"
            else [found]
            if len(members) == 1 and found[0] not in ("group", "rel")
            else None
        )
        return bool(others) == bool(members) and others is not None and _same_set(members, others, ask)
    if is_labelled(found):
        return match(gold, found[3], ask)
    vector = vector_of(found)
    if vector is not None and gold[1] in ("(", "langle", "[") and gold[2] in (")", "rangle", "]"):
        return (gold[1] == "[") == (gold[2] == "]") and _in_order(members, vector, ask)
    if found[0] == "list" and gold[1:3] == ("(", ")"):
        point = assigned(found[1:])
        return point is not None and _in_order(members, point, ask)
    plain = {"langle": "(", "rangle": ")"}
    if found[0] != "group" or [plain.get(b, b) for b in gold[1:3]] != [plain.get(b, b) for b in found[1:3]]:
        return False
    return _in_order(members, found[3:], ask)


def _match_matrix(gold: Node, found: Node, ask: Oracle) -> bool:
    if is_labelled(found):
        return match(gold, found[3], ask)
    if found[0] == "group" and found[1] == "[" and all(m[0] == "group" and m[1] == "[" for m in found[3:]):
        found = ("matrix", "pmatrix", *(m[3:] for m in found[3:]))  # [[1, 2], [3, 4]]
    mine, other = vector_of(gold), vector_of(found)
    if found[0] == "group" and found[1] in ("(", "langle", "["):
        return (
            mine is not None
            and found[2] in (")", "rangle", "]")
            and (found[1] == "[") == (found[2] == "]")
            and _in_order(mine, found[3:], ask)
        )
    if mine is not None and other is not None:
        return _in_order(mine, other, ask)
    if found[0] != "matrix" or found[1] != gold[1] or len(found) != len(gold):
        return False
    return all(_in_order(g, f, ask) for g, f in zip(gold[2:], found[2:], strict=True))


def _match_ratio(gold: Node, found: Node, ask: Oracle) -> bool:
    if is_labelled(found):
        return match(gold, found[3], ask)
    if found[0] != "ratio":
        return (
            len(gold) == 3 and found[0] not in ("list", "group", "rel", "qty") and ask.equal(("div", *gold[1:]), found)
        )
    if len(gold) != len(found):
        return False
    return all(ask.equal(("mul", gold[1], f), ("mul", found[1], g)) for g, f in zip(gold[2:], found[2:], strict=True))


# --- relations


def _match_relation(gold: Node, found: Node, ask: Oracle) -> bool:
    if gold[2] == "=" and len(gold) == 4:
        return _match_equation(gold, found, ask)
    if found[0] != "rel" or len(found) != len(gold):
        return False
    turns = (found, reversed_relation(found)) if all(sign in FLIPPED for sign in found[2::2]) else (found,)
    return any(turned[2::2] == gold[2::2] and _in_order(gold[1::2], turned[1::2], ask) for turned in turns)


def _match_equation(gold: Node, found: Node, ask: Oracle) -> bool:
    _, left, _, right = gold
    if found[0] != "rel":
        return is_label(left) and found[0] != "ratio" and match(right, found, ask)
    if any(sign != "=" for sign in found[2::2]):
        return False
    if is_label(left) and found[1] == left and all(match(right, part, ask) for part in found[3::2]):
        return True
    if len(found) != 4 or any(
        n[0] in ("list", "group", "matrix", "ratio", "qty", "rel") for n in (left, right, found[1], found[3])
    ):
        return len(found) == 4 and _in_order((left, right), (found[1], found[3]), ask)
    difference, other = ("add", left, ("neg", right)), ("add", found[1], ("neg", found[3]))
    return ask.proportion(difference, other) != 0.0


# --- sets of real numbers


def _match_sets(gold: Node, found: Node, ask: Oracle) -> bool | None:
    """Intervals and inequalities in one variable; None where they are none."""
    mine = real_set(gold)
    if mine is None:
        return None
    other = real_set(found)
    if other is None:
        return False if gold[0] not in ("group", "sym", "rel") else None
    (variable, intervals), (named, others) = mine, other
    if gold[0] == found[0] == "group":
        return None
    if variable and named and variable != named:
        return False
    return _pairs(intervals, others, _same_interval, ask)


def _same_interval(a: Interval, b: Interval, ask: Oracle) -> bool:
    ends = ((a.low, a.closed_low, b.low, b.closed_low), (a.high, a.closed_high, b.high, b.closed_high))
    return all(match(x, y, ask) and (closed == other or is_infinite(x)) for x, closed, y, other in ends)


# --- quantities and single values


def _match_quantity(gold: Node, found: Node, ask: Oracle) -> bool:
    """With its own unit or one that says the same; a bare number where the gold has a single unit and no direction."""
    if found[0] in ("rel", "approx"):
        return _chain(gold, found, ask)
    unit = gold[2]
    if found[0] == "qty":
        if unit.dims == found[2].dims:
            return ask.equal(base_value(gold), base_value(found))
        return False
    if found[0] in ("list", "group", "ratio", "matrix", "union"):
        return False
    same_size = unit.dims in ((("angle", Fraction(1)),), (("percent", Fraction(1)),)) and ask.equal(
        base_value(gold), found
    )
    if same_size:
        return True
    return not gold[3] and not has_direction(unit.dims) and ask.equal(gold[1], found)


def _match_value(gold: Node, found: Node, ask: Oracle) -> bool:
    if found[0] in ("rel", "approx"):
        return _chain(gold, found, ask)
    if found[0] == "group" and found[1] == "{" and len(found) == 4 and gold[0] != "num":
        return match(gold, found[3], ask)
    if found[0] == "qty":
        return _match_bare(gold, found, ask)
    if found[0] in ("list", "group", "matrix", "union", "minus", "cong", "cycle", "ellipsis"):
        return False
    if found[0] == "ratio":
        return len(found) == 3 and gold[0] == "div" and ask.equal(gold, ("div", *found[1:]))
    if is_infinite(gold) or is_infinite(found):
        return gold == found
    return ask.equal(gold, found)


def _match_bare(gold: Node, found: Node, ask: Oracle) -> bool:
    """A gold without a unit takes its number with any; beside letters, only with one of measure."""
    _, value, unit, is_compound = found
    if is_compound or (symbols(gold) and not is_measured(unit.dims)):
        return False
    same_size = unit.dims in ((("angle", Fraction(1)),), (("percent", Fraction(1)),)) and ask.equal(
        gold, base_value(found)
    )
    return same_size or ask.equal(gold, value)


def _chain(gold: Node, found: Node, ask: Oracle) -> bool:
    """x = 2 + 3 = 5: every part but a label at one end is the gold; x about 3.14 is only for a decimal gold."""
    if found[0] == "approx":
        found = ("rel", ("sym", ""), "~", found[1])
    parts, signs = list(found[1::2]), found[2::2]
    if any(sign not in ("=", "~") for sign in signs):
        return False
    if is_label(parts[0]) and parts[0] != gold:
        if signs[0] == "~" and decimal_of(gold[1] if gold[0] == "qty" else gold) is None:
            return False
        parts = parts[1:]
    elif is_label(parts[-1]) and parts[-1] != gold:
        parts = parts[:-1]
    return bool(parts) and all(part[0] not in ("list", "rel") and match(gold, part, ask) for part in parts)
