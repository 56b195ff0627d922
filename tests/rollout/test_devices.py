"""Which rank takes which device: those of one node follow each other, whatever order Ray gives the bundles."""

from collections.abc import Iterator

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dcpo_openrlhf.local_ray import StartupError
from dcpo_openrlhf.rollout import devices
from dcpo_openrlhf.rollout.devices import Place
from tests.bounds import HANG_S
from tests.weight_sync.engines import cluster


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster(gpus=3):
        yield


def scattered(*nodes: str) -> list[Place]:
    return [Place(f"10.0.0.{node}", node, "", bundle) for bundle, node in enumerate(nodes)]


def test_bundles_of_one_node_stand_together(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {bundle: node for bundle, node in enumerate("abbbaaab")}
    monkeypatch.setattr(devices, "placement_group_table", lambda _: {"bundles_to_node_id": nodes})
    hosts = {"a": "10.0.0.2", "b": "10.0.0.1"}
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": n, "NodeManagerAddress": h} for n, h in hosts.items()])
    found = devices.places(None, None, ask_devices=False)  # type: ignore[arg-type]
    assert [place.bundle for place in found] == [1, 2, 3, 7, 0, 4, 5, 6]
    assert devices.told(found) == "4 devices on 10.0.0.1, 4 on 10.0.0.2"
    devices.require_whole(found, size=4, each=4)
    with pytest.raises(StartupError, match=r"ranks 0 to 7 would be on 10.0.0.1 and 10.0.0.2: Ray found 4 devices on"):
        devices.require_whole(found, size=8, each=8)


def test_tensor_group_leaves_its_node_only_where_the_recipe_says_so() -> None:
    found = scattered("1", "1", "1", "2")
    with pytest.raises(StartupError, match=r"parallel.tensor = 2 .* ranks 2 to 3 .* 3 devices on 10.0.0.1, 1 on"):
        devices.require_whole(found, size=2, each=2)
    devices.require_whole(found, size=4, each=2)
    devices.require_whole(found, size=1, each=2)


@ray.remote(num_cpus=0.2, num_gpus=0.2)
class Engine:
    def ready(self) -> None:
        pass


def test_devices_of_a_node_are_in_their_order_also_beside_colocated_engines() -> None:
    group = placement_group([{"GPU": 1.0, "CPU": 1.0}] * 3, strategy="PACK")
    ray.get(group.ready(), timeout=HANG_S)
    bundle = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=1)
    engine = Engine.options(scheduling_strategy=bundle).remote()  # type: ignore[attr-defined]
    ray.get(engine.ready.remote(), timeout=HANG_S)
    found = devices.places(group, HANG_S, ask_devices=True)
    assert [place.device for place in found] == ["0", "1", "2"]
    assert {place.bundle for place in found} == {0, 1, 2}
    assert {place.node for place in found} == set(placement_group_table(group)["bundles_to_node_id"].values())
    ray.kill(engine)
    remove_placement_group(group)
