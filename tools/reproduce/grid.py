"""The grid of runs: a cell is a recipe and keys, a run a cell and a seed. tables.py says which table asks for which."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RECIPES = {"small": ROOT / "tools/reproduce/small.yaml", "smollm2": ROOT / "recipes/dcpo-smollm2-135m-cpu.yaml"}
SEEDS = {"small": (1, 2, 3, 4, 5), "smollm2": (1, 2, 3)}
NOT_IN_THE_NUMBERS = ("run", "checkpoint", "monitor")
"""Sections that a run's identity leaves out."""


@dataclass(frozen=True)
class Cell:
    """One column of numbers: a recipe of RECIPES with these keys, over all seeds."""

    name: str
    label: str
    keys: dict[str, Any] = field(hash=False)
    model: str = "small"

    @cached_property
    def identity(self) -> str:
        """What tells this cell's runs from those of another recipe or other keys."""
        base = {k: v for k, v in _layered(RECIPES[self.model]).items() if k not in NOT_IN_THE_NUMBERS}
        base.get("model", {}).pop("path", None)
        return hashlib.sha256(json.dumps([base, self.keys], sort_keys=True).encode()).hexdigest()[:12]

    def overrides(self, seed: int) -> list[str]:
        """What `load_recipe` lays over the recipe."""
        values = {**self.keys, "run.seed": seed}
        return [
            f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}" for key, value in values.items()
        ]


def _layered(path: Path) -> dict[str, Any]:
    """The recipe's own keys over those of its base."""
    own = yaml.safe_load(path.read_text())
    base = _layered(path.parent / own.pop("base")) if "base" in own else {}
    for section, keys in own.items():
        base[section] = base.get(section, {}) | keys
    return base


@dataclass(frozen=True)
class Run:
    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell.model}/{self.cell.name}/seed{self.seed}"


TARGET = 0.8
"""H_0 [nats/token] of every table but Figure 2 and Table 4; the small model starts at 1.2."""
LEVELS = {0.4: "dcpo-h0.4", 0.6: "dcpo-h0.6", TARGET: "dcpo", 1.0: "dcpo-h1"}
"""H_0 [nats/token] of Figure 2 and Table 4 -> its cell."""


def small(name: str, label: str, method: str, **keys: Any) -> Cell:
    """A cell on the small model: keys of the section `method` by their names, others as section__key."""
    own = {} if method == "grpo" else {"target_entropy": TARGET}  # which is nothing to GRPO
    full = {k.replace("__", ".") if "__" in k else f"method.{k}": v for k, v in (own | keys).items()}
    return Cell(name, label, {"method.name": method} | full)


HOLDING: dict[str, Any] = {"alpha_schedule": "pi", "alpha_max": 2.0, "temperature_low": 0.5, "temperature_high": 2.0}
"""Constants with which the regulariser can hold the small model's entropy; the paper's are the schema's defaults."""
OWN_CLIP: dict[str, dict[str, Any]] = {
    "clip_cov": {"loss__clip_low": 1.0, "loss__clip_high": 1.0},
    "kl_cov": {"loss__clip_low": 1.0, "loss__clip_high": 1e6},
}
"""Bounds of the ratio that these two are defined with (docs/methods.md)."""
REGULARISED = ("dcpo", "j1", "j2", "j3", "j4", "dcpo_wo_double_is", "dcpo_wo_reinforce")
OTHERS = ("entropy_reg", "entropy_adv", "aepo", "scope_rl", "clip_cov", "kl_cov", "adaptive_entropy", "entropic")


def _cells() -> Iterator[Cell]:
    yield small("grpo", "grpo", "grpo")
    for name in REGULARISED:
        yield small(name, f"dcpo, H_0 = {TARGET:g}" if name == "dcpo" else name, name, **HOLDING)
        yield small(f"{name}-paper", f"{name}, the paper's constants", name)
    for name in OTHERS:
        yield small(name, name, name, **OWN_CLIP.get(name, {}))
    for level, name in LEVELS.items():
        if name != "dcpo":
            yield small(name, f"dcpo, H_0 = {level:g}", "dcpo", **HOLDING | {"target_entropy": level})
    yield from QUESTIONS
    yield SLOW_GRPO
    yield from AFTERWARDS
    yield from SOLVED
    yield from _headline()


def _questions() -> Iterator[Cell]:
    """One key of dcpo changed at a time: the questions that paper and code leave open."""
    asked: dict[str, dict[str, Any]] = {
        "reference, alpha_max 2": HOLDING | {"alpha_schedule": "reference"},
        "reference, alpha_max 0.3": HOLDING | {"alpha_schedule": "reference", "alpha_max": 0.3},
        "the paper's schedule": HOLDING | {"alpha_schedule": "paper"},
        "constant 0.3": HOLDING | {"alpha_schedule": "constant", "alpha_max": 0.3},
        "additive": HOLDING | {"mixing": "additive"},
        "lagged_sampled": HOLDING | {"entropy_source": "lagged_sampled"},
        "continuous": HOLDING | {"alpha_schedule": "reference", "temperature_rule": "continuous"},
        "T_high 1.2": HOLDING | {"temperature_low": 0.8, "temperature_high": 1.2},
        "T_high 3": HOLDING | {"temperature_high": 3.0},
        "alpha_max 1": HOLDING | {"alpha_max": 1.0},
        "learning rate / 3": HOLDING | {"optimizer__learning_rate": 1.0e-4},
        "learning rate / 3, the paper's constants": {"optimizer__learning_rate": 1.0e-4},
        "dcpo_expected": HOLDING | {"name": "dcpo_expected"},
        "ahead 1": HOLDING | {"rollout__ahead": 1},
        "ahead 1, corrected": HOLDING | {"rollout__ahead": 1, "correction__level": "token", "correction__mode": "clip"},
    }
    for label, keys in asked.items():
        slug = "".join(c if c.isalnum() or c in "._" else "-" for c in label).replace("--", "-").strip("-")
        yield small(
            f"dcpo-{slug}", f"dcpo, {label}", keys.get("name", "dcpo"), **{k: v for k, v in keys.items() if k != "name"}
        )


QUESTIONS = tuple(_questions())
SLOW_GRPO = small("grpo-learning-rate--3", "grpo, learning rate / 3", "grpo", optimizer__learning_rate=1.0e-4)
"""Beside the runs of dcpo at that rate: what of it is the rate's."""
LONG = 240
"""Steps of the runs that go on where those of the other tables end, at 60."""
AFTERWARDS = (
    small("grpo-long", f"grpo, {LONG} steps", "grpo", train__steps=LONG),
    small(
        "dcpo-h0.4-long",
        f"dcpo, H_0 = 0.4, {LONG} steps",
        "dcpo",
        **HOLDING | {"target_entropy": 0.4, "train__steps": LONG},
    ),
    small("dcpo-long", f"dcpo, H_0 = {TARGET:g}, {LONG} steps", "dcpo", **HOLDING, train__steps=LONG),
)
_EASY: dict[str, Any] = {"reward__function": "tools.reproduce.tasks:grade_easy", "train__steps": LONG}
SOLVED = (
    small("grpo-easy", "grpo, easy", "grpo", **_EASY),
    small("dcpo-easy", f"dcpo, H_0 = {TARGET:g}, easy", "dcpo", **HOLDING, **_EASY),
    small("dcpo-paper-easy", "dcpo, the paper's constants, easy", "dcpo", **_EASY),
)
"""Where most groups are all right from the start, so that GRPO's advantage, and its pull on the entropy, is small."""


def _headline() -> Iterator[Cell]:
    yield Cell("dcpo-demo", "dcpo, SmolLM2-135M", {"method.name": "dcpo"}, model="smollm2")
    yield Cell("grpo-demo", "grpo, SmolLM2-135M", {"method.name": "grpo"}, model="smollm2")


CELLS: dict[str, Cell] = {cell.name: cell for cell in _cells()}
