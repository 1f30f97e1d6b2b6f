"""Imports go one way, as docs/architecture.md says."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "dyadlm"
# Packages of one row may import those of the same row, and all above.
ROWS = (
    ("ops",),
    ("model",),
    ("engine", "causal_lm"),
    ("data",),
    ("generate", "evaluate", "train", "recall"),
    ("diagnose",),
    ("report",),
    ("cli",),
)
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
# Modules that anything may import: they import next to nothing.
FREE = {"errors", "files", "lazy", "values", "version", "registration", "state_file", "accounting", "console"}


def imports(path: Path, top_alone: bool) -> set[str]:
    """The modules of dyadlm that a file imports. top_alone: not those inside functions and for types."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_alone else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("dyadlm", "torch", "transformers")}


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).parts[0] in ROW]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_imports_upward(path):
    own = path.relative_to(SOURCE)
    for name in imports(path, top_alone=True):
        parts = name.split(".")
        if parts[0] != "dyadlm" or len(parts) < 2 or parts[1] in FREE:
            continue
        assert ROW[parts[1]] <= ROW[own.parts[0]], f"{own} imports {name}"


def test_the_core_imports_no_extra():
    core = [path for path in (SOURCE / "model").rglob("*.py") if "extras" not in path.parts]
    for path in core:
        assert not any(name.startswith("dyadlm.model.extras") for name in imports(path, top_alone=False)), path


def test_the_engine_imports_neither_torch_nor_the_model():
    for path in (SOURCE / "engine").glob("*.py"):
        if path.name != "bridge.py":
            names = imports(path, top_alone=False)
            assert not any(name.startswith(("torch", "transformers", "dyadlm.model")) for name in names), path
