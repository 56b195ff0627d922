"""Sets of real numbers in one variable: intervals, inequalities, unions, all but some points."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from dcpo_openrlhf.reward.algebra import exact, symbols
from dcpo_openrlhf.reward.tokens import Node

INFINITY: Node = ("const", "inf")
REALS: Node = ("sym", "mathbb R")
FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


class Interval(NamedTuple):
    low: Node
    closed_low: bool
    high: Node
    closed_high: bool


def is_infinite(node: Node) -> bool:
    return node == INFINITY or node == ("neg", INFINITY)


def real_set(node: Node) -> tuple[str | None, list[Interval]] | None:
    """(variable, intervals) of an interval, an inequality, a union, R without some points."""
    kind = node[0]
    if node == REALS:
        return None, [Interval(("neg", INFINITY), False, INFINITY, False)]
    if kind == "group" and len(node) == 5 and node[1] in "([" and node[2] in ")]":
        return None, [Interval(node[3], node[1] == "[", node[4], node[2] == "]")]
    if kind == "rel":
        return _from_relation(node)
    if kind == "minus" and node[1] == REALS and node[2][0] == "group" and node[2][1] == "{" and len(node[2]) > 3:
        return _without(node[2][3:])
    if kind == "union":
        parts = [points_of(m) or real_set(m) for m in node[1:]]
        if None in parts:
            return None
        names = {name for name, _ in parts if name}  # type: ignore
        intervals = [interval for _, some in parts for interval in some]  # type: ignore
        return (names.pop() if names else None, intervals) if len(names) < 2 else None
    return None


def points_of(node: Node) -> tuple[None, list[Interval]] | None:
    if node[0] == "group" and node[1] == "{" and len(node) > 3:
        return None, [Interval(point, True, point, True) for point in node[3:]]
    return None


def _without(points: Sequence[Node]) -> tuple[None, list[Interval]] | None:
    values = [exact(p) for p in points]
    if len(points) > 1:
        if None in values:
            return None
        points = [p for _, p in sorted(zip(values, points, strict=True), key=lambda pair: pair[0])]  # type: ignore
    ends = [("neg", INFINITY), *points, INFINITY]
    return None, [Interval(low, False, high, False) for low, high in pairwise(ends)]


def _from_relation(node: Node) -> tuple[str | None, list[Interval]] | None:
    parts, signs = node[1::2], node[2::2]
    if signs == ("in",) and parts[0][0] == "sym":
        inside = points_of(parts[1]) or real_set(parts[1])
        return None if inside is None else (parts[0][1], inside[1])
    if signs and all(s in (">", ">=") for s in signs):
        return _from_relation(reversed_relation(node))
    if (
        len(signs) == 2
        and all(s in ("<", "<=") for s in signs)
        and parts[1][0] == "sym"
        and not symbols(parts[0]) | symbols(parts[2])
    ):
        return parts[1][1], [Interval(parts[0], signs[0] == "<=", parts[2], signs[1] == "<=")]
    if len(signs) != 1 or signs[0] not in ("<", "<=", "!="):
        return None
    low, high = parts
    if signs[0] == "!=":
        low, high = (low, high) if low[0] == "sym" else (high, low)
        inside = _without([high]) if low[0] == "sym" and not symbols(high) else None
        return None if inside is None else (low[1], inside[1])
    if low[0] == "sym" and low[1] not in symbols(high):
        return low[1], [Interval(("neg", INFINITY), False, high, signs[0] == "<=")]
    if high[0] == "sym" and high[1] not in symbols(low):
        return high[1], [Interval(low, signs[0] == "<=", INFINITY, False)]
    return None


def reversed_relation(node: Node) -> Node:
    parts = list(reversed(node[1:]))
    return ("rel", *(FLIPPED.get(p, p) if isinstance(p, str) else p for p in parts))
