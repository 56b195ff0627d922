"""Several senders over gloo, on the policy's meshes: what arrives, from whom, side by side, and what a failure does.

Two workers live in threads of rank 0's process, in front of a model that keeps what it is given.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import distributed_c10d
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from dcpo_openrlhf.policy.megatron.senders import sent_shapes, sent_tensors
from dcpo_openrlhf.weight_sync import WeightSyncError, connect, connection, register, senders
from dcpo_openrlhf.weight_sync.base import ReloadingWorkerEngine
from dcpo_openrlhf.weight_sync.channels import NCCLChannel
from dcpo_openrlhf.weight_sync.client import RayWeightSyncClient
from dcpo_openrlhf.weight_sync.source import SharedWeights
from tests.bounds import ENDS_S, HANG_S
from tests.distributed import run_distributed
from tests.policy.megatron.common import make_policy
from tests.policy.megatron.test_model import MESHES
from tests.tiny import make_tiny_model

WORKERS = 2
BUCKET_BYTES = 120_000  # of all senders together: several rounds, some of which end inside a layer
FACTOR = 0.5
WAYS = {
    # architecture, tied, mesh, senders of a stage
    "pp2": ("llama", True, "pp2", 1),
    "interleaved": ("qwen2", False, "interleaved", 1),
    "ep2": ("qwen3_moe", True, "ep2", 2),
    "tp2pp2": ("llama", False, "tp2pp2", 1),
    "pp2ep2": ("qwen3_moe", False, "pp2ep2", 2),
    "tp2pp2ep2-interleaved": ("glm4_moe", False, "tp2pp2ep2-interleaved", 2),
}


class Recorder(torch.nn.Module):
    """A model that keeps what it is given, each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.refused: str | None = None

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == self.refused:
                raise OSError(f"no room for {name}")
            assert name not in self.tensors
            self.tensors[name] = tensor.clone()


class Worker(senders.GlooSendersWorkerEngine):
    """A worker of vLLM's without vLLM."""

    model: Recorder

    def __init__(self) -> None:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        vllm: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        super().__init__(None, vllm, torch.device("cpu"), Recorder())  # type: ignore[arg-type]
        self.finished = 0
        self.ready, self.silent = True, False

    def start_weight_update(self) -> None:
        if not self.ready:
            raise OSError("not now")
        self.model.tensors.clear()
        super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.silent:  # as a worker that dies: nobody in the meeting hears of it
            ReloadingWorkerEngine.update_weights(self, update_info)
        else:
            super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.finished += 1


class LocalClient(RayWeightSyncClient):
    """Calls to workers of this process, one thread each, in the place of Ray's."""

    def _each(self, call: Callable[[int, Worker], None]) -> list[Future[None]]:
        if not hasattr(self, "_threads"):
            self._threads = [ThreadPoolExecutor(1) for _ in self.engines]
        return [t.submit(call, i, e) for i, (t, e) in enumerate(zip(self._threads, self.engines, strict=True))]

    def post_init(self, info: dict[str, Any]) -> Any:
        def init(i: int, worker: Worker) -> None:
            worker.init_transfer_engine(worker.parse_init_info(info | {"rank_offset": info["rank_offset"] + i}))

        return self._each(init)

    def post_update(self, update_info: Any) -> Any:
        return self._each(lambda _, worker: worker.update_weights(update_info))

    def start_weight_update(self) -> None:
        self.wait(self._each(lambda _, worker: worker.start_weight_update()))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.wait(self._each(lambda _, worker: worker.finish_weight_update()))

    def look(self, calls: Any) -> None:
        self.wait(calls, finished=True)

    def wait(self, calls: Any, *, finished: bool = False) -> list[Any]:
        for i, call in enumerate(calls):
            if finished and not call.done():
                continue
            try:
                call.result(HANG_S)
            except Exception as error:
                raise WeightSyncError(f"{self} failed while {self.stage}: engine {i}: {error}") from error
        return []


class Trainer:
    """A rank of the policy, on rank 0 with the workers, and its end of the sync."""

    def __init__(self, rank: int, world_size: int, models: dict[Any, Path], way: str) -> None:
        architecture, tie, mesh, self.per_stage = WAYS[way]
        self.rank = rank
        self.policy = make_policy(models[architecture, tie], rank=rank, world_size=world_size, **MESHES[mesh][1])
        self.workers = [Worker() if rank == 0 else None for _ in range(WORKERS)]
        self.fails_at: int | None = None
        """Number of the tensor of which the source yields a part alone, once."""
        connection.RayWeightSyncClient = LocalClient  # type: ignore[assignment,misc]
        self.sync: Any = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, (name, tensor) in enumerate(sent_tensors(self.policy, self.per_stage)):
            if i == self.fails_at:
                self.fails_at, tensor = None, tensor[:1]
            yield name, tensor

    def connect(self, **options: Any) -> None:
        source = SharedWeights(shapes=lambda: sent_shapes(self.policy, self.per_stage), tensors=self.tensors)
        settings: dict[str, Any] = {"deadline_s": HANG_S, "bucket_bytes": BUCKET_BYTES, "host": "127.0.0.1"}
        self.sync = connect(
            transport="gloo_senders",
            rank=self.rank,
            engines=self.workers,  # type: ignore[arg-type]
            source=source,
            instead_of=self.sync,
            **(settings | options),
        )

    def scale(self) -> None:
        with torch.no_grad():
            for _, weight in self.policy.entries():
                weight.mul_(FACTOR)

    def received(self) -> list[dict[str, Tensor]]:
        """What each worker has."""
        return [dict(worker.model.tensors) for worker in self.workers if worker is not None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        (a, tie): make_tiny_model(folder / f"{a}-{tie}", architecture=a, layers=4, hidden=64, kv_heads=4, tie=tie)
        for a, tie, _, _ in WAYS.values()
    }


def differences(received: dict[str, Tensor], folder: Path, factor: float) -> list[str]:
    wanted = {name: tensor * factor for name, tensor in load_file(folder / "model.safetensors").items()}
    return [n for n in wanted.keys() | received.keys() if n not in wanted or not torch.equal(wanted[n], received[n])]


def _syncs(rank: int, world_size: int, models: dict[Any, Path], ways: list[str]) -> dict[str, Any]:
    """way -> what the workers have after each of two syncs, bytes broadcast from here, checksums here and there."""
    found = {}
    for way in ways:
        trainer, sent = Trainer(rank, world_size, models, way), Counter[str]()
        trainer.connect()
        engine = trainer.sync.engine
        if engine.is_sender:
            broadcast = engine._channel.broadcast

            def counted(buffer: Tensor, broadcast: Any = broadcast, sent: Counter[str] = sent) -> Any:
                sent["bytes"] += buffer.numel()
                return broadcast(buffer)

            engine._channel.broadcast = counted
        received = []
        for _ in range(2):
            trainer.sync.send_weights()
            received.append(trainer.received())
            trainer.scale()
        arrived = [worker.received_checksums for worker in trainer.workers if worker is not None]
        found[way] = received, sent["bytes"] // 2, trainer.sync.checksums, arrived
        torch.distributed.barrier()  # as the run's driver waits for every rank
        trainer.sync.shutdown()
    return found


@pytest.fixture(scope="module")
def syncs(models: dict[tuple[str, bool], Path]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for size in (2, 4):
        ways = [way for way, (_, _, mesh, _) in WAYS.items() if MESHES[mesh][0] == size]
        for rank in run_distributed(_syncs, size, models, ways):
            for way, result in rank.items():
                found.setdefault(way, []).append(result)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_every_worker_has_every_tensor_and_later_the_new_ones(
    syncs: dict[str, list[Any]], models: dict[Any, Path], way: str
) -> None:
    architecture, tie, _, _ = WAYS[way]
    (first, second), _, _, _ = syncs[way][0]
    for received, factor in ((first, 1.0), (second, FACTOR)):
        assert len(received) == WORKERS
        assert [differences(worker, models[architecture, tie], factor) for worker in received] == [[]] * WORKERS


@pytest.mark.parametrize("way", WAYS)
def test_each_sender_broadcasts_its_share_of_the_bytes_and_knows_its_checksums(
    syncs: dict[str, list[Any]], models: dict[Any, Path], way: str
) -> None:
    architecture, tie, mesh, per_stage = WAYS[way]
    whole = sum(t.nbytes for t in load_file(models[architecture, tie] / "model.safetensors").values())
    sent = [nbytes for _, nbytes, _, _ in syncs[way] if nbytes]
    assert len(sent) == MESHES[mesh][1].get("pipeline", 1) * per_stage
    assert whole <= sum(sent) < 1.1 * whole, "nothing is sent twice; gaps and seals are small"
    assert max(sent) < 1.4 * whole / len(sent)
    sums = [checksums for _, _, checksums, _ in syncs[way]]
    together = {name: checksum for rank in sums for name, checksum in rank.items()}
    assert sum(map(len, sums)) == len(together)
    assert syncs[way][0][3] == [together] * WORKERS


GATES = {(0, 0): (1, 0), (1, 1): (0, 1)}
"""(rank, its bucket) that is sent when another one has arrived."""


def _gated(rank: int, world_size: int, models: dict[Any, Path]) -> list[dict[str, Tensor]]:
    trainer = Trainer(rank, world_size, models, "pp2")
    trainer.connect()
    store, channel = distributed_c10d._get_default_store(), trainer.sync.engine._channel
    begin, count = channel.broadcast, itertools.count()

    def broadcast(buffer: Tensor) -> Any:
        number = (rank, next(count))
        if number in GATES:
            store.wait([f"arrived {GATES[number]}"], timedelta(seconds=ENDS_S))
        there = begin(buffer)
        return lambda: there() and (store.set(f"arrived {number}", "") or True)

    channel.broadcast = broadcast
    trainer.sync.send_weights()
    assert next(count) > 2
    return trainer.received()


def test_buckets_of_different_stages_are_in_flight_together(models: dict[Any, Path]) -> None:
    """Each sender in turn holds a bucket back until one of the other has arrived, which the workers load later."""
    received, _ = run_distributed(_gated, 2, models)
    assert [differences(worker, models["llama", True], 1.0) for worker in received] == [[]] * WORKERS


FAULTS = ("source", "engine", "death", "begin", "bytes")
SAID = {
    "source": r"broken off by trainer rank {rank}: the weight source yields",
    "engine": r"broken off by engines' worker 1 failed: no room for model.layers.3.mlp.down_proj.weight",
    "death": r"broken off by trainer rank 0: .* engine 1: no room for model.layers.3.mlp.down_proj.weight",
    "begin": r"broken off by trainer rank 0: .* engine 0: not now",
    "bytes": r"broken off by engines' worker [01] failed: bucket 2 of \d+ .* arrived with checksum",
}
"""On every sender. {rank}: the last stage's."""


def _faults(rank: int, world_size: int, models: dict[Any, Path], way: str) -> list[Any]:
    """For every fault the error here, and what the workers have finished and hold after the next sync."""
    trainer, found = Trainer(rank, world_size, models, way), []
    last = max(sender for _, _, _, sender, _ in sent_shapes(trainer.policy, trainer.per_stage))
    for fault in FAULTS:
        trainer.connect()
        if fault == "source" and rank == last:
            trainer.fails_at = 5
        if fault == "bytes" and rank == last:
            damage(trainer.sync.engine._channel)
        if trainer.workers[0] is not None and trainer.workers[1] is not None:
            trainer.workers[0].ready = trainer.workers[1].ready = fault != "begin"
            refuses, trainer.workers[1].silent = fault in ("engine", "death"), fault == "death"
            trainer.workers[1].model.refused = "model.layers.3.mlp.down_proj.weight" if refuses else None
        before = [worker.finished for worker in trainer.workers if worker is not None]
        said = None
        try:
            trainer.sync.send_weights()
        except WeightSyncError as error:
            said = str(error)
        after = [worker.finished for worker in trainer.workers if worker is not None]
        for worker in trainer.workers:
            if worker is not None:
                worker.ready, worker.silent, worker.model.refused = True, False, None
        torch.distributed.barrier()  # as the run's driver waits for every rank
        trainer.connect()
        trainer.sync.send_weights()
        found.append((said, before == after, trainer.received()))
    return found


def damage(channel: Any) -> None:
    """Let a byte of the second bucket change on the way."""
    begin, count = channel.broadcast, itertools.count()

    def broadcast(buffer: Tensor) -> Any:
        buffer[9] += next(count) == 1
        return begin(buffer)

    channel.broadcast = broadcast


@pytest.mark.parametrize("way", ["pp2", "tp2pp2"])
def test_a_failure_anywhere_fails_the_sync_and_the_next_one_over_fresh_groups_repairs(
    models: dict[Any, Path], way: str
) -> None:
    """No wait is ended by its bound here, which is half an hour."""
    architecture, tie, mesh, _ = WAYS[way]
    size, _ = MESHES[mesh]
    ranks = run_distributed(_faults, size, models, way)
    sending = [0, size // 2]
    for number, fault in enumerate(FAULTS):
        _, unfinished, received = ranks[0][number]
        assert unfinished, "no engine serves what did not arrive whole"
        said = {rank: ranks[rank][number][0] for rank in range(size) if ranks[rank][number][0] is not None}
        assert list(said) == sending
        assert all(re.search(SAID[fault].format(rank=sending[-1]), text) for text in said.values()), said
        assert [differences(worker, models[architecture, tie], 1.0) for worker in received] == [[]] * WORKERS


def test_vllm_makes_the_engines_of_both_transports() -> None:
    register()
    for name, worker, trainer in (
        ("gloo_senders", senders.GlooSendersWorkerEngine, senders.GlooSendersTrainerEngine),
        ("nccl_senders", senders.NCCLSendersWorkerEngine, senders.NCCLSendersTrainerEngine),
    ):
        assert WeightTransferEngineFactory._registry[name]() is worker
        assert WeightTransferTrainerFactory._registry[name]() is trainer
        assert worker.channel is trainer.channel


def test_nccl_waits_for_what_packs_a_buffer_and_sends_in_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without a GPU shows: the calls and their order."""
    from vllm.distributed.device_communicators import pynccl

    events: list[Any] = []

    class Stream:
        def __init__(self, device: Any) -> None: ...

        def wait_stream(self, other: str) -> None:
            events.append(f"waits for {other}")

        def record_event(self) -> Any:
            return SimpleNamespace(query=lambda: events.append("asked") or True)

    class Communicator:
        def __init__(self, group: Any, device: Any) -> None:
            events.append((group.rank, group.world_size, device.index))

        def broadcast(self, buffer: Tensor, src: int, stream: Stream) -> None:
            events.append((buffer.numel(), src))

        def destroy(self) -> None:
            events.append("closed")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current stream")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", Communicator)
    meeting: Any = SimpleNamespace(store=torch.distributed.HashStore())
    channel = NCCLChannel(meeting, "a", rank=0, world_size=5)
    assert channel.broadcast(torch.zeros(7, dtype=torch.uint8))()
    channel.close()
    assert events == [(0, 5, 3), "waits for the current stream", (7, 0), "asked", "closed"]
