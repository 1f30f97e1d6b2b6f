"""The two ways a request can end badly. The command line maps them to exit codes; the library raises them."""

import re


class UserError(ValueError):
    """The request was wrong (exit code 2). The message is one sentence that says what to do instead."""


class RunFailed(RuntimeError):
    """The request was right and ran, but failed (exit code 1): divergence, a failed check."""


class Diverged(RunFailed):
    """Training or reading came upon what is no number, or a loss that rose far. reason: without a remedy."""

    def __init__(self, reason: str, message: str | None = None):
        super().__init__(message or reason)
        self.reason = reason


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# What torch says, in errors of no class of their own, where there is no memory for a tensor, or never can be.
_MEMORY = re.compile(r"out of memory|(can't allocate|not enough) memory|Storage size calculation overflowed")


def memory_missing(error: BaseException) -> str | None:
    """What an error says of memory that there is not, as the beginning of a sentence; None where it says nothing."""
    if not isinstance(error, MemoryError) and not _MEMORY.search(str(error)):
        return None
    wanted = re.search(r"allocate ([\d.]+ (?:bytes|\w*iB))", str(error))
    return f"There is not enough memory{f' for another {wanted[1]}' if wanted else ''}"
