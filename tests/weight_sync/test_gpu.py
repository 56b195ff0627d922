"""On GPUs: checksums there, a device that is waited for, and engines that are sent weights over ipc and nccl."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from dcpo_openrlhf.weight_sync import WeightSyncError, connect, device
from dcpo_openrlhf.weight_sync.connection import wait_for_device
from tests.bounds import HANG_S
from tests.tiny import make_tiny_model
from tests.weight_sync.engines import FolderSource, assert_serves, cluster, engines
from tests.weight_sync.test_device import TENSORS, slow_checksum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU: dict[str, Any] = {"device": "cuda", "gpu_memory_utilization": 0.1}


class OnDevice(FolderSource):
    """A policy's weights as nccl and ipc send them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tensors = {name: tensor.cuda() for name, tensor in self.tensors.items()}


@pytest.mark.parametrize("name", TENSORS)
def test_checksum_on_the_device_is_that_of_plain_numbers(name: str) -> None:
    assert device.as_ints({name: device.bit_checksum(TENSORS[name].cuda())}) == {name: slow_checksum(TENSORS[name])}


def test_what_is_queued_is_there_before_another_stream_reads_it() -> None:
    weight, new = torch.zeros(2**26, device="cuda"), torch.ones(2**26, device="cuda")
    torch.cuda._sleep(10**9)  # as an optimizer's step that is still running
    weight.copy_(new)
    wait_for_device()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert weight.sum().item() == weight.numel()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_model(root / str(seed), architecture="llama", tie=True, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with cluster(gpus=torch.cuda.device_count()):
        yield


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_engine_follows_the_trainers_weights_and_notices_other_bits(
    ray_cluster: None, folders: list[Path], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl needs a device for the trainer and one for the engine")
    # ipc needs the trainer's device, the first; Ray gives engines the first free one, and nccl's trainer takes the last
    torch.cuda.set_device(0 if transport == "ipc" else torch.cuda.device_count() - 1)
    with engines(folders[0], transport, **GPU) as (engine,):
        assert_serves([engine], folders[0])
        settings = {"engines": [engine], "transport": transport, "rank": 0, "deadline_s": HANG_S}
        sync = connect(source=OnDevice(folders[1]), **settings)  # type: ignore[arg-type]
        sync.send_weights()
        assert_serves([engine], folders[1])
        assert ray.get(engine.weight_checksums.remote()) == [sync.checksums]
        of_sent = device.bit_checksum
        monkeypatch.setattr(device, "bit_checksum", lambda tensor: of_sent(tensor) + 1)
        with pytest.raises(WeightSyncError, match="worker 0 of engine 0 has others in"):
            sync.send_weights()
