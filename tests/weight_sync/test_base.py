"""The next bucket is packed while engines load the last one, and neither touches what the other reads."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import layerwise

from dcpo_openrlhf.weight_sync.base import (
    BucketTrainerEngine,
    BucketTrainerInitInfo,
    BucketUpdateInfo,
    leave_lookups_unpacked,
    lookups_loaded_in_place,
    own_pending,
)
from dcpo_openrlhf.weight_sync.buckets import place, unpack

BUCKET_BYTES = 1024


class LateReader(BucketTrainerEngine):
    """A transport whose engine reads a bucket at the last moment, when the trainer waits for it."""

    def rendezvous(self, nbytes: int) -> None:
        self.room = torch.zeros(nbytes, dtype=torch.uint8)
        self.received: dict[str, torch.Tensor] = {}
        self.events: list[str] = []

    def send_bucket(self, update_info: dict[str, Any], buffer: torch.Tensor) -> Any:
        info = BucketUpdateInfo(**update_info)
        self.events.append(f"sent {info.index}")

        def wait() -> None:
            whole = self.room[info.begin : info.begin + info.bucket.nbytes]
            self.received.update((name, tensor.clone()) for name, tensor in unpack(info.bucket, whole))
            self.events.append(f"loaded {info.index}")

        return wait


class Source:
    def __init__(self, sizes: list[int]) -> None:
        self.tensors = {f"w{i}": torch.randn(size) for i, size in enumerate(sizes)}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Any:
        return iter(self.tensors.items())


def connected(source: Any) -> LateReader:
    client: Any = SimpleNamespace(start_weight_update=lambda: None, finish_weight_update=lambda: None)
    info = BucketTrainerInitInfo(rank=0, bucket_bytes=BUCKET_BYTES, deadline_s=1.0)
    return LateReader.trainer_init(info, client=client, source=source)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "sizes", [[200] * 5, [30, 250, 60, 240, 16], [900, 20, 200, 200], [200, 900, 200], [100], [900, 950, 940]]
)
def test_late_engines_read_what_was_packed(sizes: list[int]) -> None:
    source = Source(sizes)
    engine = connected(source)
    for _ in range(2):
        engine.send_weights()
        assert list(engine.received) == list(source.tensors)
        assert all(torch.equal(engine.received[name], tensor) for name, tensor in source.tensors.items())
        source.tensors = {name: tensor + 1 for name, tensor in source.tensors.items()}
    assert engine.room.numel() <= max(2 * BUCKET_BYTES, 64 * -(-max(sizes) // 16))


def test_a_bucket_is_packed_while_the_last_one_is_loaded_and_then_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcpo_openrlhf.weight_sync import base

    engine = connected(Source([200] * 3))
    pack = base.pack
    monkeypatch.setattr(base, "pack", lambda b, *rest: (engine.events.append(f"packed {b.index}"), pack(b, *rest)))
    engine.send_weights()
    assert engine.events == [
        *("packed 0", "sent 0", "packed 1", "loaded 0", "sent 1", "packed 2", "loaded 1", "sent 2", "loaded 2")
    ]


def test_a_source_that_has_grown_is_refused() -> None:
    source = Source([200])
    engine = connected(source)
    source.tensors = {"w0": torch.randn(2000)}
    with pytest.raises(RuntimeError, match=r"has 8000 bytes, the buffer \d+; connect again"):
        engine.send_weights()


@pytest.mark.parametrize(
    ("nbytes", "busy", "begin"),
    [
        (64, range(0), 0),
        (64, range(0, 64), 192),
        (192, range(0, 64), 64),
        (64, range(192, 256), 0),
        (256, range(64), None),
        (192, range(192, 256), 0),
        (128, range(64, 192), None),
    ],
)
def test_a_bucket_keeps_off_bytes_in_use(nbytes: int, busy: range, begin: int | None) -> None:
    assert place(nbytes, room=256, busy=busy) == begin


def test_a_layer_that_waits_for_more_keeps_its_own_copy() -> None:
    buffer, other = torch.arange(64, dtype=torch.uint8), torch.ones(4)
    weight = buffer[:32].view(torch.float32)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    call = inspect.signature(lambda param, *loaded, **more: None).bind(torch.empty(8, device="meta"), weight, x=other)
    layerwise.get_layerwise_info(model[0]).loaded_weights.append(("weight", call))
    before = weight.clone()
    own_pending(model, buffer)
    buffer.zero_()
    (kept,) = call.arguments["loaded"]
    assert torch.equal(kept.view(torch.int32), before.view(torch.int32))
    assert call.arguments["more"]["x"] is other


def made(cls: type[torch.nn.Module]) -> Any:
    """An embedding as vLLM's CPU build leaves it after it has packed the weight."""
    module: Any = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    module.quant_method, module.cpu_linear = UnquantizedEmbeddingMethod(), lambda *_: None
    return module


def test_an_embedding_beside_an_output_layer_is_not_packed() -> None:
    embedding, head = made(VocabParallelEmbedding), made(ParallelLMHead)
    leave_lookups_unpacked(torch.nn.ModuleList([embedding, head]))
    assert not hasattr(embedding, "cpu_linear")
    embedding.quant_method.process_weights_after_loading(embedding)
    assert not hasattr(embedding, "cpu_linear")
    assert hasattr(head, "cpu_linear")
    assert type(head.quant_method) is UnquantizedEmbeddingMethod


def test_an_embedding_that_is_the_output_layer_stays_packed() -> None:
    embedding = made(VocabParallelEmbedding)
    leave_lookups_unpacked(torch.nn.ModuleList([embedding]))
    assert hasattr(embedding, "cpu_linear")


def test_a_lookup_is_loaded_into_the_memory_that_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, head = made(VocabParallelEmbedding), made(ParallelLMHead)
    model, new = torch.nn.ModuleList([embedding, head]), torch.randn(8, 4)
    for module in model:
        module.weight = torch.nn.Parameter(torch.zeros(8, 4), requires_grad=False)
    leave_lookups_unpacked(model)
    head.quant_method = None
    served = embedding.weight
    layerwise.record_metadata_for_reloading(model)
    made_anew: list[Any] = []
    materialize = layerwise.materialize_layer  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(
        layerwise,
        "materialize_layer",
        lambda layer, info: (made_anew.append(layer) if layer.weight.is_meta else None, materialize(layer, info)),
    )
    layerwise.initialize_layerwise_reload(model)
    with lookups_loaded_in_place():
        for weight in (embedding.weight, head.weight):
            weight.weight_loader(weight, new)
    assert made_anew == [head]
    assert embedding.weight is served
    assert torch.equal(served, new) and torch.equal(head.weight, new)
