"""Errors that end a run and whose message tells all that a person needs."""


class RunError(RuntimeError):
    """A run cannot go on: what happened, and what to do. The entry prints it without a traceback."""
