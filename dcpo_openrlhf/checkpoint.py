"""A run's checkpoints as folders: written aside, whole or not there, verified, kept and found again. Knows no ranks.

<run folder>/checkpoints/step_NNNNNN/ holds the policy's files, run.json (everything of the run that is not the policy)
and manifest.json (size and checksum of every other file). What a resumed run takes back lies in <run folder>/cut/NNN/.
"""

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from dcpo_openrlhf.errors import RunError

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "run.json"
STEP_NAME = re.compile(r"step_(\d{6,})")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_CHUNK = 1 << 22
_READERS = 8


class FileSum(TypedDict):
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and the step after which it was taken."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """What the driver saved beside the policy."""
        return json.loads((self.path / STATE).read_text())

    def scores(self) -> dict[str, float]:
        """What `keep_best` compares, as far as it was known."""
        return json.loads((self.path / MANIFEST).read_text())["scores"]


def file_sum(path: Path) -> FileSum:
    """Size and CRC-32 of a file, read in chunks."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


class CheckpointFolder:
    """The checkpoints of one run: at most one is being written, in `.step_NNNNNN.partial`."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_best: bool,
        write: Callable[[Path], None],
        finish: Callable[[], Iterable[dict[str, FileSum]]],
    ) -> None:
        """write(folder) starts writing the policy; finish() ends it and gives the sums of files it has read already."""
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self._write, self._finish = write, finish
        self._in_flight: tuple[int, dict[str, float]] | None = None
        self.saved_step = 0
        """Step of the newest checkpoint begun or resumed from."""

    def begin(self, state: dict[str, Any], scores: dict[str, float]) -> None:
        """Start the checkpoint of state["step"]; one that is still in flight is finished first."""
        self.finish()
        step = state["step"]
        partial = self.folder / f".step_{step:06d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_json(partial / STATE, state)
        self._write(partial)
        self._in_flight, self.saved_step = (step, scores), step

    def finish(self) -> Path | None:
        """Make the checkpoint in flight whole: manifest, rename, then let older ones go. None where there is none."""
        if self._in_flight is None:
            return None
        (step, scores), self._in_flight = self._in_flight, None
        known: dict[str, FileSum] = {}
        for sums in self._finish():
            known |= sums
        partial, whole = self.folder / f".step_{step:06d}.partial", self.folder / f"step_{step:06d}"
        write_manifest(partial, step=step, scores=scores, known=known)
        partial.rename(whole)
        _sync(self.folder)
        prune(self.folder, keep_last=self.keep_last, keep_best=self.keep_best)
        logger.info("checkpoint %s", whole)
        return whole

    def score(self, step: int, scores: dict[str, float]) -> None:
        """Add scores to the whole checkpoint of `step`, if there is one, and let go of what is no longer the best."""
        folder = self.folder / f"step_{step:06d}"
        if not scores or damage(folder, quick=True) is not None:
            return
        manifest = json.loads((folder / MANIFEST).read_text())
        _write_manifest(folder, {**manifest, "scores": manifest["scores"] | scores})
        prune(self.folder, keep_last=self.keep_last, keep_best=self.keep_best)


def write_manifest(
    folder: Path, *, step: int, scores: dict[str, float], known: dict[str, FileSum] | None = None
) -> None:
    """manifest.json of everything in `folder`; files in `known` are not read again.

    Raises RuntimeError for a file of `known` that is not there: another node wrote it into a folder of its own.
    """
    known = known or {}
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    if unseen := sorted(known.keys() - set(files)):
        raise RuntimeError(
            f"a rank wrote {', '.join(unseen[:3])}, and {folder} shows no such file here: run.dir must be a folder "
            "that every node sees; set it to one on a shared file system"
        )
    body = {
        "step": step,
        "scores": scores,
        "files": {name: known.get(name) or file_sum(folder / name) for name in files},
    }
    _write_manifest(folder, body)


def _write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """The manifest with its own checksum, whole or as it was."""
    body = {name: value for name, value in body.items() if name != "crc32"}
    aside = folder / f".{MANIFEST}.partial"
    _write_json(aside, body | {"crc32": _crc(body)})
    aside.rename(folder / MANIFEST)


def damage(folder: Path, *, quick: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None when it is whole; quick: sizes alone, no checksums."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = manifest.pop("crc32")
        files: dict[str, FileSum] = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    if _crc(manifest) != expected or f"step_{manifest['step']:06d}" != folder.name:
        return f"{MANIFEST} does not match its own checksum or the folder's name"
    for name, sums in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != sums["bytes"]:
            return f"{name} has {size} bytes instead of {sums['bytes']}" if size is not None else f"{name} is missing"
    if quick:
        return None
    with ThreadPoolExecutor(_READERS) as pool:  # zlib and file reads let other threads run
        for name, sums in zip(files, pool.map(lambda name: file_sum(folder / name), files), strict=True):
            if sums != files[name]:
                return f"{name} has checksum {sums['crc32']:08x} instead of {files[name]['crc32']:08x}"
    return None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Every step folder, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := STEP_NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((Checkpoint(path, int(match[1])) for match, path in found), key=lambda c: c.step)


def newest_whole(folder: Path, *, quick: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole; newer ones that are not are named in a warning and passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        wrong = damage(checkpoint.path, quick=quick)
        if wrong is None:
            return checkpoint
        if not quick:
            logger.warning("%s is damaged and passed over: %s", checkpoint.path, wrong)
    return None


def prune(folder: Path, *, keep_last: int, keep_best: bool) -> None:
    """Delete whole checkpoints beyond the newest `keep_last` and the best, and what interrupted saves left behind.

    Best: highest held-out accuracy among those that have one, else highest mean reward. Damaged ones stay.
    """
    whole = [c for c in checkpoints(folder) if damage(c.path, quick=True) is None]
    kept = {c.step for c in whole[-keep_last:]}
    if keep_best and (best := _best(whole)):
        kept.add(best.step)
    for checkpoint in whole:
        if checkpoint.step not in kept:  # renamed first: a deletion that is interrupted leaves no torn checkpoint
            checkpoint.path.rename(folder / f".{checkpoint.path.name}.deleted")
    for leftover in [*folder.glob(".step_*.deleted"), *folder.glob(".step_*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _best(whole: list[Checkpoint]) -> Checkpoint | None:
    scores = {c: c.scores() for c in whole}
    for name in ("heldout_accuracy", "reward_mean"):
        having = [c for c in whole if name in scores[c]]
        if having:
            return max(having, key=lambda c: (scores[c][name], c.step))
    return None


def disk_full(error: BaseException, run: Path) -> RunError | None:
    """What to say where the run folder's disk had no room for a file, here or in an actor; None for another error."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in NO_ROOM):
        cause = cause.__cause__ or cause.__context__
    if cause is None and not any(os.strerror(number) in str(error) for number in NO_ROOM):  # an actor's is a text
        return None
    newest, free = newest_whole(run / "checkpoints", quick=True), shutil.disk_usage(run).free
    kept = f"step {newest.step}, which is whole" if newest else "none, so the run begins anew"
    return RunError(
        f"no room to write into run.dir = {run}: {free / 2**20:.0f} MiB are free now; its newest checkpoint is {kept}. "
        "Make room (an older run, checkpoint.keep_last), then continue with checkpoint.resume=auto"
    )


def _crc(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Let a rename in `folder` reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
