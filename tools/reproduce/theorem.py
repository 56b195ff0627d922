"""What the sums of gradients.py say of Theorem 3.1 and Section 2.3: claims, rows, and what the sums leave out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean, median
from typing import Any

from tools.reproduce import statistics as s
from tools.reproduce.gradients import WEIGHTS
from tools.reproduce.report import Claim, Report, shown

TITLE = "Theorem 3.1, Section 2.3: weights of tokens against weights of sequences"
LESS, GROWS, ALIKE, NEARER, STEADY, EVEN = CLAIMS = (
    "weights of tokens have less variance than weights of sequences, at every T and n",
    "with n the variance of weights of sequences grows beside that of weights of tokens, at every T",
    "weights of tokens point the same way as g (cosine > 0.9), at every T and n",
    "weights of tokens are less biased than no weights, at every T and n",
    "beside the length of its own mean, a response's deviation is less with weights of tokens, at every T and n",
    "the weights themselves vary less over tokens than over sequences (effective share), at every T and n",
)
COSINE = 0.9
COLUMNS = {
    "bias": "bias",
    "cosine": "cosine with g",
    "size": "length of the mean",
    "deviation": "deviation of a response",
    "effective": "effective share",
    "effective_right": "of right responses",
}

Place = tuple[float, int]
"""(T, n)."""


@dataclass(frozen=True)
class Numbers:
    """The lines of gradients.json by their names."""

    lines: Sequence[dict[str, Any]]

    @property
    def temperatures(self) -> list[float]:
        return sorted({line["temperature"] for line in self.lines})

    @property
    def lefts(self) -> list[int]:
        return sorted({line["left"] for line in self.lines})

    @property
    def places(self) -> list[Place]:
        return [(t, n) for t in self.temperatures for n in self.lefts]

    def of(self, weight: str, key: str, place: Place) -> list[float]:
        """A value a problem."""
        (found,) = (x[key] for x in self.lines if (x["weight"], (x["temperature"], x["left"])) == (weight, place))
        return found

    def ratio(self, key: str, first: str, second: str, place: Place) -> list[float]:
        """log of first / second, a value a problem."""
        return [log(a / b) for a, b in zip(self.of(first, key, place), self.of(second, key, place), strict=True)]


def report(name: str, lines: Sequence[dict[str, Any]] | None) -> Report:
    """The table; intervals are over problems. lines: None where they are not made yet."""
    if lines is None:
        return Report(name, TITLE, [Claim(text, "not run yet") for text in CLAIMS], [], [])
    numbers = Numbers(lines)
    rows = [
        [f"{t:g}", weight, str(n), *(shown(s.interval(numbers.of(weight, key, (t, n)))) for key in COLUMNS)]
        for t in numbers.temperatures
        for weight in WEIGHTS
        for n in (numbers.lefts[0], numbers.lefts[-1])  # gradients.json has those between
    ]
    return Report(name, TITLE, claims(numbers), ["T", "weight", "n", *COLUMNS.values()], rows, notes(numbers))


def claims(numbers: Numbers) -> list[Claim]:
    few, many = numbers.lefts[0], numbers.lefts[-1]
    gap = {place: numbers.ratio("deviation", "sequence", "token", place) for place in numbers.places}
    grown = {(t, many): _less(gap[t, many], gap[t, few]) for t in numbers.temperatures}
    above = {place: [c - COSINE for c in numbers.of("token", "cosine", place)] for place in numbers.places}
    nearer = {place: numbers.ratio("bias", "none", "token", place) for place in numbers.places}
    sizes = {place: numbers.ratio("size", "sequence", "token", place) for place in numbers.places}
    steady = {place: _less(gap[place], sizes[place]) for place in numbers.places}
    even = {place: numbers.ratio("effective", "token", "sequence", place) for place in numbers.places}

    def ranges(ratios: Mapping[Place, Sequence[float]]) -> str:
        each = (
            f"{exp(fmean(ratios[t, few])):.2f} to {exp(fmean(ratios[t, many])):.2f} at T = {t:g}"
            for t in numbers.temperatures
        )
        return f"from n = {few} to {many}: {', '.join(each)}"

    cosines = ", ".join(
        f"{fmean(numbers.of('token', 'cosine', (t, many))):.3f} at T = {t:g}" for t in numbers.temperatures
    )
    return [
        _claim(LESS, gap, f"deviation of sequences / of tokens {ranges(gap)}"),
        _claim(GROWS, grown),
        _claim(ALIKE, above, f"n = {many}: {cosines}"),
        _claim(NEARER, nearer, f"bias without weights / of tokens {ranges(nearer)}"),
        _claim(STEADY, steady, f"of sequences / of tokens {ranges(steady)}"),
        _claim(EVEN, even, f"share of tokens / of sequences {ranges(even)}"),
    ]


def _less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, others, strict=True)]


def _claim(text: str, values: Mapping[Place, Sequence[float]], because: str = "") -> Claim:
    """Needs an interval above 0 at each place; says which places have none."""
    verdicts: dict[Place, s.Verdict] = {place: s.sign_of(s.interval(list(found))) for place, found in values.items()}
    lacking: dict[tuple[s.Verdict, float], list[str]] = {}
    for (t, n), verdict in verdicts.items():
        if verdict != "reproduced":
            lacking.setdefault((verdict, t), []).append(str(n))
    places = [f"{verdict} at T = {t:g}, n = {', '.join(found)}" for (verdict, t), found in lacking.items()]
    return Claim(text, s.all_of(list(verdicts.values())), "; ".join(filter(None, (because, *places))))


def notes(numbers: Numbers) -> list[str]:
    n, each = numbers.lefts[-1], numbers.temperatures
    problems = len(numbers.of("token", "bias", numbers.places[0]))
    rounding = max(max(numbers.of("sequence", "bias", place)) for place in numbers.places)
    until = ", ".join(f"{_until(numbers, (t, n)):.0f} at T = {t:g}" for t in each)
    shares = ", ".join(f"{fmean(numbers.of('none', 'share', (t, n))):.2g} at T = {t:g}" for t in each)
    at_1 = fmean(numbers.of("none", "share_at_1", numbers.places[-1]))
    return [
        f"Sums over all n! 2^n responses that end the answers to {problems} training problems; the first numbers are "
        "those of an exact answer, the last n are left to place. So there is no noise; intervals are over problems. g: "
        "the regulariser's gradient over responses of pi^T, of the output layer. Bias and length of the mean and the "
        "standard deviation of one response (root of the covariance's trace) are shares of |g|; what sequences have of "
        f"bias, at most {rounding:.0e}, is rounding. Effective share: (E w)^2 / E w^2 over responses and their tokens.",
        "The mean of N responses to a problem is nearer to g with weights of tokens than with those of sequences up to "
        f"N = {until} (n = {n}, median over problems; 0: for no N).",
        "Left out: whole answers, which are too many; starts that are no exact answer's; and all words but the legal "
        f"ones, to which the model is held here. Left free, it gives legal numbers {at_1:.2g} of its probability at "
        f"n = {n} and T = 1, {shares}.",
    ]


def _until(numbers: Numbers, place: Place) -> float:
    """N at which bias^2 + deviation^2 / N of tokens equals deviation^2 / N of sequences; median over problems."""
    bias, token, sequence = (
        numbers.of(weight, key, place)
        for weight, key in (("token", "bias"), ("token", "deviation"), ("sequence", "deviation"))
    )
    return median(max(q * q - t * t, 0.0) / (b * b) for b, t, q in zip(bias, token, sequence, strict=True))
