"""The bound on waiting in tests: it ends a hang, and says nothing about speed."""

HANG_S = 1800.0
"""At least ten times what the slowest single wait takes on two quiet cores. pytest's own timeout is twice this."""
ENDS_S = 300.0
"""For processes to end after a signal or a death, which the product promises within 30 s on a machine that has time."""
