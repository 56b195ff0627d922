"""Sets of every known shape become one form; duplicates, overlap, checksums and bad input are named."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from dcpo_openrlhf.rollout.tasks import Problem, load_jsonl
from tools import prepare_data
from tools.prepare_data import deduplicate, find_overlap, load_problems, main, normalise

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
    names = ["Record ID", "Question", "Correct Answer", *prepare_data.DISTRACTORS]
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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("missing.jsonl", None, "No such file"),
        ("empty.jsonl", "", "holds no rows"),
        ("torn.jsonl", '{"problem": "p", "answer": "1"}\n{"prob', "torn.jsonl:2: not JSON"),
        ("list.jsonl", "[1]\n", "list.jsonl:1: list instead of an object"),
        ("columns.jsonl", '{"text": "p"}\n', "the columns are text"),
        ("answer.jsonl", '{"problem": "p", "answer": ""}\n', "answer.jsonl:1: the answer is empty"),
        ("ids.jsonl", '{"problem":"p","answer":"1","id":"x"}\n' * 2, "ids.jsonl:2: id 'x' was seen before"),
        ("set.txt", "x", "ends in none of .jsonl"),
        ("set.parquet", "x", "not a parquet file"),
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


def test_a_problem_in_another_form_is_shown():
    rows = [("f, row 1", {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"})]
    with pytest.raises(prepare_data.PrepareError, match=r"f, row 1: prompt is \[\{'role'.* \(list\); it must be text"):
        normalise("mine", rows, origin="f")


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
    amc = load_jsonl(DATA / "amc23.jsonl")
    overlap = find_overlap(load_jsonl(DATA / "train_dapo17k.jsonl"), {"amc": amc})
    assert len({pair.test for pair in overlap}) == 25  # of 40
