"""What this machine's processor multiplies natively, and what bf16 costs where it does not."""

import time

BF16_UNITS = ("avx512_bf16", "amx_bf16")
"""Instructions of x86-64 that multiply bf16; without them it is emulated, 2 to 70 times slower than fp32."""


def native_dtype(device: str) -> str:
    """What `model.dtype: auto` means: bf16 on cuda, and on a CPU that multiplies it natively; else fp32."""
    return "bf16" if device == "cuda" or multiplies_bf16() else "fp32"


def multiplies_bf16() -> bool:
    """Does torch multiply bf16 by instructions of this processor?

    torch's own answer heeds what its libraries are held to (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY), but says yes to
    every AVX512, with bf16 units or without.
    """
    import torch

    found = torch.cpu.get_capabilities()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (
        found.get("architecture") != "x86_64" or any(found.get(unit, False) for unit in BF16_UNITS)
    )


def bf16_slowdown() -> float:
    """Time of bf16 multiplies over that of fp32 ones on this CPU now; takes a second at most.

    The three products of a layer, forward, to its input and to its weight, in the sizes of a small model.
    """
    import torch

    tokens, narrow, wide = 256, 576, 1536
    x, w, g = torch.randn(tokens, narrow), torch.randn(wide, narrow), torch.randn(tokens, wide)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = x.to(dtype), w.to(dtype), g.to(dtype)
        best = float("inf")
        begin = time.monotonic()
        while time.monotonic() - begin < 0.2:
            start = time.perf_counter()
            _ = a @ b.mT, c @ b, c.mT @ a
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
    return seconds[torch.bfloat16] / seconds[torch.float32]
