"""A real vLLM engine of every family: it takes new weights and then continues prompts greedily as transformers does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from dcpo_openrlhf.weight_sync import connect
from tests.bounds import HANG_S
from tests.tiny import ARCHITECTURE_FIELDS, make_tiny_model
from tests.weight_sync.engines import FolderSource, assert_serves, cluster, engines

pytestmark = pytest.mark.long  # an engine each: make test ARGS='-m long tests/weight_sync/test_families.py'


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster():
        yield


@pytest.mark.parametrize("architecture", ARCHITECTURE_FIELDS)
def test_an_engine_follows_the_trainers_weights(tmp_path: Path, architecture: str) -> None:
    old, new = (make_tiny_model(tmp_path / str(s), architecture=architecture, tie=False, seed=s) for s in range(2))
    with engines(old, "shared_memory") as (engine,):
        assert_serves([engine], old)
        source = FolderSource(new)
        sync = connect(
            engines=[engine],
            source=source,
            transport="shared_memory",
            rank=0,
            deadline_s=HANG_S,
            bucket_bytes=100_000,
        )
        sync.send_weights()
        assert_serves([engine], new)
        assert ray.get(engine.weight_checksums.remote()) == [sync.checksums]
        sync.shutdown()
