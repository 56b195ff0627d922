"""Rows of data files, which stay on the disk: JSONL and JSON, either of them in gzip, Parquet, saved datasets, folders.

JSON is read by the standard library line by line: Arrow's reader makes dates of texts that look like one, knows no
line numbers, and wants one type a column. What is packed is unpacked once, to a file without a name, which ends with
the process.
"""

import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dcpo_openrlhf.rollout.problems import TaskError

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
BATCH = 10_000
"""Rows of a Parquet file that are unpacked at a time."""
_BOM = b"\xef\xbb\xbf"
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./]|$)")
_NO_ROWS = ("dataset_infos.json",)
"""What lies beside the files of a set from the hub."""


class Lines:
    """Rows of a JSONL file, or of a JSON file that holds a list; blank lines are none."""

    def __init__(self, path: Path) -> None:
        """Raises TaskError, here and wherever a row is read, that names the file and, where there is one, the line."""
        self.path = path
        self._file, self._unit = _unpacked(path)
        self._starts, self._sizes, self._numbers, self._sums = array("Q"), array("Q"), array("Q"), array("q")
        place = 0
        for number, whole in enumerate(self._file, start=1):
            line = whole.removeprefix(_BOM) if number == 1 else whole
            place += len(whole)
            if line.strip():
                self._starts.append(place - len(line))
                self._sizes.append(len(line))
                self._numbers.append(number)
                self._sums.append(hash(line))

    def __len__(self) -> int:
        return len(self._numbers)

    def scan(self, names: Iterable[str] | None = None) -> Iterator[Row]:
        """All rows in their order, whole."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Row:
        line = os.pread(self._file.fileno(), self._sizes[i], self._starts[i])
        if hash(line) != self._sums[i]:
            raise TaskError(
                f"{self.place(i)}: the line changed since the run began; put it back and resume, or start a new run"
            )
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
            seen = line.strip()[:60].decode("utf-8", errors="replace")
            raise TaskError(f"{self.place(i)}: not JSON in UTF-8 ({error}): {seen!r}; give one object a line") from None
        if not isinstance(row, dict):
            raise TaskError(f"{self.place(i)}: {type(row).__name__} instead of an object; give one object a line")
        return row

    def number(self, i: int) -> int:
        """The row's line, counted from 1, or its place in the list."""
        return self._numbers[i]

    def place(self, i: int) -> str:
        return f"{self.path}{self._unit}{self._numbers[i]}"


class Columns:
    """Rows of a table in Arrow's form, which is mapped into memory and not read into it."""

    def __init__(self, path: Path, dataset: Any, streams: Sequence[IO[bytes]]) -> None:
        """dataset: of the `datasets` library; streams: the files that it is mapped from."""
        self.path, self._dataset, self._streams = path, dataset, streams

    def __len__(self) -> int:
        return len(self._dataset)

    def scan(self, names: Iterable[str] | None = None) -> Iterator[Row]:
        """All rows in their order; names: with these columns alone, or those that these lie in."""
        columns = self._dataset.column_names
        wanted = set(columns) if names is None else {n if n in columns else n.split(".")[0] for n in names}
        kept = [column for column in columns if column in wanted] or columns
        done = 0
        for batch in self._batches():
            part = self._dataset_of(batch).select_columns(kept)
            values = self._taken(part, slice(None), done).values()
            yield from (dict(zip(kept, row, strict=True)) for row in zip(*values, strict=True))
            done += batch.num_rows

    def __getitem__(self, i: int) -> Row:
        return self._taken(self._dataset, i, i)

    def _batches(self) -> Iterator[Any]:
        """The table piece by piece, read as a file: pages of a mapping would stay in memory."""
        import pyarrow

        for stream in self._streams:
            stream.seek(0)
            yield from pyarrow.ipc.open_stream(stream)

    def _dataset_of(self, batch: Any) -> Any:
        import datasets
        import pyarrow

        return datasets.Dataset(pyarrow.Table.from_batches([batch]), info=self._dataset.info, fingerprint="a part")

    def _taken(self, dataset: Any, which: int | slice, first: int) -> Any:
        try:
            return dataset[which]
        except UnicodeDecodeError as error:
            raise TaskError(f"{self.place(first)} or soon after: not UTF-8 ({error}); write it anew") from None

    def number(self, i: int) -> int:
        """The row, counted from 1."""
        return i + 1

    def place(self, i: int) -> str:
        return f"{self.path}, row {i + 1}"


def rows_of(path: Path) -> Lines | Columns:
    """The rows of a file, or of a saved dataset. Raises TaskError for what cannot be read, or holds no row."""
    try:
        if path.is_dir():
            rows = _saved(path)
        elif path.suffix == ".parquet":
            rows = _from_parquet(path)
        else:
            rows = Lines(path)
    except (OSError, EOFError, zlib.error) as error:  # the latter two: gzip's, of a file that was cut off or damaged
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"{path}: cannot be read: {reason}; give the path of a readable file") from error
    if not len(rows):
        raise TaskError(f"{path}: is empty; give one JSON object a line, or one row, for each problem")
    return rows


def files_of(path: Path) -> list[Path]:
    """The files below a folder, in the order of their names; anything else is itself, a saved dataset too.

    Raises TaskError for a folder with none, or with a test set beside the training set.
    """
    if not path.is_dir() or is_saved(path):
        return [path]
    if (path / "manifest.json").is_file():
        raise TaskError(f"{path}: a folder of tools.prepare_data, with one set a file; name the file that is meant")
    inside = [file.relative_to(path) for file in path.rglob("*") if file.name.endswith(SUFFIXES)]
    inside = sorted(f for f in inside if f.name not in _NO_ROWS and not any(part[0] == "." for part in f.parts))
    if not inside:
        raise TaskError(f"{path}: the folder holds no file of {', '.join(SUFFIXES)}; name one that does, or a file")
    splits = {match[1]: file for file in inside for match in _SPLIT.finditer(str(file))}
    if len(splits) > 1:
        raise TaskError(
            f"{path}: the folder holds several splits ({', '.join(str(file) for file in splits.values())}); name the "
            "files of the one that is meant"
        )
    return [path / file for file in inside]


def names_of(files: Sequence[Path]) -> list[str]:
    """What tells the files apart: their path below the folder that they share; of one file, its name."""
    if len(files) == 1:
        return [files[0].name]
    absolute = [os.path.abspath(file) for file in files]
    shared = os.path.commonpath([os.path.dirname(file) for file in absolute])
    return [os.path.relpath(file, shared) for file in absolute]


def _unpacked(path: Path) -> tuple[IO[bytes], str]:
    """(a file of lines, what stands between path and number)."""
    unit = ":"
    if path.suffix == ".gz":
        file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as its rows are asked for)
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, file)
        file.seek(0)
    else:
        file = path.open("rb")
    if file.read(64).removeprefix(_BOM).lstrip().startswith(b"[") and path.name.endswith((".json", ".json.gz")):
        file.seek(0)
        with file:
            file, unit = _listed(path, file.read()), ", entry "
    file.seek(0)
    return file, unit


def _listed(path: Path, text: bytes) -> IO[bytes]:
    """The list that the text is, one entry a line."""
    try:
        entries = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise TaskError(f"{path}: not JSON in UTF-8 ({error}); give a list of objects, or one object a line") from None
    lines = tempfile.TemporaryFile()  # noqa: SIM115
    lines.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
    lines.flush()
    return lines


def _from_parquet(path: Path) -> Columns:
    """The file as Arrow's stream, which can be mapped: Parquet itself is packed."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file, tempfile.NamedTemporaryFile(suffix=".arrow") as stream:
            packed = parquet.ParquetFile(file)
            with pyarrow.ipc.new_stream(stream, packed.schema_arrow) as out:
                for batch in packed.iter_batches(batch_size=BATCH):
                    out.write_batch(batch)
            stream.flush()
            # mapping and file outlive the name
            return Columns(path, datasets.Dataset.from_file(stream.name), [Path(stream.name).open("rb")])
    except (pyarrow.ArrowException, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{path}: not a Parquet file that can be read here ({reason}); write it anew") from None


def is_saved(path: Path) -> bool:
    """Whether the folder is what `save_to_disk` wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(path: Path) -> Columns:
    """What `save_to_disk` wrote."""
    import datasets
    import pyarrow

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{path}: no dataset that datasets.load_from_disk reads ({reason}); save it anew") from error
    if isinstance(found, datasets.DatasetDict):
        if len(found) > 1:
            splits = ", ".join(f"{path / str(name)}" for name in found)
            raise TaskError(f"{path}: a dataset of several splits; name the folder of the one that is meant: {splits}")
        found = next(iter(found.values()))
    return Columns(path, found.with_format(None), [Path(file["filename"]).open("rb") for file in found.cache_files])
