"""Checkpoint folders: whole or not there; damage is recognised and passed over; old ones go when newer are whole."""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcpo_openrlhf import checkpoint
from dcpo_openrlhf.checkpoint import CheckpointFolder, damage, file_sum, newest_whole
from dcpo_openrlhf.errors import RunError
from dcpo_openrlhf.recipe import preflight
from dcpo_openrlhf.recipe.load import resolved_yaml
from dcpo_openrlhf.recipe.resume import (
    MAY_DIFFER,
    _flat,
    differences,
    finished,
    held,
    prepare_run_folder,
    resume_point,
    starting_model,
    what_is_kept,
)
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError


def make_recipe(run: Path, **sections: Any) -> Recipe:
    values = {"run": {"dir": run}, "model": {"path": "unused"}, "task": {"kind": "arithmetic"}}
    return Recipe.model_validate(values | sections)


class Policy:
    """Stands for the ranks: writes two files, of which it knows the sums of one."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def write(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rank0.distcp").write_bytes(f"weights of {folder.name}".encode() * 100)
        (folder / "common.pt").write_bytes(b"common")

    def finish(self) -> list[dict[str, checkpoint.FileSum]]:
        assert self.folder is not None
        return [{"rank0.distcp": file_sum(self.folder / "rank0.distcp")}, {}]


def make_folder(run: Path, *, keep_last: int = 3, keep_best: bool = False) -> CheckpointFolder:
    policy = Policy()
    return CheckpointFolder(
        run / "checkpoints", keep_last=keep_last, keep_best=keep_best, write=policy.write, finish=policy.finish
    )


def save(folder: CheckpointFolder, recipe: Recipe, *steps: int, **scores: float) -> None:
    for step in steps:
        folder.begin({"step": step, "recipe": recipe.model_dump(mode="json")}, {"reward_mean": 0.0, **scores})
        folder.finish()


def steps(run: Path) -> list[int]:
    return [c.step for c in checkpoint.checkpoints(run / "checkpoints")]


def test_a_checkpoint_appears_when_it_is_whole(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    folder.begin({"step": 5, "recipe": {}}, {})
    assert steps(tmp_path) == [] and (tmp_path / "checkpoints/.step_000005.partial").is_dir()
    assert newest_whole(tmp_path / "checkpoints") is None
    assert folder.finish() == tmp_path / "checkpoints/step_000005"
    assert steps(tmp_path) == [5] and damage(tmp_path / "checkpoints/step_000005") is None
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert folder.finish() is None


def test_one_at_a_time_the_next_finishes_the_one_in_flight(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    folder.begin({"step": 1, "recipe": {}}, {})
    folder.begin({"step": 2, "recipe": {}}, {})
    assert steps(tmp_path) == [1]
    assert folder.saved_step == 2


def _truncate(folder: Path) -> None:
    file = folder / "rank0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def _flip(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return flip


def _change_score(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["scores"]["reward_mean"] = 9.0
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_truncate, "rank0.distcp has 3099 bytes instead of 3100"),
        (_flip("rank0.distcp"), "rank0.distcp has checksum"),
        (_flip("common.pt"), "common.pt has checksum"),
        (_flip("run.json"), "run.json has checksum"),
        (lambda folder: (folder / "common.pt").unlink(), "common.pt is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 3,'), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (_change_score, "manifest.json does not match its own checksum"),
    ],
)
def test_damage_is_named_and_passed_over(
    harm: Callable[[Path], None], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path, checkpoint={"resume": "auto"})
    save(make_folder(tmp_path), recipe, 1, 2, 3)
    harm(tmp_path / "checkpoints/step_000003")
    with caplog.at_level(logging.WARNING):
        found = resume_point(recipe)
    assert found is not None and found.step == 2
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "step_000003 is damaged and passed over" in warning and said in warning
    assert (tmp_path / "checkpoints/step_000003").is_dir()  # for a person to look at


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(make_folder(tmp_path), make_recipe(tmp_path), 1)
    moved = (tmp_path / "checkpoints/step_000001").rename(tmp_path / "checkpoints/step_000007")
    assert "the folder's name" in (damage(moved) or "")


def test_quick_looks_at_sizes_alone(tmp_path: Path) -> None:
    save(make_folder(tmp_path), make_recipe(tmp_path), 1)
    _flip("rank0.distcp")(tmp_path / "checkpoints/step_000001")
    assert damage(tmp_path / "checkpoints/step_000001", quick=True) is None
    _truncate(tmp_path / "checkpoints/step_000001")
    assert damage(tmp_path / "checkpoints/step_000001", quick=True) is not None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    recipe, folder = make_recipe(tmp_path), make_folder(tmp_path, keep_last=2, keep_best=True)
    save(folder, recipe, 1, reward_mean=0.3)
    save(folder, recipe, 2, reward_mean=0.9)
    save(folder, recipe, 3, 4, reward_mean=0.5)
    assert steps(tmp_path) == [2, 3, 4]
    save(folder, recipe, 5, reward_mean=0.1, heldout_accuracy=0.4)  # an evaluated one beats any that is not
    save(folder, recipe, 6, 7, reward_mean=0.5)
    assert steps(tmp_path) == [5, 6, 7]


def test_nothing_whole_goes_before_its_successor_is_whole(tmp_path: Path) -> None:
    recipe, folder = make_recipe(tmp_path), make_folder(tmp_path, keep_last=1)
    save(folder, recipe, 1)
    folder.begin({"step": 2, "recipe": {}}, {})
    assert steps(tmp_path) == [1]
    folder.finish()
    assert steps(tmp_path) == [2]
    (tmp_path / "checkpoints/step_000002/manifest.json").unlink()  # what is damaged replaces nothing
    save(folder, recipe, 3)
    save(folder, recipe, 4)
    assert steps(tmp_path) == [2, 4]


def test_what_a_kill_left_behind_goes_with_the_next_save(tmp_path: Path) -> None:
    for name in (".step_000001.partial", ".step_000001.deleted"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save(make_folder(tmp_path), make_recipe(tmp_path), 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]


def test_resume_says_where_to_begin(tmp_path: Path) -> None:
    assert resume_point(make_recipe(tmp_path, checkpoint={"resume": "auto"})) is None  # nothing there: from the start
    save(make_folder(tmp_path), make_recipe(tmp_path), 3)
    assert resume_point(make_recipe(tmp_path)) is None  # never
    for resume in ("auto", str(tmp_path / "checkpoints/step_000003")):
        found = resume_point(make_recipe(tmp_path, checkpoint={"resume": resume}))
        assert found is not None and (found.step, found.state()["step"]) == (3, 3)
    with pytest.raises(RecipeError, match=r"is at step 3, beyond train.steps = 2"):
        resume_point(make_recipe(tmp_path, checkpoint={"resume": "auto"}, train={"steps": 2}))


def test_a_run_with_a_kl_goes_on_with_the_model_that_it_started_from(tmp_path: Path) -> None:
    model, kl = tmp_path / "model", {"coefficient": 0.1}
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(10**7))
    recipe = make_recipe(tmp_path, model={"path": str(model)}, kl=kl, checkpoint={"resume": "auto"})
    folder = make_folder(tmp_path)
    state = {"step": 3, "recipe": recipe.model_dump(mode="json"), "reference": starting_model(recipe)}
    folder.begin(state, {"reward_mean": 0.0})
    folder.finish()
    assert resume_point(recipe) is not None
    (model / "model.safetensors").write_bytes(bytes(10**7 - 1) + b"1")
    with pytest.raises(RecipeError, match=r"the model that its run started from .* holds other weights"):
        resume_point(recipe)
    assert starting_model(make_recipe(tmp_path, model={"path": str(model)})) is None, "nothing is read without a KL"


def test_a_finished_run_is_told_from_one_that_lacks_its_end(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, checkpoint={"resume": "auto"}, train={"steps": 3})
    assert not finished(recipe)
    save(make_folder(tmp_path), make_recipe(tmp_path), 3)
    assert not finished(recipe)  # the last evaluation, the export or the report is missing
    (tmp_path / "report.md").write_text("| grpo, 3 steps |")
    (tmp_path / "recipe.yaml").write_text("old recipe")
    assert finished(recipe) and not finished(make_recipe(tmp_path, train={"steps": 3}))  # a new run is another matter
    longer = make_recipe(tmp_path, checkpoint={"resume": "auto"}, train={"steps": 4})
    prepare_run_folder(longer, resume_point(longer))
    save(make_folder(tmp_path), make_recipe(tmp_path), 4)
    assert not finished(longer)  # that report was of three steps
    assert (tmp_path / "cut/001/report.md").read_text() == "| grpo, 3 steps |"


def test_a_named_checkpoint_must_be_one_and_be_whole(tmp_path: Path) -> None:
    save(make_folder(tmp_path), make_recipe(tmp_path), 3)
    with pytest.raises(RecipeError, match="is not a checkpoint"):
        resume_point(make_recipe(tmp_path, checkpoint={"resume": str(tmp_path)}))
    _truncate(tmp_path / "checkpoints/step_000003")
    with pytest.raises(RecipeError, match=r"step_000003 is damaged: rank0.distcp has"):
        resume_point(make_recipe(tmp_path, checkpoint={"resume": str(tmp_path / "checkpoints/step_000003")}))


def test_a_branch_without_a_checkpoint_of_its_own_begins_once_more_where_it_began(tmp_path: Path) -> None:
    """auto would begin with the model's own weights."""
    save(make_folder(tmp_path / "run"), make_recipe(tmp_path / "run"), 3)
    point, branch = tmp_path / "run/checkpoints/step_000003", tmp_path / "branch"
    named, auto = (make_recipe(branch, checkpoint={"resume": resume}) for resume in (point, "auto"))
    prepare_run_folder(named, resume_point(named))
    (branch / "metrics.jsonl").write_text('{"step": 4}\n')
    with pytest.raises(RecipeError, match=f"began from {point} and has no whole .* checkpoint.resume={point}, or"):
        resume_point(auto)
    assert preflight._continues(named)
    prepare_run_folder(named, resume_point(named))
    assert (branch / "metrics.jsonl").read_text() == "" and (branch / "cut/001/metrics.jsonl").is_file()
    save(make_folder(branch), auto, 4)
    found = resume_point(auto)
    assert found is not None and found.step == 4 and not preflight._continues(named)


@pytest.mark.parametrize("text", ["", "old recipe", "checkpoint:", "checkpoint: {resume: never}", "{"])
def test_auto_begins_anew_whatever_else_the_folders_recipe_says(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert resume_point(make_recipe(tmp_path, checkpoint={"resume": "auto"})) is None


def test_a_recipe_that_would_continue_another_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    save(make_folder(tmp_path), make_recipe(tmp_path), 3)
    other = make_recipe(
        tmp_path,
        checkpoint={"resume": "auto"},
        loss={"clip_high": 0.28},
        optimizer={"learning_rate": 1e-5},
        parallel={"tensor": 2},
    )
    with pytest.raises(RecipeError) as caught:
        resume_point(other)
    message = str(caught.value)
    assert "loss.clip_high: 0.2 -> 0.28" in message and "optimizer.learning_rate: 1e-06 -> 1e-05" in message
    assert "parallel" not in message and "checkpoint.resume" not in message


def test_mesh_engines_and_length_of_a_constant_schedule_may_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(make_folder(tmp_path), make_recipe(tmp_path), 3)
    other = make_recipe(
        tmp_path,
        checkpoint={"resume": "auto"},
        parallel={"tensor": 2, "devices_per_node": 2},
        rollout={"engines": 2},
        train={"steps": 200},
    )
    with caplog.at_level(logging.INFO):
        assert resume_point(other) is not None
    assert "  differs from the checkpoint: parallel.tensor: 1 -> 2" in caplog.messages
    cosine = {"optimizer": {"schedule": "cosine"}, "checkpoint": {"resume": "auto"}}
    save(make_folder(tmp_path), make_recipe(tmp_path, **cosine), 4)
    with pytest.raises(RecipeError, match=r"train.steps: 100 -> 200"):
        resume_point(make_recipe(tmp_path, train={"steps": 200}, **cosine))


def test_deepspeeds_files_belong_to_one_backend_stage_and_number_of_ranks(tmp_path: Path) -> None:
    zero = {"backend": "deepspeed", "devices_per_node": 2}
    save(make_folder(tmp_path), make_recipe(tmp_path, parallel=zero), 3)
    for parallel, said in [
        ({"devices_per_node": 2}, "parallel.backend: 'deepspeed' -> 'megatron'"),
        (zero | {"zero_stage": 3}, "parallel.zero_stage: 2 -> 3"),
        (zero | {"devices_per_node": 4}, "parallel.devices_per_node: 2 -> 4"),
    ]:
        with pytest.raises(RecipeError, match=said):
            resume_point(make_recipe(tmp_path, parallel=parallel, checkpoint={"resume": "auto"}))
    same = make_recipe(tmp_path, parallel=zero, rollout={"engines": 2}, checkpoint={"resume": "auto"})
    assert resume_point(same) is not None


def test_what_is_kept_says_no_more_than_there_is(tmp_path: Path) -> None:
    def kept(**checkpoint: Any) -> str:
        return what_is_kept(make_recipe(tmp_path, checkpoint=checkpoint), 7)

    assert kept() == f"checkpoint step_000007 and the exported policy hf/ in {tmp_path}"
    assert kept(every=0) == f"the exported policy hf/ in {tmp_path}; with checkpoint.every = 0 it cannot be resumed"
    assert "is not kept" in kept(every=0, export_hf=False)


def test_experts_stay_shared_out_or_whole(tmp_path: Path) -> None:
    one, two, four = (make_recipe(tmp_path, parallel={"expert": expert}) for expert in (1, 2, 4))
    saved = two.model_dump(mode="json")
    assert differences(saved, four) == ([], ["parallel.expert: 2 -> 4"])
    assert differences(saved, one)[0] == ["parallel.expert: 2 -> 1"]
    assert differences(one.model_dump(mode="json"), two)[0] == ["parallel.expert: 1 -> 2"]


def test_a_checkpoint_from_before_a_key_ran_as_its_default_says(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    saved = recipe.model_dump(mode="json")
    del saved["parallel"]["backend"], saved["parallel"]["zero_stage"], saved["optimizer"]["eps"]
    del saved["estimate"]
    assert differences(saved, recipe)[0] == []
    other = make_recipe(tmp_path, optimizer={"eps": 1e-6})
    assert differences(saved, other)[0] == ["optimizer.eps: 1e-08 -> 1e-06"]


def test_a_key_that_is_gone_is_named(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    saved = recipe.model_dump(mode="json")
    saved["loss"]["entropy_bonus"] = 0.1
    assert differences(saved, recipe)[0] == [
        "loss.entropy_bonus: 0.1 in the checkpoint, and this version has no such key"
    ]


def test_data_that_moved_are_known_by_their_fingerprint(tmp_path: Path) -> None:
    here, there = (
        make_recipe(tmp_path, task={"train": f"{place}/train.jsonl", "heldout": f"{place}/test.jsonl"})
        for place in ("here", "there")
    )
    assert differences(here.model_dump(mode="json"), there)[0] == []
    listed = {"train": [{"path": "x/train.parquet"}, "y"], "fields": {"problem": "prompt"}}
    assert differences(here.model_dump(mode="json"), make_recipe(tmp_path, task=listed))[0] == []


def test_a_file_that_only_another_node_sees_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "here.pt").write_bytes(b"x")
    known = {"here.pt": file_sum(tmp_path / "here.pt"), "rank1.distcp": checkpoint.FileSum(bytes=3, crc32=1)}
    with pytest.raises(RuntimeError, match=r"a rank wrote rank1.distcp.*on a shared file system"):
        checkpoint.write_manifest(tmp_path, step=1, scores={}, known=known)
    assert not (tmp_path / "manifest.json").exists()


def test_the_last_evaluation_decides_which_is_best(tmp_path: Path) -> None:
    folder, recipe = make_folder(tmp_path, keep_last=1, keep_best=True), make_recipe(tmp_path)
    save(folder, recipe, 2, heldout_accuracy=0.5)
    save(folder, recipe, 4)
    assert steps(tmp_path) == [2, 4]
    folder.score(4, {"heldout_accuracy": 0.9})
    assert steps(tmp_path) == [4] and damage(tmp_path / "checkpoints/step_000004") is None
    folder.score(6, {"heldout_accuracy": 1.0})  # never saved
    assert steps(tmp_path) == [4]


def test_every_key_that_may_differ_is_a_key_of_the_recipe(tmp_path: Path) -> None:
    known = _flat(make_recipe(tmp_path).model_dump(mode="json"))
    for name in MAY_DIFFER:
        assert name in known or (name.endswith(".") and any(key.startswith(name) for key in known)), name


def make_run(run: Path) -> None:
    """A run folder after step 5, of which the last row was torn by a kill."""
    (run / "samples").mkdir(parents=True)
    rows = [json.dumps({"step": step, "x": step}) + "\n" for step in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(rows) + '{"step": 6, "x"')
    (run / "evaluation.jsonl").write_text('{"step": 0}\n{"step": 4}\n')
    (run / "timeline.jsonl").write_text('{"step": 0}\n{"step": 3}\n{"step": 4}\n{"step": 5')
    (run / "recipe.yaml").write_text("old recipe")
    for name in ("step_000003.jsonl", "step_000004.jsonl", "step_000004.pt", "evaluation_000004.pt"):
        (run / "samples" / name).write_text(name)
    save(make_folder(run), make_recipe(run), 3, 5)


def test_what_lies_beyond_the_checkpoint_is_cut_and_kept(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in ("step_000003_driver.json", "step_000004_driver.json"):
        (tmp_path / "profile").mkdir(exist_ok=True)
        (tmp_path / "profile" / name).write_text("{}")
    recipe = make_recipe(tmp_path, checkpoint={"resume": "auto"})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    prepare_run_folder(recipe, checkpoint.Checkpoint(tmp_path / "checkpoints/step_000003", 3))
    cut = tmp_path / "cut/001"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes() + (cut / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "evaluation.jsonl").read_text() == '{"step": 0}\n'
    assert (tmp_path / "timeline.jsonl").read_text() == '{"step": 0}\n{"step": 3}\n'
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_000003.jsonl"]
    assert len(list((cut / "samples").iterdir())) == 3
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["step_000003_driver.json"]
    assert [p.name for p in (cut / "profile").iterdir()] == ["step_000004_driver.json"]
    assert steps(tmp_path) == [3] and damage(cut / "checkpoints/step_000005") is None
    assert (cut / "recipe.yaml").read_text() == "old recipe"
    assert (tmp_path / "recipe.yaml").read_text() == resolved_yaml(recipe)


def test_auto_without_a_whole_checkpoint_begins_anew_and_keeps_what_was(tmp_path: Path) -> None:
    make_run(tmp_path)
    prepare_run_folder(make_recipe(tmp_path, checkpoint={"resume": "auto"}), None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert len((tmp_path / "cut/001/metrics.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "evaluation.jsonl").read_text() == ""  # step 0 is evaluated again
    assert (tmp_path / "timeline.jsonl").read_text() == ""  # nor is there another start
    prepare_run_folder(make_recipe(tmp_path, checkpoint={"resume": "auto"}), None)
    assert (tmp_path / "cut/002/recipe.yaml").is_file()


def test_an_evaluation_that_is_made_again_stands_once(tmp_path: Path) -> None:
    make_run(tmp_path)
    recipe = make_recipe(tmp_path, checkpoint={"resume": "auto"}, train={"steps": 4})
    prepare_run_folder(recipe, checkpoint.Checkpoint(tmp_path / "checkpoints/step_000004", 4))
    assert (tmp_path / "evaluation.jsonl").read_text() == '{"step": 0}\n'


def test_an_evaluation_that_the_checkpoint_does_not_know_of_is_made_again(tmp_path: Path) -> None:
    """It was written just before a signal came; the resumed run evaluates that step."""
    make_run(tmp_path)
    (tmp_path / "evaluation.jsonl").write_text('{"step": 0}\n{"step": 3}\n')
    recipe, point = make_recipe(tmp_path, checkpoint={"resume": "auto"}), tmp_path / "checkpoints/step_000003"
    prepare_run_folder(recipe, checkpoint.Checkpoint(point, 3))
    assert (tmp_path / "evaluation.jsonl").read_text() == '{"step": 0}\n'
    make_folder(tmp_path).score(3, {"heldout_accuracy": 0.5})
    (tmp_path / "evaluation.jsonl").write_text('{"step": 0}\n{"step": 3}\n')
    prepare_run_folder(recipe, checkpoint.Checkpoint(point, 3))
    assert (tmp_path / "evaluation.jsonl").read_text() == '{"step": 0}\n{"step": 3}\n'


def test_files_that_no_run_writes_stay_where_they_are(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in ("samples/my_notes.txt", "samples/look_at_000099", "checkpoints/step_old", "problems.jsonl"):
        (tmp_path / name).write_text("mine")
    recipe = make_recipe(tmp_path, checkpoint={"resume": "auto"})
    prepare_run_folder(recipe, checkpoint.Checkpoint(tmp_path / "checkpoints/step_000003", 3))
    assert (tmp_path / "problems.jsonl").read_text() == "mine"
    assert (tmp_path / "samples/my_notes.txt").exists() and (tmp_path / "samples/look_at_000099").exists()
    assert (tmp_path / "checkpoints/step_old").exists() and steps(tmp_path) == [3]


def test_a_run_that_resumes_nothing_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    make_run(tmp_path)
    prepare_run_folder(make_recipe(tmp_path), None)
    assert steps(tmp_path) == [3, 5] and not (tmp_path / "cut").exists()


def test_a_run_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    said = rf"run\.dir = .*/run is in use by process {os.getpid()} on \S+; wait for its end .* name another"
    with held(tmp_path / "run"):
        with pytest.raises(RunError, match=said), held(tmp_path / "run"):
            pytest.fail("two runs write into one folder")
        with held(tmp_path / "other"):
            pass
    with held(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path):
        (warning,) = caplog.messages
    assert "has no locks (No locks available)" in warning


def test_a_full_disk_is_told_by_its_cause_or_by_an_actors_words(tmp_path: Path) -> None:
    full, other = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EIO, os.strerror(errno.EIO))
    caused = RuntimeError("a rank could not write its part")
    caused.__cause__ = full
    for error in (full, caused, RuntimeError(f"Worker failure: {full}")):
        told = checkpoint.disk_full(error, tmp_path)
        assert told is not None and f"no room to write into run.dir = {tmp_path}: " in str(told)
        assert "its newest checkpoint is none, so the run begins anew" in str(told)
    assert checkpoint.disk_full(other, tmp_path) is None and checkpoint.disk_full(ValueError("no"), tmp_path) is None
