"""Weights reach a real vLLM engine over gloo: a mixture of experts with an output layer of its own."""

import threading
import time
from types import SimpleNamespace

import pytest
import ray

from dcpo_openrlhf.rollout import pool
from dcpo_openrlhf.weight_sync import WeightSyncError, connect
from dcpo_openrlhf.weight_sync.client import RayWeightSyncClient
from tests.bounds import HANG_S
from tests.tiny import make_tiny_model
from tests.weight_sync.engines import FolderSource, assert_all_end, assert_serves, cluster, engines, generator, prompts

BUCKET_BYTES = 100_000  # about twenty buckets, some of which end inside a layer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [
        make_tiny_model(root / str(seed), architecture="qwen3_moe", tie=False, seed=seed, layers=2) for seed in range(3)
    ]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    with cluster():
        yield


@pytest.fixture(scope="module")
def engine(ray_cluster, folders):
    with engines(folders[0], "gloo") as made:
        children = ray.get(made[0].health.remote())["children"]
        assert children
        yield made[0]
        pool.shutdown_engines(made)
        assert_all_end(children)


class Counting(FolderSource):
    walked = 0

    def __iter__(self):
        for pair in super().__iter__():
            self.walked += 1
            yield pair


def sync_to(engine, source, **options):
    settings = {"transport": "gloo", "rank": 0, "deadline_s": HANG_S, "bucket_bytes": BUCKET_BYTES} | options
    return connect(engines=[engine], source=source, **settings)


def test_engine_follows_the_trainers_weights_and_counts_versions(engine, folders):
    assert_serves([engine], folders[0])
    assert ray.get(engine.weight_version.remote()) == 0
    source = FolderSource(folders[1])
    sync = sync_to(engine, source)
    sync.send_weights()
    assert_serves([engine], folders[1])
    assert ray.get(engine.weight_version.remote()) == sync.version == 1
    assert sync.checksums.keys() == source.tensors.keys()
    assert ray.get(engine.weight_checksums.remote()) == [sync.checksums]
    source.tensors = FolderSource(folders[2]).tensors
    sync.send_weights(version=7)
    assert_serves([engine], folders[2])
    assert ray.get(engine.weight_version.remote()) == sync.version == 7
    sync.shutdown()


@pytest.mark.parametrize("left_out", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_sync_that_leaves_a_weight_out_is_refused_and_the_next_one_repairs(engine, folders, left_out):
    source = FolderSource(folders[1])
    whole = dict(source.tensors)
    del source.tensors[left_out]
    sync = sync_to(engine, source)
    layer = left_out.removesuffix(".weight").replace("k_proj", "qkv_proj")
    with pytest.raises(WeightSyncError, match=rf"engine 0.*must bring every weight.*{layer}"):
        sync.send_weights()
    with pytest.raises(WeightSyncError, match="connect again"):
        sync.send_weights()
    with pytest.raises(RuntimeError, match="unfinished weight update"):
        generator([engine], folders[1]).generate(
            prompts(folders[1])[:1], [""], step=0, n_samples=1, max_new_tokens=4, max_len=96
        )
    source.tensors = whole
    sync_to(engine, source).send_weights()
    assert_serves([engine], folders[1])


def test_bytes_that_change_on_the_way_are_noticed(engine, folders, monkeypatch):
    source = Counting(folders[0])
    sync = sync_to(engine, source)
    send = sync.engine.send_bucket

    def corrupt(update_info, buffer):
        if update_info["index"] == 2:
            buffer[5] += 1
        return send(update_info, buffer)

    monkeypatch.setattr(sync.engine, "send_bucket", corrupt)
    with pytest.raises(WeightSyncError, match=r"engine 0.*bucket 3 of \d+.*arrived with checksum"):
        sync.send_weights()
    assert source.walked == len(source.tensors), "other trainer ranks take part in every tensor"


def test_a_source_that_never_returns_ends_at_the_deadline(engine, folders):
    release = threading.Event()

    class Stuck(FolderSource):
        def __iter__(self):
            release.wait()
            return super().__iter__()

    sync = sync_to(engine, Stuck(folders[0]))
    sync.client.deadline_s = 5.0
    with pytest.raises(WeightSyncError, match=r"1 over gloo, trainer rank 0, reading the source, .* within 5 s"):
        sync.send_weights()
    release.set()


def test_other_trainer_ranks_walk_the_source_and_send_nothing(folders):
    source = Counting(folders[0])
    sync = sync_to("no engine is called from this rank", source, rank=1)
    sync.send_weights()
    assert source.walked == len(source.tensors)
    assert sync.version == 1


def test_client_names_the_engine_that_fails_or_hangs():
    class Engine:  # local, so that its process need not import this module
        def ready(self):
            return True

        def start_weight_update(self):
            return None

    class Hanging(Engine):
        def start_weight_update(self):
            time.sleep(3600)

    class Failing(Engine):
        def start_weight_update(self):
            raise OSError("disk full")

    kinds = (Engine, Failing, Hanging, Hanging)
    good, failing, *hanging = (ray.remote(num_cpus=0)(kind).remote() for kind in kinds)
    ray.get([actor.ready.remote() for actor in (good, failing, *hanging)])  # the deadlines below are of the calls alone
    client = RayWeightSyncClient([good, hanging[0], failing], HANG_S)
    client.begin(3)
    with pytest.raises(WeightSyncError, match=r"version 3 failed while start_weight_update: engine 2.*disk full"):
        client.start_weight_update()
    client = RayWeightSyncClient([good, hanging[1]], 10.0)
    client.begin(3)
    with pytest.raises(WeightSyncError, match="more than 10 s while start_weight_update: engine 1 did not answer"):
        client.start_weight_update()


def test_client_finishes_no_sync_of_which_a_worker_has_other_bits():
    class Engine:  # local, so that its process need not import this module
        finished = 0

        def __init__(self, *workers):
            self.workers = workers

        def weight_checksums(self):
            return list(self.workers)

        def finish_weight_update(self, version):
            self.finished += 1

        def count(self):
            return self.finished

    sent = {"a": 1, "b": 2, "c": 3}
    remote = ray.remote(num_cpus=0)(Engine).remote
    good, other, partial = remote(sent, sent), remote(sent, sent | {"b": 7}), remote({"a": 1, "b": 2}, sent)
    for wrong, worker, name in ((other, 1, "b"), (partial, 0, "c")):
        client = RayWeightSyncClient([good, wrong], HANG_S, engine_world_size=2)
        client.sent_checksums = lambda: sent
        client.begin(3)
        with pytest.raises(
            WeightSyncError, match=rf"version 3: .* worker {worker} of engine 1 has others in 1 of 3 tensors: {name};"
        ):
            client.finish_weight_update()
    assert ray.get([engine.count.remote() for engine in (good, other, partial)]) == [0, 0, 0]
    client.engines = [good]
    client.finish_weight_update()
    assert ray.get(good.count.remote()) == 1


def test_client_gives_each_engine_its_own_ranks():
    received = []
    engine = SimpleNamespace(init_weight_transfer_engine=SimpleNamespace(remote=received.append))
    client = RayWeightSyncClient([engine] * 3, HANG_S, engine_world_size=2)  # type: ignore[list-item]
    client.post_init({"rank_offset": 1})
    assert [request.init_info for request in received] == [{"rank_offset": n} for n in (1, 3, 5)]


def test_an_unknown_transport_is_refused(folders):
    with pytest.raises(ValueError, match=r"must be one of shared_memory, gloo, nccl, ipc, .* not 'carrier pigeon'"):
        sync_to("no engine", FolderSource(folders[0]), transport="carrier pigeon")
