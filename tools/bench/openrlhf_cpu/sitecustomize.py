"""Stock OpenRLHF 0.11.2 on a CPU: with this folder on PYTHONPATH the following stands in for a GPU; no package changes.

OpenRLHF names "cuda", NCCL and flash-attn in its code. Python imports this module in each process as it starts, in
those of Ray and vLLM too, and each function below runs right after its module was imported:

- flash_attn, which OpenRLHF imports at the top and calls for packed rows alone: a stub (`make_importable`);
- torch.cuda's current device, streams, synchronize and empty_cache: the CPU, and nothing;
- the device mesh of "cuda": of "cpu";
- NCCL between trainer and engine: the same broadcasts over gloo;
- the engine's update of one parameter, which receives into a buffer on "cuda": into one on the engine's device;
- vLLM's packed linear layers on CPU, which free the weight that this update writes to: torch's linear.

With OPENRLHF_FP32=1, for processors that do not multiply bf16: parameters, DeepSpeed and engine in fp32, where OpenRLHF
knows bf16 and fp16 alone.
"""

import datetime
import functools
import os
from typing import Any

from wrapt import when_imported


class Device(str):
    """ "cpu", which formats as the 0 of f"cuda:{device}": OpenRLHF names a device so, and puts nothing on it."""

    def __format__(self, spec: str) -> str:
        return "0"


class Stream:
    """Stands for a CUDA stream: work on CPU is done when the call returns."""

    def synchronize(self) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...


@when_imported("openrlhf")
def flash_attn(_: Any) -> None:
    from dcpo_openrlhf.openrlhf_seam import make_importable

    make_importable()


@when_imported("torch")
def torch_cuda(torch: Any) -> None:
    torch.cuda.current_device = lambda: Device("cpu")
    torch.cuda.current_stream = lambda *_, **__: Stream()
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *_, **__: None)


@when_imported("openrlhf.utils.deepspeed.deepspeed")
def device_mesh(module: Any) -> None:
    made = module.init_device_mesh
    module.init_device_mesh = lambda device, *args, **named: made("cpu", *args, **named)


@when_imported("openrlhf.utils.distributed_util")
def broadcast_group(module: Any) -> None:
    module.stateless_init_process_group = GlooGroup


class GlooGroup:
    """OpenRLHF's group of trainer and engines, with the one call that is made of it."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, device: Any) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

        bound = datetime.timedelta(seconds=300)
        self._store = TCPStore(address, port, world_size, rank == 0, timeout=bound)
        self._group: Any = ProcessGroupGloo(PrefixStore("weights", self._store), rank, world_size, bound)

    def broadcast(self, tensor: Any, src: int = 0, stream: Any = None) -> None:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()


@when_imported("openrlhf.trainer.ray.vllm_worker_wrap")
def update_weight(module: Any) -> None:
    def update(self: Any, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
        import torch

        weight = torch.empty(shape, dtype=dtype, device=self.device)
        self._model_update_group.broadcast(weight, src=0)
        self.model_runner.model.load_weights(weights=[(name, weight)])

    module.WorkerWrap.update_weight = update


@when_imported("vllm.model_executor.layers.utils")
def linear(module: Any) -> None:
    def unpacked(layer: Any, remove_weight: bool) -> None:
        import torch

        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = unpacked


def fp32() -> None:
    """The same in fp32."""

    @when_imported("openrlhf.utils.utils")
    def parameters(module: Any) -> None:
        import torch

        module.convert_to_torch_dtype = lambda _: torch.float32

    @when_imported("openrlhf.utils.deepspeed.deepspeed_utils")
    def deepspeed(module: Any) -> None:
        def in_fp32(config: Any, *args: Any, **named: Any) -> dict[str, Any]:
            return config(*args, **named) | {"bf16": {"enabled": False}, "data_types": {}}

        for name in ("get_train_ds_config", "get_eval_ds_config"):
            setattr(module, name, functools.partial(in_fp32, getattr(module, name)))

    @when_imported("vllm.engine.arg_utils")
    def engine(module: Any) -> None:
        checked = module.EngineArgs.__post_init__

        def in_fp32(self: Any) -> None:
            self.dtype = "float32"
            checked(self)

        module.EngineArgs.__post_init__ = in_fp32


if os.environ.get("OPENRLHF_FP32"):
    fp32()
