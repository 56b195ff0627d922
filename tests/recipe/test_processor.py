"""What model.dtype=auto means on each kind of processor, and where the choice goes."""

import datetime
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpo_openrlhf.recipe import preflight, processor, resume
from dcpo_openrlhf.recipe.load import load_recipe, resolved_yaml
from dcpo_openrlhf.recipe.schema import Recipe
from tests.test_checkpoint import make_folder, save
from tests.tiny import make_tiny_model

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""What makes a larger processor multiply like one that has AVX2 alone."""


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch):
    """native(units, torch_says, architecture): let this machine look like such a processor."""

    def pretend(units: tuple[str, ...], torch_says: bool, architecture: str = "x86_64") -> None:
        found = {"architecture": architecture, "avx2": True} | dict.fromkeys(units, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: torch_says)

    return pretend


def make_recipe(run: Path, device: str = "cpu", **model: Any) -> Recipe:
    return Recipe.model_validate(
        {"run": {"dir": run, "device": device}, "model": {"path": "unused"} | model, "task": {"kind": "arithmetic"}}
    )


@pytest.mark.parametrize(
    ("units", "torch_says", "architecture", "dtype"),
    [
        (("avx512_bf16",), True, "x86_64", "bf16"),
        (("avx512_bf16", "amx_bf16"), True, "x86_64", "bf16"),
        (("amx_bf16",), True, "x86_64", "bf16"),
        ((), False, "x86_64", "fp32"),  # AVX2 alone
        (("avx512_f",), True, "x86_64", "fp32"),  # AVX512 without bf16 units, of which torch says yes
        (("avx512_bf16",), False, "x86_64", "fp32"),  # held to AVX2 by the environment
        ((), True, "aarch64", "bf16"),
        ((), False, "aarch64", "fp32"),
    ],
)
def test_auto_is_what_the_processor_multiplies(
    native, tmp_path: Path, units: tuple[str, ...], torch_says: bool, architecture: str, dtype: str
) -> None:
    native(units, torch_says, architecture)
    recipe = make_recipe(tmp_path)
    assert (recipe.model.dtype, recipe.chose("model.dtype")) == (dtype, True)
    assert recipe.engine_dtype == {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert make_recipe(tmp_path, dtype="auto") == recipe
    assert make_recipe(tmp_path, device="cuda").model.dtype == "bf16"


def test_the_choice_stands_in_the_resolved_recipe_and_reaches_every_process(native, tmp_path: Path) -> None:
    native((), False)
    recipe = make_recipe(tmp_path)
    assert "dtype: fp32" in resolved_yaml(recipe)
    native(("avx512_bf16",), True)  # another host of the same cluster
    assert pickle.loads(pickle.dumps(recipe)).model.dtype == "fp32"
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and not again.chose("model.dtype")


def test_a_resume_keeps_the_checkpoints(native, tmp_path: Path) -> None:
    native((), False)
    save(make_folder(tmp_path), make_recipe(tmp_path), 3)
    native(("avx512_bf16",), True)
    resuming = make_recipe(tmp_path).model_copy(
        update={"checkpoint": make_recipe(tmp_path).checkpoint.model_copy(update={"resume": "auto"})}
    )
    assert resuming.model.dtype == "bf16"
    kept = resume.keep_chosen(resuming)
    assert kept.model.dtype == "fp32"
    point = resume.resume_point(kept)
    assert point is not None and point.step == 3
    # what is given is not overruled, and another run's choice is refused
    given = resuming.model_copy(update={"model": make_recipe(tmp_path, dtype="bf16").model})
    assert resume.keep_chosen(given) == given
    with pytest.raises(ValueError, match=r"model.dtype: 'fp32' -> 'bf16'"):
        resume.resume_point(given)


def test_a_resume_or_a_replay_keeps_the_date_of_the_first_start(tmp_path: Path) -> None:
    first, other = datetime.date(2024, 7, 26), datetime.date(2024, 7, 27)
    started = make_recipe(tmp_path, dtype="fp32").with_chosen("task.date", first)
    save(make_folder(tmp_path), started, 3)
    again = make_recipe(tmp_path, dtype="fp32")
    resuming = again.model_copy(update={"checkpoint": again.checkpoint.model_copy(update={"resume": "auto"})})
    kept = resume.keep_chosen(resuming)
    assert kept.task.date == first and resume.resume_point(kept) is not None
    assert resume.keep_chosen(again).task.date is None
    given = resuming.with_chosen("task.date", other)
    assert resume.keep_chosen(given) == given
    with pytest.raises(ValueError, match=r"task.date: '2024-07-26' -> '2024-07-27'"):
        resume.resume_point(given)
    (tmp_path / "recorded" / "samples").mkdir(parents=True)
    (tmp_path / "recorded" / "recipe.yaml").write_text(resolved_yaml(started))
    for folder in ("recorded", "recorded/samples"):
        replay = again.model_copy(update={"rollout": again.rollout.model_copy(update={"replay": tmp_path / folder})})
        assert resume.keep_chosen(replay).task.date == first


def test_a_checkpoint_from_before_the_newer_keys_is_continued(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, dtype="fp32")
    saved = recipe.model_dump(mode="json")
    for key in ("date", "chat_template_kwargs"):
        del saved["task"][key]
    del saved["rollout"]["stop"]
    assert resume.differences(saved, recipe) == ([], [])


def test_bf16_where_it_is_emulated_is_a_hint_with_its_price(native, tmp_path: Path, monkeypatch) -> None:
    native((), False)
    monkeypatch.setattr(processor, "bf16_slowdown", lambda: 17.6)
    (hint,) = preflight.hints(make_recipe(tmp_path, dtype="bf16"))
    assert "multiply" not in hint and "18 x slower than fp32 here" in hint and "auto" in hint
    assert preflight.hints(make_recipe(tmp_path)) == []
    assert preflight.hints(make_recipe(tmp_path, device="cuda", dtype="bf16")) == []
    native(("avx512_bf16",), True)
    assert preflight.hints(make_recipe(tmp_path, dtype="bf16")) == []


def test_the_price_is_measured_and_a_dry_run_tells_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = make_tiny_model(tmp_path / "model")
    recipe.write_text(
        f"""
        run: {{dir: {tmp_path}/run, device: cpu}}
        model: {{path: {model}}}
        task: {{kind: arithmetic, template: plain}}
        train: {{prompts_per_step: 8, prompts_per_update: 8}}
        parallel: {{devices_per_node: 1}}
        rollout: {{engines: 1, max_prompt_tokens: 200, max_new_tokens: 16}}
        """
    )
    command = [sys.executable, "-m", "dcpo_openrlhf.train_dcpo", "--recipe", str(recipe), "--dry-run"]

    def dry_run(*overrides: str) -> str:
        done = subprocess.run([*command, *overrides], env=os.environ | AVX2, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "  dtype: fp32" in dry_run() and "x slower" not in dry_run()
    assert "x slower than fp32 here" in dry_run("model.dtype=bf16")
