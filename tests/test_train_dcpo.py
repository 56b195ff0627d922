"""The entry: a dry run starts nothing, and bad input ends in one clear error before anything is started or written."""

import contextlib
import datetime
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dcpo_openrlhf import local_ray, signals, train_dcpo
from dcpo_openrlhf.recipe import resume
from dcpo_openrlhf.recipe.load import load_recipe
from dcpo_openrlhf.recipe.schema import Recipe
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[1]
PROBLEM = {"id": "a", "problem": "1+1?", "answer": "2", "source": "test"}
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("train") / "tiny", layers=1)


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    values = {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "logical_devices": 2},
        "model": {"path": str(tiny)},
        "task": {"kind": "arithmetic", "template": "plain"},
        "train": {"steps": 1, "prompts_per_step": 2, "prompts_per_update": 2, "group_size": 2},
        "parallel": {"devices_per_node": 1},
        "rollout": {"engines": 1, "max_prompt_tokens": 100, "max_new_tokens": 8},
    }
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def main(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """(exit status, stdout, stderr) of the entry on the tiny recipe; starting Ray fails the test."""

    def started(*_: Any) -> None:
        pytest.fail("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(train_dcpo, "join_ray", started)
    monkeypatch.setattr(train_dcpo, "log_to", lambda _: None)  # it would take pytest's log handlers away

    def call(*arguments: str) -> tuple[int, str, str]:
        status = train_dcpo.main(["--recipe", str(recipe), *arguments])
        return status, *capsys.readouterr()

    return call


def error_of(outcome: tuple[int, str, str], tmp_path: Path) -> str:
    """The one error of a refused run, which left no trace."""
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()
    return err


def jsonl(tmp_path: Path, *lines: object) -> str:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return f"task.train={file}"


def test_dry_run_prints_the_resolved_recipe(main: Main, recipe: Path, tmp_path: Path) -> None:
    status, out, err = main("--dry-run", "train.steps=7")
    assert (status, err) == (0, "")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(out)
    assert load_recipe(resolved) == load_recipe(recipe, ["train.steps=7"])
    assert not (tmp_path / "run").exists()


def test_dry_run_and_bad_data_import_neither_ray_nor_vllm(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from dcpo_openrlhf.train_dcpo import main\n"
        f"assert main(['--recipe', {str(recipe)!r}, '--dry-run']) == 0\n"
        f"assert main(['--recipe', {str(recipe)!r}, 'task.kind=jsonl', {jsonl(tmp_path)!r}]) == 2\n"
        "print('loaded:', sorted({'ray', 'vllm', 'openrlhf', 'megatron', 'deepspeed'} & set(sys.modules)))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/train.jsonl: is empty; give one JSON object a line")


def test_bad_recipe(main: Main, tmp_path: Path) -> None:
    err = error_of(main("train.steps=0", "train.group_sise=2"), tmp_path)
    assert "no key train.group_sise; did you mean 'group_size'?" in err
    assert "train.steps = 0 must be greater than 0" in error_of(main("train.steps=0"), tmp_path)
    assert "train.group_size = 1 must be at least 2" in error_of(main("train.group_size=1"), tmp_path)
    assert "is not a Hugging Face model folder" in error_of(main("model.path=/nowhere"), tmp_path)


def test_empty_jsonl(main: Main, tmp_path: Path) -> None:
    assert "train.jsonl: is empty" in error_of(main("task.kind=jsonl", jsonl(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": ', "train.jsonl:2: not JSON"),
        ("[1]", "train.jsonl:2: list instead of an object"),
        ({"id": "b", "problem": "x"}, "train.jsonl:2: missing answer; the keys are id, problem"),
        (PROBLEM | {"id": "b", "answer": 2.5}, "train.jsonl:2: answer is 2.5 (float); write it as a string"),
        (PROBLEM, "train.jsonl:2: id 'a' is already on line 1"),
    ],
)
def test_malformed_jsonl_names_file_and_line(line: object, said: str, main: Main, tmp_path: Path) -> None:
    assert said in error_of(main("task.kind=jsonl", jsonl(tmp_path, PROBLEM, line)), tmp_path)


@pytest.mark.parametrize("which", ["train", "heldout"])
@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"answer": "1/2"}, ["reward.extractor=last_integer"], 'extractor "last_integer" needs integer answers, not'),
        ({"answer": "1" * 2001}, [], "an answer has at most 2000 characters, not 2001"),
        ({"problem": "1+\ud8001?"}, [], r"problem holds half of a surrogate pair, \ud800 at character 3"),
        ({"answer": "2\udc00"}, [], r"answer holds half of a surrogate pair, \udc00 at character 2"),
    ],
)
def test_what_would_end_the_run_in_its_middle_is_an_error_before(
    which: str, changes: dict[str, str], overrides: list[str], said: str, main: Main, tmp_path: Path
) -> None:
    data = jsonl(tmp_path, PROBLEM, PROBLEM | {"id": "b"} | changes)
    files = [data]
    if which == "heldout":
        (tmp_path / "good.jsonl").write_text(json.dumps(PROBLEM))
        files = [f"task.train={tmp_path}/good.jsonl", data.replace("task.train", "task.heldout")]
    for dry_run in ([], ["--dry-run"]):
        err = error_of(main("task.kind=jsonl", *files, *overrides, *dry_run), tmp_path)
        assert err.startswith(f"error: {tmp_path}/train.jsonl:2: {said}")


def test_a_reward_function_that_cannot_be_imported_is_an_error_before_anything(main: Main, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_module\n\n\ndef f(batch):\n    return [0.0] * len(batch)\n")
    for dry_run in ([], ["--dry-run"]):
        for key in (f"reward.function={tmp_path}/mine.py:f", f"reward.by_source={{'*': {tmp_path}/mine.py:f}}"):
            err = error_of(main(key, *dry_run), tmp_path)
            assert f"{tmp_path}/mine.py:f cannot be imported (ModuleNotFoundError: No module named 'no_such" in err


def test_graders_by_source_are_checked_against_the_data(main: Main, tmp_path: Path) -> None:
    data = jsonl(tmp_path, PROBLEM, PROBLEM | {"id": "b", "answer": "1/2", "source": "other", "tests": ["x"]})
    assert main("--dry-run", "task.kind=jsonl", data, "reward.by_source={test: last_integer}")[0] == 0
    err = error_of(main("task.kind=jsonl", data, "reward.by_source={'*': last_integer}"), tmp_path)
    assert err.startswith(f'error: {tmp_path}/train.jsonl:2: extractor "last_integer" needs integer answers')
    err = error_of(main("task.kind=jsonl", data, "reward.by_source={tset: last_integer, o*: boxed}"), tmp_path)
    assert "reward.by_source names tset, the source of no problem; the sources are other, test" in err


def test_tests_that_cannot_be_read_are_an_error_before_a_run(main: Main, tmp_path: Path) -> None:
    code = [PROBLEM | {"tests": ["assert f(1) == 2"]}, PROBLEM | {"id": "b", "tests": ["assert f(1"]}]
    err = error_of(main("task.kind=jsonl", jsonl(tmp_path, *code), "reward.extractor=python_tests"), tmp_path)
    assert err.startswith(f'error: {tmp_path}/train.jsonl:2: grader "python_tests" cannot read the tests (SyntaxError')


def test_half_a_surrogate_in_the_template(main: Main, tmp_path: Path) -> None:
    err = error_of(main("task.template={problem}\udcff"), tmp_path)
    assert r"holds half of a surrogate pair, \udcff at character" in err


def test_prompt_longer_than_its_room(main: Main, tmp_path: Path) -> None:
    long = PROBLEM | {"id": "long", "problem": "one plus " * 40}
    err = error_of(main("task.kind=jsonl", jsonl(tmp_path, PROBLEM, long)), tmp_path)
    assert err == error_of(main("--dry-run", "task.kind=jsonl", jsonl(tmp_path, PROBLEM, long)), tmp_path)
    assert "prompt 'long' has" in err and "above the limit of 100 = context 108 - max_new_tokens 8" in err
    heldout = jsonl(tmp_path, long).replace("task.train", "task.heldout")
    (tmp_path / "short.jsonl").write_text(json.dumps(PROBLEM))
    err = error_of(main("task.kind=jsonl", f"task.train={tmp_path}/short.jsonl", heldout), tmp_path)
    assert "prompt 'long' has" in err


def test_data_of_other_columns_and_forms(main: Main, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1+1?"}]
    rows = [{"prompt": turns, "truth": {"value": n}, "set": "sums"} for n in (2, 3)]
    (tmp_path / "chat.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    names = "{problem: prompt, answer: truth.value, source: set}"
    files = (
        f"[{{path: {tmp_path}/chat.jsonl.gz, weight: 2, fields: {names}}}, {{path: {tmp_path}/train.jsonl, weight: 1}}]"
    )
    jsonl(tmp_path, PROBLEM, {"problem": "2+2?", "answer": 4})
    held = f"task.heldout={tmp_path}/train.jsonl"
    arguments = (
        "task.kind=jsonl",
        f"task.train={files}",
        held,
        "reward.by_source={sums: last_integer, train.jsonl: boxed}",
    )
    assert main("--dry-run", *arguments)[0] == 0
    err = error_of(main(*arguments, "task.system=S"), tmp_path)
    assert "problem 'chat.jsonl.gz:1' is chat messages, which take no task.system = 'S'" in err
    err = error_of(
        main("task.kind=jsonl", f"task.train={tmp_path}/chat.jsonl.gz", "task.fields={problem: prompt}"), tmp_path
    )
    assert err.startswith(
        f"error: {tmp_path}/chat.jsonl.gz:1: missing answer; the keys are prompt, truth, set; name the"
    )


def test_data_without_answers_are_for_functions(main: Main, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(batch):\n    return [0.0] * len(batch)\n")
    data = ("task.kind=jsonl", jsonl(tmp_path, {"problem": "A poem."}), "task.fields={answer: null}")
    assert main("--dry-run", *data, f"reward.function={tmp_path}/mine.py:f")[0] == 0
    err = error_of(main(*data), tmp_path)
    assert err.startswith(f"error: {tmp_path}/train.jsonl:1: task.fields.answer = null, and reward.extractor = boxed")
    err = error_of(main(*data, "reward.extractor=last_integer"), tmp_path)
    assert err.startswith(f"error: {tmp_path}/train.jsonl:1: extractor \"last_integer\" needs integer answers, not ''")


def test_other_data_errors(main: Main, tmp_path: Path) -> None:
    assert "no prompt template 'nope'; take one of" in error_of(main("task.template=nope"), tmp_path)
    assert "arithmetic level must be one of" in error_of(main("task.level=99"), tmp_path)


def test_the_day_of_the_first_start_stands_in_the_recipe(
    main: Main, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_dcpo, "_today", lambda: datetime.date(2024, 7, 26))
    assert yaml.safe_load(main("--dry-run")[1])["task"]["date"] is None, "whose template does not ask"
    folder = tmp_path / "dated"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}")
    model = f"model.path={folder}"
    assert yaml.safe_load(main("--dry-run", model)[1])["task"]["date"] == "2024-07-26"
    assert yaml.safe_load(main("--dry-run", model, "task.date=1999-01-02")[1])["task"]["date"] == "1999-01-02"
    assert yaml.safe_load(main("--dry-run", model, "task.chat=false")[1])["task"]["date"] is None


def test_what_the_chat_template_does_not_take(main: Main, tmp_path: Path) -> None:
    err = error_of(main("task.chat_template_kwargs={enable_thinking: false}"), tmp_path)
    assert "sets enable_thinking, which the tokenizer's chat template does not read" in err
    assert "rollout.stop: 'end of it' is" in error_of(main("rollout.stop=[end of it]"), tmp_path)


def test_tokenizer_that_is_missing_or_never_ends(main: Main, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(tiny / name)
    assert f"the tokenizer of {folder} cannot be loaded" in error_of(main(f"model.path={folder}"), tmp_path)
    (folder / "tokenizer.json").symlink_to(tiny / "tokenizer.json")
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    err = error_of(main(f"model.path={folder}"), tmp_path)
    assert "pad_token_id = None; set both in its tokenizer_config.json" in err


def test_signal_is_told_and_sets_the_exit_status(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> None:
        raise train_dcpo.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(train_dcpo, "run", interrupted)
    status, _, err = main()
    assert status == 128 + signal.SIGTERM
    assert err.startswith("ended by SIGTERM")


def test_ctrl_c_while_the_data_are_read_is_told_too(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_dcpo, "read_prompts", interrupted)
    assert main() == (130, "", "ended by SIGINT; every process of this run is gone\n")


def test_a_start_that_does_not_come_up_is_one_error(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(_: Any) -> None:
        raise local_ray.StartupError("2 devices for training must fit")

    monkeypatch.setattr(train_dcpo, "run", late)
    assert main() == (1, "", "error: 2 devices for training must fit\n")


def test_a_run_folder_in_use_is_left_as_it_is(main: Main, tmp_path: Path) -> None:
    """Before its first step a run has no metrics.jsonl yet, and one that resumes would cut another's rows."""
    with resume.held(tmp_path / "run"):
        for key in ("never", "auto"):
            status, out, err = main(f"checkpoint.resume={key}")
            assert (status, out) == (1, "") and err.startswith("error: run.dir = ") and "is in use by process" in err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [resume.LOCK]


def test_a_save_that_takes_too_long_or_fails_is_told_and_the_run_still_ends(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise OSError("no space left")

    with signals.raising():
        for save, said in [(lambda: time.sleep(30), "checkpoint.signal_timeout is over"), (fails, "no space left")]:
            caplog.clear()
            train_dcpo._before_exit(save, 2.0)
            (warning,) = caplog.messages
            assert said in warning and "the last whole one stays" in warning


class FakeTrainer:
    """A trainer that ends with an error, with two finished steps of which one is saved."""

    def __init__(self, in_hand: int | None) -> None:
        self.saved, self.actor_model_group = [], None
        self.saving = SimpleNamespace(
            in_hand=in_hand,
            before_exit=lambda: self.saved.append("step 2"),
            checkpoints=SimpleNamespace(saved_step=1, finish=lambda: self.saved.append("in flight")),
        )

    def fit(self) -> None:
        raise RuntimeError("an engine died")


@pytest.mark.parametrize(
    ("in_hand", "every", "saved", "said"),
    [
        (None, 5, ["step 2"], ""),
        (3, 5, ["in flight"], "of 2 steps after the newest checkpoint (step 1)"),
        (3, 0, [], ""),
    ],
)
def test_an_error_saves_the_last_finished_step_where_the_weights_are_still_its(
    in_hand: int | None, every: int, saved: list[str], said: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = FakeTrainer(in_hand)
    monkeypatch.setattr(train_dcpo, "started", lambda *_, **__: contextlib.nullcontext(trainer))
    values = {"model": {"path": "unused"}, "task": {"kind": "arithmetic"}, "checkpoint": {"every": every}}
    with signals.raising(), pytest.raises(RuntimeError, match="an engine died"):
        train_dcpo.run(Recipe.model_validate(values))
    assert trainer.saved == saved
    assert said in caplog.text


def test_unknown_option_ends_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_dcpo.main(["--recipe", "x.yaml", "--dryrun"])
    assert caught.value.code == 2
    assert "--dryrun" in capsys.readouterr().err
