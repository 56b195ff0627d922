"""Two tasks, the answers that a small model learns from, and the grader: Sums for the grid, Signs for Theorem 3.1.

Standard library alone: a grader runs in a process of its own.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

FAR = 256
"""More than any sum of a problem's numbers in Signs."""


@dataclass(frozen=True)
class Sums:
    """Add three numbers column by column, with the carry, as pupils do who slip and who often carry 1 for a 2.

    problem: "add 9 8 7 , 1 2 3 , 4 0 0 :", the digits of each column from the units up; the exact answer: "24 8 4",
    each column's total with what was carried into it. An answer with at most `wrong` totals that are not the exact ones
    is right: at first few are, and once the slips are gone those with more than one carry of 2 are not.
    """

    columns: int = 6
    slip: float = 0.22
    """Share of columns in which a pupil writes any total, and goes on with it."""
    forget: float = 0.7
    """Share of carries of 2 that pupils carry as 1."""
    wrong: int = 1
    count: int = 12000
    new_tokens: int = 10
    """Bound of an answer, its end token included."""

    def vocabulary(self) -> list[str]:
        """Every word of problems and answers; words stand between spaces, each is a token."""
        return ["add", ",", ":", *map(str, range(TOTALS))]

    def problems(self) -> list[str]:
        """`count` problems, the same ones at every call, in no order."""
        rng, found = random.Random(0), dict[str, None]()
        while len(found) < self.count:
            columns = (" ".join(str(rng.randrange(10)) for _ in range(3)) for _ in range(self.columns))
            found[f"add {' , '.join(columns)} :"] = None
        return list(found)

    def trace(self, problem: str, rng: random.Random) -> str:
        """A pupil's answer."""
        carry, totals = 0, []
        for column in _columns(problem):
            totals.append(rng.randrange(TOTALS) if rng.random() < self.slip else sum(column) + carry)
            carry = totals[-1] // 10
            if carry == 2 and rng.random() < self.forget:
                carry = 1
        return " ".join(map(str, totals))

    def right(self, problem: str, response: str) -> bool:
        carry, exact = 0, []
        for column in _columns(problem):
            exact.append(str(sum(column) + carry))
            carry = int(exact[-1]) // 10
        written = response.split()
        return len(written) == len(exact) and sum(map(str.__ne__, written, exact)) <= self.wrong


TOTALS = 30
"""0 to 29: three digits and a carry of 2."""


def _columns(problem: str) -> Iterator[list[int]]:
    for column in problem.removeprefix("add ").removesuffix(" :").split(" , "):
        yield [int(digit) for digit in column.split()]


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
    near: int = 2
    """A sum is right at most this far from the target. (The parity of all sums is that of the numbers.)"""

    def vocabulary(self) -> list[str]:
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

    def right(self, problem: str, response: str) -> bool:
        """Every number stands once, and the sum is near the target; what is left need not be written right."""
        target, numbers = _read(problem)
        signed = [int(word) for word in response.split() if word[0] in "+-"]
        return sorted(map(abs, signed)) == numbers and abs(sum(signed) - target) <= self.near


Task = Sums | Signs
"""What a small model is taught, sampled and graded on."""
SUMS, SIGNS = Sums(), Signs()
EASY = replace(SUMS, wrong=4)
"""The same problems for the same model, which is right in nine of ten samples here."""
Rows = Sequence[tuple[str, str, str, str, Any]]
"""(prompt, response, answer, source, metadata) of each response: what a reward.function is called with."""


def grade(batch: Rows, task: Sums = SUMS) -> list[dict[str, Any]]:
    """Reward and success by SUMS, or another one."""
    rights = [float(task.right(prompt, response)) for prompt, response, *_ in batch]
    return [{"reward": r, "success": r, "extracted": row[1]} for r, row in zip(rights, batch, strict=True)]


def grade_easy(batch: Rows) -> list[dict[str, Any]]:
    """By EASY."""
    return grade(batch, EASY)


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
