"""Bring training and test sets into the one form that is read here: JSONL of {"id", "problem", "answer", "source"}.

python -m tools.prepare_data dapo17k aime24 math500 --output data          # from the hub
python -m tools.prepare_data gpqa_diamond --from gpqa_diamond.csv --output data
python -m tools.prepare_data --verify --output data                        # checksums of data/manifest.json

Training sets lose their duplicates. Test sets keep every problem, so that scores compare with published ones. Every
training set of the folder is compared with every test set of it; what they share is reported, or removed on request.
"""

import argparse
import csv
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from dcpo_openrlhf.reward.extract import extract_boxed
from dcpo_openrlhf.rollout.tasks import JSONL_KEYS, Problem, TaskError, load_jsonl


class PrepareError(ValueError):
    """Data that cannot be had or read; names the place, the value and the remedy."""


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


# --- reading ---------------------------------------------------------------------------------------------------------

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """(place, row) of a .jsonl, .json, .csv or .parquet file. Raises PrepareError that names file and line."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise PrepareError(f"{path}: the file name ends in none of {', '.join(readers)}; convert or rename it")
    try:
        rows = readers[path.suffix](path)
    except OSError as error:
        raise PrepareError(f"{path}: cannot be read: {error.strerror or error}; give a readable file") from error
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path}: not UTF-8 ({error}); convert it") from error
    if not rows:
        raise PrepareError(f"{path}: holds no rows; give a file with at least one problem")
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise PrepareError(f"{place}: {type(row).__name__} instead of an object; give one object a row")
    return rows


def _jsonl_rows(path: Path) -> list[tuple[str, Row]]:
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")  # splitlines would split at U+2028 too
    return [(f"{path}:{n}", _parse(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line or len(lines) > 1]


def _json_rows(path: Path) -> list[tuple[str, Row]]:
    rows = _parse(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise PrepareError(f"{path}: {type(rows).__name__} instead of a list of objects")
    return [(f"{path}, entry {n}", row) for n, row in enumerate(rows, 1)]


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PrepareError(f"{place}: not JSON ({error}): {text[:60].decode(errors='replace')!r}") from error


def _csv_rows(path: Path) -> list[tuple[str, Row]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        return [(f"{path}:{reader.line_num}", row) for row in reader]


def _parquet_rows(path: Path) -> list[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise PrepareError(f"{path}: not a parquet file ({error})") from error
    return [(f"{path}, row {n}", row) for n, row in enumerate(rows, 1)]


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


# --- the normalised form ---------------------------------------------------------------------------------------------

PROBLEM_COLUMNS = ("problem", "question", "prompt", "Question")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "Correct Answer")  # DAPO's `solution` is the answer alone
ID_COLUMNS = ("id", "unique_id", "problem_idx", "question_id", "Record ID")
DISTRACTORS = tuple(f"Incorrect Answer {n}" for n in (1, 2, 3))


def normalise(name: str, rows: Sequence[tuple[str, Row]], *, origin: str) -> list[Problem]:
    """The rows as problems, by the column names that the known sets use; rows already in the form stay as they are.

    Multiple choice is rendered as "question, Options:, A. ...", its answer is the letter. Raises PrepareError that
    names the row whose problem or answer is missing or whose id was seen before.
    """
    problems, place_of = [], {}
    for index, (place, row) in enumerate(rows):
        problem = _as_problem(name, row, index=index, place=place, origin=origin)
        if problem.id in place_of:
            raise PrepareError(f"{place}: id {problem.id!r} was seen before ({place_of[problem.id]}); ids are unique")
        place_of[problem.id] = place
        problems.append(problem)
    return problems


def _as_problem(name: str, row: Row, *, index: int, place: str, origin: str) -> Problem:
    text = _first(row, PROBLEM_COLUMNS, place).strip()
    if options := row.get("options"):
        text, answer = _with_options(text, options), str(row["answer"])
    elif all(row.get(column) for column in DISTRACTORS):
        text, answer = _shuffled_options(text, [row["Correct Answer"], *(row[column] for column in DISTRACTORS)])
    else:
        answer = _final_answer(_first(row, ANSWER_COLUMNS, place, allow_any=True))
    if not text or not answer:
        raise PrepareError(f"{place}: the {'answer' if text else 'problem'} is empty; remove the row or fill it in")
    id_value = next((row[column] for column in ID_COLUMNS if row.get(column) not in (None, "")), index)
    known = isinstance(id_value, str) and not id_value.isdecimal()
    return Problem(
        id=str(id_value) if known else f"{name}-{id_value}",
        problem=text,
        answer=answer,
        source=row["source"] if set(JSONL_KEYS) <= row.keys() and isinstance(row["source"], str) else origin,
    )


def _first(row: Row, columns: Sequence[str], place: str, *, allow_any: bool = False) -> Any:
    for column in columns:
        if column in row and (allow_any or isinstance(row[column], str)):
            return row[column]
    if other := [column for column in columns if column in row]:
        seen = f"{other[0]} is {row[other[0]]!r:.80} ({type(row[other[0]]).__name__})"
        raise PrepareError(
            f"{place}: {seen}; it must be text, such as the content of the user's turn alone: convert it"
        )
    raise PrepareError(f"{place}: none of the columns {', '.join(columns)} holds it; the columns are {', '.join(row)}")


def _final_answer(value: Any) -> str:
    """The final answer alone: the entries of a list, an integral float as integer, what follows ####, the last box."""
    if isinstance(value, list | tuple):
        return ", ".join(_final_answer(entry) for entry in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if "####" in text:  # GSM8K: the solution, then "#### 1,234"
        text = text.rpartition("####")[2].strip().replace(",", "")
    return extract_boxed(text) or text


def _with_options(question: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, "Options:", *lines])


def _shuffled_options(question: str, options: Sequence[str]) -> tuple[str, str]:
    """The question with its options in an order that only their text decides, and the letter of the first of them."""
    correct = options[0]
    order = sorted(options, key=lambda option: hashlib.sha256(f"{question}\0{option}".encode()).digest())
    return _with_options(question, order), ascii_uppercase[order.index(correct)]


def load_problems(name: str, path: Path | None) -> list[Problem]:
    """The problems of a set, from a file in the normalised form or in the set's own, or from the hub without a file.

    Raises PrepareError or TaskError.
    """
    if path is None:
        source = SOURCES[canonical(name)]
        return normalise(name, hub_rows(name, source), origin=f"{source.hub} {source.config or ''} {source.split}")
    rows = read_rows(path)
    if path.suffix == ".jsonl" and all(set(JSONL_KEYS) <= row.keys() for _, row in rows):
        return load_jsonl(path)
    return normalise(name, rows, origin=path.name)


# --- duplicates and overlap ------------------------------------------------------------------------------------------

NGRAM = 8
SHARE = 0.5
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    """Words in lower case without punctuation and LaTeX marks; each Chinese or Japanese character is a word."""
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", unicodedata.normalize("NFKC", text).lower())
    return tuple(_WORD.findall(spaced))


def _identity(text: str) -> str:
    """The text up to case, spaces and dollar signs. Operators and digits stay: 2+3 and 2-3 are two problems."""
    return re.sub(r"[\s$]+", "", unicodedata.normalize("NFKC", text).lower())


class Deduplicated(NamedTuple):
    kept: list[Problem]
    duplicates: list[str]
    """Ids whose problem and answer an earlier row has."""
    conflicting: list[str]
    """Ids of equal problems with different answers; none of them is kept."""


def deduplicate(problems: Sequence[Problem]) -> Deduplicated:
    """The first of each group of equal problems (see _identity); none of a group that disagrees about the answer."""
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[_identity(problem.problem)].append(problem)
    result = Deduplicated([], [], [])
    for group in groups.values():
        if len({_identity(p.answer) for p in group}) > 1:
            result.conflicting.extend(p.id for p in group)
        else:
            result.kept.append(group[0])
            result.duplicates.extend(p.id for p in group[1:])
    return result


class Overlap(NamedTuple):
    """A training problem that holds much of a test problem."""

    train: str
    set: str
    test: str
    share: float
    """Of the test problem's n-grams; 1.0 where the whole text is in the training problem."""


def find_overlap(train: Sequence[Problem], tests: Mapping[str, Sequence[Problem]]) -> list[Overlap]:
    """Pairs where the training problem holds at least SHARE of the test problem's runs of NGRAM words.

    After Chowdhery et al. 2022 (PaLM, 8-grams, 70%). Half, since DAPO rewrites how a problem ends so that its answer is
    an integer. Any one 13-gram, as for GPT-3, would flag "m/n where m and n are relatively prime positive integers".
    """
    holders: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    size: dict[tuple[str, str], int] = {}
    for name, problems in tests.items():
        for problem in problems:
            grams = _grams(words(problem.problem))
            size[name, problem.id] = len(grams)
            for gram in grams:
                holders[gram].append((name, problem.id))
    found = []
    for problem in train:
        shared = Counter(test for gram in _grams(words(problem.problem)) for test in holders.get(gram, ()))
        shares = ((*test, count / size[test]) for test, count in sorted(shared.items()))
        found.extend(Overlap(problem.id, *pair) for pair in shares if pair[-1] >= SHARE)
    return found


def _grams(text: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + NGRAM]) for i in range(max(1, len(text) - NGRAM + 1))}


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
        rows = [{key: getattr(problem, key) for key in JSONL_KEYS} for problem in problems]
        if not rows:
            raise PrepareError(f"{name}: no problem is left to write; its rows were duplicates or in the test sets")
        _write_aside(self.file(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.entries[name].rows, self.entries[name].sha256 = len(rows), _sha256(self.file(name))


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
    parser.add_argument("--from", type=Path, dest="file", help="a .jsonl, .json, .csv or .parquet file of the one SET")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="more test sets (JSONL) to compare with"
    )
    parser.add_argument("--remove-overlap", action="store_true", help="remove from training sets what tests hold")
    parser.add_argument("--verify", action="store_true", help="only compare the files with the manifest's checksums")
    args = parser.parse_args(argv)
    if args.verify == bool(args.sets):
        parser.error("name the sets to prepare, or pass --verify alone")
    if args.file and len(args.sets) != 1:
        parser.error(f"--from FILE prepares one set, not {len(args.sets)}")
    try:
        folder = Folder(args.output)
        if args.verify:
            folder.verify()
            print(f"{args.output}: {len(folder.entries)} files are as prepared")
            return 0
        for name in map(canonical, args.sets):
            origin = args.file.name if args.file else f"{SOURCES[name].hub} {SOURCES[name].split}"
            folder.add(name, load_problems(name, args.file), origin=origin)
        folder.check_overlap(against={path.stem: load_jsonl(path) for path in args.against}, remove=args.remove_overlap)
        folder.save()
    except (PrepareError, TaskError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    for name, entry in folder.entries.items():
        print(describe(name, entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
