"""nccl and ipc as far as a machine without a GPU shows: what vLLM is asked for, the bits of every tensor summed."""

from functools import reduce
from operator import xor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from dcpo_openrlhf.weight_sync import connect, connection, device, register
from dcpo_openrlhf.weight_sync.buckets import MIB
from tests.bounds import HANG_S

TENSORS = {
    "odd": torch.randn(7, 3).bfloat16(),
    "float": torch.randn(130),
    "scalar": torch.tensor(-2.5, dtype=torch.float64),
    "bytes": torch.arange(13, dtype=torch.uint8),
    "transposed": torch.randn(6, 5).half().T,
    "empty": torch.zeros(0, 3),
}


class Source(WeightSource):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Any:
        yield from self.tensors.items()


def slow_checksum(tensor: Tensor) -> int:
    """As `bit_checksum`, in Python's numbers."""
    words = tensor.contiguous().view(-1).view(device.WORDS[tensor.element_size()]).tolist()
    total = sum(words) + device.XOR_WEIGHT * reduce(xor, words, 0)
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("chunk", [2, 5, 2**24])
@pytest.mark.parametrize("name", TENSORS)
def test_checksum_is_that_of_plain_numbers(monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    monkeypatch.setattr(device, "CHUNK", chunk)
    tensor = TENSORS[name]
    assert int(device.bit_checksum(tensor)) == slow_checksum(tensor)
    lying_anywhere = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:] if tensor.numel() else tensor
    assert int(device.bit_checksum(lying_anywhere)) == slow_checksum(tensor)


def test_checksum_sees_every_bit_and_what_a_sum_does_not() -> None:
    words = torch.tensor([5, 1, 200, 7], dtype=torch.int16)
    right = int(device.bit_checksum(words.view(torch.bfloat16)))
    for bit in range(15):
        wrong = words.clone()
        wrong[2] ^= 1 << bit
        assert int(device.bit_checksum(wrong.view(torch.bfloat16))) != right
    shifted = words + torch.tensor([1, -1, 0, 0], dtype=torch.int16)
    assert shifted.sum() == words.sum()
    assert int(device.bit_checksum(shifted.view(torch.bfloat16))) != right


def connected(monkeypatch: pytest.MonkeyPatch, transport: str, source: WeightSource, **options: Any) -> Any:
    """(what vLLM's trainer side is made of, the sync)."""
    made: dict[str, Any] = {}

    def trainer_init(info: Any, *, client: Any, source: Any) -> Any:
        made.update(info=info, client=client, source=source)
        return SimpleNamespace(send_weights=lambda: list(source), shutdown=lambda: None)

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    settings = {"rank": 0, "deadline_s": HANG_S, "host": "localhost", "port": 1, "engines": []} | options
    sync = connect(transport=transport, source=source, **settings)
    return SimpleNamespace(**made), sync


def test_ipc_has_room_for_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = torch.empty(152064, 3584, dtype=torch.bfloat16, device="meta")  # Qwen2.5-7B's: more than a GiB
    made, _ = connected(monkeypatch, "ipc", Source({"embedding": embedding, "norm": torch.empty(3584)}))
    assert made.info.packed_buffer_size_bytes == 152064 * 3584 * 2 > 2**30
    assert made.info.packed
    made, _ = connected(monkeypatch, "ipc", Source({"norm": torch.empty(3584)}))
    assert made.info.packed_buffer_size_bytes == 256 * MIB


def test_nccl_sends_in_small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = connected(monkeypatch, "nccl", Source(TENSORS), rank=3)
    assert (made.info.packed, made.info.packed_buffer_size_bytes, made.info.rank) == (True, 256 * MIB, 3)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_the_sender_sums_what_it_yields(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    made, sync = connected(monkeypatch, transport, Source(TENSORS))
    assert made.client.init_info == {"verify": True}
    sync.send_weights()
    assert sync.checksums == {name: slow_checksum(tensor) for name, tensor in TENSORS.items()}
    for options in ({"verify": False}, {"rank": 1}):
        made, sync = connected(monkeypatch, transport, Source(TENSORS), **options)
        assert made.client.init_info == {"verify": options.get("verify", True)}
        assert made.client.sent_checksums is None
        sync.send_weights()
        assert sync.checksums == {}


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_waits_for_its_device_before_it_sends(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    events: list[str] = []
    _, sync = connected(monkeypatch, "nccl", Source(TENSORS), rank=rank)
    monkeypatch.setattr(connection, "wait_for_device", lambda: events.append("device"))
    monkeypatch.setattr(sync.engine, "send_weights", lambda: events.append("sent"))
    sync.send_weights()
    assert events == ["device", "sent"]


class Engine:
    """What vLLM's workers do with two messages of an update."""

    def __init__(self, model: Any) -> None:
        self.model, self.handshake = model, None

    def init_transfer_engine(self, init_info: Any) -> None:
        self.handshake = init_info

    def start_weight_update(self) -> None:
        self.model.loaded.clear()

    def receive_weights(self, update_info: list[str]) -> None:
        self.model.load_weights((name, TENSORS[name]) for name in update_info)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.loaded.update(weights)


@pytest.mark.parametrize("verify", [True, False])
def test_a_worker_sums_what_it_loads(verify: bool) -> None:
    class Checked(device._Checked, Engine):
        pass

    engine = Checked(Model())
    assert engine.received_checksums == {}
    engine.init_transfer_engine(SimpleNamespace(verify=verify))
    assert engine.handshake is not None
    for _ in range(2):
        engine.start_weight_update()
        assert engine.received_checksums == {}
        for message in (["odd", "bytes"], ["scalar", "empty", "float", "transposed"]):
            engine.receive_weights(message)
        assert engine.model.loaded.keys() == TENSORS.keys()
        wanted = {name: slow_checksum(tensor) for name, tensor in TENSORS.items()}
        assert engine.received_checksums == (wanted if verify else {})
        assert "load_weights" not in vars(engine.model)


def test_vllm_makes_the_checked_engines() -> None:
    for _ in range(2):
        register()
        made = {name: WeightTransferEngineFactory._registry[name]() for name in ("nccl", "ipc")}
        assert made == {"nccl": device.NCCLWorkerEngine, "ipc": device.IPCWorkerEngine}
    nccl = {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2}
    for init_info, more in ((device.CheckedNCCLInitInfo, nccl), (device.CheckedIPCInitInfo, {})):
        assert init_info(**more, verify=False).verify is False  # type: ignore[arg-type]
    assert device.NCCLWorkerEngine.init_info_cls is device.CheckedNCCLInitInfo
    assert device.IPCWorkerEngine.init_info_cls is device.CheckedIPCInitInfo
