"""What is said on standard error, which may be closed, full or of any encoding without ending the work."""

import contextlib
import sys
from typing import IO, Any, cast

from rich.console import Console


class _StandardError:
    """Standard error as it is at the time; what cannot be written is let go."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return sys.stderr.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def standard_error() -> Console:
    """A console for progress and remarks. Square brackets in names are no markup, and lines are not broken."""
    return Console(file=cast(IO[str], _StandardError()), highlight=False, markup=False, soft_wrap=True)
