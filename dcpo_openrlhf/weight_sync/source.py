"""The live weights as vLLM's weight transfer wants them: names and shapes, then full tensors one by one."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource


class LiveWeights(WeightSource):
    """Hugging Face tensors of the live policy; iteration is a collective of the policy's ranks.

    shapes: names, dtypes and full shapes in the order of `tensors`, without communication.
    """

    def __init__(
        self,
        *,
        shapes: Callable[[], Iterator[tuple[str, torch.dtype, tuple[int, ...]]]],
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    ) -> None:
        self._shapes, self._tensors = shapes, tensors

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every tensor, in the order of iteration; nothing is gathered."""
        return [ParamMeta(*meta) for meta in self._shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors()


class WholeWalk(WeightSource):
    """A source that is walked to its end also after an error: the other ranks take part in every tensor's gather."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._walk: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._walk = iter(self._source)
        return self._walk

    def finish(self) -> None:
        """Take what is left of the walk, all of it where none was begun."""
        for _ in self if self._walk is None else self._walk:
            pass
        self._walk = None
