"""What lets CUDA-only library code run on a CPU machine: device names mapped to cpu, CUDA calls without effect.

CPU runs alone import it.
"""

import contextlib
import ctypes
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Maps device="cuda" (or an index) to cpu, makes Tensor.cuda() a no-op, and reports CUDA tensor types.

    megatron-core 0.19.2 writes device='cuda' in its schedules and compares Tensor.type() with torch.cuda.*Tensor in
    its optimizer.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _CUDA_TYPE.get(name, name)
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _NoStream:
    """Stands for torch.cuda.Stream and Event: work on CPU is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *_: Any) -> "_NoStream":
        return self

    def query(self) -> bool:
        return True


_mode: _CudaNamesMeanCpu | None = None


def install() -> None:
    """Let this process run libraries written for CUDA from now on, in the calling thread. Idempotent."""
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("cpu.install() was called on a machine with CUDA; set run.device=cuda")

    # one function object for each name: torch's compiler refuses to see one under two names
    for name in ("synchronize", "empty_cache", "set_device", "manual_seed", "manual_seed_all", "ipc_collect"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *_, **__: _NoStream())
    torch.cuda.Stream = torch.cuda.Event = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment]
    torch.cuda.stream = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[assignment]
    _mode = _CudaNamesMeanCpu()
    _mode.__enter__()


def return_freed_memory() -> None:
    """Give pages that are free inside malloc's heap back to the system.

    Packed micro-batches differ in size; without this the freed blocks between them add up to gigabytes over a run.
    """
    with contextlib.suppress(AttributeError, OSError):  # glibc has it; another C library keeps its pages
        ctypes.CDLL("libc.so.6").malloc_trim(0)
