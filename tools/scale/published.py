"""Published steps and weight syncs beside the model's, and its error on each; which of them fitted a constant."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dcpo_openrlhf.recipe.families import Sizes
from dcpo_openrlhf.recipe.schema import Recipe
from tools.scale import model
from tools.scale.constants import CONSTANTS, DATA, DEVICES
from tools.scale.model import Case, Parts, Result

CONFIGS = Path(__file__).parents[2] / "tests" / "model_configs"


def head(columns: Sequence[str]) -> list[str]:
    return [row(columns), "|" + "---|" * len(columns)]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 9.95 else f"{seconds:.1f}"


class Published(NamedTuple):
    entry: Mapping[str, Any]
    result: Result

    @property
    def seconds(self) -> Parts:
        """NeMo-RL's and verl's ways between their devices are not ours: the sync counts as sharded."""
        return self.result.sharded

    def of(self, part: str) -> float:
        return self.seconds.step(ahead=self.result.ahead) if part == "step" else getattr(self.seconds, part)

    def fitted(self, part: str) -> str:
        """Whether it set a constant or an input, or has a part that did; "": held out."""
        fits = self.entry.get("fits", ())
        partly = part == "step" and {"rollout", "train"} & set(fits)
        return ", fitted" if part in fits else ", partly fitted" if partly else ""

    def error(self, part: str) -> float:
        """Of the model, relative to what was published."""
        return self.of(part) / self.entry["seconds"][part] - 1


def published_steps() -> list[Published]:
    return [
        Published(entry, model.simulate(published_case(entry), ahead=entry.get("ahead", False)))
        for entry in DATA["steps"]
    ]


def published_case(entry: Mapping[str, Any]) -> Case:
    base = {"model": {"path": "unused"}, "task": {"kind": "arithmetic"}, "method": {"target_entropy": 0.3}}
    name = entry["name"].split()[0]
    hf = DATA["models"].get(name) or json.loads((CONFIGS / f"{name}.json").read_text())
    theirs = dataclasses.replace(CONSTANTS, driver_response_seconds=0.0, driver_token_seconds=0.0)  # no driver of ours
    recipe = Recipe.model_validate(base | entry["recipe"])
    shares = recipe.parallel.pipeline * recipe.parallel.expert  # a sender each
    return Case(recipe, Sizes.of(hf), DEVICES[entry["device"]], theirs, senders=shares)


def steps_table() -> Iterator[str]:
    names = ("rollout", "token_stats", "train", "weight_sync", "step")
    yield from head(
        ["model and devices", "source", "mode", "rollout", "statistics", "train", "way over", "step", "never empty"]
    )
    for found in published_steps():
        mode = "ahead" if found.result.ahead else "sync"
        yield row(
            [found.entry["name"], found.entry["source"], mode, *(compared(found, name) for name in names), bound(found)]
        )


def compared(found: Published, part: str) -> str:
    seconds = found.entry["seconds"].get(part)
    if seconds is None:
        return shown(found.of(part))
    return f"**{seconds:g}** / {shown(found.of(part))} ({found.error(part):+.0%}{found.fitted(part)})"


def bound(found: Published) -> str:
    """The step where the engines never ran empty."""
    if not found.result.ahead:
        return ""
    parts = found.seconds._replace(rollout=found.result.decoded.never_empty)
    return shown(parts.step(ahead=True))


def sync_error(entry: Mapping[str, Any]) -> tuple[float, float]:
    """(seconds of the model, error against the middle of what was published)."""
    d = DEVICES["H100"]
    seconds = model.transfer_seconds(
        entry["gb"], entry["senders"], getattr(CONSTANTS, entry["at"]), CONSTANTS.network_share * d.network_gb_per_s
    )
    return seconds, seconds / (sum(entry["seconds"]) / 2) - 1


def syncs_table() -> Iterator[str]:
    yield from head(["model", "source", "GB", "how", "published", "model (error)"])
    for e in DATA["syncs"]:
        seconds, error = sync_error(e)
        fitted = ", fitted" if e.get("fits") else ""
        how = f"{e['senders']} sender{'s' * (e['senders'] > 1)} at {getattr(CONSTANTS, e['at']):g} GB/s"
        yield row(
            [
                e["name"],
                e["source"],
                f"{e['gb']:g}",
                how,
                span(e["seconds"]),
                f"{shown(seconds)} ({error:+.0%}{fitted})",
            ]
        )
    for e in DATA["other_syncs"]:
        yield row([e["name"], e["source"], "", e["way"], span(e["seconds"]), "not modelled"])


def span(seconds: Sequence[float]) -> str:
    low, high = seconds
    return f"**{low:g}**" if low == high else f"**{low:g} to {high:g}**"


def held_out() -> list[tuple[float, str]]:
    """(error, what) of every published second of a step that fitted nothing."""
    return [
        (found.error(part), f"{part} of {found.entry['name']}, {found.entry['source']}")
        for found in published_steps()
        for part in found.entry["seconds"]
        if not found.fitted(part)
    ]
