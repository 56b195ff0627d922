"""The devices of a run: a placement group of them, and its bundles in an order in which hosts stay together."""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group as make_placement_group
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dcpo_openrlhf.local_ray import StartupError
from dcpo_openrlhf.recipe.schema import Parallel

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)
POLL_S = 2.0


class Place(NamedTuple):
    """A bundle of a placement group, which is one device."""

    host: str
    """Address."""
    node: str
    """Ray's id of the node there; a host may have several."""
    device: str
    """Ray's number of the device on its node; "" where it was not asked for."""
    bundle: int


def device_group(count: int, timeout_s: float | None, *, what: str) -> "PlacementGroup":
    """A placement group of `count` devices for `what`, each a Ray GPU and a CPU; None waits for ever.

    Raises StartupError where they are not free in `timeout_s`. A wait is told in the log.
    """
    begin = time.monotonic()
    group = make_placement_group([{"GPU": 1.0, "CPU": 1.0} for _ in range(count)], strategy="PACK")
    ready = group.ready()
    first = POLL_S if timeout_s is None else min(POLL_S, timeout_s)
    if not ray.wait([ready], timeout=first)[0]:
        logger.info("waiting for %d devices for %s: %s", count, what, _devices_held())
        left = None if timeout_s is None else max(timeout_s - (time.monotonic() - begin), 0.0)
        if not ray.wait([ready], timeout=left)[0]:
            held = _devices_held()
            remove_placement_group(group)
            raise StartupError(
                f"{count} devices for {what} must fit Ray's free GPUs and CPUs, and did not in run.startup_timeout = "
                f"{timeout_s:g} s: {held}; wait for other jobs to end (ray status), raise run.startup_timeout, lower "
                "rollout.engines or the mesh, or add nodes"
            )
    return group


def _devices_held() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    return "the cluster has " + " and ".join(
        f"{total.get(kind, 0):g} {kind}s, {free.get(kind, 0):g} of them free" for kind in ("GPU", "CPU")
    )


def places(group: "PlacementGroup", timeout_s: float | None, *, ask_devices: bool) -> list[Place]:
    """The bundles of a group that is ready, sorted by host and by device: PACK keeps neither order (ray issues 51117,
    59547).

    ask_devices: a task in each bundle tells its device, else bundles of one host stay in Ray's order. Raises
    StartupError where one does not answer in `timeout_s`.
    """
    node_of = placement_group_table(group)["bundles_to_node_id"]
    host_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    device_of = dict.fromkeys(node_of, "")
    if ask_devices and len(node_of) > 1:
        calls = [_ask(group, bundle) for bundle in node_of]
        try:
            device_of = dict(zip(node_of, ray.get(calls, timeout=timeout_s), strict=True))
        except GetTimeoutError:
            raise StartupError(
                f"a task on each of {len(calls)} devices must answer in run.startup_timeout = {timeout_s:g} s, and one "
                "did not; see `ray status` and the logs in Ray's session folder, or raise run.startup_timeout"
            ) from None
    found = [Place(host_of[node], node, device_of[bundle], bundle) for bundle, node in node_of.items()]
    return sorted(found, key=lambda p: (p.host, p.node, len(p.device), p.device, p.bundle))


def _ask(group: "PlacementGroup", bundle: int) -> "ray.ObjectRef":
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    # a share that is free beside engines which have started in the group
    return _device.options(num_cpus=0, num_gpus=0.01, scheduling_strategy=place).remote()


@ray.remote
def _device() -> str:
    return ray.get_runtime_context().get_accelerator_ids()["GPU"][0]


def rank_bundles(group: "PlacementGroup", parallel: Parallel, timeout_s: float, *, on_gpus: bool) -> list[int]:
    """The bundle of each policy rank: those of one node follow each other, in the order of its GPUs.

    Raises StartupError as `places` and `require_whole`.
    """
    found = places(group, timeout_s, ask_devices=on_gpus)
    require_whole(found, size=parallel.tensor, each=parallel.devices_per_node)
    if parallel.nodes > 1:
        logger.info("policy ranks, in their order: %s", told(found))
    return [place.bundle for place in found]


def require_whole(found: Sequence[Place], *, size: int, each: int) -> None:
    """Raise StartupError where a tensor group, `size` ranks in a row, would leave its node.

    It may where the recipe says so: `each` ranks a node are then no whole number of groups. Groups of expert tensor
    ranks are tensor groups or single ranks.
    """
    if each % size:
        return
    for first in range(0, len(found), size):
        nodes = {place.node: place.host for place in found[first : first + size]}
        if len(nodes) > 1:
            raise StartupError(
                f"parallel.tensor = {size} ranks must share a node, and ranks {first} to {first + size - 1} would be "
                f"on {' and '.join(nodes.values())}: Ray found {told(found)}; free whole nodes with "
                f"parallel.devices_per_node = {each} devices, or lower parallel.tensor"
            )


def told(found: Sequence[Place]) -> str:
    """ "8 devices on 10.0.0.1, 8 on 10.0.0.2" """
    nodes = list(dict.fromkeys((place.node, place.host) for place in found))
    counts = [f"{sum(p.node == node for p in found)} on {host}" for node, host in nodes]
    return ", ".join(counts).replace(" on", " devices on", 1)
