"""One table a figure or table of the paper: its cells, and what their runs say about its claim."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tools.reproduce import archive, gradients, theorem
from tools.reproduce import statistics as s
from tools.reproduce.grid import (
    AFTERWARDS,
    CELLS,
    LEVELS,
    LONG,
    OTHERS,
    QUESTIONS,
    SEEDS,
    SLOW_GRPO,
    SOLVED,
    TARGET,
    Run,
)
from tools.reproduce.report import (
    Claim,
    Measure,
    Report,
    Results,
    columns_of,
    curves,
    difference,
    over_seeds,
    plane,
    shown,
)

HOLDS, COLLAPSES = 0.25, 0.5
"""Held: mean |H - H_0| / H_0 of the last half is below the first. Collapsed: H of the last quarter is below the second,
as a share of H_0. Each counts where the whole interval over seeds is on that side."""
CURVES = {"entropy/exact": "H [nats/token]", "rollout/success_rate": "right answers in training"}
KS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Table:
    name: str
    cells: Sequence[str]
    tell: Callable[["Table", Results, Path], Report]

    def runs(self) -> list[Run]:
        """Seed by seed."""
        found = [Run(CELLS[name], seed) for name in self.cells for seed in SEEDS[CELLS[name].model]]
        return sorted(found, key=lambda run: run.seed)

    def labels(self, names: Sequence[str] | None = None) -> dict[str, str]:
        return {name: CELLS[name].label for name in (self.cells if names is None else names)}

    def report(self, folder: Path = archive.RESULTS) -> Report:
        """From the committed numbers in `folder`, where its figure goes too."""
        results = {name: archive.committed(CELLS[name], folder) for name in self.cells}
        return self.tell(self, results, folder)


# --- claims ----------------------------------------------------------------------------------------------------------


def below(found: s.Interval | None, bound: float) -> s.Verdict:
    """Is the whole interval below the bound?"""
    if found is None:
        return "not run yet"
    return s.sign_of(s.Interval(bound - found.mean, bound - found.high, bound - found.low, found.seeds))


def has_target(run: archive.Result) -> bool:
    """All but the small model's GRPO, to which its recipe's H_0 means nothing: that is held against the others'."""
    return run.about["keys"]["method.name"] != "grpo" or not run.about["run"].startswith("small/")


def relative_entropy(run: archive.Result) -> float:
    """H of the last quarter as a share of H_0."""
    return s.final_entropy(run) / (run.series("entropy/target")[-1] if has_target(run) else TARGET)


def distance(run: archive.Result) -> float:
    """mean abs(H - H_0) / H_0 of the last half."""
    if has_target(run):
        return s.tracking(run).mean_error
    return fmean(abs(h - TARGET) / TARGET for h in s.last(run.series("entropy/exact"), 0.5))


def larger(results: Results, first: str, second: str, measure: Measure, text: str) -> Claim:
    """The claim that the first cell has more of it than the second, by paired differences."""
    found = difference(results, first, second, measure)
    if found is None:
        return Claim(text, "not run yet")
    return Claim(text, s.sign_of(found), f"difference {shown(found)}, {found.seeds} {_seeds(found.seeds)}")


def _seeds(count: int) -> str:
    return "seed" if count == 1 else "seeds"


def entropy_claim(results: Results, cell: str, does: str) -> Claim:
    """`cell` holds or collapses."""
    error, end = (over_seeds(results, cell, measure) for measure in (distance, relative_entropy))
    verdict = below(error, HOLDS) if does == "holds" else below(end, COLLAPSES)
    because = "" if end is None else f"H ends at {shown(end, 2)} of H_0, {end.seeds} {_seeds(end.seeds)}"
    if does == "holds" and error is not None:
        because = f"mean abs(H - H_0) / H_0 is {shown(error, 2)}, {because}"
    return Claim(f"{CELLS[cell].label} {does}", verdict, because)


ENTROPY: dict[str, Measure] = {
    "H, last quarter": s.final_entropy,
    "mean abs(H - H_0) / H_0, last half": distance,
    "regulariser's share": s.regulariser_share,
}
SCORES: dict[str, Measure] = {
    "held-out accuracy, T = 0.1": s.accuracy,
    "right in training, T = 1": s.final_success,
}
BEFORE: dict[str, Measure] = {
    "held-out accuracy before": s.accuracy_before,
    "right at step 1, T = 1": lambda run: run.series("rollout/success_rate")[0],
}


# --- tables ----------------------------------------------------------------------------------------------------------


def figure_1(table: Table, results: Results, folder: Path) -> Report:
    names = [name for name in table.cells if not name.endswith("-paper")]
    curves(results, table.labels(names), folder / "figure_1.svg", panels=CURVES, targets=_targets(results))
    claims = []
    for suffix in ("", "-paper"):
        claims += [entropy_claim(results, f"j3{suffix}", "holds"), entropy_claim(results, f"j4{suffix}", "collapses")]
        claims += [entropy_claim(results, f"j1{suffix}", "collapses"), entropy_claim(results, f"j2{suffix}", "holds")]
        text = f"{CELLS[f'j3{suffix}'].label} keeps more entropy than j4"
        claims.append(larger(results, f"j3{suffix}", f"j4{suffix}", s.final_entropy, text))
        text = f"{CELLS[f'j2{suffix}'].label} keeps more entropy than j1"
        claims.append(larger(results, f"j2{suffix}", f"j1{suffix}", s.final_entropy, text))
    claims.append(entropy_claim(results, "grpo", "collapses"))
    return Report(
        table.name,
        "Figure 1: which weight on which samples holds the entropy",
        claims,
        **columns_of(results, table.labels(), ENTROPY | SCORES),
        figure="figure_1.svg",
    )


def figure_2(table: Table, results: Results, folder: Path) -> Report:
    curves(results, table.labels(), folder / "figure_2.svg", panels=CURVES, targets=list(LEVELS))
    names = list(LEVELS.values())
    follows = s.all_of([below(over_seeds(results, name, distance), HOLDS) for name in names])
    measured = {name: over_seeds(results, name, s.accuracy) for name in names}
    text = "accuracy is best at a moderate H_0"
    best = Claim(text, "not run yet")
    if all(measured.values()):
        means = {name: value.mean for name, value in measured.items() if value is not None}
        top = max(means, key=lambda name: means[name])
        if top in (names[0], names[-1]):
            best = Claim(text, "undecided", f"{CELLS[top].label}, an end of the range, is best: {shown(measured[top])}")
        else:
            against: list[s.Verdict] = [
                larger(results, top, end, s.accuracy, "").verdict for end in (names[0], names[-1])
            ]
            best = Claim(text, s.all_of(against), f"{CELLS[top].label} is best: {shown(measured[top])}")
    because = ", ".join(f"{CELLS[n].label}: {shown(over_seeds(results, n, s.final_entropy), 2)}" for n in names)
    return Report(
        table.name,
        "Figure 2 and Table 4: entropy follows H_0, and which H_0 is best",
        [Claim("entropy follows H_0 at four levels", follows, because), best],
        **columns_of(results, table.labels(), ENTROPY | SCORES),
        figure="figure_2.svg",
    )


def table_2(table: Table, results: Results, folder: Path) -> Report:
    curves(results, table.labels(), folder / "table_2.svg", panels=CURVES, targets=_targets(results))
    average = {"Avg@128, T = 0.6": s.average_at_k} | SCORES
    others = [name for name in table.cells if not name.startswith("dcpo")]
    claims = [
        larger(results, "dcpo", other, s.average_at_k, f"dcpo has a higher Avg@128 than {other}") for other in others
    ]
    return Report(
        table.name,
        "Table 2: the methods by Avg@k",
        claims,
        **columns_of(results, table.labels(), average | {"H, last quarter": s.final_entropy}),
        figure="table_2.svg",
    )


def table_3(table: Table, results: Results, folder: Path) -> Report:
    columns: dict[str, Measure] = {f"Pass@{k}": lambda run, k=k: s.passed_at(run, k) for k in KS}
    top = KS[-1]
    claims = [
        larger(results, "dcpo", other, columns[f"Pass@{top}"], f"dcpo has a higher Pass@{top} than {other}")
        for other in table.cells
        if not other.startswith("dcpo")
    ]
    note = "Unbiased (Chen et al. 2021) from 128 answers to each of 32 held-out problems, T = 0.6, top-p 0.95."
    found = columns_of(results, table.labels(), columns)
    return Report(table.name, "Table 3: the methods by Pass@k", claims, **found, notes=[note])


def table_5(table: Table, results: Results, folder: Path) -> Report:
    curves(results, table.labels(), folder / "table_5.svg", panels=CURVES, targets=_targets(results))
    claims = []
    for suffix in ("", "-paper"):
        claims += [
            entropy_claim(results, f"dcpo{suffix}", "holds"),
            entropy_claim(results, f"dcpo_wo_double_is{suffix}", "collapses"),
            entropy_claim(results, f"dcpo_wo_reinforce{suffix}", "collapses"),
        ]
    return Report(
        table.name,
        "Table 5: without double importance sampling, without REINFORCE",
        claims,
        **columns_of(results, table.labels(), ENTROPY | SCORES),
        figure="table_5.svg",
    )


BESIDE = {
    "dcpo-reference-alpha_max-0.3": "dcpo-reference-alpha_max-2",
    "dcpo-continuous": "dcpo-reference-alpha_max-2",
    "dcpo-learning-rate--3-the-paper-s-constants": "dcpo-paper",
    "dcpo-ahead-1-corrected": "dcpo-ahead-1",
}
"""A cell of the questions -> the cell that differs from it in what is asked alone; `dcpo` for the others."""


def questions(table: Table, results: Results, folder: Path) -> Report:
    """What paper and code leave open: one key changed at a time; the map of what holds, with the reason."""
    slow, slow_paper = SLOW_GRPO.name, "dcpo-learning-rate--3-the-paper-s-constants"
    asked = [name for name in table.cells if name not in ("dcpo", "dcpo-paper", slow)]
    claims = [entropy_claim(results, "dcpo-paper", "holds")]
    for name in asked:
        beside = BESIDE.get(name, "dcpo")
        text = f"{CELLS[name].label}: farther from H_0 than {CELLS[beside].label}"
        claims.append(larger(results, name, beside, distance, text))
    for what, measure in {"entropy": s.final_entropy, "held-out accuracy": s.accuracy}.items():
        text = f"{CELLS[slow_paper].label}: more {what} than {SLOW_GRPO.label}"
        claims.append(larger(results, slow_paper, slow, measure, text))
    across, up = (
        "the regulariser's share of the advantage x (1 - 1/T), steps with T > 1, last half",
        "H of the last quarter / H_0",
    )
    plane(
        results,
        table.labels([name for name in table.cells if name != slow]),
        folder / "questions.svg",
        across=(across, s.pull),
        up=(up, relative_entropy),
        band=(1 - HOLDS, 1 + HOLDS),
    )
    return Report(
        table.name,
        "Open questions: which constants hold the entropy, and why",
        claims,
        **columns_of(results, table.labels(), ENTROPY | {"pull": s.pull} | SCORES),
        figure="questions.svg",
        notes=[rule_of_thumb([run for name in table.cells for run in results.get(name, {}).values()])],
    )


def rule_of_thumb(runs: Sequence[archive.Result]) -> str:
    """Which pull the regulariser had in runs of dcpo that ended near H_0, and in those that did not."""
    pulls: dict[bool, list[float]] = {True: [], False: []}
    for run in (run for run in runs if run.about["keys"]["method.name"] == "dcpo"):
        pulls[abs(relative_entropy(run) - 1) < HOLDS].append(s.pull(run))
    said = []
    for holds, what in ((True, f"ended within {HOLDS:.0%} of H_0"), (False, "did not")):
        found = pulls[holds]
        between = f", the regulariser's pull {min(found):.2f} to {max(found):.2f}" if found else ""
        said.append(f"{len(found)} runs of dcpo {what}{between}")
    separates = pulls[True] and pulls[False] and min(pulls[True]) > max(pulls[False])
    rule = ""
    if pulls[True] and pulls[False]:
        rule = " The pull alone tells them apart." if separates else " The pull alone does not tell them apart."
    return f"The map (pull: the share of the advantage x (1 - 1/T), steps with T > 1): {'; '.join(said)}.{rule}"


def precision(table: Table, results: Results, folder: Path) -> Report:
    def settled(run: archive.Result) -> float:
        return min(s.tracking(run).settled, len(run.steps) + 1)

    columns: dict[str, Measure] = {
        "mean abs(H - H_0) / H_0, last half": distance,
        "(mean H - H_0) / H_0, last half": lambda run: s.tracking(run).offset,
        "overshoot / H_0": lambda run: s.tracking(run).overshoot,
        "settled at step": settled,
    }
    held_by_pi = [run for name in LEVELS.values() for run in results.get(name, {}).values()]
    claim = Claim("pi keeps H within 10 % of H_0 on every seed (mean over the last half)", "not run yet")
    if held_by_pi:
        errors = [distance(run) for run in held_by_pi]
        inside = sum(error <= s.BAND for error in errors)
        verdict: s.Verdict = "reproduced" if inside == len(errors) else "not reproduced"
        claim = Claim(claim.text, verdict, f"{inside} of {len(errors)} runs, the farthest at {max(errors):.0%}")
    note = (
        f"Overshoot and settling are those of the mean of the last {s.SMOOTHED} steps: every step has other problems, "
        f"whose entropies differ. Settled: from this step on it stays within {s.BAND:.0%} of H_0; one more than the "
        "steps where it does not."
    )
    found = columns_of(results, table.labels(), columns)
    return Report(table.name, "Precision: how close to H_0", [claim], **found, notes=[note])


def afterwards(table: Table, results: Results, folder: Path) -> Report:
    """What entropy that was held is worth, and whether it stays held, after four times as many steps."""
    *cells, early = table.cells
    curves(results, table.labels(cells), folder / "afterwards.svg", panels=CURVES, targets=_targets(results))
    scores = {"Avg@128": s.average_at_k, f"Pass@{KS[-1]}": lambda run: s.passed_at(run, KS[-1])}
    grpo, *others = cells
    claims = [entropy_claim(results, grpo, "collapses")]
    text = f"{CELLS[early].label}: a higher Avg@128 after 60 steps than after {LONG}"
    claims.append(larger(results, early, grpo, s.average_at_k, text))
    for name in others:
        claims.append(entropy_claim(results, name, "holds"))
        for text, measure in (scores | {"held-out accuracy": s.accuracy}).items():
            claims.append(larger(results, name, grpo, measure, f"{CELLS[name].label}: a higher {text} than grpo"))
        text = f"{CELLS[name].label}: fewer right answers in training than grpo"
        claims.append(larger(results, grpo, name, s.final_success, text))
    return Report(
        table.name,
        "Afterwards: four times as many steps",
        claims,
        **columns_of(results, table.labels(), ENTROPY | BEFORE | SCORES | scores),
        figure="afterwards.svg",
    )


def solved(table: Table, results: Results, folder: Path) -> Report:
    """The other end of the map: a task on which GRPO has little left to teach."""
    curves(results, table.labels(), folder / "solved.svg", panels=CURVES, targets=_targets(results))
    grpo, dcpo, paper = table.cells
    claims = [entropy_claim(results, paper, "holds"), entropy_claim(results, dcpo, "holds")]
    for name in (paper, dcpo):
        for what, measure in {"entropy": s.final_entropy, "held-out accuracy": s.accuracy}.items():
            claims.append(larger(results, name, grpo, measure, f"{CELLS[name].label}: keeps more {what} than grpo"))
    return Report(
        table.name,
        "A task that is nearly solved: do the paper's constants hold the entropy there?",
        claims,
        **columns_of(results, table.labels(), ENTROPY | {"pull": s.pull} | BEFORE | SCORES),
        figure="solved.svg",
    )


def theorem_3_1(table: Table, results: Results, folder: Path) -> Report:
    return theorem.report(table.name, gradients.load(folder))


def headline(table: Table, results: Results, folder: Path) -> Report:
    curves(results, table.labels(), folder / "smollm2.svg", panels=CURVES, targets=_targets(results))
    return Report(
        table.name,
        "SmolLM2-135M-Instruct: the demo's comparison over seeds",
        [entropy_claim(results, "dcpo-demo", "holds"), entropy_claim(results, "grpo-demo", "collapses")],
        **columns_of(results, table.labels(), ENTROPY | SCORES),
        figure="smollm2.svg",
    )


def _targets(results: Results) -> list[float]:
    """H_0 of the runs."""
    every = (run.about["keys"].get("method.target_entropy") for runs in results.values() for run in runs.values())
    return sorted({target for target in every if target is not None})


def _with_paper(names: Sequence[str]) -> list[str]:
    return [*names, *(f"{name}-paper" for name in names)]


METHODS = ("dcpo", "dcpo-paper", "grpo", *OTHERS)
_ASKED = ["dcpo-paper", *(cell.name for cell in QUESTIONS)]
TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("figure_1", ["grpo", *_with_paper(["j1", "j2", "j3", "j4"])], figure_1),
        Table("figure_2", ["grpo", *LEVELS.values()], figure_2),
        Table("table_2", METHODS, table_2),
        Table("table_3", METHODS, table_3),
        Table("table_5", ["grpo", *_with_paper(["dcpo", "dcpo_wo_double_is", "dcpo_wo_reinforce"])], table_5),
        Table("theorem_3_1", [], theorem_3_1),
        Table("questions", ["dcpo", *_ASKED, SLOW_GRPO.name], questions),
        Table("precision", [*LEVELS.values(), *_ASKED], precision),
        Table("afterwards", [*(cell.name for cell in AFTERWARDS), "grpo"], afterwards),
        Table("solved", [cell.name for cell in SOLVED], solved),
        Table("smollm2", ["dcpo-demo", "grpo-demo"], headline),
    )
}
