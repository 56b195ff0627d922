"""What our own transports share: the trainer packs its weights into buckets, the worker loads them into the model."""

import contextlib
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils._pytree import tree_map
from vllm.distributed.weight_transfer.base import TrainerInitInfo as VLLMTrainerInitInfo
from vllm.distributed.weight_transfer.base import (
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload, layerwise

from dcpo_openrlhf.weight_sync.buckets import (
    MIB,
    Bucket,
    checksums,
    pack,
    place,
    plan_buckets,
    room_for,
    unpack,
    verify,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

    from dcpo_openrlhf.weight_sync.client import RayWeightSyncClient

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)
UpdateInfo = TypeVar("UpdateInfo", bound=WeightTransferUpdateInfo)


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: what lies in it and, unless checks are off, the checksum of each tensor."""

    index: int
    count: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    begin: int
    """Its first byte in the trainer's buffer."""
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


class ReloadingWorkerEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Engine side: buckets in, the live model's weights replaced layer by layer; which ones come says a subclass."""

    supports_draft_weight_update = False

    def __init__(
        self,
        config: "WeightTransferConfig",
        vllm_config: "VllmConfig",
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        if device.type == "cpu":
            leave_lookups_unpacked(model)
        self.uses = count_uses(model)
        self.received_checksums: dict[str, int] = {}

    def start_weight_update(self) -> None:
        self.received_checksums = {}
        initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            repack_experts_on_load(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The inherited method synchronises an accelerator, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def load(self, bucket: Bucket, buffer: UInt8[Tensor, "bytes"]) -> None:
        """Give the model the bucket's tensors; afterwards nothing of ours reads `buffer`."""
        with disable_mtp_completeness_check(), lookups_loaded_in_place():
            self.model.load_weights(unpack(bucket, buffer))  # type: ignore[operator]
        own_pending(self.model, buffer)

    def finish_weight_update(self) -> None:
        require_complete(self.model, self.uses)
        # It warns of "Failed to load weights" for layers that have none of their own: rotary tables, a tied lm_head.
        logger = logging.getLogger(layerwise.__name__)
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            finalize_layerwise_reload(self.model, self.model_config)
        finally:
            logger.setLevel(level)
        repack_shared_weights(self.model)


class BucketWorkerEngine(ReloadingWorkerEngine[InitInfo, BucketUpdateInfo]):
    """One bucket an update, all from one sender. A transport adds `receive_bucket`."""

    update_info_cls = BucketUpdateInfo

    @abstractmethod
    def receive_bucket(self, bucket: Bucket, begin: int) -> UInt8[Tensor, "bytes"]:
        """The bucket's bytes, which begin there on the sender; nothing writes to them before this update returns."""

    def receive_weights(self, update_info: BucketUpdateInfo) -> None:
        bucket = update_info.bucket
        buffer = self.receive_bucket(bucket, update_info.begin)
        if update_info.checksums is not None:
            received = checksums(bucket, buffer)
            verify(bucket, sent=update_info.checksums, received=received)
            self.received_checksums.update(zip(bucket.names, received, strict=True))
        self.load(bucket, buffer)


def own_pending(model: torch.nn.Module, buffer: UInt8[Tensor, "bytes"]) -> None:
    """Copy what layers that are not whole yet keep of `buffer`, since the next bucket may overwrite it.

    Layer-wise reload holds what it was given until a layer's last weight is there. Whole layers have copied it.
    """
    lent = buffer.untyped_storage().data_ptr()

    def owned(value: Any) -> Any:
        held = isinstance(value, Tensor) and not value.is_meta and value.untyped_storage().data_ptr() == lent
        return value.clone() if held else value

    for layer in model.modules():
        for _, call in layerwise.get_layerwise_info(layer).loaded_weights:
            call.arguments.update(tree_map(owned, dict(call.arguments)))


def count_uses(model: torch.nn.Module) -> Counter[int]:
    """id of a parameter -> number of modules that hold it; 2 for the weight of a tied lm_head."""
    return Counter(id(weight) for module in model.modules() for weight in module._parameters.values())


def require_complete(model: torch.nn.Module, uses: Counter[int]) -> None:
    """Raise ValueError, naming the first ones, where a sync left out a layer's weights or brought a part of them.

    vLLM itself keeps the old weights. To be called before layer-wise reload is finalised, which forgets its counts.
    """
    waiting = {}
    for name, layer in model.named_modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None and info.kernel_tensors[0]:
            waiting[name] = (layer, info, [id(weight) for weight in info.kernel_tensors[0].values()])
    untouched = Counter(key for _, info, keys in waiting.values() if not info.load_numel for key in keys)
    missing = []
    for name, (layer, info, keys) in waiting.items():
        # A tied lm_head is loaded through the embedding that shares its weight.
        absent = not info.load_numel and any(untouched[key] >= uses[key] for key in keys)
        # Embeddings and experts may be padded with rows that no checkpoint holds; linear layers are not.
        partial = info.load_numel and isinstance(layer, LinearBase)
        if absent or partial:
            missing.append(f"{name} ({info.load_numel} of {info.load_numel_total} elements)")
    if missing:
        raise ValueError(
            f"a weight sync must bring every weight; {len(missing)} layers are incomplete: {', '.join(missing[:5])}; "
            "compare the source's metadata() with the checkpoint that the engine was started from"
        )


def repack_experts_on_load(model: torch.nn.Module) -> None:
    """Let every mixture-of-experts layer pack its weights again when they are loaded.

    vLLM skips the packing where a kernel already exists, which on CPU leaves raw weights in the place of packed ones:
    log-probs wrong by several nats, silently. Without CUDA graphs nothing holds on to the old kernel.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # type: ignore[union-attr]


class LookupMethod(UnquantizedEmbeddingMethod):
    """vLLM's embedding without the copy of its weight that is packed for multiplication."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass


def leave_lookups_unpacked(model: torch.nn.Module) -> None:
    """Drop the packed copy of an embedding beside which the model has an output layer, tied or not: nothing reads it.

    vLLM's CPU build packs it at every load all the same, the largest weight of a small model.
    """
    if not any(isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear") for module in model.modules()):
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if type(module) is VocabParallelEmbedding and type(method) is UnquantizedEmbeddingMethod:
            module.quant_method = LookupMethod()
            module.__dict__.pop("cpu_linear", None)


@contextlib.contextmanager
def lookups_loaded_in_place() -> Iterator[None]:
    """Let layer-wise reload put an embedding together in the memory that serves it.

    In memory of its own, made for the moment, every page of the largest weight would be a fault, at each sync.
    """
    materialize = layerwise.materialize_layer  # pyright: ignore[reportPrivateImportUsage]

    def place(layer: torch.nn.Module, info: Any) -> None:
        if isinstance(getattr(layer, "quant_method", None), LookupMethod) and info.kernel_tensors is not None:
            for name, served in info.kernel_tensors[0].items():
                if served.shape == getattr(layer, name).shape:
                    setattr(layer, name, served)
        materialize(layer, info)  # what is not there yet

    layerwise.materialize_layer = place  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        layerwise.materialize_layer = materialize  # pyright: ignore[reportPrivateImportUsage]


def repack_shared_weights(model: torch.nn.Module) -> None:
    """Rebuild the packed copy of every weight that several modules share, such as a tied lm_head.

    On CPU vLLM packs weights into oneDNN handlers. Layer-wise reload repacks the module it loaded and not its twin: the
    logits would still come from the old weights (log-probs 0.1 to 0.6 wrong), silently.
    """
    uses = count_uses(model)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() and uses[id(weight)] > 1:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr,operator]


class BucketTrainerEngine(TrainerWeightTransferEngine[BucketTrainerInitInfo]):
    """Trainer side: rank 0 packs and sends, the others walk the source in lockstep. A transport adds `send_bucket`.

    While the engines load a bucket, the next one is packed beside it.
    """

    client: "RayWeightSyncClient"
    source: WeightSource
    room: UInt8[Tensor, "bytes"]
    """Where buckets are packed, on the sender alone; `rendezvous` makes it, of `room_for` bytes."""

    def __init__(
        self, init_info: BucketTrainerInitInfo, *, client: "RayWeightSyncClient", source: WeightSource | None
    ) -> None:
        if source is None:
            raise ValueError(f"transport {init_info.backend} sends all weights: it needs a WeightSource")
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self.init_info = init_info
        self.sent_checksums: dict[str, int] = {}
        self._loading: tuple[str, range, Callable[[], object]] | None = None
        """What the engines load now: its name, its bytes in `room`, and how to wait for them."""

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
            engine.rendezvous(room_for(buckets, init_info.bucket_bytes))
        return engine

    @abstractmethod
    def rendezvous(self, nbytes: int) -> None:
        """Open the way to the engines' workers, on the sender alone, and make `room` of so many bytes."""

    @abstractmethod
    def send_bucket(self, update_info: dict[str, Any], buffer: UInt8[Tensor, "bytes"]) -> Callable[[], object]:
        """Begin to bring the bucket to every worker; what is returned waits until all have loaded it."""

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
        self._settle()
        self.require_end(pairs)
        self.client.finish_weight_update()

    @staticmethod
    def require_end(pairs: Iterator[tuple[str, Tensor]]) -> None:
        extra = next(pairs, None)
        if extra is not None:
            raise ValueError(f"the weight source yields {extra[0]} after the last tensor its metadata declares")

    def _send(self, bucket: Bucket, pairs: Iterator[tuple[str, Tensor]]) -> None:
        begin = self._place(bucket)
        self.client.stage = f"packing {bucket}"
        buffer = self.room[begin : begin + bucket.nbytes]
        pack(bucket, pairs, buffer)
        sums = checksums(bucket, buffer) if self.init_info.verify else None
        if sums is not None:
            self.sent_checksums.update(zip(bucket.names, sums, strict=True))
        self._settle()
        self.client.stage = f"sending {bucket}"
        update_info = asdict(BucketUpdateInfo(**asdict(bucket), begin=begin, checksums=sums))
        busy = range(begin, begin + bucket.nbytes)
        self._loading = (str(bucket), busy, self.send_bucket(update_info, buffer))

    def _place(self, bucket: Bucket) -> int:
        """Where in `room` the bucket may be packed now; waits for the engines where they still read all of it."""
        room = self.room.numel()
        if bucket.nbytes > room:
            raise RuntimeError(f"{bucket} has {bucket.nbytes} bytes, the buffer {room}; connect again")
        begin = place(bucket.nbytes, room=room, busy=self._loading[1] if self._loading else range(0))
        if begin is None:
            self._settle()
            begin = 0
        return begin

    def _settle(self) -> None:
        """Wait until the engines have loaded what was sent last."""
        if self._loading is not None:
            name, _, wait = self._loading
            self.client.stage = f"sending {name}"
            wait()
            self._loading = None
