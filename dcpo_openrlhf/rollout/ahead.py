"""The next step's responses, begun while this step trains (rollout.ahead): handed over, or kept for a checkpoint.

Engines take new weights between two batches: a sync waits until what was begun is answered. A checkpoint of step k
holds the responses of step k+1, since the weights that drew them are gone after the update of step k.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.rollout.generator import arguments
from dcpo_openrlhf.rollout.replay import EVALUATION_STEP, Replay, Request, read, request_of, require_same, write
from dcpo_openrlhf.rollout.tasks import PromptStream

logger = logging.getLogger(__name__)
FILE = "ahead.pt"
"""In a checkpoint's folder: the responses that the next step trains on."""


@dataclass
class StepResponses:
    """The responses of one step."""

    step: int
    request: Request
    begun: Any = None
    """What `finish` of the generator takes; None: from a checkpoint."""
    samples: list[Any] | None = None
    """As they were drawn; None: not there yet."""
    seconds: float = 0.0
    """From the requests to the last answer."""


class Ahead:
    """A samples generator over another one, which may `begin` the responses that `generate` is asked for later."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.following: StepResponses | None = None
        """Of the step after the one in hand."""
        self.in_hand: StepResponses | None = None
        """Of the step that trains on them, until it has: a checkpoint of the step before needs them."""
        self.times: dict[str, float] = {}
        """time/* of the step in hand."""

    def begin_step(self, step: int, prompts: PromptStream, recipe: Recipe) -> None:
        """With rollout.ahead, let engines that have no more to do for the step before begin the responses of `step`."""
        r, t = recipe.rollout, recipe.train
        if r.ahead and recipe.generates and step <= t.steps:
            sampling = {"n_samples": t.group_size, "temperature": r.temperature, "top_p": r.top_p}
            self.begin(**arguments(prompts.peek(t.prompts_per_step), r, step=step, **sampling))

    def begin(self, prompts: Sequence[str], labels: Sequence[str], *, step: int, **sampling: Any) -> None:
        """Let the engines begin the responses of a step; `generate` with the same arguments hands them over."""
        begun = self.generator.begin(prompts, labels, step=step, **sampling)
        self.following = StepResponses(step, request_of(prompts, labels, sampling), begun)

    def wait(self, look: Callable[[], object]) -> None:
        """Return when what was begun is answered, so that the engines may take other weights.

        The step in hand has been trained. Where no engine is left that has the weights of what was begun, the rest
        is drawn after the next sync, from its weights. `look` is called meanwhile, and may raise.
        """
        begin, self.in_hand = time.monotonic(), None
        if self.following is None:
            return
        batch = self.following.begun.batch
        self.following.begun.pool.wait(batch, look=look, trained=True)
        if not batch.left:
            self._finish(self.following)
        elif not batch.groups:
            self.following = None
        self.times["time/wait"] = time.monotonic() - begin

    def _finish(self, responses: StepResponses) -> list[Any]:
        if responses.samples is not None:
            return responses.samples
        responses.samples = samples = self.generator.finish(responses.begun)
        responses.seconds = responses.begun.batch.last - responses.begun.batch.begun
        return samples

    def generate(self, prompts: Sequence[str], labels: Sequence[str], *, step: int, **sampling: Any) -> list[Any]:
        """Responses that were begun for this request, or else those of the generator.

        Raises ReplayError where another request was begun for the step.
        """
        if self.following is None or self.following.step != step:
            if step < EVALUATION_STEP and (self.in_hand is None or self.in_hand.step != step):
                self.times = {}
            return self.generator.generate(prompts, labels, step=step, **sampling)
        found = self.following
        what, remedy = f"responses of step {step} were begun", "resume with the recipe of the checkpoint"
        require_same(request_of(prompts, labels, sampling), found.request, what=what, remedy=remedy)
        samples = self._finish(found)
        self.in_hand, self.following = found, None
        self.times = {"time/generation": found.seconds}
        return [replace(s, info=dict(s.info)) for s in samples]  # grading adds to them

    def save(self, file: Path, *, step: int) -> None:
        """Write the responses of `step`, where they were begun."""
        found = next((r for r in (self.in_hand, self.following) if r is not None and r.step == step), None)
        if found is None:
            return
        if found.samples is None:
            logger.warning(
                "responses of step %d were under way and are not saved: a resumed run draws them again, from the "
                "newer weights",
                step,
            )
            return
        write(file, found.request | {"seconds": found.seconds}, found.samples)

    def load(self, file: Path, *, step: int) -> None:
        """Have the responses of `step` that `save` wrote; nothing where it wrote none, or a replay has them anyway."""
        if file.is_file() and not isinstance(self.generator, Replay):  # which counts the requests of a step
            request, samples = read(file)
            self.following = StepResponses(step, request, samples=samples, seconds=request.pop("seconds"))
