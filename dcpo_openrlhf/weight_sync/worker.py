"""What vLLM mixes into its worker class (worker_extension_cls).

Importing it registers the backends in the worker process and ties vLLM's processes to the life of the rollout actor.
"""

import os
import select
import signal
import threading
from typing import TYPE_CHECKING, Any

from vllm.config import set_current_vllm_config

from dcpo_openrlhf.weight_sync import ACTOR_PID, register

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.weight_transfer.base import WeightTransferEngine


def end_with_actor() -> None:
    """Kill this process and vLLM's engine process above it once the rollout actor is gone.

    vLLM's engine process does not watch its parent: an actor that the out-of-memory killer takes would leave engine and
    worker behind with all their memory. Process handles, unlike ids, are never given to another process.
    """
    actor, parent = int(os.environ.get(ACTOR_PID, "0")), os.getppid()
    if actor not in (parent, _parent_of(parent)):  # a worker that Ray started, which Ray ends
        return
    handles = [os.pidfd_open(pid) for pid in (parent, os.getpid()) if pid != actor]
    actor_handle = os.pidfd_open(actor)

    def watch() -> None:
        select.select([actor_handle], [], [])
        for handle in handles:
            signal.pidfd_send_signal(handle, signal.SIGKILL)

    threading.Thread(target=watch, name="end_with_actor", daemon=True).start()


def _parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


register()
end_with_actor()


class WorkerExtension:
    """Calls for `collective_rpc` besides vLLM's own weight-transfer calls."""

    if TYPE_CHECKING:
        vllm_config: "VllmConfig"
        weight_transfer_engine: "WeightTransferEngine[Any, Any]"
        _weight_update_active: bool

    def weight_checksums(self) -> dict[str, int]:
        """name -> checksum of what the last sync brought to this worker; empty before it and with checks off."""
        return dict(getattr(self.weight_transfer_engine, "received_checksums", {}))

    def abort_weight_update(self) -> None:
        """Close an update that never finished, so that another can start; until that ends the weights are a mixture."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        engine = self.weight_transfer_engine
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(engine.model, engine.model_config)
        engine.reset_weight_update_target()
        self._weight_update_active = False
