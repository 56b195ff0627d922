"""Runs one after another in one Ray with one start of the engines: a run then costs its policy's start and its steps.

What a run reads of engines that served another one is its own: weights come at its first sync, which also empties the
prefix cache, and every request carries its seed.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dcpo_openrlhf import local_ray, signals, train_dcpo
from dcpo_openrlhf.recipe import preflight, resume
from dcpo_openrlhf.recipe.schema import Recipe

if TYPE_CHECKING:
    from dcpo_openrlhf.trainer import DCPOTrainer

logger = logging.getLogger("dcpo_openrlhf")

SHARED = ("run", "model", "parallel", "rollout", "weight_sync")
OWN = ("run.dir", "run.seed")
"""A session's runs agree in every key of these sections but these: seeds of requests come from the trainer."""


def shared_settings(recipe: Recipe) -> dict[str, Any]:
    """What runs must have in common to take turns on the same engines."""
    return {k: v for k, v in recipe.settings.items() if k.split(".")[0] in SHARED and k not in OWN}


class Session:
    """Engines that serve one run after another, started by the first one, and again where a run needs others."""

    def __init__(self, stack: contextlib.ExitStack, install: Callable[[], None]) -> None:
        self._outer, self._install = stack, install
        self._stack: contextlib.ExitStack | None = None
        self._settings: dict[str, Any] = {}
        self._engines: Any = None

    def train(self, recipe: Recipe, *, then: Callable[["DCPOTrainer"], None]) -> None:
        """Run the recipe to its end, or the rest of it; `then` is called with its trainer before the policy ends."""
        recipe = resume.keep_chosen(recipe)
        preflight.check(recipe, dry_run=False)
        if shared_settings(recipe) != self._settings:
            self._start(recipe)
        train_dcpo.run(recipe, serving=self._engines, then=then)

    def _start(self, recipe: Recipe) -> None:
        from dcpo_openrlhf.rollout.pool import shutdown_engines

        self.close()
        self._stack = self._outer.enter_context(contextlib.ExitStack())
        train_dcpo.join_ray(recipe, self._stack)
        self._install()  # ray.init put a handler of its own in place
        self._engines = train_dcpo.create_engines(recipe)
        self._stack.callback(shutdown_engines, self._engines, recipe.run.shutdown_timeout)
        self._settings = shared_settings(recipe)

    def close(self) -> None:
        """End engines and Ray."""
        if self._stack is not None:
            self._stack.close()
        self._stack, self._settings, self._engines = None, {}, None


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """A session that has started nothing yet; all that its runs start is ended on the way out."""
    local_ray.raise_bounds()
    with signals.raising() as install, contextlib.ExitStack() as stack:
        yield Session(stack, install)
