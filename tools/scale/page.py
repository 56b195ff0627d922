"""A recipe's table over numbers of devices, what breaks at each, and the page docs/scale.md."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dcpo_openrlhf.recipe.families import Sizes
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import MAX_SENDERS, Recipe, RecipeError
from tools.scale import model, published
from tools.scale.constants import CONSTANTS, DATA, DEVICES, LIMITS
from tools.scale.model import Case, DoesNotFit, Result
from tools.scale.published import head, row, shown

ROOT = Path(__file__).resolve().parents[2]
SIZES = (8, 64, 512, 4096)
RECIPES = (
    "recipes/dcpo-qwen2.5-7b-8xa800.yaml",
    "recipes/cluster/dcpo-qwen3-30b-a3b-4x8xa800.yaml",
    "recipes/cluster/dcpo-qwen3-235b-a22b-20x8xa800.yaml",
)
"""Of the page."""


def case_of(recipe: Recipe, device: str) -> Case:
    """Raises RecipeError for a recipe that has no such steps, or whose model's config.json cannot be read."""
    if recipe.run.device != "cuda":
        raise RecipeError(f"run.device = {recipe.run.device} is not simulated; name a recipe for GPUs, or set cuda")
    if recipe.train.rollout_only or not recipe.generates:
        raise RecipeError(
            f"train.rollout_only = {recipe.train.rollout_only} and rollout.replay = {recipe.rollout.replay}: only "
            "steps that generate and train are simulated; unset them"
        )
    files = (recipe.model.path / "config.json", recipe.model.config)
    file = next((file for file in files if file is not None and file.is_file()), None)
    if file is None:
        raise RecipeError(f"model.path = {recipe.model.path} has no config.json; name one with model.config=FILE")
    try:
        sizes = Sizes.of(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is no config.json of a known family ({error!r}); name another one") from None
    return Case(recipe, sizes, DEVICES[device], CONSTANTS)


class Strain(NamedTuple):
    ratio: float
    """Of the value to its limit in data.yaml."""
    text: str


def strains(result: Result, scaling: float) -> list[Strain]:
    """Of a step with one sender, the worst first."""
    case, parts, step = result.case, result.one, result.step
    idle, driver, uneven = result.idle(parts), model.driver_gib(case), result.trained.imbalance
    rows, unused = case.rows / case.recipe.parallel.data, 1 - case.devices / result.devices
    found = {
        "idle": (idle, f"{idle:.0%} of the devices' time idle"),
        "sync": (parts.weight_sync / step, f"the one sender: {parts.weight_sync / step:.0%} of the step"),
        "driver_time": (parts.driver / step, f"the driver's time: {parts.driver / step:.0%} of the step"),
        "driver_memory": (driver, f"the driver's memory: {driver:,.0f} GiB"),
        "unused": (unused, f"batch too small: {unused:.0%} of the devices have no row or response"),
        "imbalance": (
            uneven - 1,
            f"batch too small: {rows:g} rows a data rank, the fullest has {uneven:.1f} x the mean",
        ),
        "tail": (result.decoded.tail, f"long responses: engines under half full for {result.decoded.tail:.0%}"),
        "scaling": (1 - scaling, f"a device does {scaling:.0%} of the work that it does at the recipe's size"),
    }
    return sorted((Strain(value / LIMITS[name], text) for name, (value, text) in found.items()), reverse=True)


COLUMNS = (
    "devices",
    "mode",
    "train + engines",
    "step, one sender",
    "step, sharded",
    "idle, one sender",
    "idle, sharded",
    "rollout",
    "driver",
    "statistics",
    "train",
    "sync, one sender",
    "sync, a fast one",
    "sync, sharded",
    "GiB a training device",
    "GiB driver",
    "what breaks, the worst first",
)


def table(case: Case, sizes: Sequence[int], *, grown: bool) -> Iterator[str]:
    """The recipe on each number of devices, sync and one step ahead; grown: with prompts in proportion to them."""
    yield from head(COLUMNS)
    modes = (False,) if case.recipe.parallel.colocate else (False, True)
    own = {ahead: model.simulate(case, ahead=ahead) for ahead in modes}
    for devices in sizes:
        factor = devices / case.devices if grown else 1.0
        here = case._replace(recipe=model.with_prompts(case.recipe, factor))
        for ahead in modes:
            mode = "ahead" if ahead else "sync"
            try:
                result = model.fastest(here, devices, ahead=ahead)
                yield row(cells(result, mode, work(result) / work(own[ahead])))
            except DoesNotFit as error:
                yield row([f"{devices}", mode, *[""] * (len(COLUMNS) - 3), f"does not fit: {error}"])


def first_table(sizes: Sequence[int], device: str) -> Iterator[str]:
    """What breaks first, one step ahead."""
    yield from head(["recipe", "prompts", *(f"{devices} devices" for devices in sizes)])
    for path in RECIPES:
        case = case_of(load_recipe(ROOT / path), device)
        own = work(model.simulate(case, ahead=True))
        for grown in (False, True):
            first = [first_to_break(case, devices, own, grown=grown) for devices in sizes]
            yield row([f"`{Path(path).stem}`", "in proportion" if grown else "the recipe's", *first])


def first_to_break(case: Case, devices: int, own: float, *, grown: bool) -> str:
    recipe = model.with_prompts(case.recipe, devices / case.devices if grown else 1.0)
    try:
        result = model.fastest(case._replace(recipe=recipe), devices, ahead=True)
    except DoesNotFit:
        return "does not fit"
    worst = strains(result, work(result) / own)[0]
    return worst.text if worst.ratio > 1 else "nothing"


def work(result: Result) -> float:
    """Responses a second and device."""
    return result.case.responses / result.step / result.devices


def cells(result: Result, mode: str, scaling: float) -> list[str]:
    case, one, sharded = result.case, result.one, result.sharded
    worst = strains(result, scaling)
    over = [strain.text for strain in worst if strain.ratio > 1]
    fast = model.sync_seconds(case, 1, CONSTANTS.fast_sender_gb_per_s)
    seconds = [one.rollout, one.driver, one.token_stats, one.train, one.weight_sync, fast, sharded.weight_sync]
    return [
        f"{result.devices}",
        mode,
        f"{case.recipe.parallel.world_size} + {case.recipe.rollout.engines} x {case.recipe.rollout.tensor_parallel}",
        *(shown(parts.step(ahead=result.ahead)) for parts in (one, sharded)),
        *(f"{result.idle(parts):.0%}" for parts in (one, sharded)),
        *map(shown, seconds),
        f"{result.device_gib:.0f}",
        f"{model.driver_gib(case):,.0f}",
        "; ".join(over) if over else f"nothing; nearest: {worst[0].text}",
    ]


def page(sizes: Sequence[int], device: str) -> Iterator[str]:
    """docs/scale.md, line by line."""
    yield INTRODUCTION
    yield from constants_table()
    yield ""
    yield from devices_table()
    errors = published.held_out()
    worst, where = max(errors, key=lambda pair: abs(pair[0]))
    middle = statistics.median(abs(error) for error, _ in errors)
    totals = [error for error, what in errors if what.startswith("step ")]
    within = sum(abs(error) <= 0.2 for error in totals)
    yield CHECKED.format(count=len(errors), middle=middle, worst=worst, where=where, within=within, steps=len(totals))
    yield from published.steps_table()
    rates = [getattr(CONSTANTS, entry["at"]) for entry in DATA["syncs"]]
    yield SYNCED.format(factor=max(rates) / min(rates), most=MAX_SENDERS)
    yield from published.syncs_table()
    yield "\nSources:\n"
    yield from (f"- {name}: {text}" for name, text in DATA["sources"].items())
    limits = ", ".join(f"{entry['what']} {entry['value']:g}" for entry in DATA["limits"].values())
    yield SIMULATED.format(device=device, limits=limits)
    yield from first_table(sizes, device)
    yield ""
    for path in RECIPES:
        case = case_of(load_recipe(ROOT / path), device)
        for grown in (False, True):
            prompts = case.recipe.train.prompts_per_step
            yield f"### `{path}`, {'prompts in proportion' if grown else f'{prompts} prompts a step'}\n"
            yield from table(case, sizes, grown=grown)
            yield ""
    yield from sequences_table(device)
    yield UNKNOWN


def constants_table() -> Iterator[str]:
    yield from head(["constant", "value", "unit", "source"])
    for name, entry in DATA["constants"].items():
        yield row([name, f"{entry['value']:g}", entry["unit"], entry["source"]])


def devices_table() -> Iterator[str]:
    yield from head(["device", "10^12 bf16 FLOP/s", "memory GB/s", "GB/s within a node", "GB/s to others", "source"])
    for name, device in DEVICES.items():
        yield row([name, *(f"{value:g}" for value in device), DATA["device_sources"][name]])


def sequences_table(device: str) -> Iterator[str]:
    """Rollouts of the page's recipes as they are placed, by the sequences that an engine decodes at a time."""
    counts = (CONSTANTS.engine_sequences, 256, 512, 1024)
    yield SEQUENCES.format(count=CONSTANTS.engine_sequences)
    yield from head(["recipe", "responses an engine", "room in its cache", *(f"{n}" for n in counts)])
    for path in RECIPES:
        case = case_of(load_recipe(ROOT / path), device)
        placed = [
            case._replace(
                recipe=case.recipe.model_copy(
                    update={"rollout": case.recipe.rollout.model_copy(update={"max_sequences": count})}
                )
            )
            for count in counts
        ]
        each = -(-case.responses // case.recipe.rollout.engines)
        seconds = [shown(model.rollout(c).seconds) for c in placed]
        yield row([f"`{Path(path).stem}`", f"{each}", f"{model.sequences_in_cache(case)}", *seconds])


INTRODUCTION = """# A step on 8, 64, 512 and 4096 devices

Generated: `python -m tools.scale --output docs/scale.md`; of a recipe of yours
`python -m tools.scale RECIPE [section.key=value ...] --device H100 --devices 8 64 --batch grown`. **No number of
seconds here was measured on a GPU of ours**: it is arithmetic on the constants below, held against steps that others
published (`tools/scale/`; data and sources in its `data.yaml`).

A step is rollout + driver + token statistics + train + weight sync; one step ahead (`ahead`) it is the longer of
rollout and driver + token statistics + train, and the sync. A decode step reads the weights that its tokens meet and
the cache of its sequences. Lengths of responses are exponential, cut at the longest, with the mean that the recipe or
the publication names: the last ones are decoded by engines that run empty. Training is FLOPs at a constant rate, times
the fullest data rank's share over the mean, the pipeline's bubble, and gradient reductions that nothing hides. Memory
is that of `--dry-run`.
"""
CHECKED = """
## Published steps

Seconds, **published** / of the model (error). What is marked `fitted` set a constant or, for verl, whose lengths are
not published, the mean response (720 tokens). All else is held out: {count} figures, on which the model errs by
{middle:.0%} in the middle and {worst:+.0%} at worst ({where}); {within} of
{steps} whole steps are within 20 %.
"Never empty" is the model's step if responses of the next one took the place of those that end: NeMo-RL's `1-step off`
works so, with new weights under responses in flight, `rollout.ahead` does not. verl's rows are not of the same batch:
its scripts draw 16 responses a prompt colocated and 12 one step ahead. "Way over" is the weight sync, colocated all
between training and generation (verl: what `gen` takes beyond `generate_sequences`).
"""
SYNCED = """
## Published weight syncs

Seconds. One sender's rate is a property of how it gathers, names and packs: the published ones differ by a factor of
{factor:.0f}. That of our nccl transport is not known, so the tables below give the slow one, which counts in the step,
and a fast one. Sharded is as many senders as the recipe makes (`weight_sync.senders: auto`): one for each share of a
pipeline stage's expert ranks, {most} in all at most where there are no more stages. Published systems are given one for
each stage and group of expert ranks. Every engine device still takes all weights, and that is what bounds it.
"""
SIMULATED = """
## Recipes on {device}

The recipe's mesh and lengths (`estimate.*`), with the division into training and engine devices that makes the step the
shortest. Seconds. Idle: share of all devices' time in which they neither decode nor compute. The driver's GiB are those
of its host. What breaks is judged with one sender; it is said above these limits of ours: {limits}.
In proportion: whole multiples of the recipe's prompts in every update. What breaks first, one step ahead:
"""
SEQUENCES = """## Sequences that an engine decodes at a time

`rollout.max_sequences: null` leaves vLLM's default, which for the engine that OpenRLHF starts is {count}. Seconds of
the rollout as the recipe is placed, by that number, as far as the cache has room:
"""
UNKNOWN = """
## What it does not know

Failures and restarts; slow nodes; congestion; evaluation and checkpoints; graders that are slower than the engines;
responses to a prompt that are alike in length; other laws of length; the exchange of tensor and expert ranks, but for
what the fitted rates hold of it; what each actor costs the driver, which was measured with two engines and two ranks.
The constants come from H100: another device is taken to reach the same share of its peak and bandwidth, and experts the
same rate. Above 256 devices no published step of this kind was found."""
