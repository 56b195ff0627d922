"""The starting model beside the policy: a copy of its weights in host memory that takes their place for one forward."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK = 2**26
"""Bytes that are exchanged at a time: no second model is ever on the device."""


class Reference:
    """The weights as they are when this is made; each rank keeps its own part."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """weights: every tensor that a forward reads; those that share a storage count once."""
        storages = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in weights)}
        self._pairs = [(_bytes(storage), _bytes(storage).cpu().clone()) for storage in storages.values()]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The policy computes as the starting model inside, and as itself again after, whatever happens."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for here, kept in self._pairs:
            for a, b in zip(here.split(CHUNK), kept.split(CHUNK), strict=True):
                a_before = a.cpu().clone()
                a.copy_(b)
                b.copy_(a_before)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportArgumentType]
