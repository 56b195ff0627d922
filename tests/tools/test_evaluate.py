"""Estimators against slow twins and simulation; samples that survive a kill; the table; bad input; one run of vLLM."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_tiny_model
from tools import evaluate
from tools.sample_file import Sample, SampleFile
from tools.scores import Estimate, Result, estimate, pass_at_k, table

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"

# --- estimators ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_subsets(case):
    n, correct, k = case
    subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
    assert pass_at_k(n=n, correct=correct, k=k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_is_finite():
    assert pass_at_k(n=100_000, correct=3, k=50_000) == pytest.approx(1 - 0.5**3, abs=1e-4)
    assert pass_at_k(n=128, correct=37, k=1) == pytest.approx(37 / 128)


@pytest.mark.parametrize("bad", [(2, 3, 1), (2, 1, 3), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(bad):
    with pytest.raises(ValueError, match="needed"):
        pass_at_k(n=bad[0], correct=bad[1], k=bad[2])


def test_interval_of_single_samples_is_wilsons():
    """7 of 20 right: 0.1812 to 0.5671 (Wilson 1927 with z = 1.96)."""
    value, low, high = estimate([1.0] * 7 + [0.0] * 13, samples=1)
    assert (value, low, high) == pytest.approx((0.35, 0.1812, 0.5671), abs=1e-4)


def test_interval_has_a_width_where_all_agree():
    assert estimate([0.0] * 30, samples=32) == pytest.approx((0.0, 0.0, 0.1135), abs=1e-4)
    assert estimate([1.0] * 30, samples=32).low == pytest.approx(1 - 0.1135, abs=1e-4)


def test_samples_of_one_problem_are_not_counted_as_independent():
    all_or_nothing = [1.0] * 15 + [0.0] * 15
    assert estimate(all_or_nothing, samples=32) == estimate(all_or_nothing, samples=1)
    spread = [0.4, 0.6] * 15
    assert estimate(spread, samples=32).high - 0.5 < (estimate(all_or_nothing, samples=32).high - 0.5) / 3


def test_interval_covers_the_truth():
    """Difficulties ~ Beta(0.5, 1), mean 1/3; 40 problems x 8: about 95% of the intervals hold 1/3."""
    draw, hits, trials = random.Random(0), 0, 600
    for _ in range(trials):
        difficulties = [draw.betavariate(0.5, 1) for _ in range(40)]
        scores = [sum(draw.random() < p for _ in range(8)) / 8 for p in difficulties]
        _, low, high = estimate(scores, samples=8)
        hits += low <= 1 / 3 <= high
    assert 0.92 < hits / trials < 0.985


# --- the command, with a generator of our own ------------------------------------------------------------------------


class Oracle:
    """Answers problem n with n % 2 == sample % 2 right; stops by force after `crash_after` samples."""

    def __init__(self, crash_after: float = math.inf) -> None:
        self.crash_after, self.asked, self.starts = crash_after, [], []

    @contextmanager
    def __call__(self, model, *, max_model_len, args):
        self.starts.append((model.name, max_model_len))

        def generate(requests):
            for request in requests:
                if len(self.asked) >= self.crash_after:
                    raise KeyboardInterrupt
                self.asked.append(request)
                number = int(request.key[0].removeprefix("p"))
                answer = number if number % 2 == request.key[1] % 2 else -1
                yield Sample(request.key, f"I think \\boxed{{{answer}}}", tokens=5, truncated=False)

        yield generate


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [{"id": f"p{n}", "problem": f"What is {n}?", "answer": str(n), "source": "t"} for n in range(4)]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(model, data, tmp_path):
    def run(*more: str, oracle: Oracle, benchmark: str = "mine") -> int:
        fixed = ["--model", str(model), "--benchmark", benchmark, "--data", str(data), "--max-tokens", "20"]
        fixed += ["--output", str(tmp_path / "out"), "--template", "plain", "--samples", "2"]
        return evaluate.main([*fixed, *more], generator=oracle)

    return run


def samples_file(tmp_path: Path) -> Path:
    return tmp_path / "out" / "tiny" / "mine-T0.1.jsonl"


def test_scores_samples_and_table(call, tmp_path, capsys):
    oracle = Oracle()
    assert call(oracle=oracle) == 0
    assert len(oracle.asked) == 8 and oracle.starts[0][0] == "tiny"
    assert "<|im_start|>user\nWhat is 0?" in oracle.asked[0].prompt  # the chat template is applied
    assert len({request.seed for request in oracle.asked}) == 8
    result = json.loads(samples_file(tmp_path).with_suffix(".result.json").read_text())
    assert result["avg"][0] == 0.5 and result["pass_at"]["1"][0] == 0.5 and result["pass_at"]["2"][0] == 1.0
    assert (result["temperature"], result["top_p"]) == (0.1, 0.95)
    grades = [json.loads(line) for line in samples_file(tmp_path).with_suffix(".grades.jsonl").read_text().splitlines()]
    assert [(g["id"], g["sample"], g["reward"]) for g in grades[:2]] == [("p0", 0, 1.0), ("p1", 0, 0.0)]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| model | mine (4) Avg@2 | mine Pass@2 |" in table and "| tiny | 50.0 [" in table and "| 100.0 [" in table
    out = capsys.readouterr().out
    assert table.strip() in out and "4 problems x 2, 5 tokens on average" in out


def test_a_stopped_call_is_continued(call, tmp_path, capsys):
    first = Oracle(crash_after=3)
    assert call(oracle=first) == 130
    assert "call again to go on" in capsys.readouterr().err
    file = samples_file(tmp_path)
    kept = file.read_bytes()
    assert len(kept.splitlines()) == 4
    file.write_bytes(kept + b'{"id": "p3", "sample": 0, "resp')  # as a kill in the middle of a write leaves it

    second = Oracle()
    assert call(oracle=second) == 0
    assert [r.key for r in first.asked + second.asked] == [(f"p{n}", k) for k in range(2) for n in range(4)]
    assert file.read_bytes().startswith(kept) and len(file.read_bytes().splitlines()) == 9
    seeds = {r.key: r.seed for r in first.asked + second.asked}
    whole = Oracle()
    assert call("--output", str(tmp_path / "other"), oracle=whole) == 0
    assert {r.key: r.seed for r in whole.asked} == seeds

    third = Oracle()
    assert call(oracle=third) == 0 and third.starts == []  # nothing is missing: the model is not loaded
    fourth = Oracle()
    assert call("--samples", "3", oracle=fourth) == 0
    assert [r.key[1] for r in fourth.asked] == [2, 2, 2, 2]


def test_a_slice_is_extended(call):
    first, second = Oracle(), Oracle()
    assert call("--problems", "2", oracle=first) == 0 and call(oracle=second) == 0
    assert {r.key[0] for r in first.asked} == {"p0", "p1"} and {r.key[0] for r in second.asked} == {"p2", "p3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--top-p", "0.5"], "top_p: 0.95 there, 0.5 now"),
        (["--template", "Q: {problem}"], "prompts_sha256"),
        (["--seed", "1"], "seed: 0 there, 1 now"),
        (["--max-tokens", "21"], "max_tokens: 20 there, 21 now"),
    ],
)
def test_other_settings_are_refused(call, tmp_path, capsys, change, message):
    assert call("--problems", "1", oracle=Oracle()) == 0
    before, oracle = samples_file(tmp_path).read_bytes(), Oracle()
    assert call(*change, oracle=oracle) == 2
    error = capsys.readouterr().err
    assert "made with other settings" in error and message in error and oracle.asked == []
    assert samples_file(tmp_path).read_bytes() == before


def test_other_data_and_other_weights_are_refused(call, data, model, tmp_path, capsys):
    assert call("--problems", "1", oracle=Oracle()) == 0
    text = data.read_text()
    data.write_text(text.replace("What is 3?", "What is three?"))
    assert call(oracle=Oracle()) == 2
    assert "prompts_sha256" in capsys.readouterr().err
    data.write_text(text)
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert call(oracle=Oracle()) == 2
        assert "model_sha256" in capsys.readouterr().err
    finally:
        weights.write_bytes(content)


KEPT = {"id": "p0", "sample": 0, "response": "r", "tokens": 1, "truncated": False}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", ":2: not a sample"),
        (b'{"id": "p0"}', ":2: not a sample"),
        (b"[]", ":2: not a sample"),
        (
            json.dumps(KEPT | {"tokens": math.nan}).encode(),
            ":2: not a sample (TypeError('tokens is nan instead of int'",
        ),
        (
            json.dumps(KEPT | {"sample": math.nan}).encode(),
            ":2: not a sample (TypeError('sample is nan instead of int'",
        ),
        (json.dumps(KEPT | {"response": None}).encode(), ":2: not a sample (TypeError('response is None instead of"),
        (json.dumps(KEPT | {"truncated": 0}).encode(), ":2: not a sample (TypeError('truncated is 0 instead of bool'"),
    ],
)
def test_a_broken_line_is_named(call, tmp_path, capsys, line, message):
    assert call(oracle=Oracle()) == 0
    file = samples_file(tmp_path)
    rows = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([rows[0], line, *rows[2:]]))
    assert call(oracle=Oracle()) == 2
    assert f"{file}{message}" in capsys.readouterr().err


def test_one_writer_at_a_time(call, tmp_path, capsys):
    assert call(oracle=Oracle()) == 0
    settings = json.loads(samples_file(tmp_path).read_text().splitlines()[0])["evaluation"]
    other = SampleFile(samples_file(tmp_path), settings)
    assert call(oracle=Oracle()) == 2
    other.close()
    assert call(oracle=Oracle()) == 0
    assert "another evaluation writes it" in capsys.readouterr().err


def test_two_models_beside_the_paper(model, data, tmp_path, capsys):
    second = make_tiny_model(tmp_path / "run-7" / "hf", seed=1)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("amc23", "gsm8k"):
        (folder / f"{name}.jsonl").write_text(data.read_text())
    arguments = ["--model", str(model), "--model", str(second), "--benchmark", "amc", "--benchmark", "gsm8k"]
    arguments += ["--data", str(folder), "--max-tokens", "20", "--template", "plain", "--output", str(tmp_path / "out")]
    assert evaluate.main([*arguments, "--paper", "Qwen2.5-Math-7B"], generator=Oracle()) == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0] == "| model | amc (4) Avg@32 | amc Pass@32 | gsm8k (4) Avg@1 |"  # the preset's samples
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| tiny", "| run-7"]
    assert "| paper: Qwen2.5-Math-7B +DCPO | 76.3 | - | 92.0 |" in lines
    assert sum(line.startswith("| paper") for line in lines) == 6


def test_paper_pass_at_128():
    row = Result("hmmt25", 30, 128, *[Estimate(0.5, 0.4, 0.6)], {128: Estimate(0.7, 0.6, 0.8)}, 0, 0, 9, 0)
    assert "| paper: Qwen3-4B +DCPO | 28.8 | 73.3 |" in table({"m": [row]}, paper="Qwen3-4B")


def test_presets():
    contest, long = (["--benchmark", "aime24", "--model", "m", *more] for more in ([], ["--preset", "pass128"]))
    first, second = evaluate.parse(contest), evaluate.parse(long)
    assert (first.temperature, first.top_p, evaluate.samples_of("aime24", first)) == (0.1, 0.95, 32)
    assert evaluate.samples_of("math500", first) == 1
    assert (second.temperature, second.top_p, evaluate.samples_of("aime24", second)) == (0.6, 0.95, 128)


def test_hung_comparisons_and_missing_answers_are_counted(call, tmp_path):
    class Rambler(Oracle):
        @contextmanager
        def __call__(self, model, *, max_model_len, args):
            yield lambda requests: (Sample(r.key, "I give up", tokens=20, truncated=True) for r in requests)

    assert call(oracle=Rambler()) == 0
    result = json.loads(samples_file(tmp_path).with_suffix(".result.json").read_text())
    assert (result["unanswered"], result["truncated"], result["tokens"], result["avg"][0]) == (1.0, 1.0, 20, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "mime"], "no benchmark is named 'mime'; take one of aime24"),
        (["--benchmark", "aime24", "--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--benchmark", "aime24", "--data", "."], "holds none of aime24.jsonl"),
        (["--benchmark", "aime24", "--benchmark", "amc", "--data", "pyproject.toml"], "give their folder"),
        (["--benchmark", "aime24", "--temperature", "0", "--data", "x"], "gives 32 equal samples"),
        (["--benchmark", "gpqa_diamond"], "gated"),
    ],
)
def test_bad_input_is_named(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(ROOT)
    assert evaluate.main(["--model", str(tmp_path), *arguments], generator=Oracle()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_model_context_and_answers(call, model, data, tmp_path, capsys):
    arguments = ["--benchmark", "mine", "--data", str(data), "--output", str(tmp_path / "o")]
    assert evaluate.main(["--model", str(tmp_path), *arguments], generator=Oracle()) == 2
    assert "lacks config.json" in capsys.readouterr().err
    assert evaluate.main(["--model", str(model), *arguments], generator=Oracle()) == 2
    error = capsys.readouterr().err
    assert "the longest prompt of 203 tokens and --max-tokens 8192 exceed the context of 256 of tiny" in error
    assert "pass --max-tokens 53 or less" in error and error.count("\n") == 1
    assert evaluate.main(["--model", str(model), *arguments, "--max-tokens", "53"], generator=Oracle()) == 0
    assert evaluate.main(["--model", str(model), *arguments, "--system", "x" * 300], generator=Oracle()) == 2
    assert "above the limit of 255" in capsys.readouterr().err
    data.write_text(data.read_text().replace('"answer": "3"', '"answer": "x"'))
    oracle = Oracle()
    assert call("--extractor", "last_integer", oracle=oracle) == 2
    assert "mine cannot be graded" in capsys.readouterr().err and oracle.asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deadline", "0"], "--deadline is above 0 and at most 3600 [s], not 0"),
        (["--deadline", "nan"], "--deadline is above 0 and at most 3600 [s], not nan"),
        (["--deadline", "inf"], "--deadline is above 0 and at most 3600 [s], not inf"),
        (["--temperature", "nan"], "temperature >= 0 and 0 < top-p <= 1 are needed, not nan"),
        (["--temperature", "inf"], "temperature >= 0 and 0 < top-p <= 1 are needed, not inf"),
        (["--gpu-memory-utilization", "1.5"], "0 < gpu-memory-utilization <= 1"),
        (["--cpu-kv-cache-gb", "0"], "cpu-kv-cache-gb > 0 are needed, not 0.9 and 0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, capsys, arguments, message):
    oracle = Oracle()
    with pytest.raises(SystemExit) as stopped:
        call(*arguments, oracle=oracle)
    assert stopped.value.code == 2 and oracle.asked == []
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "more", "message"),
    [
        ("{{ raise_exception('no system role') }}", ["--system", "s"], "(no system role); leave out --system"),
        ("{{ raise_exception('one turn') }}", [], "(one turn); mend it, or pass --no-chat"),
        ("{{ 'a' + 1 }}", [], "mend it, or pass --no-chat"),
        ("{{ messages[0].name.first }}", [], "mend it, or pass --no-chat"),
        ("{% if %}", [], "mend it, or pass --no-chat"),
    ],
)
def test_a_chat_template_that_fails_is_one_error(model, data, tmp_path, capsys, template, more, message):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "chat_template.jinja").write_text(template)
    arguments = ["--model", str(broken), "--benchmark", "mine", "--data", str(data), "--output", str(tmp_path / "out")]
    assert evaluate.main([*arguments, "--max-tokens", "20", *more], generator=Oracle()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"evaluate: the chat template of {broken} fails on problem 'p0' of mine (")
    assert message in error and error.count("\n") == 1
    assert evaluate.main([*arguments, "--max-tokens", "20", "--no-chat"], generator=Oracle()) == 0


def test_a_model_without_a_context_is_named(model, data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "config.json").write_text('{"model_type": "bloom"}')
    arguments = ["--model", str(other), "--benchmark", "mine", "--data", str(data), "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments, generator=Oracle()) == 2
    assert "has no max_position_embeddings" in capsys.readouterr().err


def test_data_of_every_form_and_their_columns(call, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    renamed = [{"q": {"text": row["problem"]}, "a": int(row["answer"])} for row in rows]
    Dataset.from_list(renamed).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    Dataset.from_list(renamed).to_parquet(tmp_path / "folder" / "mine.parquet")
    arguments = ["--model", "m", "--benchmark", "mine", "--fields", "problem=q.text", "answer=a", "--data"]
    for path in (tmp_path / "saved", tmp_path / "folder", tmp_path / "folder" / "mine.parquet"):
        found = evaluate.benchmark_problems("mine", evaluate.parse([*arguments, str(path)]))
        assert [(p.problem, p.answer) for p in found] == [(row["problem"], row["answer"]) for row in rows]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the checkout")
def test_real_benchmarks_by_name():
    for name in ("aime24", "amc", "gsm8k", "math500", "minerva", "olympiadbench", "mmlu_pro"):
        args = evaluate.parse(["--model", "m", "--benchmark", name, "--data", str(DATA)])
        assert len(evaluate.benchmark_problems(name, args)) >= 30


# --- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vllm_runs_and_resumes_after_a_kill(model, data, tmp_path):
    """A process is killed after its third sample; the next one keeps those three and makes the rest."""
    arguments = ["--model", str(model), "--benchmark", "mine", "--data", str(data), "--max-tokens", "12"]
    arguments += ["--template", "plain", "--samples", "4", "--temperature", "1", "--dtype", "float32"]
    arguments += ["--cpu-kv-cache-gb", "0.1", "--output", str(tmp_path / "out")]
    kill = (
        "import os, signal\nfrom tools import evaluate\nappend = evaluate.SampleFile.append\n"
        "def killing(self, sample):\n    append(self, sample)\n"
        "    if len(self.samples) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"evaluate.SampleFile.append = killing\nevaluate.main({arguments!r})\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run([sys.executable, "-c", kill], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    file = tmp_path / "out" / "tiny" / "mine-T1.jsonl"
    kept = file.read_bytes()
    assert len(kept.splitlines()) == 4

    other = make_tiny_model(tmp_path / "other", seed=1)
    command = [sys.executable, "-m", "tools.evaluate", *arguments, "--model", str(other)]
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert file.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert sorted((row["id"], row["sample"]) for row in rows) == [(f"p{n}", k) for n in range(4) for k in range(4)]
    assert all(0 < row["tokens"] <= 12 and row["truncated"] == (row["tokens"] == 12) for row in rows)
    assert len({row["response"] for row in rows}) > 8  # each sample has a seed of its own
    assert "| tiny |" in second.stdout and "| other |" in second.stdout and second.stderr.count("16/16") >= 2
    answers = [json.loads(line)["response"] for line in (tmp_path / "out" / "other" / file.name).open().readlines()[1:]]
    assert len(answers) == 16 and not set(answers) & {row["response"] for row in rows}
