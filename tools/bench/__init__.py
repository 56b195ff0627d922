"""Benchmarks: `python -m tools.bench.NAME` prints a page. Here: how time and memory are measured."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch


def median_seconds(paths: Mapping[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, float]:
    """Median time [s] of each path after a call to warm up; they take turns, so that a busy machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(repeats + 1):
        for name, path in paths.items():
            _synchronize(device)
            start = time.perf_counter()
            path()
            _synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def peak_extra_bytes(path: Callable[[], object], *, device: str) -> int:
    """Most tensor memory [bytes] that `path` holds at once beyond what was allocated before it."""
    if device != "cpu":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        path()
        _synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        path()
    results: Any = profile.profiler and profile.profiler.kineto_results
    live = peak = 0
    for event in results.events():  # in the order of time
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def publish(page: str, output: Path | None) -> None:
    """Print the page, and write it to the file too where one is named."""
    print(page, end="")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
