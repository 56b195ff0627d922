"""Rows and statistics as they cross Ray: numpy arrays, copied once on either side.

torch pickles a tensor through a byte string of its own, which takes several copies and shares nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.policy.shared_prompts import deal


@dataclass(frozen=True)
class SentRows:
    """Rows with arrays in the place of tensors, token ids in int32."""

    fields: dict[str, Any]


def dealt(item: Any, parts: int, *, groups: bool) -> list[Any]:
    """What each of `parts` data ranks is sent: its share of Rows (`groups` as `deal` has it), all of anything else."""
    shares = deal(item, parts, groups=groups) if isinstance(item, Rows) else [item] * parts
    return [sent(share) for share in shares]


def sent(item: Any) -> Any:
    """Rows as SentRows, and tensors of dicts and tuples as arrays; anything else as it is."""
    if isinstance(item, Rows):
        found = {field.name: sent(getattr(item, field.name)) for field in fields(item)}
        return SentRows(found | {"sequences": found["sequences"].astype(np.int32, copy=False)})
    if isinstance(item, Tensor):
        return np.ascontiguousarray(item.numpy())
    if isinstance(item, dict):
        return {name: sent(value) for name, value in item.items()}
    return tuple(map(sent, item)) if isinstance(item, tuple) else item


def received(item: Any) -> Any:
    """What `sent` was given, in memory of its own: a write to the store's pages would end the process."""
    if isinstance(item, SentRows):
        return Rows(**{name: received(value) for name, value in item.fields.items()})
    if isinstance(item, np.ndarray):
        return torch.from_numpy(item.astype(np.int64 if item.dtype == np.int32 else item.dtype))  # a copy, always
    return tuple(map(received, item)) if isinstance(item, tuple) else item


def in_order(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The values of all parts, each row where `index` says that it stands."""
    batch = sum(len(part["index"]) for part in parts)
    whole = {name: np.empty((batch, *v.shape[1:]), v.dtype) for name, v in parts[0].items() if name != "index"}
    for part in parts:
        for name, values in whole.items():
            values[part["index"]] = part[name]
    return {name: torch.from_numpy(values) for name, values in whole.items()}
