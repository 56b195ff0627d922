"""Sets of every known shape become one form; duplicates, overlap, checksums and bad input are named."""

import csv
import gzip
import hashlib
import json
from pathlib import Path

import pytest

from dcpo_openrlhf.rollout.tasks import Problem, load_jsonl
from tools import prepare_data
from tools.data_form import DISTRACTORS, normalise
from tools.data_rows import PrepareError
from tools.overlap import deduplicate, find_overlap
from tools.prepare_data import load_problems, main

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
LONG = "A regular hexagon with side nine is cut along three of its diagonals into pieces of equal area"


def problem(id: str, text: str, answer: str = "1") -> Problem:
    return Problem(id=id, problem=text, answer=answer, source="test")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row(id: str, text: str, answer: str = "1") -> dict:
    return {"id": id, "problem": text, "answer": answer, "source": "test"}


# One row of each set, with the column names that it has on the hub.
HUB_ROWS = {
    "dapo17k": ({"prompt": "Find x.", "solution": "34", "source_prompt": [{"content": "..."}]}, "dapo17k-0", "34"),
    "gsm8k": ({"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}, "gsm8k-0", "1004"),
    "aime24": ({"id": 60, "problem": "Walk.", "solution": "So 204.", "answer": "204"}, "aime24-60", "204"),
    "aime25": ({"id": "0", "problem": "Bases.", "answer": "70"}, "aime25-0", "70"),
    "amc": ({"id": 0, "question": "Cities.", "answer": 27.0, "url": "..."}, "amc-0", "27"),
    "math500": (
        {"problem": "Polar.", "solution": "long", "answer": "\\frac{1}{2}", "unique_id": "test/a/1.json"},
        "test/a/1.json",
        "\\frac{1}{2}",
    ),
    "minerva": ({"question": "Mirror.", "answer": "1.6"}, "minerva-0", "1.6"),
    "olympiadbench": (
        {"id": 1606, "question": "Game.", "final_answer": ["2", "3"], "solution": ["..."]},
        "olympiadbench-1606",
        "2, 3",
    ),
    "hmmt25": ({"problem_idx": 1, "problem": "Sum.", "answer": "103"}, "hmmt25-1", "103"),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_columns_are_read(name):
    columns, id, answer = HUB_ROWS[name]
    (read,) = normalise(name, [("row 1", columns)], origin="hub")
    assert (read.id, read.answer, read.source) == (id, answer, "hub")
    assert read.problem == columns.get("problem", columns.get("question", columns.get("prompt")))


def test_boxed_solution_becomes_its_answer():
    (read,) = normalise("aime24", [("row 1", {"problem": "p", "solution": "Thus \\boxed{20\\{4\\}}."})], origin="hub")
    assert read.answer == "20\\{4\\}"


def test_multiple_choice():
    columns = {"question_id": 7, "question": "Which?", "options": ["red", "blue"], "answer": "B", "answer_index": 1}
    (read,) = normalise("mmlu_pro", [("row 1", columns)], origin="hub")
    assert (read.id, read.problem, read.answer) == ("mmlu_pro-7", "Which?\nOptions:\nA. red\nB. blue", "B")


def test_gpqa_csv_is_shuffled_the_same_way_every_time(tmp_path):
    names = ["Record ID", "Question", "Correct Answer", *DISTRACTORS]
    file = tmp_path / "gpqa_diamond.csv"
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(names)
        writer.writerows(
            [f"rec{n}", f"Question,\n{n}?", f"right {n}", "wrong 1", "wrong 2", "wrong 3"] for n in range(40)
        )
    first, again = load_problems("gpqa_diamond", file), load_problems("gpqa_diamond", file)
    assert first == again and len(first) == 40
    for n, read in enumerate(first):
        assert f"{read.answer}. right {n}" in read.problem.splitlines()
    assert {read.answer for read in first} == set("ABCD")


def test_json_and_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"problem": f"Problem {n}", "answer": str(n)} for n in range(3)]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    expected = [("Problem 0", "0"), ("Problem 1", "1"), ("Problem 2", "2")]
    for suffix in ("json", "parquet"):
        assert [(p.problem, p.answer) for p in load_problems("dapo17k", tmp_path / f"set.{suffix}")] == expected


def test_what_a_run_reads_is_read_here_too(tmp_path, capsys):
    """Packed files, a folder, and rows by their columns, chat messages among them."""
    rows = [{"problem": f"Problem {n}", "answer": str(n)} for n in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.jsonl.gz").write_bytes(gzip.compress(text))
    for path in (tmp_path / "set", tmp_path / "set" / "part.jsonl.gz"):
        assert [p.problem for p in load_problems("dapo17k", path)] == [row["problem"] for row in rows]
    turns = [{"role": "user", "content": "Find x."}]
    file = write(tmp_path / "verl.jsonl", [{"prompt": turns, "reward_model": {"ground_truth": 5}, "data_source": "m"}])
    fields = ["--fields", "problem=prompt", "answer=reward_model.ground_truth", "source=data_source"]
    output = ["--output", str(tmp_path / "data")]
    assert main(["dapo17k", "--from", str(file), *fields, *output]) == 0
    (problem,) = load_jsonl(tmp_path / "data" / "dapo17k.jsonl")
    assert (problem.messages, problem.problem, problem.answer, problem.source) == (turns, "Find x.", "5", "m")
    assert problem.metadata == {"reward_model": {"ground_truth": 5}}
    capsys.readouterr()
    for wrong in (["promblem=x"], ["problem"], ["problem="]):
        assert main(["dapo17k", "--from", str(file), "--fields", *wrong, *output]) == 2
        assert "the form is KEY=COLUMN, once for each KEY of id, problem, answer, source" in capsys.readouterr().err


def test_duplicates():
    unique = deduplicate(
        [
            problem("a", "Find $x + 1$."),
            problem("b", "find x+1."),
            problem("c", "Find x - 1."),
            problem("d", "Find y.", "2"),
            problem("e", "Find  y.", "3"),
        ]
    )
    assert [p.id for p in unique.kept] == ["a", "c"]
    assert (unique.duplicates, unique.conflicting) == (["b"], ["d", "e"])


def test_overlap():
    tests = {"exam": [problem("t1", f"{LONG}. What is the perimeter of one piece?"), problem("t2", "Find $2+2$.")]}
    train = [
        problem("same", f"{LONG}; what is the PERIMETER of one piece?"),
        problem("rewritten", f"{LONG}. The perimeter is m/n in lowest terms. Find m+n."),
        problem("phrase", "A disc is cut along three of its diagonals into pieces of equal area. How many?"),
        problem("short", "find 2 + 2"),
        problem("other", "Find 2 + 3."),
    ]
    found = {(pair.train, pair.test): pair.share for pair in find_overlap(train, tests)}
    assert set(found) == {("same", "t1"), ("rewritten", "t1"), ("short", "t2")}
    assert found["same", "t1"] == found["short", "t2"] == 1.0 > found["rewritten", "t1"] >= 0.5


def test_chinese_is_compared_by_character():
    text = "设函数在区间上连续且可导求其最大值与最小值之和"
    assert find_overlap([problem("a", text + "。")], {"exam": [problem("t", text)]})[0].share == 1.0
    assert not find_overlap([problem("a", text[::-1])], {"exam": [problem("t", text)]})


def test_folder_manifest_and_overlap(tmp_path, capsys):
    output = tmp_path / "data"
    exam = write(tmp_path / "exam.jsonl", [row("t1", LONG), row("t2", "Find z."), row("t3", "find Z.")])
    train = write(
        tmp_path / "train.jsonl", [row("a", f"{LONG}?"), row("b", "Find y."), row("c", "Find Y."), row("d", "w?")]
    )
    arguments = ["--output", str(output)]
    assert main(["aime24", "--from", str(exam), *arguments]) == 0
    assert main(["train_dapo17k", "--from", str(train), *arguments]) == 0
    out = capsys.readouterr().out
    assert "dapo17k: 3 problems" in out and "removed 1 duplicates" in out and "overlap: 1 with aime24" in out

    assert [p.id for p in load_jsonl(output / "dapo17k.jsonl")] == ["a", "b", "d"]
    assert [p.id for p in load_jsonl(output / "aime24.jsonl")] == ["t1", "t2", "t3"]  # a test set stays whole
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["aime24"]["duplicates"] == ["t3"] and manifest["dapo17k"]["duplicates"] == ["c"]
    assert manifest["dapo17k"]["overlap"] == [["a", "aime24", "t1", 1.0]]
    for name, entry in manifest.items():
        assert entry["sha256"] == hashlib.sha256((output / f"{name}.jsonl").read_bytes()).hexdigest()
    assert main(["--verify", *arguments]) == 0

    assert main(["dapo17k", "--from", str(train), "--remove-overlap", *arguments]) == 0
    assert [p.id for p in load_jsonl(output / "dapo17k.jsonl")] == ["b", "d"]
    assert main(["amc", "--from", str(write(tmp_path / "amc.jsonl", [row("t", "w")])), *arguments]) == 0
    entry = json.loads((output / "manifest.json").read_text())["dapo17k"]
    assert entry["overlap_removed"] == [["a", "aime24", "t1", 1.0]]
    assert entry["overlap"] == [["d", "amc", "t", 1.0]]

    with (output / "aime24.jsonl").open("a") as file:
        file.write("\n")
    assert main(["--verify", *arguments]) == 2
    assert "aime24; prepare it again" in capsys.readouterr().err


def test_against_other_tests(tmp_path, capsys):
    other = write(tmp_path / "mine.jsonl", [row("m", LONG)])
    train = write(tmp_path / "train.jsonl", [row("a", LONG), row("b", "Find y.")])
    arguments = ["dapo17k", "--from", str(train), "--against", str(other), "--output", str(tmp_path / "data")]
    assert main(arguments) == 0
    assert "overlap: 1 with mine" in capsys.readouterr().out


def test_a_file_that_was_not_prepared_here_stays(tmp_path, capsys):
    mine = write(tmp_path / "dapo17k.jsonl", [row("a", "Find y."), row("b", "Find Y.")])
    before = mine.read_bytes()
    assert main(["dapo17k", "--from", str(mine), "--output", str(tmp_path)]) == 2
    assert "dapo17k.jsonl: is there and not in manifest.json" in capsys.readouterr().err
    assert mine.read_bytes() == before and not (tmp_path / "manifest.json").exists()


def test_one_bad_set_leaves_the_folder_as_it_was(monkeypatch, tmp_path, capsys):
    rows = {"aime24": [("r", {"problem": "p", "answer": "1"})], "amc": [("r", {"problem": "p"})]}
    monkeypatch.setattr(prepare_data, "hub_rows", lambda name, _: rows[name])
    assert main(["aime24", "--output", str(tmp_path)]) == 0
    rows["aime24"] = [("r", {"problem": "other", "answer": "1"})]
    assert main(["aime24", "amc", "--output", str(tmp_path)]) == 2
    assert main(["aime24", "--against", str(tmp_path / "gone"), "--output", str(tmp_path)]) == 2
    assert main(["--verify", "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("missing.jsonl", None, "No such file"),
        ("empty.jsonl", "", "is empty"),
        ("torn.jsonl", '{"problem": "p", "answer": "1"}\n{"prob', "torn.jsonl:2: not JSON"),
        ("list.jsonl", "[1]\n", "list.jsonl:1: list instead of an object"),
        ("columns.jsonl", '{"text": "p"}\n', "the columns are text"),
        ("answer.jsonl", '{"problem": "p", "answer": ""}\n', "answer.jsonl:1: the answer is empty"),
        ("ids.jsonl", '{"problem":"p","answer":"1","id":"x"}\n' * 2, "ids.jsonl:2: id 'x' was seen before"),
        (
            "comma.csv",
            "problem,answer\nIs 5 odd, really,5\n",
            "comma.csv:2: 3 fields for 2 columns (['Is 5 odd', ' really'",
        ),
        ("short.csv", "problem,answer\n5 + 5\n", "short.csv:2: 1 fields for 2 columns"),
        ("quote.csv", 'problem,answer\n"5 + 5,10\nx,1\n', "quote.csv:3: not CSV (unexpected end of data)"),
        ("twice.csv", "problem,answer,answer\np,1,2\n", "twice.csv:1: column 'answer' is there twice"),
        ("options.csv", "problem,options,answer\np,red;blue,B\n", "options.csv:2: options is 'red;blue' (str)"),
        ("nan.json", '[{"problem": "p", "answer": NaN}]', "nan.json, entry 1: answer is 'nan', a missing value"),
        ("set.txt", "x", "ends in none of .jsonl"),
        ("set.parquet", "x", "not a Parquet file"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, file, content, message):
    path = tmp_path / file
    if content is not None:
        path.write_text(content)
    assert main(["aime24", "--from", str(path), "--output", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


OPTIONS = {"question": "Which?", "options": ["red", "blue"], "answer": "B"}
GPQA = {"Question": "Which?", "Correct Answer": "right", **dict.fromkeys(DISTRACTORS, "wrong")}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (OPTIONS | {"options": "red"}, "options is 'red' (str) instead of a list of 2 to 26 texts"),
        (OPTIONS | {"options": {"A": "red", "B": "blue"}}, "options is {'A': 'red', 'B': 'blue'} (dict) instead of"),
        (OPTIONS | {"options": ["red", 5]}, "option 2 is 5 (int) instead of a text"),
        (OPTIONS | {"options": ["red", " "]}, "option 2 is ' ' (str) instead of a text"),
        (OPTIONS | {"options": []}, "options is [] (list) instead of a list of 2 to 26"),
        (OPTIONS | {"options": ["o"] * 27}, "instead of a list of 2 to 26 texts"),
        (OPTIONS | {"answer": 1}, "answer is 1 (int), and that of 2 options is a letter from A to B"),
        (OPTIONS | {"answer": "C"}, "answer is 'C' (str), and that of 2 options"),
        ({"question": "Which?", "options": ["red", "blue"]}, "answer is None (NoneType), and that of 2 options"),
        ({"question": "Which?", "choices": ["red", "blue"], "answer": 1}, "not from 'choices'"),
        ({"question": "Which?", "A": "red", "B": "blue", "answer": "B"}, "not from 'A'"),
        (GPQA | {DISTRACTORS[1]: ""}, f"{DISTRACTORS[1]} of Correct Answer, {DISTRACTORS[0]}"),
        (GPQA | {DISTRACTORS[1]: 7}, "option 3 is 7 (int) instead of a text"),
        ({"problem": "p", "answer": {"value": "5"}}, "answer is {'value': '5'} (dict) instead of a text or a number"),
        ({"problem": "p", "answer": True}, "answer is True (bool) instead of a text or a number"),
        ({"problem": "p", "answer": ["1", None, {}]}, "answer is {} (dict) instead of"),
        ({"problem": "p", "answer": float("nan")}, "answer is 'nan', a missing value"),
        ({"problem": "p", "answer": float("inf")}, "answer is inf, which no response equals"),
        ({"problem": "p", "answer": "None"}, "answer is 'None', a missing value"),
        ({"problem": "nan", "answer": "1"}, "problem is 'nan', a missing value"),
        ({"problem": "p", "solution": "So the total is 204."}, "solution is a sentence ('So the total is 204.' (str))"),
        ({"problem": "p", "answer": "1", "id": ["x"]}, "id is ['x'] (list) instead of a text or a whole number"),
        ({"prompt": [{"role": "user", "content": "p"}], "answer": "1"}, "prompt is [{'role': 'user', 'content': 'p'}]"),
        ({"Problem": "p", "Answer": "1"}, "the columns are Problem, Answer; rename 'Problem'"),
        ({"problem": "p", " Answer": "1"}, "rename ' Answer'"),
    ],
)
def test_values_of_another_type_are_refused_not_written_as_text(columns, message):
    with pytest.raises(PrepareError) as error:
        normalise("mine", [("row 1", {"problem": "p", "answer": "1"}), ("row 2", columns)], origin="hub")
    assert str(error.value).startswith("row 2: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("June 20", "June 20"),
        ("\\boxed{\\text{a cat or a dog}}", "\\text{a cat or a dog}"),
        ("\\text{left of the line}", "\\text{left of the line}"),
        ("So the total is \\boxed{204}.", "204"),
        ("\\frac{\\sqrt{2}\\sin x}{\\cos y}", "\\frac{\\sqrt{2}\\sin x}{\\cos y}"),
        (["(1, 2)", 3.0], "(1, 2), 3"),
        (-0.5, "-0.5"),
        (10**30, str(10**30)),
    ],
)
def test_final_answers_stay(value, answer):
    assert normalise("mine", [("row 1", {"problem": "p", "answer": value})], origin="hub")[0].answer == answer


def test_unknown_set(capsys):
    assert main(["aime1999"]) == 2
    assert "no set is named 'aime1999'; the sets are dapo17k" in capsys.readouterr().err


def test_without_network(monkeypatch, capsys, tmp_path):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert main(["aime24", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "HuggingFaceH4/aime_2024 cannot be read from the hub" in error and "--from FILE" in error
    assert error.count("\n") == 1
    assert main(["gpqa_diamond", "--output", str(tmp_path)]) == 2
    assert "gated" in capsys.readouterr().err


def test_from_the_hub(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load(*arguments, **keywords):
        asked.append((arguments, keywords))
        return [{"question": "Mirror?", "answer": "1.6"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert main(["minerva", "--output", str(tmp_path)]) == 0
    assert asked == [(("math-ai/minervamath", None), {"split": "test"})]
    assert load_jsonl(tmp_path / "minerva.jsonl")[0].answer == "1.6"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the checkout")
def test_real_files():
    for file in sorted(DATA.glob("*.jsonl")):
        name = prepare_data.canonical(file.stem)
        assert load_problems(name, file) == load_jsonl(file)
        column = "final_answer" if name == "olympiadbench" else "answer"
        rows = [(p.id, {"id": p.id, "problem": p.problem, column: p.answer}) for p in load_jsonl(file)]
        assert len(normalise(name, rows, origin="hub")) == len(rows)  # no published answer is taken for a sentence
    amc = load_jsonl(DATA / "amc23.jsonl")
    overlap = find_overlap(load_jsonl(DATA / "train_dapo17k.jsonl"), {"amc": amc})
    assert len({pair.test for pair in overlap}) == 25  # of 40
