"""The numbers of data.yaml: devices, constants with their sources, limits, published figures. GB = 10^9 bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Device(NamedTuple):
    bf16_tflops: float
    """Dense bf16 multiplies [10^12 FLOP/s]."""
    memory_gb_per_s: float
    node_gb_per_s: float
    """One way, to devices of its node."""
    network_gb_per_s: float
    """One way, to other nodes."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Each stands in data.yaml with its unit and source."""

    train_mfu: float
    """Share of the bf16 peak that a dense model's training reaches."""
    expert_tflops: float
    """10^12 FLOP/s of a device that a model with experts reaches at most."""
    decode_efficiency: float
    """Share of memory bandwidth and of the bf16 peak that a decode step reaches."""
    decode_layer_seconds: float
    """Of a decode step and layer, whatever the batch: launches, exchange between tensor ranks."""
    engine_sequences: int
    """Sequences that an engine decodes at a time where rollout.max_sequences is null."""
    sender_gb_per_s: float
    """At which one sender gathers, names, packs and sends a dense model."""
    expert_sender_gb_per_s: float
    """The same of a model with experts."""
    fast_sender_gb_per_s: float
    """The fastest one sender that was found published."""
    network_share: float
    """Share of its network rate at which an engine device takes weights."""
    colocated_seconds: float
    """A colocated step's way from training to generation and back, weights included."""
    driver_response_seconds: float
    """The driver's work for each response, beside:"""
    driver_token_seconds: float
    """for each token of its padded row."""
    driver_base_gib: float
    """Memory of the driver's processes before the first step."""
    driver_token_bytes: float
    """Most that the driver's host holds for each token of a step's rows, padding included."""


DATA: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "data.yaml").read_text())
DEVICES = {name: Device(**values) for name, values in DATA["devices"].items()}
CONSTANTS = Constants(**{name: entry["value"] for name, entry in DATA["constants"].items()})
LIMITS: dict[str, float] = {name: entry["value"] for name, entry in DATA["limits"].items()}
