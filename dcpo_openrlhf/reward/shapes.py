"""One shape for what answers say in several: both signs written out, labels taken off, integers named alike."""

from collections.abc import Sequence
from fractions import Fraction

from dcpo_openrlhf.reward.algebra import contains, symbols
from dcpo_openrlhf.reward.quantity import join
from dcpo_openrlhf.reward.tokens import Node

ZERO: Node = ("num", Fraction(0), None)
INTEGERS = ("mathbb Z", "mathbb N")


def simple(node: Node) -> Node:
    """Both signs written out, 2 h and 30 min as one, a label before a list taken off: x = 2, 7."""
    if node[0] not in ("list", "group", "matrix", "rel", "ratio", "union", "minus", "cong") and contains(node, "pm"):
        return ("list", *_both(node))
    if node[0] == "rel" and len(node) == 4 and node[2] == "=" and contains(node[3], "pm"):
        return ("list", *_both(node[3]))
    if node[0] == "rel" and len(node) == 4 and node[2] == "in" and node[3][:2] == ("group", "{"):
        return simple(node[3])
    if (
        node[0] == "pow"
        and node[1][0] in ("group", "matrix")
        and node[2] == ("sym", "T")
        and (node[1][0] == "group" or vector_of(node[1]))
    ):
        return node[1]
    if node[0] == "list" or (node[0] == "group" and node[1] == "{"):
        start = 1 if node[0] == "list" else 3
        members: list[Node] = []
        for member in node[start:]:
            inside = simple(member)
            members += inside[1:] if inside[0] == "list" else [inside]
        if len(members) == 2 and members[0][0] == members[1][0] == "qty" and node[0] == "list":
            joined = join(members[0], members[1])
            if joined is not None:
                return joined
        return (*node[:start], *_unlabelled(members))
    return node


def _unlabelled(members: Sequence[Node]) -> list[Node]:
    """x = 2, 7 as 2, 7: a label that stands once, before the first."""
    first = members[0] if members else ZERO
    labelled = [is_labelled(m) for m in members]
    if len(members) > 1 and labelled[0] and not any(labelled[1:]) and not any(m[0] == "rel" for m in members[1:]):
        return [first[3], *members[1:]]
    return list(members)


def common_label(node: Node) -> Node | None:
    """x in x = 2, 7 and in x = 2 ± 7: the label that `simple` takes off."""
    if node[0] == "list" and is_labelled(node[1]) and not any(m[0] == "rel" for m in node[2:]):
        return node[1][1]
    is_choice = node[0] == "rel" and len(node) == 4 and node[2] == "in" and node[3][:2] == ("group", "{")
    return node[1] if is_choice or (is_labelled(node) and contains(node[3], "pm")) else None


def _both(node: Node) -> list[Node]:
    """a + b and a - b of every a ± b; the signs go together."""

    def choose(tree: Node, sign: str) -> Node:
        if tree[0] == "pm":
            left, right = choose(tree[1], sign), choose(tree[2], sign)
            return ("add", left, right if sign == "+" else ("neg", right))
        return tuple(
            choose(child, sign) if isinstance(child, tuple) and child and isinstance(child[0], str) else child
            for child in tree
        )

    return [choose(node, "+"), choose(node, "-")]


def is_label(node: Node) -> bool:
    return (
        node[0] in ("sym", "app")
        or node == ("const", "e")
        or (node[0] == "group" and all(m[0] == "sym" for m in node[3:]))
    )


def is_labelled(node: Node) -> bool:
    return node[0] == "rel" and len(node) == 4 and node[2] == "=" and is_label(node[1])


def family(gold: Node, found: Node) -> tuple[Node, Node]:
    """n pi, n in Z and k pi, k in Z with the same name for the integer."""
    (gold, mine), (found, other) = _bound(gold), _bound(found)
    if mine and other and mine != other and other not in symbols(gold):
        found = _renamed(found, other, mine)
    return gold, found


def _bound(node: Node) -> tuple[Node, str | None]:
    clauses = (
        [
            m
            for m in node[1:]
            if m[0] == "rel" and len(m) == 4 and m[2] == "in" and m[3][0] == "sym" and m[3][1].startswith(INTEGERS)
        ]
        if node[0] == "list"
        else []
    )
    if len(clauses) != 1 or clauses[0][1][0] != "sym":
        return node, None
    rest = [m for m in node[1:] if m is not clauses[0]]
    return (rest[0] if len(rest) == 1 else ("list", *rest)), clauses[0][1][1]


def _renamed(node: Node, old: str, new: str) -> Node:
    if node == ("sym", old):
        return ("sym", new)
    return tuple(
        _renamed(child, old, new) if isinstance(child, tuple) and child and isinstance(child[0], str) else child
        for child in node
    )


def one_label(members: Sequence[Node]) -> bool:
    """x = 1, x = 3 or x_1 = 1, x_2 = 3: names for solutions, not for different things."""
    return all(is_labelled(m) for m in members) and len({str(m[1][1]).partition("_")[0] for m in members}) == 1


def assigned(members: Sequence[Node]) -> list[Node] | None:
    """(1, 2) of x = 1, y = 2: the values in the order of the names."""
    if not all(is_labelled(m) and m[1][0] == "sym" for m in members) or len({m[1][1] for m in members}) < len(members):
        return None
    return [m[3] for m in sorted(members, key=lambda m: m[1][1])]


def vector_of(node: Node) -> list[Node] | None:
    if node[0] != "matrix" or node[1] != "pmatrix":
        return None
    rows = node[2:]
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else list(rows[0]) if len(rows) == 1 else None
