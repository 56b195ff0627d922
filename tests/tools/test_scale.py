"""The simulator: its arithmetic by hand and against the code that it stands for; published steps; what it refuses."""

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcpo_openrlhf.monitor.cost import Cost
from dcpo_openrlhf.policy.peaks import BF16_PEAKS
from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.recipe.load import load_recipe
from tests.bounds import HANG_S
from tools.scale import model, page, published
from tools.scale.__main__ import main
from tools.scale.constants import CONSTANTS, DATA, DEVICES, LIMITS
from tools.scale.model import Case, Lengths, Parts

ROOT = Path(__file__).parents[2]
SMALL, MIXTURE, LARGE = page.RECIPES
CPU = "recipes/dcpo-smollm2-135m-cpu.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipes' paths are relative to it


def case(path: str, *overrides: str, device: str = "A800") -> Case:
    return page.case_of(load_recipe(path, list(overrides)), device)


# --- decoding ---


def test_decoding_by_hand() -> None:
    tens = [10.0] * 4
    assert model.decode(tens, 5, 4, lambda count, cached: 1.0).seconds == 10
    assert model.decode(tens, 5, 2, lambda count, cached: 1.0).seconds == 20  # two after two
    assert model.decode([10.0, 4.0, 4.0], 0, 2, lambda count, cached: 1.0).seconds == 10  # the third beside the first
    # two sequences, whose cache grows from 2 x 5 to 2 x 15 tokens: 20 in the mean, over 10 steps
    assert model.decode([10.0, 10.0], 5, 2, lambda count, cached: cached).seconds == 200


@pytest.mark.parametrize("slots", [1, 3, 8, 100])
def test_every_token_is_decoded_once(slots: int) -> None:
    lengths = np.ceil(np.random.default_rng(0).exponential(50, 40)).tolist()
    assert model.decode(lengths, 7, slots, lambda count, cached: count).seconds == pytest.approx(sum(lengths))
    steps = model.decode(lengths, 7, slots, lambda count, cached: 1.0).seconds
    assert max(max(lengths), sum(lengths) / slots) <= steps <= sum(lengths)


def test_the_tail_is_the_time_with_under_half_of_the_first_batch() -> None:
    found = model.decode([10.0, 10.0, 10.0, 40.0], 0, 4, lambda count, cached: 1.0)
    assert (found.seconds, found.tail) == (40, 0.75)


def test_a_decode_step_by_hand() -> None:
    c = case(SMALL)
    s, constants = c.sizes, c.constants
    step = model.decode_step(c)
    read = 2 * (s.parameters - s.vocab * s.hidden) / (0.8 * 2039e9)  # all but the embedding, in bf16
    cache = 1000 * 2 * s.layers * s.key * 2 / (0.8 * 2039e9)
    assert (constants.decode_efficiency, constants.decode_layer_seconds) == (0.8, 0.0002)
    assert step(1, 1000) == pytest.approx(read + cache + 0.0002 * s.layers)
    multiplied = 2 * s.active_parameters * 4096 / (0.39 * 312e12)  # many sequences: multiplies, no longer the weights
    assert step(4096, 0) == pytest.approx(multiplied + 0.0002 * s.layers)


def test_few_sequences_read_the_experts_that_they_meet() -> None:
    c = case(MIXTURE)
    s, step = c.sizes, model.decode_step(c)
    expert = 2 * s.expert_parameters / (0.8 * 2 * 2039e9)  # engines of two devices
    assert step(2, 0) - step(1, 0) == pytest.approx(expert * (1 / 16 - 1 / 256))  # 8 of 128 each: 15/16 of the rest
    assert step(200, 0) - step(100, 0) < expert / 100


@pytest.mark.parametrize("mean", [20.0, 1500.0, 6000.0])
def test_lengths_have_their_mean_and_their_bound(mean: float) -> None:
    lengths = Lengths(mean, 8192).of(100_000)
    assert lengths.mean() == pytest.approx(mean, rel=0.03)  # rounded up to whole tokens
    assert lengths.max() <= 8192 and (np.diff(lengths) >= 0).all()
    assert (Lengths(8192, 8192).of(5) == 8192).all()


def test_an_engine_has_the_longest_of_all_responses() -> None:
    lengths = Lengths(100, 10_000)
    assert lengths.of(10, 10_000)[-1] == lengths.of(10_000)[-1] > lengths.of(10)[-1]
    assert (lengths.of(10, 10_000)[:-1] == lengths.of(10)[:-1]).all()


# --- training ---


@pytest.mark.parametrize("share", ["true", "false"])
def test_flops_are_those_that_a_run_reports(share: str) -> None:
    c = case(SMALL, f"train.share_prompts={share}")
    lengths = c.lengths.of(64)
    responses = torch.from_numpy(lengths)
    cost = Cost(
        sizes=c.sizes,
        peak_flops=None,
        training_devices=1,
        engine_devices=1,
        group_size=c.recipe.train.group_size,
        share_prompts=share == "true",
    )
    assert model.forward_flops(c, lengths) == pytest.approx(cost.forward_flops(responses + c.prompt, responses))


@pytest.mark.parametrize("ranks", [1, 4, 32])
def test_rows_are_dealt_as_the_policy_deals_them(ranks: int) -> None:
    lengths, prompt, rows = Lengths(300, 2000), 100, 64
    tokens = (lengths.of(rows) + prompt).astype(int)
    mask = torch.arange(tokens.max())[None] < torch.from_numpy(tokens)[:, None]
    dealt = Rows(sequences=mask.long(), attention_mask=mask, action_mask=mask[:, 1:])
    fullest = max(int(dealt.part(rank, ranks).attention_mask.sum()) for rank in range(ranks))
    assert model.imbalance(lengths, prompt, rows, ranks) == pytest.approx(fullest / tokens.sum() * ranks)


def test_training_by_hand() -> None:
    """8 data ranks of one row each, of 1000 + 200 tokens; one update; full recomputation."""
    c = case(
        SMALL,
        *("parallel.devices_per_node=8", "parallel.tensor=1", "parallel.sequence_parallel=false"),
        *("train.prompts_per_step=4", "train.prompts_per_update=4", "train.group_size=2"),
        *("rollout.max_new_tokens=1000", "estimate.response_tokens=1000", "train.recompute=full"),
        "train.share_prompts=false",
    )
    s = c.sizes
    forward = 8 * (2 * s.active_parameters * 1200 + 2 * s.layers * s.query * 1200**2) / (8 * 0.39 * 312e12)
    moved = s.parameters * (4 + 2) * 7 / 8 / 200e9  # fp32 gradients, bf16 weights, over NVLink
    found = model.training(c)
    assert found.imbalance == 1
    assert found.token_stats == pytest.approx(forward)
    assert found.train == pytest.approx(4 * forward + moved)
    reference = model.training(c._replace(recipe=load_recipe_with_kl(c)))
    assert reference.token_stats == pytest.approx(2 * forward)


def load_recipe_with_kl(c: Case) -> Any:
    return c.recipe.model_copy(update={"kl": c.recipe.kl.model_copy(update={"coefficient": 0.1})})


def test_a_pipeline_idles_by_its_bubble() -> None:
    whole = case(SMALL, "parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.devices_per_node=4")
    parts = case(SMALL, "parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.pipeline=4")
    rows = parts.rows * (parts.lengths.of(parts.rows).mean() + parts.prompt / parts.recipe.train.group_size)
    micro = math.ceil(rows / 10240)
    bubble = model.training(parts).token_stats / model.training(whole).token_stats
    assert bubble * model.training(whole).imbalance == pytest.approx(1 + 3 / micro)


# --- a step ---


@pytest.mark.parametrize("rollout", [10.0, 100.0])
def test_parts_add_up(rollout: float) -> None:
    parts = Parts(rollout, driver=5.0, token_stats=10.0, train=35.0, weight_sync=7.0)
    sync, ahead = parts.step(ahead=False), parts.step(ahead=True)
    assert sync == sum(parts)
    assert sync - ahead == min(rollout, 50.0)  # what the longer one hides
    assert ahead >= max(rollout, 50.0) + 7


def test_idle_shares_by_hand() -> None:
    """4 devices train for 45 of 107 s, 4 generate for 50."""
    parts = Parts(50.0, driver=5.0, token_stats=10.0, train=35.0, weight_sync=7.0)
    result = model.simulate(case(SMALL))._replace(one=parts)
    assert result.idle(parts) == pytest.approx(1 - (4 * 45 + 4 * 50) / (8 * 107))
    assert result._replace(ahead=True).idle(parts) == pytest.approx(1 - (4 * 45 + 4 * 50) / (8 * 57))
    assert result._replace(devices=16).idle(parts) == pytest.approx(1 - (4 * 45 + 4 * 50) / (16 * 107))


@pytest.mark.parametrize("path", page.RECIPES)
def test_more_devices_are_never_slower(path: str) -> None:
    c = case(path)
    p, engines = c.recipe.parallel, c.recipe.rollout.engines
    training = [model.training(c._replace(recipe=model.placed(c.recipe, p.world_size * n, engines))) for n in (1, 2, 4)]
    rollouts = [model.rollout(c._replace(recipe=model.placed(c.recipe, p.world_size, engines * n))) for n in (1, 2, 4)]
    for more, less in itertools.pairwise(reversed(training)):
        assert more.token_stats <= less.token_stats and more.train <= less.train
    for more, less in itertools.pairwise(reversed(rollouts)):
        assert more.seconds <= less.seconds
    for ahead in (False, True):
        steps = [model.fastest(c, devices, ahead=ahead).step for devices in (160, 256, 512, 1024, 4096)]
        assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("path", page.RECIPES)
def test_one_step_ahead_is_faster_and_sharded_senders_are_not_slower(path: str) -> None:
    c = case(path)
    sync, ahead = (model.fastest(c, 512, ahead=ahead) for ahead in (False, True))
    assert ahead.step < sync.step
    for result in (sync, ahead):
        assert 0 <= result.idle(result.sharded) <= result.idle(result.one) < 1
        assert result.sharded.weight_sync <= result.one.weight_sync


def test_senders_and_receivers_bound_a_weight_sync() -> None:
    c = case(LARGE, device="H100")
    assert c.recipe.senders == 8, "2 stages of 64 expert ranks; the rest is bounded by what weights cross the network"
    seconds = model.simulate(c).sharded.weight_sync
    assert seconds == pytest.approx(model.sync_seconds(c, 8))
    assert seconds > model.sync_seconds(c, 128)
    gb = model.weight_bytes(c) / 1e9
    assert model.sync_seconds(c, 1) == pytest.approx(gb / 1.9)
    assert model.sync_seconds(c, 2) == pytest.approx(gb / 3.8)
    assert model.sync_seconds(c, 128) == pytest.approx(gb / (0.85 * 50))  # what a device takes
    assert case(SMALL).recipe.senders == 1
    theirs = published.published_case(next(e for e in DATA["steps"] if e["recipe"]["parallel"].get("expert", 1) > 1))
    p = theirs.recipe.parallel
    assert theirs.senders == p.pipeline * p.expert, "another system's is not bounded as ours"


def test_the_drivers_part_grows_with_responses_and_tokens() -> None:
    c = case(SMALL)
    constants = dataclasses.replace(
        c.constants, driver_response_seconds=1e-3, driver_token_seconds=1e-6, driver_base_gib=2, driver_token_bytes=64
    )
    c = c._replace(constants=constants)
    assert model.driver_seconds(c) == pytest.approx(4096 * (1e-3 + 8392e-6), rel=1e-3)  # one of 1024 has 8192 tokens
    assert model.driver_gib(c) == pytest.approx(2 + 4096 * (200 + 8192) * 64 / 2**30, rel=1e-3)


# --- placing ---


def test_a_recipe_is_placed_in_whole_meshes_that_divide_its_rows() -> None:
    c = case(LARGE)
    found = [(p.recipe.parallel.world_size, p.recipe.rollout.engines) for p in model.placements(c, 512)]
    assert found == [(128, 48), (256, 32)]  # 384 would make 48 data ranks, which do not divide 1024 rows
    for placed in model.placements(c, 512):
        assert placed.devices <= 512 and placed.recipe.parallel.data in (16, 32)


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(model.DoesNotFit, match=r"the mesh takes 128 training devices .* an engine 8; there are 64"):
        model.fastest(case(LARGE), 64, ahead=False)
    with pytest.raises(model.DoesNotFit, match=r"a training device needs about .* parallel.device_memory_gb = 20"):
        model.fastest(case(SMALL, "parallel.device_memory_gb=20"), 64, ahead=False)


@pytest.mark.parametrize(("factor", "prompts"), [(1.0, 128), (25.6, 26 * 128), (0.25, 32), (1e-9, 1)])
def test_a_grown_batch_keeps_its_updates(factor: float, prompts: int) -> None:
    grown = model.with_prompts(case(SMALL).recipe, factor)
    assert (grown.train.prompts_per_update, grown.updates_per_step) == (prompts, 4)


def test_work_a_device_stays_where_the_batch_grows_but_for_the_one_driver() -> None:
    def scaling(driver: float, *, grown: bool) -> float:
        c = case(SMALL)
        per_token = driver * c.constants.driver_token_seconds
        constants = dataclasses.replace(c.constants, driver_response_seconds=0.0, driver_token_seconds=per_token)
        c = c._replace(constants=constants)
        big = c._replace(recipe=model.with_prompts(c.recipe, 64)) if grown else c
        return page.work(model.fastest(big, 512, ahead=False)) / page.work(model.simulate(c))

    assert scaling(0.0, grown=True) == pytest.approx(1, abs=0.02)
    assert scaling(1.0, grown=True) < 0.95
    assert scaling(0.0, grown=False) < 0.25


# --- what breaks ---


@pytest.mark.parametrize(
    ("path", "devices", "changed", "first"),
    [
        (LARGE, 512, {}, "the one sender: "),
        (SMALL, 4096, {"sender_gb_per_s": 1e3}, "a device does "),
        (SMALL, 8, {"driver_token_bytes": 1e5}, "the driver's memory: "),
        (SMALL, 8, {"driver_response_seconds": 1.0}, "the driver's time: "),
    ],
)
def test_what_breaks_first_is_said(path: str, devices: int, changed: dict[str, float], first: str) -> None:
    c = case(path)
    c = c._replace(constants=dataclasses.replace(c.constants, **changed))
    result = model.fastest(c, devices, ahead=True)
    worst = page.strains(result, page.work(result) / page.work(model.simulate(c, ahead=True)))
    assert worst[0].ratio > 1 and worst[0].text.startswith(first)
    assert {len(worst), len(LIMITS)} == {8}


def test_what_breaks_first_is_one_line_a_batch() -> None:
    lines = list(page.first_table((8, 512), "H100"))[2:]
    assert len(lines) == 2 * len(page.RECIPES)
    assert lines[0].startswith("| `dcpo-qwen2.5-7b-8xa800` | the recipe's | nothing | a device does ")
    assert lines[-1].startswith("| `dcpo-qwen3-235b-a22b-20x8xa800` | in proportion | does not fit | the one sender: ")


def test_a_row_a_rank_is_too_small_a_batch() -> None:
    c = case(SMALL)
    result = model.simulate(c._replace(recipe=model.placed(c.recipe, 2048, 2048)))
    assert result.trained.imbalance > 2
    assert "1 rows a data rank" in page.strains(result, 1.0)[0].text


# --- published figures ---


def test_fitted_constants_meet_what_they_were_fitted_to() -> None:
    refits = []
    for found in published.published_steps():
        for part in found.entry.get("fits", ()):
            if part == "weight_sync":
                refits.append(found.entry["seconds"][part])
            else:
                assert abs(found.error(part)) < 0.03, (found.entry["name"], part)
    assert CONSTANTS.colocated_seconds == sum(refits) / len(refits)
    for entry in DATA["syncs"]:
        assert abs(published.sync_error(entry)[1]) < 0.01 or not entry.get("fits"), entry["name"]


def test_most_published_steps_that_fitted_nothing_are_near() -> None:
    steps = [abs(error) for error, what in published.held_out() if what.startswith("step ")]
    assert len(steps) == 11  # those without a fitted part
    assert sorted(steps)[6] < 0.2 and max(steps) < 0.6


def test_every_number_has_a_source() -> None:
    assert all(entry["source"] not in ("", "TODO") and entry["unit"] for entry in DATA["constants"].values())
    named = [entry["source"] for name in ("steps", "syncs", "other_syncs") for entry in DATA[name]]
    assert set(named) == set(DATA["sources"])
    assert set(DATA["device_sources"]) == set(DEVICES)
    for name, device in DEVICES.items():
        assert device.bf16_tflops * 1e12 == BF16_PEAKS[name]


# --- the command ---


def test_committed_page_is_the_generated_one() -> None:
    text = "\n".join(page.page(page.SIZES, "A800")) + "\n"
    assert (ROOT / "docs/scale.md").read_text() == text, "run: python -m tools.scale --output docs/scale.md"


def test_a_recipes_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [SMALL, "train.group_size=4", "--devices", "8", "64", "--device", "H100"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 2 and len({line.count(" | ") for line in lines if "---" not in line}) == 1
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        [f"| {devices}", mode] for devices in (8, 64) for mode in ("sync", "ahead")
    ]
    assert main([*arguments, "--batch", "grown", "--output", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text().splitlines()[:4] == lines[:4]  # 8 devices are the recipe's own


def test_colocated_engines_have_one_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SMALL, "parallel.colocate=true", "rollout.gpu_memory_utilization=0.6", "--devices", "8"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[2:]
    assert line.startswith("| 8 | sync | 8 + 8 x 1 |")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([CPU], "run.device = cpu is not simulated"),
        ([SMALL, "train.rollout_only=true"], "only steps that generate and train"),
        ([SMALL, "model.config=nowhere.json"], "has no config.json; name one with model.config=FILE"),
        ([SMALL, "model.config=pyproject.toml"], "is no config.json of a known family"),
        ([SMALL, "--devices", "8", "0"], "--devices = 8 0 must be at least 1 each"),
        (["recipes/nothing.yaml"], "no such file"),
        ([SMALL, "train.group_size=1"], "train.group_size = 1 must be at least 2"),
    ],
)
def test_what_cannot_be_simulated_is_an_error(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out = capsys.readouterr()
    assert says in out.err and not out.out


def test_it_runs_without_the_stack() -> None:
    code = "import sys; from tools.scale.__main__ import main; main(sys.argv[1:])\n"
    code += "assert not {'torch', 'ray', 'vllm', 'megatron', 'transformers'} & set(sys.modules)"
    command = [sys.executable, "-c", code, MIXTURE, "--devices", "64"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert result.returncode == 0, result.stderr
