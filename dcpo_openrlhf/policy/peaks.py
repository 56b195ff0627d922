"""FLOP/s that a device reaches at most: of GPUs from their makers' tables, of a CPU as measured on the spot."""

import time

import torch

BF16_PEAKS = {
    # NVIDIA's data sheets, dense; longer names first: a name is looked up as part of what the driver reports
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A30": 165e12,
    "A10": 125e12,
}
"""Part of a device's name -> FLOP/s of bf16 multiplies."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one device; None for a GPU that BF16_PEAKS does not name, or in another format."""
    if device.type == "cpu":
        return _measured(dtype)
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name and dtype == torch.bfloat16), None)


def _measured(dtype: torch.dtype) -> float:
    """Of the fastest square multiply of this process's threads, within a third of a second."""
    best, begin = 0.0, time.monotonic()
    a = torch.randn(1024, 1024).to(dtype)
    while time.monotonic() - begin < 0.3:
        start = time.perf_counter()
        torch.mm(a, a)
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best
