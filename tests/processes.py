"""What runs in a process of its own, forked from one that has loaded torch: see the fixture `forkserver`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path


def shown_in(
    file: Path, function: Callable[..., object], *arguments: object, environment: Mapping[str, str] | None = None
) -> None:
    """Call a function. What it shows, and the traceback of an error, is left in a file."""
    os.environ.update(environment or {})
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(descriptor, output)
    os.close(descriptor)
    function(*arguments)
