"""What the doctor looks at in a started run: whether trainer and engines hold the same weights."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dcpo_openrlhf.rollout.tasks import Prompt

if TYPE_CHECKING:
    from dcpo_openrlhf.policy.rows import Rows
    from dcpo_openrlhf.trainer import DCPOTrainer

GREEDY_PROMPTS, GREEDY_TOKENS = 4, 12
"""The trainer makes a forward pass over the whole sequence for each token."""
SAMPLES, SAMPLE_TOKENS = 16, 64
FACTOR = 0.9375
"""Of every weight before the second sync: small, and yet no weight but 0 stays what it was, in bf16 either."""
LOG_RATIO_BOUND = 0.1
"""[nats] Of the mean |log p_trainer - log p_engine|, which sees what |p - p| does not where every token is unlikely."""
VISIBLE = 4
"""That change shows where it moves probabilities by this many times what rounding does."""
TIE = {"bf16": 0.5, "fp32": 0.01}
"""[nats] Trainer and engine may choose different tokens where the trainer's log-probs are this close."""


class Wrong(Exception):
    """What a check found; those after it can still tell something."""


class Skipped(Exception):
    """Why a check has nothing to look at."""


class Mismatch(NamedTuple):
    """How far the trainer's probabilities of sampled tokens are from the engine's, which drew them."""

    mean: float
    largest: float
    log_ratio: float
    kl: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"|p_trainer - p_engine| mean {self.mean:.2g}, largest {self.largest:.2g}; |log ratio| mean "
            f"{self.log_ratio:.2g}; KL {self.kl:.2g} nats/token; {self.tokens} tokens"
        )


def mismatch(
    trainer: Float[Tensor, "batch time"], engine: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Mismatch:
    """From log-probs at T = 1. KL(engine || trainer), the mean of log p_engine - log p_trainer, may be negative."""
    ours, theirs = trainer[mask].double(), engine[mask].double()
    difference = (ours.exp() - theirs.exp()).abs()
    ratio = theirs - ours
    return Mismatch(
        float(difference.mean()), float(difference.max()), float(ratio.abs().mean()), float(ratio.mean()), len(ours)
    )


def unequal(sent: dict[str, int], received: Sequence[Sequence[dict[str, int]]]) -> list[str]:
    """What some engine's worker holds otherwise than it was sent: tensor, engine, worker, both checksums."""
    found = []
    for engine, workers in enumerate(received):
        for worker, sums in enumerate(workers):
            for name in sorted(sent.keys() | sums.keys()):
                if sent.get(name) != sums.get(name):
                    ours, theirs = (
                        "none" if s is None else f"{s & 2**64 - 1:#x}" for s in (sent.get(name), sums.get(name))
                    )
                    found.append(f"{name}: sent {ours}, engine {engine} worker {worker} has {theirs}")
    return found


def some(texts: Sequence[str]) -> str:
    """The first of the texts, and how many there are."""
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")


class Examination:
    """A started run's trainer and engines, and what the checks so far have seen of them."""

    def __init__(self, trainer: "DCPOTrainer") -> None:
        self.trainer, self.recipe = trainer, trainer.recipe
        self.prompts = trainer.prompts.take(max(SAMPLES, len(trainer.vllm_engines)))
        self.sent: dict[str, int] = {}

    def sync(self) -> str:
        """One sync of all weights; the trainer checks that every engine reports the new version."""
        begin, mended = time.monotonic(), len(self.trainer.vllm_engines.failures)
        self.trainer.sync_weights()
        seconds = time.monotonic() - begin
        for failure in self.trainer.vllm_engines.failures[mended:]:
            raise RuntimeError(f"{failure}; the next try mended it, which a run would have noted as a warning")
        version, engines = self.trainer.weights_version, len(self.trainer.vllm_engines)
        return f"{seconds:.2f} s over {self.recipe.transport}; {engines} engines report version {version}"

    def checksums(self) -> str:
        import ray

        ranks = ray.get(self.trainer.actor_model_group.async_run_method("sent_checksums"))
        self.sent = {name: checksum for sums in ranks for name, checksum in sums.items()}
        if not self.sent:
            raise Skipped("weight_sync.verify = false takes none; see the lines below")
        received = ray.get([engine.weight_checksums.remote() for engine in self.trainer.vllm_engines])
        different = unequal(self.sent, received)
        if different:
            raise Wrong(f"{some(different)}; the engines' weights are not the trainer's: do not train, sync again")
        return f"{len(self.sent)} tensors arrived as sent, on {sum(map(len, received))} workers"

    def greedy(self) -> str:
        """The same prompts continued by both; where they part, the trainer must hold both tokens about as likely."""
        import ray

        prompts, tokenizer = self.prompts[:GREEDY_PROMPTS], self.trainer.tokenizer
        tokens = min(GREEDY_TOKENS, self.recipe.rollout.max_new_tokens)
        samples = self.generate(prompts, step=0, max_new_tokens=tokens, temperature=0.0)
        ids = tokenizer(text=[p.text for p in prompts], add_special_tokens=False)["input_ids"]
        group = self.trainer.actor_model_group
        ours = ray.get(group.async_run_method("greedy", ids, tokens, tokenizer.eos_token_id))[0]
        theirs = [s.sequences[0, 1:][s.action_mask[0].bool()].tolist() for s in samples]
        gaps = [
            self.gap(ours[i], theirs[i], sample)
            for i, sample in enumerate(samples)
            if any(a != b for a, b in zip(ours[i], theirs[i], strict=False))  # the engine may know more end tokens
        ]
        tie = TIE["bf16" if "bf" in self.recipe.model.dtype + self.recipe.engine_dtype else "fp32"]
        equal = f"{len(prompts) - len(gaps)} of {len(prompts)} continuations of {tokens} tokens are equal"
        if not gaps:
            return equal
        parted = f"{equal}; where the others part, the engine's token is up to {max(gaps):.2g} nats less likely"
        if max(gaps) > tie:
            raise Wrong(f"{parted} to the trainer, which rounding does not explain (above {tie}): other weights")
        return f"{parted}: a tie within rounding"

    def gap(self, ours: list[int], theirs: list[int], sample: Any) -> float:
        """[nats] The trainer's log-prob of its own token less that of the engine's, where they part first."""
        from dcpo_openrlhf.policy.rows import Rows

        parting = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        place = int(sample.action_mask[0].float().argmax()) + parting
        sequences = sample.sequences.repeat(2, 1)
        sequences[1, place + 1] = ours[parting]
        mask = torch.zeros_like(sequences[:, 1:], dtype=torch.bool)
        mask[:, place] = True
        theirs_logp, ours_logp = self.logp(Rows(sequences, torch.ones_like(sequences).bool(), mask))[:, place].tolist()
        return ours_logp - theirs_logp

    def probabilities(self) -> str:
        """Responses drawn by the engines at T = 1, looked at by the trainer."""
        self.rows, self.engine_logp = self.draw(step=1)
        self.first = mismatch(self.logp(self.rows), self.engine_logp, self.rows.action_mask)
        return self.judged(self.first)

    def judged(self, found: Mismatch) -> str:
        bound = self.recipe.monitor.mismatch_bound
        if found.mean <= bound and found.log_ratio <= LOG_RATIO_BOUND:
            normal = "; bf16's rounding alone is up to about 0.01 and 0.05" if self.recipe.model.dtype == "bf16" else ""
            return f"{found}{normal}"
        raise Wrong(
            f"{found}; the means must not exceed monitor.mismatch_bound = {bound:g} and {LOG_RATIO_BOUND:g}: "
            "model.dtype=fp32 settles whether it is rounding; if it stays, weights or kernels differ"
        )

    def second_sync(self) -> str:
        """A known change of every weight, then a sync."""
        import ray

        ray.get(self.trainer.actor_model_group.async_run_method("scale_weights", FACTOR))
        self.moved = mismatch(self.logp(self.rows), self.engine_logp, self.rows.action_mask)
        return f"{self.sync()}, after every weight was multiplied by {FACTOR:g}"

    def new_checksums(self) -> str:
        before = self.sent
        arrived = self.checksums()
        stayed = [name for name, checksum in before.items() if self.sent.get(name) == checksum]
        stale = [name for name in stayed if before[name]]  # a tensor of zeros stays one
        if stale:
            raise Wrong(f"{some(stale)}: the trainer sent the old weights; it read a stale copy")
        return f"{arrived}, {len(before) - len(stayed)} of {len(before)} with another checksum than before"

    def new_probabilities(self) -> str:
        """The first responses no longer fit the trainer, new ones do."""
        rows, engine_logp = self.draw(step=2)
        found = mismatch(self.logp(rows), engine_logp, rows.action_mask)
        change = f"{self.moved.mean:.2g} between the new weights and the old"
        if self.moved.mean < VISIBLE * self.first.mean:
            raise Skipped(f"the mean is {change}, which the rounding of {self.first.mean:.2g} hides; now {found}")
        if found.mean > self.moved.mean / 2:
            raise Wrong(f"{found}, and {change}: the engines still answer with the old ones")
        return f"{self.judged(found)}; {change}"

    def generate(self, prompts: Sequence[Prompt], *, step: int, max_new_tokens: int, temperature: float) -> list[Any]:
        with self.trainer.devices.engines_awake(policy_away=True):
            return self.trainer.generator.generate(
                [p.text for p in prompts],
                [p.problem.answer for p in prompts],
                step=step,
                n_samples=1,
                max_new_tokens=max_new_tokens,
                max_len=self.recipe.rollout.context,
                temperature=temperature,
                top_p=1.0,
            )

    def draw(self, *, step: int) -> "tuple[Rows, Float[Tensor, 'batch time-1']]":
        """A response to each prompt, and the engines' log-probs of its tokens."""
        from dcpo_openrlhf.experience import padded
        from dcpo_openrlhf.policy.rows import Rows

        tokens = min(SAMPLE_TOKENS, self.recipe.rollout.max_new_tokens)
        samples = self.generate(self.prompts, step=step, max_new_tokens=tokens, temperature=1.0)
        joined = padded(samples, self.trainer.tokenizer.pad_token_id)
        rows = Rows(joined.sequences, joined.attention_mask, joined.action_mask)
        return rows, joined.rollout_log_probs

    def logp(self, rows: "Rows") -> Float[Tensor, "batch time-1"]:
        """The trainer's log-probs of the tokens."""
        (stats,) = self.trainer.experience_maker.statistics([rows], [1.0])
        return stats["logp"]

    CHECKS: dict[str, Callable[["Examination"], str]] = {  # noqa: RUF012
        "sync": sync,
        "checksums": checksums,
        "greedy": greedy,
        "probabilities": probabilities,
        "second sync": second_sync,
        "new checksums": new_checksums,
        "new probabilities": new_probabilities,
    }
