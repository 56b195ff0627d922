"""What one step takes on N devices: seconds of its parts, idle shares, memory. Numbers in, numbers out; no torch.

FLOPs are counted as in monitor/cost.py, memory is that of the plan (recipe/memory.py, recipe/moving.py), rows are dealt
as in policy/rows.py. docs/scale.md holds it against published steps.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from dcpo_openrlhf.recipe import memory, moving
from dcpo_openrlhf.recipe.families import Sizes
from dcpo_openrlhf.recipe.memory import BYTES, GIB
from dcpo_openrlhf.recipe.schema import Recipe
from tools.scale.constants import Constants, Device

NODE = 8
"""Devices of a node."""


@dataclass(frozen=True)
class Lengths:
    """Response lengths [tokens] with this mean: exponential, cut at the longest that is allowed."""

    mean: float
    longest: float

    @property
    def scale(self) -> float:
        """s of s * (1 - exp(-longest / s)) = mean; infinite where every response is cut."""
        if self.mean >= self.longest:
            return math.inf
        low, high = 1e-3, 1e9
        for _ in range(100):
            s = math.sqrt(low * high)
            low, high = (s, high) if -s * math.expm1(-self.longest / s) < self.mean else (low, s)
        return low

    def at(self, share: np.ndarray) -> np.ndarray:
        """Lengths that these shares of all responses do not exceed."""
        scale = self.scale
        return np.minimum(-scale * np.log1p(-share), self.longest) if scale < math.inf else share * 0 + self.longest

    def of(self, count: int, among: int | None = None) -> np.ndarray:
        """Lengths of `count` responses, ascending, one of which is the longest of `among`."""
        lengths = self.at((np.arange(count) + 0.5) / count)
        lengths[-1] = self.at(np.array([1 - 0.5 / max(among or count, count)]))[0]
        return np.ceil(lengths)


class Parts(NamedTuple):
    """Seconds of a step's parts."""

    rollout: float
    driver: float
    token_stats: float
    train: float
    weight_sync: float

    def step(self, *, ahead: bool) -> float:
        """One after the other; ahead: the next step's responses are made meanwhile, between two weight syncs."""
        trained = self.driver + self.token_stats + self.train
        return (max(self.rollout, trained) if ahead else self.rollout + trained) + self.weight_sync


class Case(NamedTuple):
    """What is simulated."""

    recipe: Recipe
    sizes: Sizes
    device: Device
    constants: Constants
    senders: int = 0
    """Of another system's sharded weight sync; 0: as many as the recipe makes."""

    @property
    def lengths(self) -> Lengths:
        longest = self.recipe.rollout.max_new_tokens
        return Lengths(min(self.recipe.estimate.response_tokens, longest), longest)

    @property
    def prompt(self) -> int:
        return min(self.recipe.estimate.prompt_tokens, self.recipe.rollout.max_prompt_tokens)

    @property
    def responses(self) -> int:
        return self.recipe.train.prompts_per_step * self.recipe.train.group_size

    @property
    def rows(self) -> int:
        """Of an update."""
        return self.recipe.train.prompts_per_update * self.recipe.train.group_size

    @property
    def flops_per_second(self) -> float:
        """Of one training device."""
        rate = self.constants.train_mfu * self.device.bf16_tflops
        return 1e12 * (min(rate, self.constants.expert_tflops) if self.sizes.experts else rate)

    @property
    def engine_devices(self) -> int:
        return self.recipe.rollout.engines * self.recipe.rollout.tensor_parallel

    @property
    def devices(self) -> int:
        """That have work."""
        p = self.recipe.parallel
        return p.world_size + (0 if p.colocate else self.engine_devices)


# --- rollout ---


class Decoded(NamedTuple):
    seconds: float
    tail: float
    """Share of them with less than half of the first batch in hand."""
    never_empty: float = 0.0
    """Seconds of the same tokens where responses of the next step take the place of those that end."""


def rollout(case: Case) -> Decoded:
    """An engine's share of the step's responses, the longest of all among them; its prompts are computed once."""
    s, r, c = case.sizes, case.recipe.rollout, case.constants
    each = -(-case.responses // r.engines)
    slots = max(min(r.max_sequences or c.engine_sequences, sequences_in_cache(case)), 1)
    lengths = case.lengths.of(each, case.responses)
    np.random.default_rng(0).shuffle(lengths)
    step = decode_step(case)
    found = decode(lengths.tolist(), case.prompt, slots, step)
    prompts = -(-each // case.recipe.train.group_size) * case.prompt
    prefill = 2 * s.active_parameters * prompts / (case.flops_per_second * r.tensor_parallel)
    batch = min(slots, 2 * each)
    context = case.prompt + (lengths**2).mean() / lengths.mean() / 2  # of a sequence at a random moment
    steady = lengths.sum() / batch * step(batch, batch * context)
    return Decoded(found.seconds + prefill, found.tail, steady + prefill)


def sequences_in_cache(case: Case) -> int:
    """Of mean length, in an engine's."""
    return int(memory.engine_memory(case.sizes, case.recipe).kv_tokens // (case.prompt + case.lengths.mean))


def decode_step(case: Case) -> Callable[[float, float], float]:
    """(sequences, tokens in their cache) -> seconds of one decode step of an engine."""
    s, d, c, tensor = case.sizes, case.device, case.constants, case.recipe.rollout.tensor_parallel
    element = BYTES[case.recipe.engine_dtype]
    bandwidth = c.decode_efficiency * 1e9 * d.memory_gb_per_s * tensor
    rate = case.flops_per_second * tensor
    token = 2 * s.layers * s.key * max(tensor // s.kv_heads, 1) * element
    read = s.parameters - s.expert_parameters - (0 if s.tied else s.vocab * s.hidden)
    missed = 1 - s.experts_per_token / s.experts if s.experts else 0.0

    def seconds(sequences: float, cached: float) -> float:
        weights = element * (read + s.expert_parameters * (1 - missed**sequences))  # of experts that a token meets
        multiplied = 2 * s.active_parameters * sequences / rate
        return max(weights / bandwidth, multiplied) + cached * token / bandwidth + s.layers * c.decode_layer_seconds

    return seconds


def decode(lengths: Sequence[float], prompt: int, slots: int, step: Callable[[float, float], float]) -> Decoded:
    """Continuous batching: `slots` sequences at a time, in this order; every step gives each one token."""
    waiting = list(reversed(lengths))
    ends: list[float] = []
    now, seconds, half, cached = 0.0, 0.0, 0.0, 0.0
    full = min(slots, len(lengths))
    while waiting or ends:
        while waiting and len(ends) < slots:
            heapq.heappush(ends, now + waiting.pop())
            cached += prompt
        count, steps = len(ends), ends[0] - now
        taken = steps * step(count, cached + count * steps / 2)
        seconds, half = seconds + taken, half + taken * (2 * count < full)
        now, cached = ends[0], cached + count * steps
        while ends and ends[0] <= now:
            heapq.heappop(ends)
        cached *= len(ends) / count  # those that end take a mean share of the cache along
    return Decoded(seconds, half / seconds if seconds else 0.0)


# --- training ---


def forward_flops(case: Case, lengths: np.ndarray) -> float:
    """Of one forward over rows of these response lengths, in whole groups; as monitor/cost.py counts them."""
    s, recipe, p = case.sizes, case.recipe, case.prompt
    again = len(lengths) * (1 - 1 / recipe.train.group_size) if recipe.shares_prompts else 0.0
    tokens = float((lengths + p).sum()) - again * p
    pairs = float(((lengths + p) ** 2).sum()) - again * p**2
    return 2 * s.active_parameters * tokens + 2 * s.layers * s.query * pairs


@cache
def imbalance(lengths: Lengths, prompt: int, rows: int, ranks: int) -> float:
    """Tokens of the fullest data rank over the mean, rows dealt longest first, to and fro (Rows.part)."""
    tokens = lengths.of(rows) + prompt
    tokens = np.resize(tokens, -(-rows // ranks) * ranks)  # the first rows fill up the last round
    dealt = np.sort(tokens)[::-1].reshape(-1, ranks).copy()
    dealt[1::2] = dealt[1::2, ::-1]
    return float(dealt.sum(0).max() * ranks / (lengths.of(rows) + prompt).sum())


class Trained(NamedTuple):
    token_stats: float
    train: float
    imbalance: float


def training(case: Case) -> Trained:
    """Token statistics (and the starting model's) and the updates: work of the fullest rank, bubble, reduction."""
    p, t = case.recipe.parallel, case.recipe.train
    lengths = case.lengths.of(case.rows)
    uneven = imbalance(case.lengths, case.prompt, case.rows, p.data)
    forward = forward_flops(case, lengths) * uneven / (p.world_size * case.flops_per_second)
    forward *= 1 + (p.pipeline - 1) / (p.virtual_pipeline * micro_batches(case, float(lengths.mean())))
    forwards = 2 if case.recipe.kl.coefficient else 1
    passes = 4 if t.recompute == "full" else 3
    updates = case.recipe.updates_per_step
    return Trained(updates * forwards * forward, updates * (passes * forward + reduction_seconds(case)), uneven)


def micro_batches(case: Case, length: float) -> int:
    """Of one data rank in an update."""
    t, rows = case.recipe.train, case.rows / case.recipe.parallel.data
    if t.micro_batch_tokens is None:
        return max(math.ceil(rows / t.micro_batch_size), 1)
    prompt = case.prompt / (t.group_size if case.recipe.shares_prompts else 1)
    return max(math.ceil(rows * (length + prompt) / t.micro_batch_tokens), 1)


def reduction_seconds(case: Case) -> float:
    """Of an update: fp32 gradients scattered and weights gathered over the data ranks, in rings, nothing hidden."""
    p, d = case.recipe.parallel, case.device
    ranks = p.data * p.context
    held = max(memory.stage_memory(case.sizes, case.recipe, stage).gradients for stage in range(p.pipeline))
    rate = d.node_gb_per_s if p.world_size <= NODE else d.network_gb_per_s
    return held * (1 + BYTES[case.recipe.model.dtype] / 4) * (ranks - 1) / ranks / (1e9 * rate)


# --- weight sync, driver ---


def weight_bytes(case: Case) -> float:
    return case.sizes.parameters * BYTES[case.recipe.engine_dtype]


def sync_seconds(case: Case, count: int, sender_gb_per_s: float | None = None) -> float:
    """Of `count` senders, each of which broadcasts its share to every engine device; colocated: what that takes."""
    c, d = case.constants, case.device
    if case.recipe.parallel.colocate:
        return c.colocated_seconds
    each = sender_gb_per_s or (c.expert_sender_gb_per_s if case.sizes.experts else c.sender_gb_per_s)
    rate = d.node_gb_per_s if case.devices <= NODE else d.network_gb_per_s
    return transfer_seconds(weight_bytes(case) / 1e9, count, each, c.network_share * rate)


def transfer_seconds(gb: float, count: int, sender: float, receiver: float) -> float:
    """Of `count` senders together, or of a receiver, which takes all of it; rates in GB/s."""
    return gb / min(count * sender, receiver)


def padded_row(case: Case) -> float:
    """Tokens of a row on the driver: an update's are padded to its longest."""
    return case.prompt + float(case.lengths.of(case.rows)[-1])


def driver_seconds(case: Case) -> float:
    c = case.constants
    return case.responses * (c.driver_response_seconds + c.driver_token_seconds * padded_row(case))


def driver_gib(case: Case) -> float:
    """Of the driver's host."""
    c = case.constants
    return c.driver_base_gib + case.responses * padded_row(case) * c.driver_token_bytes / GIB


# --- a step on N devices ---


class Result(NamedTuple):
    case: Case
    devices: int
    """There are."""
    ahead: bool
    one: Parts
    """With one sender."""
    sharded: Parts
    """With as many senders as the case has."""
    decoded: Decoded
    trained: Trained

    @property
    def step(self) -> float:
        return self.one.step(ahead=self.ahead)

    def idle(self, parts: Parts) -> float:
        """Share of all devices' time in which they neither decode nor compute."""
        p = self.case.recipe.parallel
        step = parts.step(ahead=self.ahead)
        trained = p.world_size * (parts.token_stats + parts.train)
        return 1 - (trained + self.case.engine_devices * parts.rollout) / (self.devices * step)

    @property
    def device_gib(self) -> float:
        """Of the fullest training device, in training or in a weight sync."""
        s, recipe = self.case.sizes, self.case.recipe
        return max(memory.trainer_memory(s, recipe).total, moving.sync_memory(s, recipe).total) / GIB


def simulate(case: Case, *, devices: int | None = None, ahead: bool = False) -> Result:
    """The recipe as it is placed; devices: how many there are, those that have work by default."""
    made, trained = rollout(case), training(case)
    one, sharded = (
        Parts(made.seconds, driver_seconds(case), trained.token_stats, trained.train, sync_seconds(case, count))
        for count in (1, case.senders or case.recipe.senders)
    )
    return Result(case, devices or case.devices, ahead, one, sharded, made, trained)


class DoesNotFit(ValueError):
    """No way to place the recipe on so many devices: says why."""


def fastest(case: Case, devices: int, *, ahead: bool) -> Result:
    """The recipe's mesh, with the division into training and engine devices whose step is the shortest.

    Raises DoesNotFit.
    """
    placed = list(placements(case, devices))
    if not placed:
        p = case.recipe.parallel
        raise DoesNotFit(
            f"the mesh takes {mesh_unit(case.recipe)} training devices or a multiple with data ranks that divide "
            f"{case.rows} rows"
            + ("" if p.colocate else f", an engine {case.recipe.rollout.tensor_parallel}")
            + f"; there are {devices}"
        )
    wrong = [next(violations(c), "") for c in placed]
    fitting = [c for c, text in zip(placed, wrong, strict=True) if not text]
    if not fitting:
        raise DoesNotFit(wrong[-1])
    return min((simulate(c, devices=devices, ahead=ahead) for c in fitting), key=lambda result: result.step)


def violations(case: Case) -> Iterator[str]:
    """What does not fit into a device."""
    yield from memory.violations(case.sizes, case.recipe)
    yield from moving.violations(case.sizes, case.recipe)


def mesh_unit(recipe: Recipe) -> int:
    p = recipe.parallel
    return math.lcm(p.tensor * p.pipeline * p.context, p.expert * p.pipeline)


def placements(case: Case, devices: int) -> Iterator[Case]:
    """Training devices in whole meshes whose data ranks divide an update's rows, ascending; engines on the others."""
    recipe, unit = case.recipe, mesh_unit(case.recipe)
    split = recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context
    for training_devices in range(unit, devices + 1, unit):
        left = devices if recipe.parallel.colocate else devices - training_devices
        engines = min(left // recipe.rollout.tensor_parallel, case.responses)
        if engines >= 1 and case.rows % (training_devices // split) == 0:
            yield case._replace(recipe=placed(recipe, training_devices, engines))


def placed(recipe: Recipe, training_devices: int, engines: int) -> Recipe:
    """The recipe on so many training devices and engines."""
    each = max(n for n in range(1, NODE + 1) if training_devices % n == 0)
    parallel = recipe.parallel.model_copy(update={"nodes": training_devices // each, "devices_per_node": each})
    rollout = recipe.rollout.model_copy(update={"engines": engines})
    return recipe.model_copy(update={"parallel": parallel, "rollout": rollout})


def with_prompts(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with about so many times the prompts in an update and in a step."""
    each = recipe.train.prompts_per_update
    each = each * round(factor) if factor >= 1 else max(round(each * factor), 1)  # whole multiples: rows divide evenly
    update = {"prompts_per_update": each, "prompts_per_step": each * recipe.updates_per_step}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})
