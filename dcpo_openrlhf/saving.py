"""What a run saves: the state after its last finished step, in a checkpoint between steps and in one before it ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from dcpo_openrlhf import signals
from dcpo_openrlhf.checkpoint import CheckpointFolder
from dcpo_openrlhf.phases import phase
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.rollout.ahead import FILE as AHEAD
from dcpo_openrlhf.rollout.ahead import Ahead


class Saving:
    """The driver's half of a checkpoint; the actors write the policy's."""

    def __init__(
        self,
        recipe: Recipe,
        actor_group: Any,
        ahead: Ahead,
        *,
        stop_forward: Callable[[], None],
        policy_back: Callable[[], None],
    ) -> None:
        """ahead: the next step's responses, where they are begun; stop_forward, policy_back: what a checkpoint in the
        middle of a step needs first, a forward pass left and the policy on its devices.
        """
        c = recipe.checkpoint
        self.asynchronous, self.actor_group, self.ahead = c.asynchronous, actor_group, ahead
        self.stop_forward, self.policy_back = stop_forward, policy_back
        self.checkpoints = CheckpointFolder(
            recipe.run.dir / "checkpoints",
            keep_last=c.keep_last,
            keep_best=c.keep_best,
            write=self._write,
            finish=lambda: ray.get(actor_group.async_run_method("finish_checkpoint")),
        )
        self.settled: tuple[dict[str, Any], dict[str, float]] | None = None
        """State and scores after the last finished step of this process: what a checkpoint saves."""
        self.in_hand: int | None = None
        """The step whose update is under way: until it is settled, weights and state do not agree."""

    def settle(self, state: dict[str, Any], scores: dict[str, float]) -> None:
        """The step is finished: from here on a checkpoint saves this."""
        self.settled, self.in_hand = (state, scores), None

    @phase("save")
    def begin(self) -> None:
        """Start the checkpoint of the last finished step; it is finished after the next rollout, or at once."""
        assert self.settled is not None
        with signals.held():
            self.checkpoints.begin(*self.settled)
        if not self.asynchronous:
            self.finish()

    @phase("save")
    def finish(self) -> None:
        """Wait until the checkpoint in flight, if any, is whole."""
        with signals.held():
            self.checkpoints.finish()

    def before_exit(self) -> None:
        """A whole checkpoint of the last finished step, if this process finished one that is not saved."""
        self.stop_forward()
        self.checkpoints.finish()
        if self.settled is not None and self.settled[0]["step"] > self.checkpoints.saved_step:
            self.policy_back()
            self.checkpoints.begin(*self.settled)
            self.checkpoints.finish()

    def _write(self, folder: Path) -> None:
        """The policy, and the next step's responses where they were begun."""
        assert self.settled is not None
        self.ahead.save(folder / AHEAD, step=self.settled[0]["step"] + 1)
        ray.get(self.actor_group.async_run_method("save_checkpoint", str(folder)))
