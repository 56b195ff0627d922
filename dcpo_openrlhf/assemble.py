"""The trainer's parts, from the recipe: the one place below the entry where sections become arguments."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from dcpo_openrlhf.controller import EntropyController, SampleWeight, SteppedCoefficient, Target
from dcpo_openrlhf.methods import METHODS
from dcpo_openrlhf.monitor.cost import Cost
from dcpo_openrlhf.monitor.sinks import MetricsLog
from dcpo_openrlhf.monitor.timeline import Timeline
from dcpo_openrlhf.monitor.trends import Monitor
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.profiling import ProfiledSteps
from dcpo_openrlhf.recipe.families import Sizes
from dcpo_openrlhf.recipe.schema import Recipe
from dcpo_openrlhf.rollout.ahead import Ahead
from dcpo_openrlhf.rollout.chat import stop_tokens
from dcpo_openrlhf.rollout.generator import DCPOSamplesGenerator
from dcpo_openrlhf.rollout.replay import Recorder, Replay


def make_generator(strategy: RecipeStrategy, engines: list[Any], tokenizer: PreTrainedTokenizerBase) -> Ahead:
    """Responses from the engines, or from the recording of an earlier run."""
    recipe = strategy.recipe
    if recipe.rollout.replay is not None:
        return Ahead(Replay(recipe.rollout.replay))
    generator = DCPOSamplesGenerator(
        strategy,
        None,
        None,
        tokenizer,
        engines,
        seed=recipe.run.seed,
        timeout_s=recipe.rollout.timeout,
        stop_token_ids=stop_tokens(tokenizer, chat=recipe.task.chat, stop=recipe.rollout.stop),
    )
    return Ahead(generator)


def recorded(generator: Ahead, recipe: Recipe) -> Any:
    """The generator, which also writes what it hands over if the recipe says so."""
    return Recorder(generator, recipe.run.dir / "samples") if recipe.rollout.record else generator


def make_controller(recipe: Recipe) -> EntropyController:
    m = recipe.method
    return EntropyController(
        target_entropy=Target(
            start=m.target_entropy, end=m.target_entropy_end, course=m.target_schedule, steps=recipe.train.steps
        ),
        temperature_low=m.temperature_low,
        temperature_high=m.temperature_high,
        temperature_rule="continuous" if METHODS[m.name].continuous_temperature else m.temperature_rule,
        alpha_schedule=m.alpha_schedule,
        alpha_max=m.alpha_max,
        proportional_gain=m.proportional_gain,
        integral_gain=m.integral_gain,
        entropy_source=m.entropy_source,
        coefficient=SteppedCoefficient(change=m.adaptive_entropy_step, largest=m.adaptive_entropy_max),
        sample_weight=SampleWeight(proportional=m.entropic_proportional, integral=m.entropic_integral),
    )


def make_monitor(recipe: Recipe) -> Monitor:
    return Monitor(recipe.monitor, method=METHODS[recipe.method.name], settings=recipe.settings)


def make_cost(recipe: Recipe, peak_flops: float | None) -> Cost:
    """peak_flops: of a training device, if known."""
    config = recipe.model.path / "config.json"
    return Cost(
        sizes=Sizes.of(json.loads(config.read_text())) if config.is_file() else None,
        peak_flops=peak_flops,
        training_devices=recipe.parallel.world_size,
        engine_devices=recipe.rollout.engines * recipe.rollout.tensor_parallel,
        group_size=recipe.train.group_size,
        share_prompts=recipe.shares_prompts,
    )


def make_log(recipe: Recipe, *, done: int = 0) -> MetricsLog:
    """The sinks of a run that has `done` steps behind it."""
    config = recipe.model_dump(mode="json")
    return MetricsLog(recipe.run.dir, recipe.monitor, config=config, first_step=done + 1)


def make_watchers(recipe: Recipe, group: Any, engines: list[Any]) -> tuple[Timeline, ProfiledSteps]:
    """What looks at the processes while they work; group: None where nothing is trained."""
    ranks = group._actor_handlers if group else []
    timeline = Timeline(recipe.run.dir, engines=engines, ranks=ranks)
    return timeline, ProfiledSteps(recipe.run.profile, recipe.run.dir, group)
