"""Problems with very many right answers, the random right answers that a small model learns from, and their grader.

Standard library alone: a grader runs in a process of its own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NEAR = 2
"""An answer is right whose sum is at most this far from the target. (The parity of all sums is that of the numbers.)"""
FAR = 256
"""More than any sum of a problem's numbers."""


@dataclass(frozen=True)
class Signs:
    """Give every number of a list a sign, in any order, so that they add up to a target, or come near it.

    problem: "reach 5 with 2 4 5 6 :", a right answer: "+5 +4 =-4 +2 -6 =0": numbers with their signs, and after every
    second one what is left to go.
    """

    largest: int = 14
    size: int = 10
    """Numbers of a problem, all different."""
    target: int = 40
    count: int = 12000
    new_tokens: int = 24
    """Bound of an answer, its end token included."""

    def vocabulary(self) -> list[str]:
        """Every word of problems and answers."""
        signed = [f"{sign}{n}" for n in range(1, self.largest + 1) for sign in "+-"]
        bound = sum(range(self.largest - self.size + 1, self.largest + 1))
        left = [f"={n}" for n in range(-bound, bound + 1)]
        return ["reach", "with", ":", *signed, *map(str, range(self.target + 1)), *left]

    def problems(self) -> list[str]:
        """`count` problems that can be solved, the same ones at every call, in no order."""
        rng, found = random.Random(0), dict[str, None]()
        while len(found) < self.count:
            numbers = rng.sample(range(1, self.largest + 1), self.size)
            target = sum(rng.choice((-1, 1)) * n for n in numbers)
            if 0 <= target <= self.target:
                found[f"reach {target} with {' '.join(map(str, sorted(numbers)))} :"] = None
        return list(found)

    def trace(self, problem: str, rng: random.Random) -> str:
        """An exact answer: each number and sign is drawn among those after which the target can still be reached."""
        left, numbers = _read(problem)
        words = []
        while numbers:
            moves = []
            for n in numbers:
                reach = _reachable([m for m in numbers if m != n])
                moves += [(n, sign) for sign in (1, -1) if reach >> (left - sign * n + FAR) & 1]
            n, sign = rng.choice(moves)
            numbers.remove(n)
            left -= sign * n
            words.append(f"{'+' if sign > 0 else '-'}{n}")
            if len(numbers) % 2 == 0:
                words.append(f"={left}")
        return " ".join(words)


Task = Signs
TASK = Signs()
"""What the grid trains on."""


def right(problem: str, response: str) -> bool:
    """Every number stands once, and the sum is NEAR the target; what is left need not be written right."""
    target, numbers = _read(problem)
    signed = [int(word) for word in response.split() if word[0] in "+-"]
    return sorted(map(abs, signed)) == numbers and abs(sum(signed) - target) <= NEAR


def grade(batch: Sequence[tuple[str, str, str, str, Any]]) -> list[dict[str, Any]]:
    """Reward and success of each (prompt, response, answer, source, metadata), as reward.function takes them."""
    return [{"reward": float(right(p, r)), "success": float(right(p, r)), "extracted": r} for p, r, *_ in batch]


def _read(problem: str) -> tuple[int, list[int]]:
    """(target, numbers in rising order)."""
    words = problem.split()
    return int(words[1]), sorted(int(word) for word in words[3:-1])


def _reachable(numbers: Sequence[int]) -> int:
    """Bit FAR + s is set where the numbers, each with a sign, can add up to s."""
    bits = 1 << FAR
    for n in numbers:
        bits = bits << n | bits >> n
    return bits
