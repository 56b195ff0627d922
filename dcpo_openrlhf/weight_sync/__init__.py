"""Weights from the trainer to the vLLM engines, through vLLM's own weight-transfer API.

A sync: the source yields (HF name, tensor) on every trainer rank, rank 0 packs them into buckets, every engine worker
loads a bucket as it arrives. `nccl` and `ipc` are vLLM's backends, checked in `device`; `gloo` and `shared_memory`, for
CPU, are ours. So are `gloo_senders` and `nccl_senders`: one rank of each pipeline stage and share of its experts sends
what it has, all at once.
Importing this package is cheap: vLLM imports it in every process it starts.

Door: connect, WeightSync, WeightSyncError, register, TRANSPORTS, ACTOR_PID; source (LiveWeights, SharedWeights).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcpo_openrlhf.weight_sync.connection import WeightSync, WeightSyncError, connect

__all__ = ["ACTOR_PID", "TRANSPORTS", "WeightSync", "WeightSyncError", "connect", "register"]
SENDERS = "_senders"
"""End of a transport's name where several trainer ranks send at once."""
TRANSPORTS = ("shared_memory", "gloo", "nccl", "ipc", f"gloo{SENDERS}", f"nccl{SENDERS}")
# Environment variable with the rollout actor's process id: it sets it, vLLM's processes inherit it and end with it.
ACTOR_PID = "DCPO_ROLLOUT_ACTOR_PID"
# name -> (module, class prefix) of the backends made here
_BACKENDS = {
    "shared_memory": ("shared_memory", "SharedMemory"),
    "gloo": ("gloo", "Gloo"),
    f"gloo{SENDERS}": ("senders", "GlooSenders"),
    f"nccl{SENDERS}": ("senders", "NCCLSenders"),
}
# name of a backend of vLLM's -> class in `device` that takes the place of its workers' side
_CHECKED = {"nccl": "NCCLWorkerEngine", "ipc": "IPCWorkerEngine"}


def register() -> None:
    """Make our backends known to vLLM in this process. Idempotent: as an entry point vLLM may call it several times."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    for name, (file, prefix) in _BACKENDS.items():
        module = f"{__name__}.{file}"
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, f"{prefix}WorkerEngine")
        if name not in WeightTransferTrainerFactory._registry:
            WeightTransferTrainerFactory.register_engine(name, module, f"{prefix}TrainerEngine")
    for name, checked in _CHECKED.items():
        WeightTransferEngineFactory._registry.pop(name, None)
        WeightTransferEngineFactory.register_engine(name, f"{__name__}.device", checked)


def __getattr__(name: str) -> Any:
    if name in ("WeightSync", "WeightSyncError", "connect"):
        from dcpo_openrlhf.weight_sync import connection

        return getattr(connection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
