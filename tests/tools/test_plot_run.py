"""The picture and the page of runs: one line a run, the target drawn, the page alive in a browser, bad input named."""

import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from tests.bounds import HANG_S
from tools import plot_run
from tools.run_folder import RunError


def write_run(folder, *, alpha: float, entropies=(2.0, 0.2, 0.5), target=0.5):
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "train/step": step,
            "entropy/exact": entropy,
            "entropy/target": target[step] if isinstance(target, tuple) else target,
            "rollout/reward_mean": step / 4,
            "dcpo/alpha": alpha,
            "dcpo/temperature": 1.2,
        }
        for step, entropy in enumerate(entropies)
    ]
    evaluation = {"step": len(rows), "evaluation/accuracy": 0.9}
    lines = [json.dumps(row) for row in [*rows, evaluation]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures drawn during a test, kept open to be looked at."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    return kept


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_two_runs_side_by_side(tmp_path, figures, capsys):
    runs = [write_run(tmp_path / "dcpo", alpha=0.1), write_run(tmp_path / "grpo", alpha=0.0, entropies=(2.0, 0.1))]
    output = tmp_path / "new" / "picture.png"
    assert plot_run.main([*map(str, runs), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    height, width = plt.imread(output).shape[:2]
    assert (width, height) == (1400, 500)

    entropy, reward, alpha, temperature = figures[0].axes
    drawn = lines(entropy)
    assert drawn["dcpo"] == ([0, 1, 2], [2.0, 0.2, 0.5])
    assert drawn["grpo"] == ([0, 1], [2.0, 0.1])
    assert drawn["target $H_0$ = 0.5"][1] == [0.5, 0.5]
    assert lines(reward)["dcpo"][1] == [0.0, 0.25, 0.5]
    assert set(lines(alpha)) == {"dcpo", "grpo"}
    assert set(lines(temperature)) == {"dcpo"}  # no T takes part where alpha is 0
    assert "nats/token" in entropy.get_ylabel()
    assert {entropy.get_xlabel(), temperature.get_xlabel()} == {"step"}


def test_a_target_with_a_schedule_is_drawn_as_it_went(tmp_path, figures):
    runs = [write_run(tmp_path / "a", alpha=0.1, target=(0.5, 0.4, 0.3)), write_run(tmp_path / "b", alpha=0.1)]
    assert plot_run.main([*map(str, runs), "--output", str(tmp_path / "picture.png")]) == 0
    drawn = lines(figures[0].axes[0])
    assert drawn["target $H_0$ = 0.5 to 0.3"] == ([0, 1, 2], [0.5, 0.4, 0.3])
    assert drawn["target $H_0$ = 0.5"][1] == [0.5, 0.5]


def test_missing_metric_is_a_gap(tmp_path):
    run = write_run(tmp_path / "run", alpha=0.1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/step": 9}\n')
    columns = plot_run.read_metrics(run)
    assert columns["train/step"] == [0, 1, 2, 9]
    assert columns["entropy/exact"][3] != columns["entropy/exact"][3]  # NaN


def test_equal_folder_names_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert plot_run.labels(folders) == [str(folder) for folder in folders]
    assert plot_run.labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "finished no step"),
        ('{"train/st', "finished no step"),
        ('{"train/step": NaN}\n', "finished no step"),
        ('{"train/step": 0}\n{"train\n{"train/step": 2}\n', "line 2: not JSON"),
        ('{"train/step": 0}\n{"train\n', "line 2: not JSON"),
        ('{"train/step": 0}\n\n', "line 2: not JSON"),
        ('{"train/step": 0}\n[]', "line 2: list instead of an object"),
    ],
)
@pytest.mark.parametrize("output", ["x.png", "x.html"])
def test_bad_run_is_named(tmp_path, capsys, content, message, output):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match=message):
        plot_run.read_metrics(tmp_path)
    assert plot_run.main([str(tmp_path), "--output", str(tmp_path / output)]) == 2
    assert str(tmp_path / "metrics.jsonl") in capsys.readouterr().err
    assert not (tmp_path / output).exists()


@pytest.mark.parametrize("torn", ['{"step": 3, "entro', '{"step": 3, "text": "\u00e9'])
def test_a_line_that_the_run_is_still_writing_is_left_out(tmp_path, capsys, torn):
    run = full_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl", "evaluation.jsonl", "samples/step_000002.jsonl"):
        with (run / name).open("ab") as file:
            file.write(torn.encode()[:-1])
    outputs = [f"--output={tmp_path / name}" for name in ("x.png", "x.html")]
    assert plot_run.main([str(run), *outputs]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "x.png"), str(tmp_path / "x.html")]
    assert f"{run / 'metrics.jsonl'}, line 5: left out, its end is not written" in err
    assert err.count("\n") == 4  # each file once, though it is read for picture and page
    assert plot_run.read_metrics(run)["train/step"] == [0, 1, 2]


def test_stray_files_in_the_run_folder_are_passed_over(tmp_path):
    run = full_run(tmp_path / "run")
    expected = plot_run.page_data({"run": run})
    (run / "samples" / "step_000007.jsonl").mkdir()
    (run / "samples" / "step_000008.jsonl").symlink_to(run / "gone")
    for name in (
        "step_1.jsonl",
        "step_000002 (1).jsonl",
        "step_000002.jsonl~",
        "step_x.jsonl",
        "evaluation_1.jsonl",
        "a",
    ):
        (run / "samples" / name).write_text("not JSON")
    assert plot_run.page_data({"run": run}) == expected


def test_a_step_made_again_after_a_resume_is_drawn_once(tmp_path):
    run = write_run(tmp_path / "run", alpha=0.1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train/step": 1, "entropy/exact": 7.0}\n')
    assert plot_run.read_metrics(run)["entropy/exact"] == [2.0, 7.0, 0.5]


# --- the page --------------------------------------------------------------------------------------------------------

HOSTILE = "</script><script>document.title = 'taken'</script><b>bold</b> & \u2028"


TIMELINE = [
    {
        "step": 0,
        "part": "start",
        "begin": 5000.0,
        "end": 5002.0,
        "processes": {"driver": [["sync", 0.0, 1.0]], "policy 0": []},
    },
    {
        "step": 1,
        "part": "step",
        "begin": 5002.0,
        "end": 5010.0,
        "processes": {
            "driver": [["grade", 3.0, 4.0], ["rollout", 0.0, 4.0], ["update", 4.0, 8.0]],
            "policy 0": [["update", 4.0, 8.0]],
            "engine 0": [["generate", 0.0, 3.0]],
        },
    },
    {  # the engine generated for this step while the last one trained
        "step": 2,
        "part": "step",
        "begin": 5010.0,
        "end": 5016.0,
        "processes": {"driver": [["update", 0.0, 6.0]], "engine 0": [["generate", -4.0, 1.0]]},
    },
    {"step": 2, "part": "end", "begin": 5016.0, "end": 5017.0, "processes": {"driver": [["export", 0.0, 0.5]]}},
    {"step": 2, "part": "start", "begin": 9000.0, "end": 9001.0, "processes": {"driver": []}},
    {"step": 3, "part": "step", "begin": 9001.0, "end": 9004.0, "processes": {"driver": [["update", 0.0, 3.0]]}},
]
"""A run of two steps, resumed an hour later for a third."""


def full_run(folder: Path, *, alpha: float = 0.1) -> Path:
    """A run with everything that the page shows."""
    write_run(folder, alpha=alpha)
    write(folder / "evaluation.jsonl", [{"step": 0, "heldout_accuracy": 0.25}, {"step": 2, "heldout_accuracy": 0.75}])
    event = {
        "step": 1,
        "cause": "entropy_collapse",
        "action": "warn",
        "evidence": {"entropy/exact": 0.2},
        "keys": {"a": 1},
    }
    write(folder / "events.jsonl", [event])
    write(folder / "timeline.jsonl", TIMELINE)
    (folder / "samples").mkdir()
    for step in (1, 2):
        rows = [
            {
                "id": f"p{n}",
                "answer": "4",
                "response": f"step {step}, answer {n}",
                "reward": float(n % 2),
                "extracted": None,
            }
            for n in range(4)
        ]
        rows[0]["response"] = HOSTILE
        write(folder / "samples" / f"step_{step:06d}.jsonl", rows)
    return folder


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def page(tmp_path) -> Path:
    runs = [full_run(tmp_path / "dcpo"), write_run(tmp_path / "grpo", alpha=0.0, entropies=(2.0, 0.1))]
    output = tmp_path / "page.html"
    assert plot_run.main([*map(str, runs), "--output", str(output)]) == 0
    return output


class Reader(html.parser.HTMLParser):
    """Elements and the text of the data script, without running anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.data, self.tags, self.addresses, self._inside = "", [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self._inside = ("id", "data") in attrs

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.data += data if self._inside else ""


def test_page_is_self_contained(page):
    text = page.read_text()
    reader = Reader(text)
    assert reader.addresses == [] and "link" not in reader.tags and "img" not in reader.tags
    assert set(re.findall(r"https?://[^\"\s]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in text and text.count("</script>") == 2  # nothing in a response ends the data
    data = json.loads(reader.data)
    dcpo, grpo = data["runs"]
    assert dcpo["series"]["entropy/exact"] == [2.0, 0.2, 0.5]
    assert dcpo["series"]["heldout_accuracy"] == [0.25, None, 0.75]
    assert dcpo["events"] == [
        {"step": 1, "cause": "entropy_collapse", "details": "action = warn; entropy/exact = 0.2; a = 1"}
    ]
    assert dcpo["samples"]["2"][0]["response"] == HOSTILE
    assert (grpo["steps"], grpo["events"], grpo["samples"]) == ([0, 1], [], {})
    for metric in (
        "entropy/exact",
        "rollout/reward_mean",
        "rollout/length_mean",
        "dcpo/target_ratio_mean",
        "mismatch/kl",
    ):
        assert metric in {panel["metric"] for panel in data["panels"]}


def test_runs_of_before_success_had_a_name_have_their_rewards_as_one(tmp_path):
    new = {"train/step": 2, "rollout/reward_mean": -0.5, "rollout/success_rate": 0.75}
    write(tmp_path / "metrics.jsonl", [{"train/step": 1, "rollout/reward_mean": 0.25}, new])
    assert plot_run.read_metrics(tmp_path)["rollout/success_rate"] == [0.25, 0.75]
    assert "(row.success ?? row.reward) > 0" in plot_run.PAGE.read_text()


def test_long_runs_and_responses_are_cut(tmp_path):
    run = full_run(tmp_path / "run")
    for step in range(1, 301):
        write(run / "samples" / f"step_{step:06d}.jsonl", [{"id": "p", "response": "x" * 9000, "reward": 0.0}])
    (data,) = plot_run.page_data({"run": run})["runs"]
    assert len(data["samples"]) == 100 and {1, 300} <= data["samples"].keys()
    assert data["note"] == "100 of 300 steps are in this page."
    assert "[... 3000 characters left out ...]" in data["samples"][1][0]["response"]


def test_a_number_that_is_none_is_shown_by_its_name(tmp_path):
    run = full_run(tmp_path / "run")
    nan, row = float("nan"), {"id": "p", "response": "r", "reward": float("nan"), "more": [{"x": float("inf")}, 1.0]}
    write(run / "samples" / "step_000002.jsonl", [row])
    write(run / "evaluation.jsonl", [{"step": 2, "heldout_accuracy": nan}])
    write(run / "events.jsonl", [{"step": 1, "cause": "nan", "evidence": {"loss": nan}}])
    assert plot_run.main([str(run), "--output", str(tmp_path / "x.html")]) == 0
    (data,) = json.loads(Reader((tmp_path / "x.html").read_text()).data)["runs"]
    assert data["samples"]["2"] == [row | {"reward": "nan", "more": [{"x": "inf"}, 1.0]}]
    assert data["events"][0]["details"] == "loss = nan"


def test_the_timeline_is_in_seconds_of_the_run(tmp_path):
    (data,) = plot_run.page_data({"run": full_run(tmp_path / "run")})["runs"]
    rows = data["timeline"]
    assert [row["label"] for row in rows] == ["start", "1", "2", "end, after 2", "start, after 2", "3"]
    assert [(row["begin"], row["end"]) for row in rows[1:3]] == [(2.0, 10.0), (10.0, 16.0)]
    assert rows[2]["bars"]["engine 0"] == [["generate", 6.0, 11.0]]
    assert [row["start"] for row in rows] == [True, False, False, False, True, False]
    (older,) = plot_run.page_data({"run": write_run(tmp_path / "older", alpha=0.1)})["runs"]
    assert older["timeline"] == []


@pytest.mark.parametrize(
    "row",
    [
        {"step": 1, "part": "step", "begin": 0.0, "end": 1.0},
        {"step": 1, "part": "half", "begin": 0.0, "end": 1.0, "processes": {}},
        {"step": 1, "part": "step", "begin": 0.0, "end": 1.0, "processes": {"driver": [["sync", 0.0]]}},
    ],
)
def test_a_timeline_of_another_form_is_named(row, tmp_path, capsys):
    run = full_run(tmp_path / "run")
    write(run / "timeline.jsonl", [row])
    assert plot_run.main([str(run), "--output", str(tmp_path / "x.html")]) == 2
    assert f"{run}/timeline.jsonl: a row has step, part, begin, end and processes" in capsys.readouterr().err


def test_event_without_cause_is_named(tmp_path, capsys):
    run = full_run(tmp_path / "run")
    write(run / "events.jsonl", [{"step": 1}])
    assert plot_run.main([str(run), "--output", str(tmp_path / "x.html")]) == 2
    assert "an event has an integer step and a cause" in capsys.readouterr().err


def test_outputs_by_suffix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    full_run(tmp_path / "dcpo")
    assert plot_run.main(["dcpo"]) == 0
    assert (tmp_path / "run.png").is_file() and (tmp_path / "run.html").is_file()
    for arguments in (["dcpo", "--output", "x.gif"], ["dcpo", "dcpo"]):
        with pytest.raises(SystemExit) as stopped:
            plot_run.main(arguments)
        assert stopped.value.code == 2
    assert "not 'x.gif'" in capsys.readouterr().err


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
# Errors of the page's scripts, and what the policy blocks, are written where the dump shows them.
WATCH = """<script>
const note = (what) => document.documentElement.setAttribute("data-errors", what);
addEventListener("error", (e) => note(e.message));
addEventListener("securitypolicyviolation", (e) => note(e.blockedURI));
</script>"""


def opened(page: Path, action: str = "") -> str:
    """The document after its scripts ran, and `action` after them."""
    text = page.read_text().replace("<head>", f"<head>{WATCH}")
    copy = page.with_name("opened.html")
    copy.write_text(text.replace("</body>", f"<script>{action}</script></body>"))
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--window-size=1300,1000"]
    command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    command += [f"--user-data-dir={page.parent / 'profile'}", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert "data-errors" not in dom, dom[:300]
    return dom


@pytest.mark.skipif(BROWSER is None, reason=f"needs Chromium: one of {', '.join(BROWSERS)} on the PATH, or $CHROMIUM")
class TestInBrowser:
    def test_charts_events_and_samples(self, page):
        dom = opened(page)
        assert "<title>dcpo, grpo</title>" in dom
        charts = dict(re.findall(r'<figure data-metric="([^"]+)">(.*?)</figure>', dom, flags=re.DOTALL))
        assert {"entropy/exact", "rollout/reward_mean", "heldout_accuracy", "dcpo/alpha"} <= charts.keys()
        assert "mismatch/kl" not in charts  # neither run has it
        entropy = charts["entropy/exact"]
        assert entropy.count('class="curve"') == 2 and entropy.count('class="reference"') == 2
        assert entropy.count('class="event"') == 1 and "dcpo, step 1: entropy_collapse" in entropy
        curves = re.findall(r'class="curve"[^>]* d="([^"]+)"', entropy)
        assert sorted(curve.count("M") + curve.count("L") for curve in curves) == [2, 3]
        assert (
            charts["heldout_accuracy"].count('class="curve"') == 1 and charts["heldout_accuracy"].count("<circle") == 2
        )
        assert "<td>entropy_collapse</td>" in dom
        assert dom.count("<article") == 4 and dom.count('<article class="right"') == 2
        assert "&lt;b&gt;bold&lt;/b&gt;" in dom  # shown, not run: the title above is the page's own
        assert "step 2, answer 3" in dom and "step 1, answer 3" not in dom  # the last step first

    def test_a_step_and_a_filter_are_chosen(self, page):
        choose = (
            "byId('step').value = '1'; byId('step').onchange(); byId('which').value = '1'; byId('which').onchange();"
        )
        dom = opened(page, choose)
        assert dom.count("<article") == 2 and "step 1, answer 3" in dom and "2 of 4 kept responses" in dom
        dom = opened(page, choose + "byId('search').value = 'ANSWER 3'; byId('search').oninput();")
        assert dom.count("<article") == 1 and "1 of 4 kept responses" in dom
        dom = opened(page, "byId('run').value = 1; byId('run').onchange();")
        assert "this run kept no samples" in dom

    def test_a_run_is_hidden_and_a_value_read(self, page):
        dom = opened(page, "const box = document.querySelector('#legend input'); box.checked = false; box.onchange();")
        entropy = re.search(r'data-metric="entropy/exact">(.*?)</figure>', dom, flags=re.DOTALL)
        assert entropy and entropy[1].count('class="curve"') == 1 and 'class="event"' not in entropy[1]
        move = "const s = document.querySelector('svg'), b = s.getBoundingClientRect();"
        move += "s.onmousemove({clientX: b.left + b.width * 0.55});"
        assert "step 1: dcpo 0.2, grpo 0.1" in opened(page, move)

    def test_the_timeline_shows_a_step_a_row_a_process(self, page):
        rows, note = timeline(opened(page))
        update = [("update", 3.0, 0.0, 3.0)]  # of the last step, which comes first; the others do nothing in it
        assert (rows, note) == ({"driver": update, "engine 0": [], "policy 0": []}, "")
        choose = "byId('timelineStep').value = 1; byId('timelineStep').onchange();"
        dom = opened(page, choose)
        rows, _ = timeline(dom)
        assert list(rows) == ["driver", "engine 0", "policy 0"]
        assert sorted(rows["driver"]) == [
            ("grade", 1.0, 3.0, 4.0),
            ("rollout", 4.0, 0.0, 4.0),
            ("update", 4.0, 4.0, 8.0),
        ]
        # the second one belongs to step 2: it is in both steps' pictures, here up to the step's end
        assert rows["engine 0"] == [("generate", 3.0, 0.0, 3.0), ("generate", 5.0, 4.0, 9.0)]
        assert bars(dom, "engine 0")[1]["right"] == bars(dom, "driver")[-1]["right"]
        after, _ = timeline(opened(page, choose.replace("= 1", "= 2")))
        assert after["engine 0"] == [("generate", 5.0, -4.0, 1.0)], "it began before the step"
        tops = {bar["phase"]: bar["y"] for bar in bars(dom, "driver")}
        assert tops["rollout"] == tops["update"] < tops["grade"], "what is inside another one is drawn below it"
        assert "100 % busy" in dom and "88 % busy" in dom and "50 % busy" in dom
        assert all(f"</i>{phase}</span>" in dom for phase in ("grade", "rollout", "update", "generate"))

    def test_the_timeline_moves_and_widens_but_not_over_a_resume(self, page):
        wide = "byId('timelineCount').value = '20'; byId('timelineCount').onchange();"
        rows, _ = timeline(opened(page, "byId('timelineStep').value = 1;" + wide))
        assert rows["driver"][-1] == ("export", 0.5, 14.0, 14.5)  # from step 1 to the end, not to the next day
        assert rows["engine 0"][-1] == ("generate", 5.0, 4.0, 9.0)
        rows, _ = timeline(opened(page, "byId('earlier').click(); byId('earlier').click();"))
        assert rows["driver"] == [("export", 0.5, 0.0, 0.5)]
        rows, note = timeline(opened(page, "byId('timelineRun').value = 1; byId('timelineRun').onchange();"))
        assert (rows, note) == ({}, "this run has no timeline.jsonl")


def timeline(dom: str) -> tuple[dict[str, list[tuple[str, float, float, float]]], str]:
    """({process: [(phase, seconds, from, to), ...]} as their titles tell, what is said instead of a picture)."""
    found = {}
    for process, inside in re.findall(r'<g data-process="([^"]+)">(.*?)</g>', dom, flags=re.DOTALL):
        titles = re.findall(rf"<title>{process}: ([a-z ]+), ([\d.]+) s, from ([-\d.]+) to ([-\d.]+) s</title>", inside)
        found[process] = [(phase, float(s), float(b), float(e)) for phase, s, b, e in titles]
    (note,) = re.findall(r'id="timelineNote" class="meta">(.*?)</span>', dom)
    return found, note


def bars(dom: str, process: str) -> list[dict]:
    """Each bar of the process's row, where it is drawn."""
    (inside,) = re.findall(rf'<g data-process="{process}">(.*?)</g>', dom, flags=re.DOTALL)
    found = re.findall(r'<rect class="bar" x="([\d.]+)" y="(\d+)" width="([\d.]+)".*?: ([a-z ]+),', inside)
    return [{"y": int(y), "right": round(float(x) + float(w), 1), "phase": phase} for x, y, w, phase in found]
