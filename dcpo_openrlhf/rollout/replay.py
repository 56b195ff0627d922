"""Recorded rollouts: a generator that writes what it returns, and one that returns what was written.

samples/step_NNNNNN.pt holds one request of the trainer: its prompts, labels and sampling, and every response with
tokens, masks and rollout log-probs, bit for bit. A second request of the same step is step_NNNNNN.2.pt.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcpo_openrlhf.openrlhf_seam import make_importable

make_importable()

from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402

EVALUATION_STEP = 1 << 30
"""Added to the step in the requests of evaluation, so that their seeds never repeat those of training."""
TEMPERED_STEP = 1 << 31
"""The same for the rows that a step draws at its T (j2, j4, aepo)."""
_KINDS = {"tempered": TEMPERED_STEP, "evaluation": EVALUATION_STEP, "step": 0}


class ReplayError(RuntimeError):
    """The recorded responses are not those of this request."""


def file_name(step: int, request: int = 1) -> str:
    kind, first = next((kind, first) for kind, first in _KINDS.items() if step >= first)
    return f"{kind}_{step - first:06d}.pt" if request == 1 else f"{kind}_{step - first:06d}.{request}.pt"


def samples_folder(path: Path) -> Path:
    """`path` itself, or its samples/ where it is a run folder."""
    return path / "samples" if (path / "samples").is_dir() else path


class Recorder:
    """A samples generator that also writes each request and its responses to `folder`."""

    def __init__(self, generator: Any, folder: Path) -> None:
        self.generator, self.folder = generator, folder
        self._requests: Counter[int] = Counter()

    def generate(
        self, prompts: Sequence[str], labels: Sequence[str], *, step: int, **sampling: Any
    ) -> list[Experience]:
        samples = self.generator.generate(prompts, labels, step=step, **sampling)
        self._requests[step] += 1
        self.folder.mkdir(exist_ok=True)
        file = self.folder / file_name(step, self._requests[step])
        aside = file.with_name(f".{file.name}.partial")
        write(aside, request_of(prompts, labels, sampling), samples)
        aside.rename(file)
        return samples


class Replay:
    """A samples generator without engines: the responses that a Recorder wrote for the same step."""

    def __init__(self, folder: Path) -> None:
        self.folder = samples_folder(folder)
        self._requests: Counter[int] = Counter()

    def generate(
        self, prompts: Sequence[str], labels: Sequence[str], *, step: int, **sampling: Any
    ) -> list[Experience]:
        """Raises ReplayError where the file is missing, or was written for other prompts or another sampling."""
        self._requests[step] += 1
        file = self.folder / file_name(step, self._requests[step])
        if not file.is_file():
            raise ReplayError(f"{file} is missing; record it with rollout.record=true, or end before it (train.steps)")
        recorded, samples = read(file)
        remedy = (
            "replay with the seed, data, template and rollout settings of the run that recorded it (its recipe.yaml)"
        )
        require_same(request_of(prompts, labels, sampling), recorded, what=f"{file} was recorded", remedy=remedy)
        return samples


Request = dict[str, Any]
"""Prompts, labels and sampling of one call of a samples generator."""


def request_of(prompts: Sequence[str], labels: Sequence[str], sampling: dict[str, Any]) -> Request:
    return {"prompts": list(prompts), "labels": list(labels), "sampling": sampling}


def require_same(request: Request, made: Request, *, what: str, remedy: str) -> None:
    """Raise ReplayError where responses were made for another request."""
    if differ := [name for name, value in request.items() if made[name] != value]:
        raise ReplayError(f"{what} with other {', '.join(differ)}; {remedy}")


def write(file: Path, request: Request, samples: Sequence[Experience]) -> None:
    """The request and its responses, bit for bit."""
    torch.save(request | {"samples": _columns([vars(s) for s in samples])}, file)


def read(file: Path) -> tuple[Request, list[Experience]]:
    """What `write` wrote."""
    found = torch.load(file, weights_only=True)
    rows = _rows(found.pop("samples"))
    return found, [Experience(**row) for row in rows]


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """name -> the values of all rows; tensors end to end in the smallest type that holds them, with their shapes."""
    return {name: _column([row[name] for row in rows]) for name in rows[0]}


def _column(values: list[Any]) -> dict[str, Any]:
    if isinstance(values[0], Tensor):
        flat = torch.cat([v.flatten() for v in values])
        shapes = [list(v.shape) for v in values]
        return {"tensor": _smallest(flat), "dtype": str(flat.dtype).removeprefix("torch."), "shapes": shapes}
    if isinstance(values[0], dict):
        return {"dict": _columns(values)}
    return {"values": values}


def _smallest(values: Tensor) -> Tensor:
    if values.dtype != torch.long or not values.numel():
        return values
    for dtype in (torch.uint8, torch.int32):
        if values.min() >= torch.iinfo(dtype).min and values.max() <= torch.iinfo(dtype).max:
            return values.to(dtype)
    return values


def _rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    names, values = list(columns), [_values(column) for column in columns.values()]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _values(column: dict[str, Any]) -> list[Any]:
    if "tensor" in column:
        flat = column["tensor"].to(getattr(torch, column["dtype"]))
        sizes = [torch.Size(shape).numel() for shape in column["shapes"]]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), column["shapes"], strict=True)]
    return _rows(column["dict"]) if "dict" in column else column["values"]
