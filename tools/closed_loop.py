"""Every method in a closed loop on a tabular policy: python -m tools.closed_loop > docs/closed_loop.md

The maths is the package's own (controller, methods, objectives). Policy, task and optimizer are as small as they can
be: one logit for each token in each state, responses of one token, some good tokens a state, plain SGD.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dcpo_openrlhf import methods, objectives
from dcpo_openrlhf.controller import ControllerDecision, EntropyController, SampleWeight, SteppedCoefficient, Target
from dcpo_openrlhf.methods import METHODS
from dcpo_openrlhf.recipe.method import Method as Settings

STATES, TOKENS, GOOD = 8, 32, 4
SUCCESS = {"good": 0.7, "other": 0.2}
"""How often a token of either kind is right: with rewards by chance alone the policy gradient never comes to rest."""
SPREAD = 2.0
"""Standard deviation of the first logits."""
PROMPTS, GROUP, UPDATES = 64, 8, 4
STEPS, SEEDS, LAST = 400, 3, 50
TARGET, LEARNING_RATE = 1.0, 1.0
AEPO_SHARE = 0.25
SHOWN = (1, 100, 200, 300)
"""Steps whose entropy the page shows, beside the last ones."""

STRONG_LAMBDA: dict[str, Any] = {"adaptive_entropy_step": 0.002, "adaptive_entropy_max": 0.2}
MORE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dcpo", {"alpha_max": 1.0}),
    ("dcpo", {"alpha_max": 1.0, "alpha_schedule": "pi"}),
    ("dcpo_expected", {"alpha_max": 1.0}),
    ("scope_rl", {"scope_weight": 0.25}),
    ("clip_cov", {"clip_cov_share": 0.2, "clip_cov_low": 0.1}),
    ("kl_cov", {"kl_cov_share": 0.2}),
    ("adaptive_entropy", STRONG_LAMBDA),
    ("adaptive_entropy", STRONG_LAMBDA | {"target_schedule": "linear", "target_entropy_end": 0.5}),
    ("entropic", {"entropic_threshold": 0.0}),
    ("entropic", {"entropic_threshold": 0.0, "entropic_integral": 0.0, "entropic_proportional": 4.0}),
)
"""Further lines, since constants made for long answers and learning rates around 1e-6 are weak here."""


@dataclass(frozen=True)
class Batch:
    """Responses of one token. Tensors are [rows]."""

    state: Tensor
    token: Tensor
    success: Tensor
    old_logp: Tensor
    tempered: bool
    """Drawn from pi_old^T."""
    terms: tuple[Tensor, ...] = ()
    penalty: Tensor | None = None
    expected: Tensor | None = None

    def __len__(self) -> int:
        return len(self.token)

    def take(self, rows: Tensor) -> "Batch":
        def some(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(some, value))
            return value[rows] if isinstance(value, Tensor) else value

        return Batch(**{f.name: some(getattr(self, f.name)) for f in fields(self)})


class Loop:
    """One run: a tabular policy, its task, and the method that trains it."""

    def __init__(self, settings: Settings, *, seed: int, steps: int) -> None:
        self.settings, self.method, self.seed, self.step = settings, METHODS[settings.name], seed, 0
        self.draw = torch.Generator().manual_seed(seed)
        self.logits = SPREAD * torch.randn(STATES, TOKENS, generator=self.draw, dtype=torch.float64)
        good = torch.rand(STATES, TOKENS, generator=self.draw).topk(GOOD).indices
        rates = torch.full((STATES, TOKENS), SUCCESS["other"], dtype=torch.float64)
        self.success_rate = rates.scatter(1, good, SUCCESS["good"])
        self.controller = controller_of(settings, steps=steps)
        self.constants = methods.Constants.of(settings)

    def train(self) -> tuple[float, float]:
        """(entropy [nats/token], success rate) of a step's responses, before the step's updates."""
        self.step += 1
        prompts = torch.arange(PROMPTS) % STATES
        batch = self.respond(prompts)
        entropy, rate = float(_entropy(self.logits[batch.state]).mean()), float(batch.success.mean())
        decision = self.controller.step(entropy, -float(batch.old_logp.mean()), rate)
        parts = [batch.take(rows) for rows in torch.arange(len(batch)).chunk(UPDATES)]
        parts = [self.with_advantages(part, decision, update=i) for i, part in enumerate(parts)]
        extras: list[Batch | None] = [None] * UPDATES
        if self.method.samples == "policy+tempered":
            extras = self.tempered(prompts, decision)
        for part, extra in zip(parts, extras, strict=True):
            self.update(part, extra, decision)
        return entropy, rate

    def respond(self, prompts: Tensor, temperature: float = 1.0, *, tempered: bool = False) -> Batch:
        """G responses of pi_old^T to each prompt, with log pi_old at T = 1."""
        state = prompts.repeat_interleave(GROUP)
        logits = self.logits[state]
        token = torch.multinomial((logits / temperature).softmax(1), 1, generator=self.draw)[:, 0]
        success = torch.bernoulli(self.success_rate[state, token], generator=self.draw)
        return Batch(state, token, success, _chosen(logits.log_softmax(1), token), tempered)

    def with_advantages(self, b: Batch, decision: ControllerDecision, *, update: int = 0) -> Batch:
        """The batch with what its method makes of it, as the experience maker does it."""
        logits = self.logits[b.state]
        rho = (_chosen((logits / decision.temperature).log_softmax(1), b.token) - b.old_logp).exp()
        group = torch.zeros_like(b.success)
        if not b.tempered:
            group = objectives.group_advantage(reward=b.success, group_size=GROUP)
        alpha, mixing = decision.alpha if self.method.uses_alpha else 0.0, self.settings.mixing
        old_logp, mask = b.old_logp[:, None], torch.ones_like(b.old_logp)[:, None]
        terms = methods.method_advantage(
            self.method,
            group_advantage=group,
            success=b.success,
            target_ratio=rho[:, None],
            entropy=_entropy(logits)[:, None],
            alpha=alpha,
            mixing=mixing,
            tempered_rows=torch.full_like(b.success, b.tempered, dtype=torch.bool),
            old_logp=old_logp,
            mask=mask,
            sample_weight=decision.sample_weight,
            seed=(self.seed * 2**20 + self.step) * UPDATES + update,
            constants=self.constants,
        )
        penalty = methods.penalty_weight(
            self.method, group_advantage=group, old_logp=old_logp, mask=mask, constants=self.constants
        )
        return replace(
            b,
            terms=tuple(term[:, 0] for term in terms),
            penalty=None if penalty is None else penalty[:, 0],
            expected=methods.expected_weight(self.method, success=b.success, alpha=alpha, mixing=mixing),
        )

    def tempered(self, prompts: Tensor, decision: ControllerDecision) -> list[Batch | None]:
        """Rows drawn from pi_old^T for each update; None where there is none."""
        m = self.method
        share = self.settings.scope_share if m.positive_rows else AEPO_SHARE if m.replaces_rows else 1.0
        drawn = self.respond(prompts[: math.ceil(share * PROMPTS)], decision.temperature, tempered=True)
        chosen = torch.arange(len(drawn))
        if m.positive_rows:
            chosen = drawn.success.nonzero()[:, 0]
        if m.replaces_rows:
            chosen = methods.aepo_rows(
                group_advantage=objectives.group_advantage(reward=drawn.success, group_size=GROUP),
                above_target=decision.entropy > decision.target_entropy,
                limit=self.settings.aepo_max_rows,
            )
        chosen = chosen[torch.randperm(len(chosen), generator=self.draw)]
        shares = [chosen[i::UPDATES] for i in range(UPDATES)]
        return [self.with_advantages(drawn.take(some), decision) if len(some) else None for some in shares]

    def update(self, part: Batch, extra: Batch | None, decision: ControllerDecision) -> None:
        """One SGD step on the objective over the rows of both kinds."""
        if extra is not None and self.method.replaces_rows:
            part = part.take(torch.randperm(len(part), generator=self.draw)[len(extra) :])
        batches = [part] if extra is None else [part, extra]
        rows = sum(map(len, batches))
        table = self.logits.clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for b in batches:
            scale = rows / len(b) if self.method.separate_averages else 1.0
            loss = loss + self._loss_sum(b, table, scale, decision) / rows
        (gradient,) = torch.autograd.grad(loss, table)
        self.logits = self.logits - LEARNING_RATE * gradient

    def _loss_sum(self, b: Batch, table: Tensor, scale: float, decision: ControllerDecision) -> Tensor:
        logits = table[b.state]
        log_pi = logits.log_softmax(1)
        m, expected_logp = self.method, None
        if m.expected_regulariser:
            expected_logp = ((logits.detach() / decision.temperature).softmax(1) * log_pi).sum(1)
        coefficient = decision.entropy_coefficient if m.adaptive_coefficient else self.settings.entropy_coefficient
        clip_low, clip_high = CLIP.get(self.settings.name, (0.2, 0.2))
        return objectives.objective_terms(
            logp=_chosen(log_pi, b.token),
            old_logp=b.old_logp,
            advantages=b.terms,
            weight=torch.full_like(b.old_logp, scale),
            mask=torch.ones_like(b.old_logp),
            clip_low=clip_low,
            clip_high=clip_high,
            entropy=_entropy(logits) if m.entropy_gradient else None,
            entropy_coefficient=coefficient,
            expected_logp=expected_logp,
            expected_weight=b.expected,
            penalty_weight=b.penalty,
        ).loss_sum


def controller_of(m: Settings, *, steps: int) -> EntropyController:
    """As `assemble.make_controller` makes it, which needs engines and trainers installed."""
    names = ("temperature_low", "temperature_high", "alpha_schedule", "alpha_max", "proportional_gain", "integral_gain")
    return EntropyController(
        target_entropy=Target(start=m.target_entropy, end=m.target_entropy_end, course=m.target_schedule, steps=steps),
        temperature_rule="continuous" if METHODS[m.name].continuous_temperature else m.temperature_rule,
        coefficient=SteppedCoefficient(change=m.adaptive_entropy_step, largest=m.adaptive_entropy_max),
        sample_weight=SampleWeight(proportional=m.entropic_proportional, integral=m.entropic_integral),
        **{name: getattr(m, name) for name in names},
    )


CLIP = {"clip_cov": (1.0, 1.0), "kl_cov": (1.0, 1e6)}
"""Bounds of rows whose recipes set their own."""


def _chosen(values: Tensor, token: Tensor) -> Tensor:
    return values.gather(1, token[:, None])[:, 0]


def _entropy(logits: Tensor) -> Tensor:
    log_pi = logits.log_softmax(1)
    return -(log_pi.exp() * log_pi).sum(1)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, what differs from its defaults) of each line."""
    for name in METHODS:
        yield name, {}
        yield from (case for case in MORE if case[0] == name)


def curves(name: str, changes: dict[str, Any], *, steps: int, seeds: int) -> list[list[tuple[float, float]]]:
    """(entropy, success rate) of every step, for each seed."""
    settings = Settings(**{"name": name, "target_entropy": TARGET, **changes})
    loops = [Loop(settings, seed=seed, steps=steps) for seed in range(seeds)]
    return [[loop.train() for _ in range(steps)] for loop in loops]


def row(name: str, changes: dict[str, Any], found: list[list[tuple[float, float]]]) -> str:
    """One line of the table: means over the seeds, the last steps with their range over the seeds."""
    last = [[statistics.fmean(x) for x in zip(*curve[-LAST:], strict=True)] for curve in found]
    entropies, rates = zip(*last, strict=True)
    shown = [
        f"{statistics.fmean(curve[step - 1][0] for curve in found):.2f}" for step in SHOWN if step <= len(found[0])
    ]
    what = ", ".join(f"{key} {value}" for key, value in changes.items()) or "defaults"
    ends = f"{statistics.fmean(entropies):.2f} ({min(entropies):.2f} to {max(entropies):.2f})"
    return f"| {name} | {what} | {' | '.join(shown)} | {ends} | {statistics.fmean(rates):.2f} |"


def page(*, steps: int = STEPS, seeds: int = SEEDS) -> Iterator[str]:
    """The page, line by line as the runs end."""
    shown = [step for step in SHOWN if step <= steps]
    yield INTRODUCTION.format(
        states=STATES,
        tokens=TOKENS,
        good=GOOD,
        top=math.log(GOOD),
        good_rate=SUCCESS["good"],
        other=SUCCESS["other"],
        prompts=PROMPTS,
        group=GROUP,
        updates=UPDATES,
        rate=LEARNING_RATE,
        target=TARGET,
        steps=steps,
        seeds=seeds,
        last=LAST,
    )
    yield f"| method | constants | {' | '.join(f'H, step {step}' for step in shown)} | H, last {LAST} | success |"
    yield "|---|---|" + "---|" * (len(shown) + 2)
    for name, changes in cases():
        yield row(name, changes, curves(name, changes, steps=steps, seeds=seeds))


INTRODUCTION = """# Every method in a closed loop

Generated: `python -m tools.closed_loop > docs/closed_loop.md`. It says what a method does to the entropy when all
else is equal and known, on a policy that is a table. It says nothing about answers of thousands of tokens: there the
constants of the papers act through far more tokens.

The task: {states} states, {tokens} tokens; {good} of a state's tokens are right in {good_rate:.0%} of the cases, the
others in {other:.0%}, so that the best policy can still have {top:.2f} nats. A step: {prompts} prompts, {group}
responses of one token each, {updates} updates of plain SGD, learning rate {rate}, H_0 = {target} nats/token. The
constants are the schema's defaults but for those named; the clip bounds of clip_cov and kl_cov are those of their
recipes. Means over {seeds} seeds; of the last {last} steps also the range over the seeds, and the success rate.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for line in page(steps=args.steps, seeds=args.seeds):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
