"""The small runs of `program.py`, as fixtures."""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

PROGRAM = Path(__file__).with_name("program.py")


def _load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("program", PROGRAM)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


_PROGRAM = _load()


@pytest.fixture
def small():
    """`small(output, *assignments, **options)`: the settings of a run of six steps."""
    return _PROGRAM.small


@pytest.fixture
def words():
    """`words(seed)`: data in memory."""
    return _PROGRAM.words


@pytest.fixture
def program() -> list[str]:
    """The command that trains on these in a process of its own."""
    return [sys.executable, str(PROGRAM)]


@pytest.fixture
def console() -> Console:
    """Collects what a run shows: `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
