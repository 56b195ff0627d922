"""The live weights as vLLM's weight transfer wants them: names and shapes, then full tensors one by one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource


class LiveWeights(WeightSource):
    """Hugging Face tensors of the live policy; iteration is a collective of the policy's ranks.

    shapes: names, dtypes (torch.dtype) and full shapes in the order of `tensors`, without communication.
    """

    def __init__(
        self,
        *,
        shapes: Callable[[], Iterator[tuple[Any, ...]]],
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    ) -> None:
        self._shapes, self._tensors = shapes, tensors

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every tensor, in the order of iteration; nothing is gathered."""
        return [ParamMeta(*meta) for meta in self._shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors()


@dataclass(frozen=True)
class SentTensor(ParamMeta):
    """A tensor's name, dtype and full shape, the trainer rank that sends it and the pipeline stage that holds it."""

    sender: int
    stage: int


class SharedWeights(LiveWeights):
    """Live weights that several ranks send. Iteration yields on each sender its own, in the order of `metadata`.

    shapes: those of all senders, each with sender and stage.
    """

    def metadata(self) -> list[ParamMeta]:
        return [SentTensor(*meta) for meta in self._shapes()]  # type: ignore[call-arg]


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
