"""Transport for engines on the trainer's host: shared memory that the trainer packs and every worker loads from."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo

from dcpo_openrlhf.weight_sync.base import BucketTrainerEngine, BucketTrainerInitInfo, BucketWorkerEngine
from dcpo_openrlhf.weight_sync.buckets import Bucket

SHARED_MEMORY_DIR = Path("/dev/shm")


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    path: str
    nbytes: int


@dataclass
class SharedMemoryTrainerInitInfo(BucketTrainerInitInfo):
    backend = "shared_memory"


class SharedMemoryWorkerEngine(BucketWorkerEngine[SharedMemoryInitInfo]):
    init_info_cls = SharedMemoryInitInfo
    _shared: Tensor | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        if not os.path.exists(init_info.path):
            raise FileNotFoundError(
                f"{init_info.path} is not on this engine's host: shared_memory needs trainer rank 0 and all engines "
                "on one host; set weight_sync.transport to gloo"
            )
        self._shared = _map(init_info.path, init_info.nbytes)

    def receive_bucket(self, bucket: Bucket, begin: int) -> UInt8[Tensor, "bytes"]:
        if self._shared is None:
            raise RuntimeError(f"{bucket} announced before the shared memory was opened; connect first")
        return self._shared[begin : begin + bucket.nbytes]

    def shutdown(self) -> None:
        self._shared = None


class SharedMemoryTrainerEngine(BucketTrainerEngine):
    init_info_cls = SharedMemoryTrainerInitInfo

    def rendezvous(self, nbytes: int) -> None:
        handle, path = tempfile.mkstemp(prefix="dcpo_weights_", dir=_directory(nbytes))
        try:
            os.truncate(handle, nbytes)
            self.room = _map(path, nbytes)
            self.client.init_weight_transfer_engine({"path": path, "nbytes": nbytes})
        finally:
            # The mappings live on; without a name nothing is left behind, however the processes end.
            os.close(handle)
            os.unlink(path)

    def send_bucket(self, update_info: dict[str, Any], buffer: UInt8[Tensor, "bytes"]) -> Callable[[], object]:
        loaded = self.client.post_update(update_info)
        return lambda: self.client.wait(loaded)

    def shutdown(self) -> None:
        vars(self).pop("room", None)  # the sender alone has one


def _map(path: str, nbytes: int) -> UInt8[Tensor, "bytes"]:
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


def _directory(nbytes: int) -> Path:
    """/dev/shm where it has room (containers often give it 64 MiB), else the folder for temporary files."""
    if SHARED_MEMORY_DIR.is_dir() and shutil.disk_usage(SHARED_MEMORY_DIR).free > nbytes:
        return SHARED_MEMORY_DIR
    return Path(tempfile.gettempdir())
