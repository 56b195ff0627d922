"""Traces of chosen steps by torch's profiler: of the driver, and of one policy rank a pipeline stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch.profiler import ProfilerActivity

MEMORY_EVENTS = 1_000_000
"""Allocations that a memory snapshot holds at most, the newest."""


class Recording:
    """What this process computes from now on; on cuda, what its device computes and allocates too."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def write(self, folder: Path, name: str) -> None:
        """End it, and write NAME.json, for perfetto.dev or chrome://tracing; on cuda NAME_memory.pickle, for
        pytorch.org/memory_viz.
        """
        if self._on_gpu:
            torch.cuda.synchronize()  # the last kernels belong to the trace
        self._profiler.stop()
        folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(folder / f"{name}.json"))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


class ProfiledSteps:
    """Records these steps of a run into RUN/profile, the driver here and the policy's ranks where they are."""

    def __init__(self, steps: Sequence[int], run: Path, group: Any) -> None:
        self._steps, self._folder, self._group = frozenset(steps), run / "profile", group
        self._driver: Recording | None = None

    def begin(self, step: int) -> None:
        if step in self._steps:
            ray.get(self._group.async_run_method("begin_profile"))
            self._driver = Recording("cpu")

    def end(self, step: int) -> None:
        """Write the traces of the step; those of a step that an error ended are not written."""
        if self._driver is not None:
            prefix = f"step_{step:06d}"
            self._driver.write(self._folder, f"{prefix}_driver")
            self._driver = None
            ray.get(self._group.async_run_method("end_profile", str(self._folder), prefix))
