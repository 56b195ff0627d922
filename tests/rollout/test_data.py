"""Data files of every form give the problems that they hold; what is ambiguous is an error with file and line."""

import datetime
import decimal
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dcpo_openrlhf.rollout import files
from dcpo_openrlhf.rollout.data import OWN_NAMES, load, load_jsonl, read
from dcpo_openrlhf.rollout.problems import Problem, TaskError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GOOD = {"id": "a", "problem": "1+1?", "answer": "2", "source": "test"}
PROBLEM = Problem("a", "1+1?", "2", "test")
ROWS = [
    {"id": f"r{i}", "problem": f"{i}+1?", "answer": str(i + 1), "source": "sums", "level": i % 3} for i in range(25)
]
PROBLEMS = [Problem(f"r{i}", f"{i}+1?", str(i + 1), "sums", metadata={"level": i % 3}) for i in range(25)]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0},
}
VERL_NAMES: Any = OWN_NAMES | {"problem": "prompt", "answer": "reward_model.ground_truth", "source": "data_source"}


def lines(path: Path, *rows: object, newline: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + newline for row in rows)
    path.write_bytes(text.encode("utf-8"))
    return path


def table(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=7)
    return path


def packed(path: Path, text: bytes) -> Path:
    path.write_bytes(gzip.compress(text))
    return path


# --- forms -----------------------------------------------------------------------------------------------------------


def saved(path: Path, rows: list[Any]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    return path


def shards(path: Path, rows: list[Any]) -> Path:
    """A folder whose files, in the order of their names, hold the rows; a hidden one and another kind are none."""
    lines(path / "b.jsonl", *rows[10:])
    table(path / "a" / "part.parquet", *rows[:10])
    lines(path / ".cache" / "x.jsonl", *rows)
    (path / "README.md").write_text("rows")
    return path


FORMS: dict[str, Any] = {
    "JSONL": lambda path, rows: lines(path / "d.jsonl", *rows),
    "JSONL by another name": lambda path, rows: lines(path / "data", *rows),
    "list": lambda path, rows: lines(path / "d.json", json.dumps(rows, indent=1)),
    "lines in .json": lambda path, rows: lines(path / "d.json", *rows),
    "packed lines": lambda path, rows: packed(path / "d.jsonl.gz", lines(path / "x", *rows).read_bytes()),
    "packed list": lambda path, rows: packed(path / "d.json.gz", json.dumps(rows).encode()),
    "Parquet": lambda path, rows: table(path / "d.parquet", *rows),
    "saved dataset": lambda path, rows: saved(path / "saved", rows),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_problems(form, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BATCH", 10)
    seen = []
    problems = read(
        [(FORMS[form](tmp_path, ROWS), OWN_NAMES)], look=lambda problem, place: seen.append((problem, place))
    )
    assert [problem for problem, _ in seen] == PROBLEMS and len(problems) == problems.counts[0] == 25
    assert [problems[i] for i in (24, 0, 13)] == [PROBLEMS[i] for i in (24, 0, 13)] and problems[3:5] == PROBLEMS[3:5]
    assert [problems.place(i) for i in range(25)] == [place for _, place in seen]
    assert problems.place(12).endswith(("13", "row 13", "entry 13"))
    with pytest.raises(IndexError):
        problems[25]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    problems = read([(shards(tmp_path / "d", ROWS), OWN_NAMES)])
    assert [p.id for p in problems] == [f"a/part.parquet:r{i}" for i in range(10)] + [
        f"b.jsonl:r{i}" for i in range(10, 25)
    ]
    assert [p.problem for p in problems] == [p.problem for p in PROBLEMS] and problems.counts == [25]
    assert problems.place(10) == f"{tmp_path}/d/b.jsonl:1"


def test_a_dataset_of_one_split_is_that_split(tmp_path):
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "one")
    assert load_jsonl(tmp_path / "one") == PROBLEMS
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "two")
    with pytest.raises(
        TaskError, match=r"two: a dataset of several splits; name the folder .* \S+two/train, \S+two/test"
    ):
        load_jsonl(tmp_path / "two")
    assert load_jsonl(tmp_path / "two" / "test") == PROBLEMS


@pytest.mark.parametrize("name", ["train.parquet", "data/train-00000-of-00001.parquet", "gsm8k_train.jsonl"])
def test_a_test_set_beside_the_training_set_is_no_training_set(name, tmp_path):
    other = lines(tmp_path / name.replace("train", "test").replace(".parquet", ".jsonl"), GOOD)
    (lines if name.endswith("jsonl") else table)(tmp_path / name, GOOD)
    with pytest.raises(TaskError, match="the folder holds several splits"):
        load_jsonl(tmp_path)
    other.unlink()
    assert load_jsonl(tmp_path) == [PROBLEM]


def test_folders_that_mean_no_set_are_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    lines(tmp_path / "dapo17k.jsonl", GOOD)
    with pytest.raises(TaskError, match=r"a folder of tools\.prepare_data, with one set a file"):
        load_jsonl(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"empty: the folder holds no file of \.jsonl"):
        load_jsonl(tmp_path / "empty")


def test_several_files_are_told_apart_by_their_names(tmp_path):
    """verl's examples keep gsm8k/train.parquet and math/train.parquet."""
    one, other = (lines(tmp_path / name / "train.jsonl", {"problem": "p", "answer": 1}, GOOD) for name in ("x", "y"))
    problems = read([(one, OWN_NAMES), (other, OWN_NAMES)])
    assert problems.counts == [2, 2]
    assert [p.id for p in problems] == ["x/train.jsonl:1", "x/train.jsonl:a", "y/train.jsonl:1", "y/train.jsonl:a"]
    assert [p.source for p in problems] == ["x/train.jsonl", "test", "y/train.jsonl", "test"]
    moved = (tmp_path / "elsewhere").mkdir() or tmp_path / "elsewhere"
    for name in ("x", "y"):
        (tmp_path / name).rename(moved / name)
    again = read([(moved / "x/train.jsonl", OWN_NAMES), (moved / "y/train.jsonl", OWN_NAMES)])
    assert list(again) == list(problems)


def test_packed_files_do_not_change_and_others_must_not(tmp_path):
    path = lines(tmp_path / "d.jsonl", GOOD, GOOD | {"id": "b"})
    problems = read([(path, OWN_NAMES)])
    lines(path, GOOD, GOOD | {"id": "c", "problem": "other"})
    assert problems[0] == PROBLEM
    with pytest.raises(TaskError, match=r"d\.jsonl:2: the line changed since the run began"):
        problems[1]
    copy = read([(packed(tmp_path / "d.jsonl.gz", path.read_bytes()), OWN_NAMES)])
    (tmp_path / "d.jsonl.gz").write_bytes(b"")
    assert copy[1].id == "c"
    copy = read([(table(tmp_path / "d.parquet", *ROWS), OWN_NAMES)])
    (tmp_path / "d.parquet").unlink()
    assert list(copy) == PROBLEMS


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for form in FORMS:
        read([(FORMS[form](tmp_path, ROWS), OWN_NAMES)])
    assert os.listdir(tmp_path / "tmp") == []


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JSONL", "Parquet", "saved dataset"])
def test_the_rows_of_verl(form, tmp_path):
    path = FORMS[form](tmp_path, [VERL, VERL | {"prompt": [{"role": "user", "content": "2+2?"}]}])
    first, second = load(path, VERL_NAMES)
    metadata = {key: VERL[key] for key in ("ability", "reward_model", "extra_info")}
    assert first == Problem("1", "1+1?", "2", "openai/gsm8k", metadata=metadata, messages=VERL["prompt"])
    assert (second.id, second.messages) == ("2", [{"role": "user", "content": "2+2?"}])


def test_the_rows_of_openrlhf(tmp_path):
    names = OWN_NAMES | {"problem": "input", "answer": "label", "source": "datasource"}
    path = lines(
        tmp_path / "d.jsonl", {"input": "1+1?", "label": "2", "datasource": "sums"}, {"input": "2?", "label": 2}
    )
    assert load(path, names) == [Problem("1", "1+1?", "2", "sums"), Problem("2", "2?", "2", "d.jsonl")]
    assert [p.answer for p in load(path, names | {"answer": None})] == ["", ""]
    assert load(path, names | {"answer": None})[0].metadata == {"label": "2"}


@pytest.mark.parametrize("form", ["Parquet", "saved dataset", "JSONL"])
def test_columns_that_are_only_metadata_may_stay_unread(form, tmp_path):
    path, seen = FORMS[form](tmp_path, [VERL, VERL]), []
    problems = read([(path, VERL_NAMES)], look=lambda problem, _: seen.append(problem), metadata=False)
    assert problems[0] == load(path, VERL_NAMES)[0] and "extra_info" in problems[0].metadata
    assert form == "JSONL" or seen[0].metadata.keys() == {"reward_model"}
    with pytest.raises(
        TaskError, match="missing question; the keys are data_source, prompt, ability, reward_model, extra_i"
    ):
        read([(path, VERL_NAMES | {"problem": "question"})], metadata=False)


def test_a_column_with_a_dot_in_its_name(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"problem": "p", "a.b": "1", "a": {"b": "2"}})
    assert load(path, OWN_NAMES | {"answer": "a.b"})[0].answer == "1"


def test_keys_that_other_rows_of_a_table_have_are_no_metadata(tmp_path):
    path = table(
        tmp_path / "d.parquet", GOOD | {"tests": ["x"], "test_list": None}, GOOD | {"id": "b", "test_list": ["y"]}
    )
    assert [p.metadata for p in load_jsonl(path)] == [{"tests": ["x"]}, {"test_list": ["y"]}]


def test_what_json_has_no_form_of_is_text_for_graders(tmp_path):
    day, price = datetime.date(2024, 1, 5), decimal.Decimal("1.50")
    (problem,) = load_jsonl(
        table(tmp_path / "d.parquet", GOOD | {"day": day, "more": {"prices": [price, None]}, "n": 0.5})
    )
    assert problem.metadata == {"day": "2024-01-05", "more": {"prices": ["1.50", None]}, "n": 0.5}


def test_what_is_no_error(tmp_path):
    """A BOM, CRLF, blank lines, no newline at the end, U+2028, integers, lists of one, no id, no source."""
    rows = [
        GOOD,
        "",
        GOOD | {"id": 7, "answer": 10**30, "problem": "line\u2028separator \\boxed{}"},
        "  ",
        {"problem": "p", "answer": ["x"], "extra": 1},
        {"problem": "q", "answer": [-3], "id": None, "source": None},
        GOOD | {"id": "b", "source": "", "answer": "2024-01-05"},
    ]
    path = lines(tmp_path / "d.jsonl", *rows, newline="\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip())
    assert load_jsonl(path) == [
        PROBLEM,
        Problem("7", "line\u2028separator \\boxed{}", str(10**30), "test"),
        Problem("5", "p", "x", "d.jsonl", metadata={"extra": 1}),
        Problem("6", "q", "-3", "d.jsonl"),
        Problem("b", "1+1?", "2024-01-05", ""),
    ]


def test_a_bom_before_a_list(tmp_path):
    (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode())
    assert load_jsonl(tmp_path / "d.json") == PROBLEMS


# --- errors ----------------------------------------------------------------------------------------------------------


TURN = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"id": "b", ', "not JSON in UTF-8"),
        ('{"id": "b", "answer": ' + "1" * 5000 + "}", "not JSON in UTF-8"),
        ("[1]", "list instead of an object"),
        ({"id": "b", "problem": "1+1?", "source": "test"}, "missing answer; the keys are id, problem, source; name"),
        (
            VERL,
            r"missing problem, answer; the keys are data_source, .* \(task\.fields=\{problem: prompt, answer: "
            r"reward_model\.ground_truth, source: data_source\} may be meant\)",
        ),
        (GOOD | {"answer": None}, "missing answer"),
        (GOOD | {"answer": 2.0}, r"answer is 2\.0 \(float\); write it as a string"),
        (GOOD | {"answer": True}, r"answer is True \(bool\); write it as a string"),
        (GOOD | {"answer": ["1", "2"]}, r"answer is \['1', '2'\] \(list\); write it as a string"),
        (GOOD | {"answer": []}, r"answer is \[\] \(list\)"),
        (GOOD | {"answer": [[1]]}, r"answer is \[1\] \(list\)"),
        (GOOD | {"answer": " "}, "answer is empty"),
        (GOOD | {"problem": " "}, "problem is empty"),
        (GOOD | {"problem": 3}, r"problem is 3 \(int\); write it as a string, or as chat messages"),
        (GOOD | {"problem": []}, r"problem is \[\] \(list\)"),
        (GOOD | {"problem": ["1+1?"]}, r"problem: message 1 is '1\+1\?' \(str\); give each a role and a content"),
        (GOOD | {"problem": [TURN, {"role": "user", "content": [{"type": "image"}]}]}, "problem: message 2 is"),
        (
            GOOD | {"problem": [TURN, {"role": "assistant", "content": "2"}]},
            "problem ends with a message of 'assistant', and the",
        ),
        (GOOD | {"problem": [{"role": "user", "content": ""}]}, "problem is empty"),
        (GOOD | {"id": ""}, "id is empty"),
        (GOOD | {"id": 1.5}, r"id is 1\.5 \(float\); write it as a string or an integer"),
        (GOOD | {"source": 1}, r"source is 1 \(int\); write it as a string"),
        (GOOD, r"id 'a' is already on line 1 of \S+d\.jsonl; ids must be unique within a file"),
        ('{"problem": "\\ud800", "answer": "1"}', r"problem holds half of a surrogate pair, \\ud800 at character 1"),
        ('{"problem": "p", "answer": "1", "source": "\\ud800"}', "source holds half of a surrogate pair"),
        (
            GOOD | {"problem": [{"role": "user", "content": "\ud800"}]},
            "problem: message 1 holds half of a surrogate pair",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = lines(tmp_path / "d.jsonl", GOOD, "", bad, GOOD | {"id": "c"})
    with pytest.raises(TaskError, match=f"d.jsonl:3: {message}"):
        load_jsonl(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": [1.5, 2.5]}, r"d\.parquet, row 1: answer is 1\.5 \(float\)"),
        ({"answer": ["1", None]}, r"d\.parquet, row 2: missing answer"),
        ({"answer": ["1", "2"], "id": ["a", "a"]}, r"d\.parquet, row 2: id 'a' is already on line 1"),
        (
            {"answer": pyarrow.array([b"1", b"\xff"]).view(pyarrow.utf8())},
            r"d\.parquet, row 1 or soon after: not UTF-8",
        ),
    ],
)
def test_a_bad_row_of_a_table_is_named(tmp_path, columns, message):
    parquet.write_table(pyarrow.table({"problem": ["p", "q"], **columns}), tmp_path / "d.parquet")
    with pytest.raises(TaskError, match=message):
        load_jsonl(tmp_path / "d.parquet")


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(TaskError, match=r"d\.jsonl:2: not JSON in UTF-8"):
        load_jsonl(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", None, "cannot be read: No such file"),
        ("d.jsonl", b"", "is empty"),
        ("d.jsonl", b"\xef\xbb\xbf\n \n", "is empty"),
        ("d.json", b"[]", "is empty"),
        ("d.json", b"[{]", "not JSON in UTF-8 .*; give a list of objects"),
        ("d.json", b"[1]", ", entry 1: int instead of an object"),
        ("d.json", b'{\n "a": 1\n}', ":1: not JSON"),
        ("d.parquet", b"x", "not a Parquet file"),
        ("d.jsonl.gz", b"x", "cannot be read: Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], "cannot be read: Compressed file ended before"),
        ("d.jsonl.gz", gzip.compress(bytes(range(256)) * 9, mtime=0)[:60] + b"xxxx" + bytes(99), "cannot be read: "),
        ("d.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
    ],
)
def test_files_that_hold_no_rows_are_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=rf"{name}.*{message}"):
        load_jsonl(tmp_path / name)


def test_a_saved_dataset_that_is_not_whole_is_named(tmp_path):
    path = saved(tmp_path / "d", ROWS)
    for file in path.glob("*.arrow"):
        file.unlink()
    with pytest.raises(TaskError, match=r"no dataset that datasets\.load_from_disk reads"):
        load_jsonl(path)


def test_a_table_without_rows_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"problem": pyarrow.array([], pyarrow.string())}), tmp_path / "d.parquet")
    with pytest.raises(TaskError, match=r"d\.parquet: is empty"):
        load_jsonl(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("name", "rows"), [("gsm8k", 1319), ("math500", 500), ("minerva_math", 272), ("train_dapo17k", 17398)]
)
def test_real_files_load(name, rows):
    if not DATA.exists():
        pytest.skip("shared/data is not beside the repository")
    assert len(load_jsonl(DATA / f"{name}.jsonl")) == rows
