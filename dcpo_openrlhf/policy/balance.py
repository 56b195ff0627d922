"""Lengths shared out over bins so that no bin holds much more than another. The standard library alone."""

from collections.abc import Sequence


def share_out(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Indices of `lengths` in that many bins of about equal sums: longest first, each into the emptiest bin."""
    found: list[list[int]] = [[] for _ in range(bins)]
    sums = [0] * bins
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = sums.index(min(sums))
        found[emptiest].append(index)
        sums[emptiest] += lengths[index]
    return [sorted(chosen) for chosen in found]


def fullest(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> int:
    """The largest sum of a bin; 0 where there is none."""
    return max((sum(lengths[i] for i in chosen) for chosen in bins), default=0)


def fill(lengths: Sequence[int], cap: int, *, at_least: int = 1) -> list[list[int]]:
    """Indices of `lengths`, of which none is above `cap`, in bins whose sums are at most `cap` and about equal.

    No fewer than `at_least` bins.
    """
    count = max(at_least, -(-sum(lengths) // cap), 1)
    while fullest(lengths, bins := share_out(lengths, count)) > cap:
        count += 1
    return bins
