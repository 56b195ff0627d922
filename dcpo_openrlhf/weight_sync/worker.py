"""What vLLM mixes into its worker class (worker_extension_cls): importing it registers the backends in the worker process."""

from typing import TYPE_CHECKING, Any

from vllm.config import set_current_vllm_config

from dcpo_openrlhf.weight_sync import register

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

register()


class WorkerExtension:
    """Calls for `collective_rpc` besides vLLM's own weight-transfer calls."""

    if TYPE_CHECKING:
        vllm_config: "VllmConfig"
        weight_transfer_engine: "WeightTransferEngine[Any, Any]"
        _weight_update_active: bool

    def weight_checksums(self) -> dict[str, int]:
        """name -> checksum of what the last sync brought to this worker; empty before the first and for nccl and ipc."""
        return dict(getattr(self.weight_transfer_engine, "received_checksums", {}))

    def abort_weight_update(self) -> None:
        """Close an update that never finished, so that another can start. The weights are a mixture until that one ends."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        engine = self.weight_transfer_engine
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(engine.model, engine.model_config)
        engine.reset_weight_update_target()
        self._weight_update_active = False
