"""What a Recorder writes, a Replay returns: every tensor bit for bit, for the same request alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dcpo_openrlhf.rollout.replay import EVALUATION_STEP, Recorder, Replay, ReplayError, file_name

REQUEST: dict[str, Any] = {"step": 3, "n_samples": 2, "temperature": 1.0}
PROMPTS = ["one plus one", "two plus two"]


def experience(seed: int) -> Any:
    from openrlhf.trainer.ppo_utils.experience import Experience

    g = torch.Generator().manual_seed(seed)
    time = int(torch.randint(4, 9, (), generator=g))
    return Experience(
        sequences=torch.randint(0, 70_000, (1, time), generator=g),
        attention_mask=torch.ones(1, time, dtype=torch.long),  # type: ignore[arg-type]
        action_mask=torch.randint(0, 2, (1, time - 1), generator=g),  # type: ignore[arg-type]
        rollout_log_probs=-torch.rand(1, time - 1, generator=g),
        prompts=[f"prompt {seed}"],
        labels=["7"],
        images=[None],
        mm_train_inputs=[None],
        truncated=torch.tensor([seed % 2 == 0]),
        total_length=torch.tensor([float(time)]),
        info={"weight_version": torch.tensor([3]), "response_clip_ratio": torch.tensor([False])},
    )


class Engines:
    def __init__(self) -> None:
        self.made: list[Any] = []

    def generate(self, prompts: list[str], labels: list[str], **_: Any) -> list[Any]:
        self.made = [experience(len(self.made) + seed) for seed in range(4)]
        return self.made


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    return one == two


def test_responses_come_back_bit_for_bit(tmp_path: Path) -> None:
    engines = Engines()
    recorder = Recorder(engines, tmp_path / "samples")
    first = recorder.generate(PROMPTS, ["2", "4"], **REQUEST)
    assert first is engines.made
    second = recorder.generate(PROMPTS, ["2", "4"], **REQUEST)  # a second request of the same step
    replay = Replay(tmp_path)  # a run folder, or its samples
    for made in (first, second):
        again = replay.generate(PROMPTS, ["2", "4"], **REQUEST)
        assert len(again) == len(made)
        assert all(same(vars(a), vars(b)) for a, b in zip(again, made, strict=True))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_000003.2.pt", "step_000003.pt"]


def test_records_with_tokens_and_masks_in_64_bits_replay_to_the_same_rows(tmp_path: Path) -> None:
    """As they were written before responses crossed Ray as arrays."""
    from dcpo_openrlhf.experience import padded

    found = []
    for name in ("long", "small"):
        engines = Engines()
        made = engines.generate(PROMPTS, [])
        if name == "small":
            for sample in made:
                sample.sequences, sample.action_mask = sample.sequences.int(), sample.action_mask.bool()
                sample.attention_mask = sample.attention_mask.bool()
        engines.generate = lambda *_, made=made, **__: made  # type: ignore[method-assign]
        Recorder(engines, tmp_path / name).generate(PROMPTS, [], **REQUEST)
        found.append(vars(padded(Replay(tmp_path / name).generate(PROMPTS, [], **REQUEST), 0)))
    assert same(*found) and found[0]["sequences"].dtype == torch.int32


@pytest.mark.parametrize(
    ("prompts", "change", "said"),
    [
        (PROMPTS[::-1], {}, "other prompts"),
        (PROMPTS, {"temperature": 0.9}, "other sampling"),
        (PROMPTS, {"n_samples": 4}, "other sampling"),
        (PROMPTS, {"step": 4}, r"step_000004.pt is missing"),
    ],
)
def test_another_request_is_refused(prompts: list[str], change: dict[str, Any], said: str, tmp_path: Path) -> None:
    Recorder(Engines(), tmp_path).generate(PROMPTS, ["2", "4"], **REQUEST)
    with pytest.raises(ReplayError, match=said):
        Replay(tmp_path).generate(prompts, ["2", "4"], **REQUEST | change)


def test_evaluation_has_files_of_its_own() -> None:
    assert file_name(EVALUATION_STEP + 4) == "evaluation_000004.pt"
    assert file_name(4) == "step_000004.pt" and file_name(4, 2) == "step_000004.2.pt"
