"""What the CPU transports share: the worker loads buckets into the live model, the trainer cuts its weights into buckets."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo as VLLMTrainerInitInfo
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from dcpo_openrlhf.weight_sync.buckets import MIB, Bucket, checksums, pack, plan_buckets, unpack, verify

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

    from dcpo_openrlhf.weight_sync.client import RayWeightSyncClient

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: what lies in it and, unless checks are off, the checksum of each tensor."""

    index: int
    count: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    checksums: list[int] | None = None

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.index, self.count, self.names, self.dtypes, self.shapes)


@dataclass
class BucketTrainerInitInfo(VLLMTrainerInitInfo):
    """Trainer-side settings that every bucket transport has. `backend` is overridden by each of them."""

    backend = "bucket"
    bucket_bytes: int = field(default=64 * MIB, kw_only=True)
    verify: bool = field(default=True, kw_only=True)
    deadline_s: float = field(kw_only=True)


class BucketWorkerEngine(WeightTransferEngine[InitInfo, BucketUpdateInfo]):
    """Engine side: buckets in, the live model's weights replaced layer by layer. A transport adds `receive_bucket`."""

    update_info_cls = BucketUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: "WeightTransferConfig",
        vllm_config: "VllmConfig",
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.expected = {name for name, _ in model.named_parameters()}
        self.loaded: set[str] = set()
        self.received_checksums: dict[str, int] = {}

    @abstractmethod
    def receive_bucket(self, bucket: Bucket) -> UInt8[Tensor, "bytes"]:
        """The bucket's bytes in a buffer that nothing writes to again: layer-wise reload keeps views of it."""

    def start_weight_update(self) -> None:
        self.loaded, self.received_checksums = set(), {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The inherited method synchronises an accelerator, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdateInfo) -> None:
        bucket = update_info.bucket
        buffer = self.receive_bucket(bucket)
        if update_info.checksums is not None:
            received = checksums(bucket, buffer)
            verify(bucket, sent=update_info.checksums, received=received)
            self.received_checksums.update(zip(bucket.names, received, strict=True))
        with disable_mtp_completeness_check():
            # Every vLLM model returns the names it loaded; the annotation of torch.nn.Module does not say so.
            self.loaded |= self.model.load_weights(unpack(bucket, buffer))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        require_complete(self.model, expected=self.expected, loaded=self.loaded)
        finalize_layerwise_reload(self.model, self.model_config)
        repack_shared_weights(self.model)


def require_complete(model: torch.nn.Module, *, expected: set[str], loaded: set[str]) -> None:
    """Raise ValueError, naming the first ones, where a sync left a parameter of the model out or brought only a part of it.

    vLLM itself keeps the old weight without a word. Call it before layer-wise reload is finalised, which forgets the counts.
    """
    missing = sorted(expected - loaded)
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        # An embedding is padded to whole blocks of rows, which no checkpoint holds.
        if not info.can_load() or isinstance(layer, VocabParallelEmbedding):
            continue
        if 0 < info.load_numel < (info.load_numel_total or 0):
            missing.append(f"{name} ({info.load_numel} of {info.load_numel_total} elements)")
    if missing:
        raise ValueError(
            f"a weight sync must bring every weight; {len(missing)} missing or incomplete: {', '.join(missing[:5])}; "
            "compare the source's metadata() with the checkpoint the engine was started from"
        )


def repack_shared_weights(model: torch.nn.Module) -> None:
    """Rebuild the packed copy of every weight that several modules share, such as a tied lm_head.

    On CPU vLLM packs weights into oneDNN handlers. Layer-wise reload repacks the module it loaded and not its twin, whose
    log-probs would then come from the old weights (0.1 to 0.6 wrong), silently.
    """
    packed = [
        (module, weight)
        for module in model.modules()
        if hasattr(module, "cpu_linear") and isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter)
    ]
    uses = Counter(id(weight) for _, weight in packed if weight.numel())
    for module, weight in packed:
        if uses[id(weight)] > 1:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr,operator]


class BucketTrainerEngine(TrainerWeightTransferEngine[BucketTrainerInitInfo]):
    """Trainer side: rank 0 packs and sends, the others walk the source in lockstep. A transport adds `send_bucket`."""

    client: "RayWeightSyncClient"
    source: WeightSource

    def __init__(
        self, init_info: BucketTrainerInitInfo, *, client: "RayWeightSyncClient", source: WeightSource | None
    ) -> None:
        if source is None:
            raise ValueError(f"transport {init_info.backend} sends all weights: it needs a WeightSource")
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self.init_info = init_info
        self.sent_checksums: dict[str, int] = {}

    @classmethod
    def trainer_init(
        cls,
        init_info: BucketTrainerInitInfo,
        *,
        client: "RayWeightSyncClient",
        source: WeightSource | None = None,
    ) -> "BucketTrainerEngine":
        engine = cls(init_info, client=client, source=source)
        # Metadata may be a collective of the trainer ranks, so every rank asks for it.
        buckets = plan_buckets(engine.source.metadata(), init_info.bucket_bytes)
        if engine.is_sender:
            engine.rendezvous(buckets)
        return engine

    @abstractmethod
    def rendezvous(self, buckets: list[Bucket]) -> None:
        """Open the way to the engines' workers; on the sender alone. `buckets` are those of the weights as they are now."""

    @abstractmethod
    def buffer(self, bucket: Bucket) -> UInt8[Tensor, "bytes"]:
        """Where to pack the bucket."""

    @abstractmethod
    def send_bucket(self, update_info: dict[str, Any], buffer: UInt8[Tensor, "bytes"]) -> None:
        """Bring the bucket to every worker and return when all have loaded it."""

    def send_weights(self) -> None:
        buckets = plan_buckets(self.source.metadata(), self.init_info.bucket_bytes)
        pairs = iter(self.source)
        if not self.is_sender:
            for _ in pairs:  # each tensor is gathered by a collective of the trainer ranks
                pass
            return
        self.client.start_weight_update()
        for bucket in buckets:
            self._send(bucket, pairs)
        extra = next(pairs, None)
        if extra is not None:
            raise ValueError(f"the weight source yields {extra[0]} after the last tensor its metadata declares")
        self.client.finish_weight_update()

    def _send(self, bucket: Bucket, pairs: Iterator[tuple[str, Tensor]]) -> None:
        self.client.stage = f"packing {bucket}"
        buffer = self.buffer(bucket)
        pack(bucket, pairs, buffer)
        sums = checksums(bucket, buffer) if self.init_info.verify else None
        if sums is not None:
            self.sent_checksums.update(zip(bucket.names, sums, strict=True))
        self.client.stage = f"sending {bucket}"
        self.send_bucket(asdict(BucketUpdateInfo(**asdict(bucket), checksums=sums)), buffer)
