"""The two ways a request can end badly. The command line maps them to exit codes; the library raises them."""


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
