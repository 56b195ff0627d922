"""Errors that end a run and whose message tells all that a person needs."""

import textwrap

LINE = 600
"""Characters of someone else's error that are repeated in ours."""


class RunError(RuntimeError):
    """A run cannot go on: what happened, and what to do. The entry prints it without a traceback."""


def one_line(error: BaseException) -> str:
    """The error's beginning, without the remote traceback that Ray's own message repeats."""
    cause = getattr(error, "cause", None) or error
    text = textwrap.shorten(str(cause), LINE, placeholder=" ...")
    return text if isinstance(cause, RunError) or not text else f"{type(cause).__name__}: {text}"
