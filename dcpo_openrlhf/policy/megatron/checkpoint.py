"""The policy's part of a checkpoint, sharded by megatron-core's dist_checkpointing: another mesh can load it.

Model, distributed optimizer, updates done (the learning-rate schedule's state) and the random state of every rank.
"""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dcpo_openrlhf.checkpoint import FileSum, file_sum
from dcpo_openrlhf.policy.megatron.step import PolicyStep

# One tensor of each parameter's own shape, gathered over gloo on the first data rank: any mesh loads it.
_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


class PolicyCheckpoint:
    """One rank's end of saving (`save`, then `finish`) and loading (`load`); every rank calls each of them."""

    def __init__(self, step: PolicyStep) -> None:
        self.step, self.mesh = step, step.mesh
        self._request: Any = None
        self._writing: threading.Thread | None = None
        self._sums: dict[str, FileSum] = {}
        # megatron-core would start a manager process for this queue, which outlives a rank that is killed
        filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]

    def save(self, folder: Path) -> None:
        """Copy this rank's state and start the thread that writes it to `folder`, which exists and is empty.

        megatron-core's own asynchronous save forks this process, which holds Ray's, gloo's and OpenMP's threads; so a
        thread does the writing, and what it writes is a copy.
        """
        request = dist_checkpointing.save(
            self._state(loading=False),
            str(folder),
            async_sharded_save=True,
            async_strategy="mcore",
            content_metadata=dict(_FORMAT),
        )
        assert request is not None
        self._request, self._sums = request, {}
        if request.async_fn is None or request.preload_fn is None:  # nothing here that no other rank holds
            return
        # views are copies already; a parameter that fills its buffer alone is not
        live = {_storage(p) for chunk in self.step.policy.chunks for p in chunk.parameters()}
        buckets = [
            (path, key, (objects, [(item, t.clone() if _storage(t) in live else t) for item, t in tensors]))
            for path, key, (objects, tensors) in request.preload_fn()
        ]
        arguments = (buckets, request.async_fn.args[0], request.async_fn_args[2])
        self._writing = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._writing.start()

    def _write(self, buckets: list[Any], transforms: Any, results: queue.Queue) -> None:
        """Write every bucket; {index: what was written} or the error go where megatron-core's finalisation looks.

        Its own loop over the buckets tells no more of an error than its class.
        """
        written = {}
        try:
            for index, bucket in enumerate(buckets):
                done: Any = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                    transforms, index, bucket, None, None, True
                )
                found = done[1]
                if isinstance(found, Exception):
                    raise found
                written[index] = found
            self._sums = {Path(path).name: file_sum(Path(path)) for path, *_ in buckets}
            results.put(written)
        except Exception as error:
            results.put(error)

    def finish(self) -> dict[str, FileSum]:
        """Wait for the thread and write the metadata (rank 0); sums of the files that this rank wrote.

        Raises RuntimeError on rank 0 where any rank could not write.
        """
        if self._writing is not None:
            self._writing.join()
        request, self._request, self._writing = self._request, None, None
        try:
            for finalize in request.finalize_fns:
                finalize()
        except CheckpointException as error:  # a BaseException, which would end a Ray actor
            if not error.failures:  # raised on every rank; rank 0's alone says why
                return {}
            raise RuntimeError(
                f"a rank could not write its part of the checkpoint; make room or save less: {error}"
            ) from None
        return self._sums

    def load(self, folder: Path) -> None:
        """Make this rank's policy, optimizer, schedule and random state those of `folder`, saved on any mesh.

        Random state comes back where the number of ranks is the saved one.
        """
        torch_adams = list(self._torch_adams())
        for optimizer in torch_adams:
            if not optimizer.optimizer.state:
                optimizer._init_optimizer_states_with_dummy_values()
            _let_step_be_absent(optimizer)
        state = self._state(loading=True)
        common = dist_checkpointing.load_common_state_dict(str(folder))
        if common["world_size"] != self.mesh.world_size:
            del state["rng"]
        loaded: Any = dist_checkpointing.load(state, str(folder))
        for name, chunk in self._chunks().items():
            chunk.load_state_dict(loaded[name])
        for group in _param_groups(loaded["optimizer"]):  # by its rates megatron-core finds a group, and an import
            group |= self._rates()  # has those of no run
        self.step.optimizer.load_state_dict(loaded["optimizer"])
        for optimizer in torch_adams:
            _own_steps(optimizer)
        self.step.schedule.num_steps = 0
        self.step.schedule.step(increment=loaded["updates"])
        if "rng" in loaded:
            _set_random_state(loaded["rng"])

    def _state(self, *, loading: bool) -> dict[str, Any]:
        models = {name: chunk.sharded_state_dict() for name, chunk in self._chunks().items()}
        rng = None if loading else _random_state()
        return models | {
            "optimizer": self.step.optimizer.sharded_state_dict(models, is_loading=loading, metadata=_FORMAT),
            "rng": ShardedObject("rng", rng, (self.mesh.world_size,), (self.mesh.rank,)),
            "updates": self.step.schedule.num_steps,
            "world_size": self.mesh.world_size,
        }

    def _rates(self) -> dict[str, float]:
        """The recipe's learning rates, which are those of the saved run too."""
        return {key: self.step.optimizer.param_groups[0][key] for key in ("max_lr", "min_lr")}

    def _chunks(self) -> dict[str, Any]:
        return {f"model{i}": chunk for i, chunk in enumerate(self.step.policy.chunks)}

    def _torch_adams(self) -> Iterator[Any]:
        """The distributed optimizers around torch's Adam, which counts steps for each parameter (no Apex, no TE)."""
        for optimizer in getattr(self.step.optimizer, "chained_optimizers", [self.step.optimizer]):
            if isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW):
                yield optimizer


def _param_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups in an optimizer's state dict, or in those of several in a chain."""
    for key, value in state.items() if isinstance(state, dict) else ():
        if key == "param_groups":
            yield from value
        else:
            yield from _param_groups(value)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _let_step_be_absent(optimizer: Any) -> None:
    """Loading `fully_reshardable` looks for every entry of Adam's state, and "step" is kept in the group instead."""
    if "_set_main_param_and_optimizer_states" in vars(optimizer):
        return
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        step = optimizer._get_main_param_and_optimizer_states(parameter)["step"]
        original(parameter, {"step": step, **tensors})

    optimizer._set_main_param_and_optimizer_states = set_states


def _own_steps(optimizer: Any) -> None:
    """Loading gives all parameters one step tensor, which each of them would then count up."""
    for state in optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def _random_state() -> dict[str, Any]:
    """Torch's generators; nothing in a rank draws from numpy's or python's."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
        state["tracker"] = _tracker().get_states()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
        _tracker().set_states(state["tracker"])
