"""The policy's part of a checkpoint as DeepSpeed writes it: a file a rank, which the same number of ranks loads.

Weights, sharded fp32 main weights and optimizer, updates done, and the random state of every rank.
"""

import re
from pathlib import Path
from typing import Any

import torch

from dcpo_openrlhf.checkpoint import FileSum, file_sum
from dcpo_openrlhf.policy.deepspeed import CHECKPOINT_FOLDER
from dcpo_openrlhf.policy.deepspeed.step import ZeroStep


class ZeroCheckpoint:
    """One rank's end of saving (`save`, then `finish`) and loading (`load`); every rank calls each of them."""

    def __init__(self, step: ZeroStep) -> None:
        self.step, self.engine = step, step.engine
        self._folder: Path | None = None

    def save(self, folder: Path) -> None:
        """Write this rank's state to `folder`, which exists; it is on disk when this returns."""
        self.engine.save_checkpoint(
            str(folder), tag=CHECKPOINT_FOLDER, client_state={"updates": self.step.updates}, save_latest=False
        )
        torch.save(_random_state(), folder / CHECKPOINT_FOLDER / f"random_{self.step.mesh.rank}.pt")
        self._folder = folder

    def finish(self) -> dict[str, FileSum]:
        """Sums of the files that this rank wrote, so that those of another node are missed where they are not seen."""
        assert self._folder is not None
        rank = self.step.mesh.rank
        files = (file for file in (self._folder / CHECKPOINT_FOLDER).iterdir() if _writer(file.name) == rank)
        return {f"{CHECKPOINT_FOLDER}/{file.name}": file_sum(file) for file in files}

    def load(self, folder: Path) -> None:
        """Make this rank's policy, optimizer, schedule and random state those of `folder`."""
        path, state = self.engine.load_checkpoint(str(folder), tag=CHECKPOINT_FOLDER, load_lr_scheduler_states=False)
        assert path is not None
        self.step.updates = state["updates"]
        _set_random_state(torch.load(folder / CHECKPOINT_FOLDER / f"random_{self.step.mesh.rank}.pt"))


def _writer(name: str) -> int:
    """The rank that writes a file: DeepSpeed's shards and the random states are numbered, the rest is rank 0's."""
    match = re.search(r"(?:pp_rank_|random_)(\d+)", name)
    return int(match[1]) if match else 0


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
