"""Bring training and test sets into the one form that is read here: JSONL of {"id", "problem", "answer", "source"}.

python -m tools.prepare_data dapo17k aime24 math500 --output data          # from the hub
python -m tools.prepare_data gpqa_diamond --from gpqa_diamond.csv --output data
python -m tools.prepare_data --verify --output data                        # checksums of data/manifest.json

Training sets lose their duplicates. Test sets keep every problem, so that scores compare with published ones. Every
training set of the folder is compared with every test set of it; what they share is reported, or removed on request.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcpo_openrlhf.rollout.data import KEYS, Names, load, load_jsonl
from dcpo_openrlhf.rollout.problems import Problem, TaskError
from tools.data_form import normalise
from tools.data_rows import PrepareError, Row, names, read_rows
from tools.overlap import Overlap, deduplicate, find_overlap

# --- which sets there are --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a set comes from."""

    kind: Literal["train", "test"]
    hub: str | None
    """Dataset on the Hugging Face hub; None where the user has to bring a file."""
    config: str | None = None
    split: str = "test"
    aliases: tuple[str, ...] = ()
    """Other names by which files of this set go."""


SOURCES: dict[str, Source] = {
    "dapo17k": Source("train", "open-r1/DAPO-Math-17k-Processed", "all", "train", ("train_dapo17k", "train_dapo")),
    "gsm8k_train": Source("train", "openai/gsm8k", "main", "train"),
    "aime24": Source("test", "HuggingFaceH4/aime_2024", split="train", aliases=("aime_2024",)),
    "aime25": Source("test", "math-ai/aime25", aliases=("aime_2025",)),
    "amc": Source("test", "math-ai/amc23", aliases=("amc23",)),
    "gsm8k": Source("test", "openai/gsm8k", "main", aliases=("gsm8k_test",)),
    "math500": Source("test", "HuggingFaceH4/MATH-500", aliases=("math_500",)),
    "minerva": Source("test", "math-ai/minervamath", aliases=("minerva_math",)),
    "olympiadbench": Source("test", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", ("olympiad",)),
    "hmmt25": Source("test", "MathArena/hmmt_feb_2025", split="train", aliases=("hmmt_feb_2025",)),
    "gpqa_diamond": Source("test", None, aliases=("gpqa",)),  # gated; its authors ask that no plain text be published
    "mmlu_pro": Source("test", "TIGER-Lab/MMLU-Pro", aliases=("mmlu_pro_sample300",)),
}
SET_OF_ALIAS = {alias: name for name, source in SOURCES.items() for alias in source.aliases}


def canonical(name: str) -> str:
    """The set that goes by this name or alias. Raises PrepareError for an unknown one."""
    found = SET_OF_ALIAS.get(name, name)
    if found not in SOURCES:
        raise PrepareError(f"no set is named {name!r}; the sets are {', '.join(SOURCES)}")
    return found


# --- reading a set ----------------------------------------------------------------------------------------------------


def hub_rows(name: str, source: Source) -> list[tuple[str, Row]]:
    """(place, row) of the set on the hub. Raises PrepareError where it cannot be reached, with the way around it."""
    by_file = f"get the file another way and pass `--from FILE` (prepare_data {name}) or `--data FILE` (evaluate)"
    if source.hub is None:
        raise PrepareError(f"{name} is gated and is not fetched for you: accept its terms, then {by_file}")
    from datasets import load_dataset

    try:
        rows = load_dataset(source.hub, source.config, split=source.split)
    except Exception as error:  # the hub's client raises a dozen unrelated kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PrepareError(
            f"{name}: {source.hub} cannot be read from the hub ({type(error).__name__}: {reason[:200]}); "
            f"run this where the hub can be reached and HF_HUB_OFFLINE is not set, or {by_file}"
        ) from error
    return [(f"{source.hub} {source.split}, row {n}", dict(row)) for n, row in enumerate(rows, 1)]


def load_problems(name: str, path: Path | None, columns: Names | None = None) -> list[Problem]:
    """The problems of a set, from a file in the normalised form or in the set's own, or from the hub without a file.

    columns: where the file's rows have what, read as a run reads them. Raises PrepareError or TaskError.
    """
    if path is None:
        source = SOURCES[canonical(name)]
        return normalise(name, hub_rows(name, source), origin=f"{source.hub} {source.config or ''} {source.split}")
    if columns is not None:
        return load(path, columns)
    rows = read_rows(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")) and all(set(KEYS) <= row.keys() for _, row in rows):
        return load_jsonl(path)
    return normalise(name, rows, origin=path.name)


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """What the manifest says about a file."""

    kind: str
    origin: str
    rows: int = 0
    sha256: str = ""
    duplicates: list[str] = field(default_factory=list)
    """Ids; removed from training sets, only listed for test sets."""
    conflicting: list[str] = field(default_factory=list)
    overlap: list[Overlap] = field(default_factory=list)
    """What a training set still shares with test sets."""
    overlap_removed: list[Overlap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.overlap = [Overlap(*pair) for pair in self.overlap]  # the manifest has lists
        self.overlap_removed = [Overlap(*pair) for pair in self.overlap_removed]


class Folder:
    """A folder of prepared sets with manifest.json."""

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, path / "manifest.json"
        self.entries: dict[str, Entry] = {}
        if self.manifest.is_file():
            try:
                written = json.loads(self.manifest.read_text())
                self.entries = {name: Entry(**entry) for name, entry in written.items()}
            except (ValueError, TypeError) as error:
                raise PrepareError(f"{self.manifest}: not a manifest ({error}); remove it and prepare again") from error

    def file(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def require_own(self, name: str) -> None:
        """Raise PrepareError where writing the set would replace a file that was not prepared here."""
        if name not in self.entries and self.file(name).exists():
            raise PrepareError(
                f"{self.file(name)}: is there and not in {self.manifest.name}, so it was not prepared here and would "
                "be lost; move it away, or take another --output"
            )

    def add(self, name: str, problems: list[Problem], *, origin: str) -> Entry:
        """Write a set: a training set without duplicates, a test set whole."""
        kind, unique = SOURCES[name].kind, deduplicate(problems)
        entry = Entry(kind, origin, duplicates=unique.duplicates, conflicting=unique.conflicting)
        self.entries[name] = entry
        self._write(name, unique.kept if kind == "train" else problems)
        return entry

    def check_overlap(self, *, against: Mapping[str, Sequence[Problem]], remove: bool) -> None:
        """Record what each training set of the folder shares with its test sets and with `against`."""
        tests = {n: load_jsonl(self.file(n)) for n, entry in self.entries.items() if entry.kind == "test"}
        for name, entry in self.entries.items():
            if entry.kind == "train":
                train = load_jsonl(self.file(name))
                entry.overlap = find_overlap(train, {**tests, **against})
                if remove and entry.overlap:
                    shared = {pair.train for pair in entry.overlap}
                    self._write(name, [p for p in train if p.id not in shared])
                    entry.overlap_removed, entry.overlap = entry.overlap_removed + entry.overlap, []

    def save(self) -> None:
        entries = {name: asdict(entry) for name, entry in sorted(self.entries.items())}
        _write_aside(self.manifest, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")

    def verify(self) -> None:
        """Raises PrepareError that names every file whose checksum is not the manifest's."""
        if not self.entries:
            raise PrepareError(f"{self.manifest}: no such manifest, or an empty one; prepare a set first")
        wrong = [n for n, e in self.entries.items() if not self.file(n).is_file() or _sha256(self.file(n)) != e.sha256]
        if wrong:
            raise PrepareError(f"{self.path}: missing or changed since prepared: {', '.join(wrong)}; prepare it again")

    def _write(self, name: str, problems: Iterable[Problem]) -> None:
        rows = [_row(problem) for problem in problems]
        if not rows:
            raise PrepareError(f"{name}: no problem is left to write; its rows were duplicates or in the test sets")
        _write_aside(self.file(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.entries[name].rows, self.entries[name].sha256 = len(rows), _sha256(self.file(name))


def _row(problem: Problem) -> dict[str, Any]:
    """The problem in the one form; chat messages stay such."""
    asked = {"problem": problem.messages} if problem.messages else {}
    return {key: getattr(problem, key) for key in KEYS} | asked | dict(problem.metadata)


def _write_aside(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(name: str, entry: Entry) -> str:
    """One line for the screen."""
    parts = [f"{name}: {entry.rows} problems, sha256 {entry.sha256[:12]}"]
    if entry.duplicates or entry.conflicting:
        what = "removed" if entry.kind == "train" else "kept"
        parts.append(f"{what} {len(entry.duplicates)} duplicates, {len(entry.conflicting)} with different answers")
    if entry.kind == "train":
        parts.append(f"overlap: {_by_set(entry.overlap)}")
        if entry.overlap_removed:
            parts.append(f"overlap removed: {_by_set(entry.overlap_removed)}")
    return "; ".join(parts)


def _by_set(pairs: Sequence[Overlap]) -> str:
    """Training problems a test set, as "33 with amc, 30 with math500"."""
    count = Counter(test_set for _, test_set in {(pair.train, pair.set) for pair in pairs})
    return ", ".join(f"{number} with {test_set}" for test_set, number in sorted(count.items())) or "none found"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_data",
        description="Bring data sets into JSONL of id, problem, answer, source, with a manifest of checksums.",
        epilog=f"sets: {', '.join(SOURCES)}",
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help="sets to prepare, by name")
    parser.add_argument("--output", type=Path, default=Path("data"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--from",
        type=Path,
        dest="file",
        help="the one SET's .jsonl, .json, .csv or .parquet file, or a folder of these",
    )
    parser.add_argument(
        "--fields", nargs="+", metavar="KEY=COLUMN", help="columns of --from, as task.fields: problem=prompt"
    )
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="more test sets (JSONL) to compare with"
    )
    parser.add_argument("--remove-overlap", action="store_true", help="remove from training sets what tests hold")
    parser.add_argument("--verify", action="store_true", help="only compare the files with the manifest's checksums")
    args = parser.parse_args(argv)
    if args.verify == bool(args.sets):
        parser.error("name the sets to prepare, or pass --verify alone")
    if args.fields and not args.file:
        parser.error("--fields names the columns of --from FILE; give the file")
    if args.file and len(args.sets) != 1:
        parser.error(f"--from FILE prepares one set, not {len(args.sets)}")
    try:
        folder = Folder(args.output)
        if args.verify:
            folder.verify()
            print(f"{args.output}: {len(folder.entries)} files are as prepared")
            return 0
        against = {path.stem: load_jsonl(path) for path in args.against}
        # all is read before anything is written: a file and its checksum in the manifest change together
        columns = None if args.fields is None else names(args.fields)
        loaded = {name: load_problems(name, args.file, columns) for name in map(canonical, args.sets)}
        for name in loaded:
            folder.require_own(name)
        for name, problems in loaded.items():
            origin = args.file.name if args.file else f"{SOURCES[name].hub} {SOURCES[name].split}"
            folder.add(name, problems, origin=origin)
        folder.check_overlap(against=against, remove=args.remove_overlap)
        folder.save()
    except (PrepareError, TaskError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    for name, entry in folder.entries.items():
        print(describe(name, entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
