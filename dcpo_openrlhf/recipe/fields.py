"""What sections of a recipe are, and types that several of their fields have."""

import contextlib
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _expanded(path: Path) -> Path:
    try:
        found = Path(os.path.expandvars(path)).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found.lstat()
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"is no path here ({error})") from None
    return found


Expanded = Annotated[Path, AfterValidator(_expanded)]
"""A path in which ~ and $VARIABLES are filled in."""
Positive = Annotated[int, Field(gt=0)]
Port = Annotated[int, Field(ge=1024, le=65535)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
