"""Checkpoint -> Hugging Face folder and back: the logits stay those of the policy, whatever mesh saved or loads it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dcpo_openrlhf import checkpoint
from dcpo_openrlhf.recipe.resume import keep_chosen, resume_point
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError
from tests.distributed import run_distributed
from tests.tiny import make_tiny_model
from tools import export_hf

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 251


def _save(rank: int, world_size: int, model: Path, folder: Path, sizes: dict[str, Any]) -> torch.Tensor:
    """One update, then a checkpoint; the policy's log-probs of TOKENS."""
    from dcpo_openrlhf.policy.megatron.checkpoint import PolicyCheckpoint
    from tests.policy.megatron.common import make_policy, make_step, random_rows

    step = make_step(make_policy(model, rank=rank, world_size=world_size, **sizes))
    step.update(random_rows().part(step.mesh.data_rank, step.mesh.data_size))
    saving = PolicyCheckpoint(step)
    saving.save(folder)
    saving.finish()
    return _logp(step)


def _load(rank: int, world_size: int, model: Path, folder: Path, sizes: dict[str, Any]) -> torch.Tensor:
    from dcpo_openrlhf.policy.megatron.checkpoint import PolicyCheckpoint
    from tests.policy.megatron.common import make_policy, make_step

    step = make_step(make_policy(model, rank=rank, world_size=world_size, **sizes))
    PolicyCheckpoint(step).load(folder)
    return _logp(step)


def _logp(step: Any) -> torch.Tensor:
    from dcpo_openrlhf.policy.rows import Rows

    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    return step.token_statistics(Rows(TOKENS, mask, mask[:, 1:]), temperatures=[])["logp"]


def hf_logp(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(TOKENS).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]


def saved(tmp_path: Path, model: Path, world_size: int, sizes: dict[str, Any]) -> tuple[Path, torch.Tensor]:
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    logp = run_distributed(_save, world_size, model, folder, sizes)[-1]  # the last stage has them
    (folder / checkpoint.STATE).write_text(json.dumps({"recipe": {"model": {"path": str(model)}}}))
    checkpoint.write_manifest(folder, step=1, scores={})
    return folder, logp


@pytest.mark.parametrize(
    ("architecture", "world_size", "sizes", "more"),
    [
        ("qwen2", 2, {"tensor": 2}, {"tie": False, "kv_heads": 4}),
        ("llama", 2, {"pipeline": 2}, {"tie": True}),
        ("qwen3_moe", 2, {"expert": 2}, {"tie": False}),
        ("glm4_moe", 2, {"expert": 2}, {"tie": False}),
    ],
    ids=["qwen2-tp2", "llama-tied-pp2", "qwen3_moe-ep2", "glm4_moe-ep2"],
)
def test_exported_logits_are_those_of_the_trained_policy(
    architecture: str, world_size: int, sizes: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model", architecture=architecture, **more)
    folder, logp = saved(tmp_path, model, world_size, sizes)
    output = export_hf.export(folder, tmp_path / "hf", shard_gb=2**-12)
    torch.testing.assert_close(hf_logp(output), logp, atol=2e-5, rtol=1e-4)
    assert (hf_logp(model) - logp).abs().max() > 1e-3, "the update changed the policy"
    assert len(list(output.glob("model-*.safetensors"))) > 1
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert (output / name).read_bytes() == (model / name).read_bytes()
    assert AutoTokenizer.from_pretrained(output)("what is the number")["input_ids"]


def test_imported_checkpoint_loads_on_other_meshes_and_is_exported_as_it_was(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="qwen3", tie=False)
    command = [sys.executable, "-W", "ignore", "-m", "tools.import_hf", "--dtype", "fp32", "--model", str(model)]
    done = subprocess.run([*command, "--output", str(tmp_path / "in")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "in" / "step_000000"
    belongs_to_no_run(folder, model)
    expected = hf_logp(model)
    other = make_tiny_model(tmp_path / "other", architecture="qwen3", tie=False, seed=5)
    for world_size, sizes in ((1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})):
        logp = run_distributed(_load, world_size, other, folder, sizes)[-1]
        torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-4)
    output = export_hf.export(folder, tmp_path / "out", model=other)
    with safe_open(output / "model.safetensors", "pt") as ours, safe_open(model / "model.safetensors", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in theirs.keys())  # noqa: SIM118


def belongs_to_no_run(imported: Path, model: Path) -> None:
    """Neither named nor found in the run folder does an import continue a run: it has no prompts."""
    run = imported.parent.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / imported.name).symlink_to(imported)
    for name in ("auto", str(imported)):
        recipe = Recipe.model_validate(
            {
                "run": {"dir": str(run), "device": "cpu"},
                "model": {"path": str(model)},
                "task": {"kind": "arithmetic"},
                "checkpoint": {"resume": name},
            }
        )
        assert keep_chosen(recipe) == recipe
        with pytest.raises(RecipeError, match=r"belongs to no run \(no run.json\).*model.path=DIR"):
            resume_point(recipe)


def test_what_is_no_whole_checkpoint_or_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_model(tmp_path / "model")
    folder, _ = saved(tmp_path, model, 1, {})
    wider = make_tiny_model(tmp_path / "wider", layers=3)
    arguments = ["--checkpoint", str(folder), "--output", str(tmp_path / "hf")]
    assert export_hf.main([*arguments, "--model", str(wider)]) == 2
    assert "2 layers" in (err := capsys.readouterr().err) and "--model DIR" in err
    assert export_hf.main([*arguments, "--model", str(tmp_path / "gone")]) == 2
    assert "is not at" in capsys.readouterr().err
    (folder / "metadata.json").write_bytes(b"")
    assert export_hf.main(arguments) == 2
    assert "metadata.json has 0 bytes" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


# --- what the output may be: with a checkpoint whose weights are those of the model -----------------------------------


class Case:
    """A run with a checkpoint, and the command that exports it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, dtype: str = "float32") -> None:
        self.model = make_tiny_model(folder / "models" / "tiny", dtype=dtype)
        self.run = folder / "run"
        self.step = self.run / "checkpoints" / "step_000001"
        self.step.mkdir(parents=True)
        recipe = {"run": {"dir": str(self.run)}, "model": {"path": str(self.model), "dtype": "fp32"}}
        (self.step / checkpoint.STATE).write_text(json.dumps({"recipe": recipe}))
        checkpoint.write_manifest(self.step, step=1, scores={})
        self.weights = {name: tensor.bfloat16() for name, tensor in load_file(self.model / "model.safetensors").items()}
        monkeypatch.setattr(export_hf, "hf_tensors", lambda *_: iter(self.weights.items()))
        monkeypatch.chdir(self.run)

    def __call__(self, output: Path | str, *more: str) -> int:
        return export_hf.main(["--checkpoint", str(self.step), "--output", str(output), *more])


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, monkeypatch)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("notes", "holds other things than an export wrote (plan.txt)"),
        ("models", "is or contains the model"),
        ("models/tiny", "is or contains the model"),
        ("models/other", "holds other things than an export wrote (chat_template.jinja, config.json"),
        ("run", "is or contains the checkpoint"),
        ("run/checkpoints", "is or contains the checkpoint"),
        ("run/checkpoints/step_000001", "is or contains the checkpoint"),
        ("run/checkpoints/step_000001/hf", "lies in the checkpoint"),
        ("run/link", "is or contains the checkpoint"),
        ("notes/plan.txt", "is a file"),
        ("notes/plan.txt/hf", "Not a directory"),
    ],
)
def test_an_output_that_holds_anything_else_is_refused_and_stays(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    make_tiny_model(tmp_path / "models" / "other")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "plan.txt").write_text("mine")
    (case.run / "link").symlink_to(case.run / "checkpoints")
    before = everything(tmp_path)
    capsys.readouterr()  # transformers' progress bar
    assert case(tmp_path / output) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert everything(tmp_path) == before


def test_the_folder_that_one_is_in_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert case(".") == 2
    assert "is or contains the folder you are in" in capsys.readouterr().err


def test_an_earlier_export_is_replaced_until_something_is_put_into_it(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    (case.step.parent / "step_000009").write_text("a file beside the checkpoints")
    (case.step / "notes").mkdir()
    assert case("hf", "--shard-gb", str(2**-12)) == 0
    assert len(list((case.run / "hf").glob("model-*.safetensors"))) > 1
    assert case("hf") == 0
    assert [file.name for file in (case.run / "hf").glob("model*")] == ["model.safetensors"]
    (case.run / "hf" / "notes.txt").write_text("mine")
    assert case("hf") == 2
    assert "(notes.txt); name another folder" in capsys.readouterr().err
    assert (case.run / "hf" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in case.run.iterdir()) == ["checkpoints", "hf"]


@pytest.mark.parametrize("more", [["--shard-gb", "0"], ["--shard-gb", "nan"]])
def test_a_shard_of_no_size_is_refused(case: Case, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert case("hf", *more) == 2
    assert "--shard-gb is above 0" in capsys.readouterr().err


def test_a_checkpoint_that_names_no_model_asks_for_one(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.step / checkpoint.STATE).unlink()
    checkpoint.write_manifest(case.step, step=1, scores={})
    assert case("hf") == 2
    assert "does not say which model it belongs to (no run.json); add --model DIR" in capsys.readouterr().err
    assert case("hf", "--model", str(case.model)) == 0


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_config_says_the_dtype_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    case = Case(tmp_path, monkeypatch, dtype="float16")
    config = json.loads((case.model / "config.json").read_text())
    config.pop("dtype", config.pop("torch_dtype", None))
    (case.model / "config.json").write_text(json.dumps(config | ({key: "float16"} if key else {})))
    assert case("hf") == 0
    written = json.loads((case.run / "hf" / "config.json").read_text())
    assert written == config | {key or "torch_dtype": "bfloat16"}
    assert AutoConfig.from_pretrained(case.run / "hf").dtype == torch.bfloat16
